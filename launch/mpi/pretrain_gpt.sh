#!/bin/bash
# Pre-train under OpenMPI's or MPICH's mpirun: one process is one rank.
#   launch/mpi/pretrain_gpt.sh 8 --config my.yaml --save /shared/runs/my                                  this machine
#   HOSTS=node1:8,node2:8 launch/mpi/pretrain_gpt.sh 16 --config my.yaml --save /shared/runs/my           several
# The first word is the number of ranks, the rest goes to launch/pretrain_gpt.py. Start it where launch/ is.
# The ranks find each other through MPI itself (pip install mpi4py), or through MPICH's process manager.
set -eu

ranks=$1
shift
if mpirun --version | grep -q "Open MPI"; then
    # ranks have threads of their own: no binding to single cores
    options=(--bind-to none --host "${HOSTS:-localhost:$ranks}")
    [ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)
    # the other nodes get nothing else of this environment
    for name in $(compgen -e | grep -E '^(FI|GLOO|HF|MEGALM|NCCL|OMP|PYTHON|TORCH|UCX)'); do options+=(-x "$name"); done
else
    options=(${HOSTS:+-hosts "$HOSTS"})
fi
exec mpirun -n "$ranks" "${options[@]}" "$(command -v python)" -u launch/pretrain_gpt.py "$@"

#!/bin/bash
# Pre-train on the nodes of a hostfile with the deepspeed launcher, which goes from this node to the others by pdsh and
# ssh without a password. The checkout, the Python environment and the run folder are at the same place on all nodes.
#   launch/hostfile/pretrain_gpt.sh launch/hostfile/hostfile --config my.yaml --save /shared/runs/my
# The first word is the hostfile, the rest goes to launch/pretrain_gpt.py. MASTER_PORT chooses the port.
set -eu

hostfile=$1
shift
exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" launch/pretrain_gpt.py "$@"

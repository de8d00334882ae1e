"""What an MPI launcher tells a process, and how its ranks agree through mpi4py on where to meet.

MPI is used for that one exchange and left at once: it takes no part in training, and a rank may then end in any way
without mpirun complaining of a missing MPI_Finalize.
"""

from collections.abc import Mapping
from typing import NamedTuple

from megalm.distributed.network import free_port, own_address
from megalm.distributed.pmi import broadcast
from megalm.errors import PlatformError


class MpiVariables(NamedTuple):
    """How one family of launchers names a process's rank; PMIx gives no sizes."""

    abi: str
    rank: str
    size: str = ""
    local_rank: str = ""
    local_size: str = ""


FAMILIES = (
    MpiVariables(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    MpiVariables(
        "mpich",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    MpiVariables("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI, Cray
    MpiVariables("openmpi", "PMIX_RANK"),
)
"""In the order in which they are asked: OpenMPI's mpirun sets PMIX_RANK too."""


class MpiRank(NamedTuple):
    """A rank of MPI's world and where the world meets."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


def family_of(environ: Mapping[str, str]) -> MpiVariables | None:
    """The launcher family whose variables are there, or None."""
    return next((family for family in FAMILIES if family.rank in environ), None)


def library_choice(family: MpiVariables, environ: Mapping[str, str]) -> dict[str, str]:
    """Which MPI mpi4py is to load, for the environment: the launcher's own, unless the user has chosen."""
    chosen = {"MPI4PY_MPIABI", "MPI4PY_LIBMPI"} & set(environ)
    return {} if chosen else {"MPI4PY_MPIABI": family.abi}


def discover(family: MpiVariables, environ: Mapping[str, str], interface: str | None) -> MpiRank:
    """Every rank's numbers, agreed through the launcher; rank 0 chooses a free port. All ranks call it, once a process.

    Raises:
        PlatformError: mpi4py is missing, or its MPI is not that of the launcher.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if all(name in environ for name in ("PMI_FD", *family[1:])):
            return _through_pmi(family, environ, interface)
        raise PlatformError(
            f"mpirun started this process ({family.rank} is set), but mpi4py, through which the ranks find each other, "
            f"does not load: {str(error).splitlines()[0]}; pip install mpi4py and install the MPI whose mpirun this "
            "is, or give MASTER_ADDR and MASTER_PORT (mpirun -x for OpenMPI, -genv for MPICH)"
        ) from error
    world = MPI.COMM_WORLD
    if family.size in environ and str(world.size) != environ[family.size]:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise PlatformError(
            f"{family.size}={environ[family.size]} but mpi4py sees a world of {world.size}: it loads {library}, "
            "another MPI than mpirun's; each rank would train alone. Use that MPI's own mpirun, or set MPI4PY_MPIABI "
            "to openmpi or mpich"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = local.size == world.size
    address, port = world.bcast(_choose(one_node, interface) if world.rank == 0 else None)
    found = MpiRank(world.rank, world.size, local.rank, local.size, address, port)
    local.Free()
    MPI.Finalize()
    return found


def _through_pmi(family: MpiVariables, environ: Mapping[str, str], interface: str | None) -> MpiRank:
    """The same through the key-value exchange of MPICH's mpirun."""
    rank, size, local_rank, local_size = (int(environ[name]) for name in family[1:])

    def choose() -> str:
        address, port = _choose(local_size == size, interface)
        return f"{address}:{port}"

    address, _, port = broadcast(int(environ["PMI_FD"]), rank, choose).rpartition(":")
    return MpiRank(rank, size, local_rank, local_size, address, int(port))


def _choose(one_node: bool, interface: str | None) -> tuple[str, int]:
    """Where rank 0 will listen."""
    address = "127.0.0.1" if one_node else own_address(interface)
    return address, free_port(address)

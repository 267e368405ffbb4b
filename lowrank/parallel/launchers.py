"""Whether a process is one of several, and how they find each other: from flags, SLURM, Open MPI or the TPU slice.

Decided from the environment alone, before JAX is asked for anything. Left out: several TPU slices.
"""

import os
import pathlib
import re
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lowrank.errors import UserError

# Flags, and what `jax.distributed.initialize` calls them.
ARGUMENTS = {"coordinator": "coordinator_address", "processes": "num_processes", "process": "process_id"}


class Cluster(NamedTuple):
    """`found_through`, in words, and the arguments of `jax.distributed.initialize`."""

    found_through: str
    arguments: dict


def detect_cluster(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
    tpu_hosts: Callable[[], int],
) -> Cluster | None:
    """None: a single process. UserError if too little is known to join the others.

    Flags win; what they leave out comes from SLURM (`srun`) or Open MPI (`mpirun`); a TPU slice knows its own hosts.
    """
    found_through, known = _slurm(environ) or _open_mpi(environ) or Cluster("flags", {})
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {ARGUMENTS[flag]: value for flag, value in flags.items() if value is not None}
    if processes == 1:
        return None
    if given or known:
        arguments = known | given
        missing = [f"--{flag}" for flag in flags if ARGUMENTS[flag] not in arguments]
        if missing:
            source = f" ({found_through} does not say it)" if known else ""
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{source}; several processes need "
                "--coordinator=HOST:PORT (where process 0 runs), --processes=N and --process=I"
            )
        count, index = arguments["num_processes"], arguments["process_id"]
        if not 0 <= index < count:
            raise UserError(f"--process={index} is not one of 0 to {count - 1} (--processes={count})")
        address = re.fullmatch(r"\S+:(\d+)", arguments["coordinator_address"])
        if not address or not 0 < int(address[1]) < 65536:
            raise UserError(f"--coordinator={arguments['coordinator_address']} must be HOST:PORT")
        return Cluster(found_through, arguments | {"cluster_detection_method": "deactivate"}) if count > 1 else None
    if environ.get("JAX_PLATFORMS") == "cpu":
        return None
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    if slices != "1":
        raise UserError(f"{slices} TPU slices (MEGASCALE_NUM_SLICES): a run takes one; start it on one slice")
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if (len(hosts.split(",")) if hosts else tpu_hosts()) > 1:
        return Cluster("the TPU slice", {})  # JAX asks the slice which process this is, and where process 0 is
    return None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Inside `srun` with several tasks; a script that sbatch runs has no step, and is a single process."""
    tasks, nodes = environ.get("SLURM_STEP_NUM_TASKS"), environ.get("SLURM_STEP_NODELIST")
    if not tasks or not nodes or int(tasks) < 2 or "SLURM_PROCID" not in environ:
        return None
    # node[001-004,007]-ib,other -> node001-ib,other -> node001-ib
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
    port = 61440 + int(environ.get("SLURM_JOB_ID", 0)) % 4096  # another one for each job that shares a node
    share_node = re.split(r"[(,]", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0] != "1"
    known = {"coordinator_address": f"{first}:{port}", "num_processes": int(tasks)}
    known |= {"process_id": int(environ["SLURM_PROCID"])}
    return Cluster("SLURM", known | _local_devices(environ, environ.get("SLURM_LOCALID"), share_node))


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    count = int(environ.get("OMPI_COMM_WORLD_SIZE") or 1)
    if count < 2:
        return None
    known: dict = {"num_processes": count, "process_id": int(environ["OMPI_COMM_WORLD_RANK"])}
    # Up to Open MPI 4 the environment has the addresses of mpirun, where rank 0 runs; 5 leaves them out.
    launcher = re.match(r"(\d+)\.\d+;tcp://([^:]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if launcher:
        # Other machines cannot reach the loopback address: it comes last.
        hosts = sorted(launcher[2].split(","), key=lambda host: host.startswith("127."))
        known["coordinator_address"] = f"{hosts[0]}:{61440 + int(launcher[1]) // 4096 % 4096}"
    share_node = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    return Cluster("Open MPI", known | _local_devices(environ, environ.get("OMPI_COMM_WORLD_LOCAL_RANK"), share_node))


def _local_devices(environ: Mapping[str, str], local_rank: str | None, share_node: bool) -> dict:
    """Processes that share a machine take one GPU each, unless the launcher has already given each its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    bound = visible is not None and len(visible.split(",")) == 1
    return {"local_device_ids": [int(local_rank)]} if share_node and local_rank and not bound else {}


def tpu_hosts() -> int:
    """Number of hosts of the TPU slice that this machine belongs to, from its metadata server; 1 elsewhere."""
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 1
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return len(response.read().decode().split(","))
    except OSError:
        return 1


# On a machine without TPUs, libtpu would look for these values, ask the network, and complain in five lines on stderr.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
GOOGLE_PCI_VENDOR = "0x1ae0"  # of TPUs


def silence_libtpu():
    """Keep libtpu from looking for TPUs on a machine that has none; call it before JAX looks for devices."""
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    if not any(vendor.read_text().strip() == GOOGLE_PCI_VENDOR for vendor in vendors):
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)

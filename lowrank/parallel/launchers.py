"""Whether a process is one of several, and how they find each other: from flags, SLURM, Open MPI or the TPU slice.

One idea: it is decided from the environment alone, before JAX is asked for anything. Left out: several TPU slices.
"""

import dataclasses
import os
import pathlib
import re
import urllib.request
from collections.abc import Callable, Mapping

from lowrank.errors import UserError


@dataclasses.dataclass(frozen=True)
class Start:
    """How processes find each other: in words, and as arguments of `jax.distributed.initialize`."""

    how: str
    arguments: dict


def decide(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
    tpu_hosts: Callable[[], int],
) -> Start | None:
    """None: one process, which need not ask anybody. Raises UserError where too little is known to begin.

    Flags win; what they leave out comes from SLURM (`srun`) or Open MPI (`mpirun`); a TPU slice knows its hosts itself.
    """
    found = _slurm(environ) or _open_mpi(environ)
    how, known = found or ("flags", {})
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    given = {name: value for name, value in given.items() if value is not None}
    if processes == 1:
        return None
    if given or known:
        arguments = known | given
        flags = {"coordinator_address": "coordinator", "num_processes": "processes", "process_id": "process"}
        missing = [f"--{flag}" for name, flag in flags.items() if name not in arguments]
        if missing:
            told = f" ({how} does not say it)" if found else ""
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{told}; several processes need "
                "--coordinator=HOST:PORT (where process 0 runs), --processes=N and --process=I"
            )
        count, index = arguments["num_processes"], arguments["process_id"]
        if not 0 <= index < count:
            raise UserError(f"--process={index} is not one of 0 to {count - 1} (--processes={count})")
        address = re.fullmatch(r"\S+:(\d+)", arguments["coordinator_address"])
        if not address or not 0 < int(address[1]) < 65536:
            raise UserError(f"--coordinator={arguments['coordinator_address']} must be HOST:PORT")
        return Start(how, arguments | {"cluster_detection_method": "deactivate"}) if count > 1 else None
    if environ.get("JAX_PLATFORMS") == "cpu":
        return None
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    if slices != "1":
        raise UserError(
            f"{slices} TPU slices (MEGASCALE_NUM_SLICES): a run is laid out over one; start it on one slice"
        )
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if (len(names.split(",")) if names else tpu_hosts()) > 1:
        return Start("the TPU slice", {})  # which process this is, and which is the first, JAX asks of it
    return None


def _slurm(environ: Mapping[str, str]) -> tuple[str, dict] | None:
    """Inside `srun` with several tasks; a script that sbatch runs has no step, and is one process."""
    tasks, nodes = environ.get("SLURM_STEP_NUM_TASKS"), environ.get("SLURM_STEP_NODELIST")
    if not tasks or not nodes or int(tasks) < 2 or "SLURM_PROCID" not in environ:
        return None
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[
        0
    ]  # node[001-004,007]-ib,other -> node[001-004,007]-ib -> node001-ib
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    port = 61440 + int(environ.get("SLURM_JOB_ID", 0)) % 4096  # another one for each job that shares a node
    known = {"coordinator_address": f"{first}:{port}", "num_processes": int(tasks)}
    known["process_id"] = int(environ["SLURM_PROCID"])
    several = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0] != "1"
    return "SLURM", known | _own_device(environ, environ.get("SLURM_LOCALID"), several)


def _open_mpi(environ: Mapping[str, str]) -> tuple[str, dict] | None:
    if int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) < 2:
        return None
    known = {"num_processes": int(environ["OMPI_COMM_WORLD_SIZE"]), "process_id": int(environ["OMPI_COMM_WORLD_RANK"])}
    # Up to Open MPI 4 the address of mpirun, where rank 0 runs, is in the environment; 5 does not say it.
    launcher = re.match(r"(\d+)\.\d+;tcp://([^:]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if launcher:
        hosts = sorted(
            launcher[2].split(","), key=lambda host: host.startswith("127.")
        )  # other machines cannot reach these
        known["coordinator_address"] = f"{hosts[0]}:{61440 + int(launcher[1]) // 4096 % 4096}"
    several = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
    return "Open MPI", known | _own_device(environ, environ.get("OMPI_COMM_WORLD_LOCAL_RANK"), several)


def _own_device(environ: Mapping[str, str], local: str | None, several: bool) -> dict:
    """Processes that share a machine take one GPU each, unless the launcher has given each its own already."""
    bound = len(environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and "CUDA_VISIBLE_DEVICES" in environ
    return {"local_device_ids": [int(local)]} if several and local and not bound else {}


def tpu_hosts() -> int:
    """How many hosts the TPU slice has that this machine is a worker of, as its metadata server says; 1 elsewhere."""
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 1
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as got:
            return len(got.read().decode().split(","))
    except OSError:
        return 1

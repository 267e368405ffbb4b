"""Whether a process is one of several, and how they find each other: from flags and from what launchers put into the environment."""

import http.server
import threading

import pytest

from lowrank.errors import UserError
from lowrank.parallel import distributed, launchers

# As `srun` sets them in the second task of a step over two nodes, one task on each.
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
# As `mpirun` of Open MPI 4 sets them in rank 3, two ranks on each machine.
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def detect(environ=None, coordinator=None, processes=None, process=None, tpu_hosts=1):
    return launchers.detect_cluster(coordinator, processes, process, environ or {}, lambda: tpu_hosts)


def test_one_process_asks_nobody():
    assert detect() is None
    assert detect(processes=1) is None
    assert detect(processes=1, process=0) is None
    assert detect(tpu_hosts=1) is None


def test_flags_say_it_all():
    start = detect(coordinator="10.0.0.1:1234", processes=2, process=0)
    assert start.found_through == "flags"
    assert start.arguments == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 2,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
    }


def test_slurm():
    start = detect(SLURM)
    assert start.found_through == "SLURM"
    assert start.arguments == {
        "coordinator_address": "gpu007:61444",  # 61440 + 4100 % 4096
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("n1,n2", "n1"),
        ("gpu[007-008]", "gpu007"),
        ("a[3,7-9],b1", "a3"),
        ("rack-2,rack-3", "rack-2"),
    ],
)
def test_the_first_node_of_a_slurm_step(nodes, first):
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).arguments["coordinator_address"] == f"{first}:61444"


def test_a_script_that_sbatch_runs_is_one_process():
    """There SLURM_NTASKS is the job's, and no step is there for the others to run in."""
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert detect(batch) is None
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty


def test_tasks_of_one_machine_take_a_gpu_each():
    together = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}
    assert detect(together).arguments["local_device_ids"] == [5]
    assert (
        "local_device_ids" not in detect(together | {"CUDA_VISIBLE_DEVICES": "5"}).arguments
    )  # srun --gpus-per-task=1
    assert detect(together | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).arguments["local_device_ids"] == [5]
    assert "local_device_ids" not in detect(SLURM).arguments


def test_open_mpi():
    start = detect(OPEN_MPI)
    assert start.found_through == "Open MPI"
    assert start.arguments == {
        "coordinator_address": "10.96.0.1:62624",  # 61440 + 1531576320 / 4096 % 4096
        "num_processes": 4,
        "process_id": 3,
        "local_device_ids": [1],
        "cluster_detection_method": "deactivate",
    }


def test_open_mpi_on_a_machine_whose_first_address_is_its_own():
    uri = "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911"
    assert detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}).arguments["coordinator_address"] == "10.148.0.1:62624"


def test_open_mpi_5_does_not_say_where_rank_0_is():
    environ = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    with pytest.raises(UserError, match=r"--coordinator is missing \(Open MPI does not say it\)"):
        detect(environ)
    assert detect(environ, coordinator="node1:99").arguments["coordinator_address"] == "node1:99"


def test_a_tpu_slice_knows_its_hosts():
    assert detect(tpu_hosts=4).arguments == {}
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b"}).found_through == "the TPU slice"
    assert detect({"TPU_WORKER_HOSTNAMES": "a"}, tpu_hosts=4) is None  # GKE says one host: no need to ask the machine
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "1"}).arguments == {}
    with pytest.raises(UserError, match="2 TPU slices"):
        detect({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})
    assert detect({"JAX_PLATFORMS": "cpu"}, tpu_hosts=4) is None


def test_a_tpu_vm_asks_its_metadata_server(monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = (
                self.path.endswith("/attributes/worker-network-endpoints")
                and self.headers["Metadata-Flavor"] == "Google"
            )
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert launchers.tpu_hosts() == 1  # no chip here: nobody is asked
    monkeypatch.setattr(launchers.pathlib.Path, "glob", lambda self, pattern: [self / "accel0"])
    assert launchers.tpu_hosts() == 2
    server.shutdown()
    server.server_close()
    assert launchers.tpu_hosts() == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"processes": 2, "process": 0}, "--coordinator is missing; several"),
        ({"coordinator": "a:1"}, "--processes and --process are missing; several"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process=2 is not one of 0 to 1"),
        ({"coordinator": "a", "processes": 2, "process": 1}, "--coordinator=a must be HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "process": 1}, "--coordinator=a:99999 must be HOST:PORT"),
    ],
)
def test_too_little_or_wrong_flags(flags, said):
    with pytest.raises(UserError, match=said):
        detect(**flags)


def test_alone_there_is_nothing_to_agree_on():
    assert not distributed.is_running()
    assert distributed.is_first()
    assert distributed.broadcast_from_first(lambda: 7) == 7
    distributed.barrier("alone")
    distributed.refuse_differences({"a": 1}, "never said")
    distributed.fail("never said")
    distributed.finish()

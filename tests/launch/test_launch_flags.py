"""Every lowrank flag in launch/, read by the real command; and what the scripts hand on, dry-run by it."""

import re
import shlex

import pytest
import running
from absl import flags
from fake_cluster import LAUNCH, ROOT, batch, jobset

from lowrank.cli import config_file
from lowrank.config import Config
from lowrank.errors import UserError

# All but those that are sourced, filled in or built by others.
FILES = sorted({file.name for file in LAUNCH.iterdir() if file.is_file()} - {"tpu.sh", "gke_jobset.yaml", "Dockerfile"})


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def commands(text: str) -> list[list[str]]:
    """The arguments of lowrank.train in a text: the flags from `--config=` to the end of the command."""
    text = re.sub(r"\\\n#?\s*", " ", text)  # one command on several lines, in a comment or not
    lines = [line[line.index("--config=") :] for line in text.splitlines() if "--config=" in line]
    return [[word for word in shlex.split(line) if word.startswith("-")] for line in lines]


def parse(words: list[str]) -> Config:
    """As `python -m lowrank.train` does: absl's flags, then the config with all of its overrides."""
    running.load("train")
    rest = flags.FLAGS(["lowrank.train", *words], known_only=True)[1:]
    return config_file.read(flags.FLAGS.config, rest)


@pytest.mark.parametrize("name", FILES)
def test_every_flag_in_a_launch_file_is_one(name):
    text = (LAUNCH / name).read_text()
    for pattern, value in [
        (r'"\$CONFIG"', "configs/alpaca.py"),
        (r'--coordinator="[^\n]*:8476"', "--coordinator=host:8476"),
        (r'"\$SKYPILOT_\w+"', "1"),
    ]:
        text = re.sub(pattern, value, text)
    found = commands(text)
    assert found
    for words in found:
        parse(words)
        assert flags.FLAGS.workdir


def test_a_flag_that_is_none_is_found():
    header = "#   sbatch x --config=configs/alpaca.py --workdir=runs/a \\\n#     --config.lora.rnk=8 > there\n"
    (words,) = commands(header)
    assert words == ["--config=configs/alpaca.py", "--workdir=runs/a", "--config.lora.rnk=8"]
    with pytest.raises(UserError, match=r"rnk.*rank"):
        parse(words)
    with pytest.raises(UserError, match="unknown argument --work_dir=runs/a"):
        parse(["--config=configs/alpaca.py", "--work_dir=runs/a"])


def test_what_slurm_starts_is_what_lowrank_runs(tmp_path):
    _, calls = batch(tmp_path, 0, "--config=configs/demo.py", f"--workdir={tmp_path}/run", "--config.lora.rank=2")
    ran = running.run("train", *calls[calls.index("lowrank.train") + 1 :], "--dry_run")
    assert ran.code == 0, ran.err
    assert "rank 2" in ran.out


def test_what_a_jobset_starts_is_what_lowrank_runs():
    it = jobset("--config=configs/demo.py", "--workdir=gs://bucket/run", "--config.lora.rank=2", "--dry_run")
    (container,) = it["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    ran = running.run("train", *[word for word in container["args"] if "gs://" not in word])
    assert ran.code == 0, ran.err
    assert "rank 2" in ran.out


def test_extras_that_are_named_are_there():
    texts = [file.read_text() for file in LAUNCH.iterdir() if file.is_file()]
    named = {word for text in texts for word in re.findall(r"EXTRAS(?:=|:-)([a-z0-9,]+)", text)}
    assert named == {"tpu", "tpu,gcs", "cuda12,gcs", "cuda13"}
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for word in named for extra in word.split(","))


def test_the_image_gets_what_it_copies():
    lines = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    copied = [name for line in lines for name in line.split()]
    assert copied == ["setup.py", "pyproject.toml", "README.md", "lowrank", "configs"]
    assert all((ROOT / name).exists() for name in copied)

"""A cloud on this machine: a `gcloud` that makes folders into TPU hosts, runs there what it is told, and writes down each call.

A host has a `make` that installs at once, and a `python` that does what the test says, a script for each time that machines
are created. What it does not show is how the real gcloud words its errors, beside NOT_FOUND, or how long anything takes.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]

GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> "$CLOUD/calls"
for word; do case $word in --worker=*) worker=${word#*=} ;; --command=*) command=${word#*=} ;; esac; done
case $worker in all) hosts=("$CLOUD"/hosts/*) ;; *) hosts=("$CLOUD/hosts/$worker") ;; esac
case "$1 $2 $3 $4" in
  *" describe")
    [ -e "$CLOUD/state" ] || { echo "ERROR: (gcloud.$2) NOT_FOUND: Resource '$5' was not found" >&2; exit 1; }
    head -n1 "$CLOUD/state" # several lines: one after the other, the last stays
    [ "$(wc -l < "$CLOUD/state")" = 1 ] || sed -i 1d "$CLOUD/state"
    ;;
  *" create")
    number=$(($(cat "$CLOUD/created" 2> /dev/null || echo 0) + 1))
    echo "$number" > "$CLOUD/created"
    cat "$CLOUD/states.$number" > "$CLOUD/state" 2> /dev/null || echo ACTIVE > "$CLOUD/state"
    for ((host = 0; host < ${HOSTS:-1}; host++)); do mkdir -p "$CLOUD/hosts/$host"; done
    [ ! -e "$CLOUD/slow" ] || sleep 60
    ;;
  *" delete")
    [ ! -e "$CLOUD/undeletable" ] || { echo "ERROR: (gcloud) UNAVAILABLE" >&2; exit 1; }
    [ -e "$CLOUD/state" ] || { echo "ERROR: (gcloud) NOT_FOUND" >&2; exit 1; }
    for pid in "$CLOUD"/hosts/*/lowrank/launch.pid; do kill -KILL "$(cat "$pid")"; done 2> /dev/null
    rm "$CLOUD/state"
    until rm -rf "$CLOUD/hosts" 2> /dev/null; do sleep 0.1; done # the shell of a training that was killed may still write
    ;;
  *" scp")
    case $5 in
      *:*) cp "${hosts[0]}/${5#*:}" "$6" ;;
      *) for host in "${hosts[@]}"; do cp "$5" "$host" || exit; done ;;
    esac
    ;;
  *" ssh")
    case $command in *tail*) [ ! -e "$CLOUD/cut" ] || { rm "$CLOUD/cut"; exit 255; } ;; esac
    for host in "${hosts[@]}"; do (cd "$host" && HOME=$host bash -c "$command") || exit; done
    ;;
  "storage rsync --recursive "*) [ -d "$CLOUD/bucket/${4#gs://}" ] && cp -r "$CLOUD/bucket/${4#gs://}/." "$5" ;;
  *) echo "fake gcloud: what is $*" >&2; exit 2 ;;
esac
"""
MAKE = r"""#!/bin/sh
echo "make $*" >> "$CLOUD/made"
mkdir -p .venv/bin && cp "$CLOUD/python.$(cat "$CLOUD/created")" .venv/bin/python && chmod +x .venv/bin/python
"""
# Prints what it is asked to do, leaves a workdir, and ends with the code.
TRAIN = r"""#!/bin/bash
printf '<%s> ' "$@"
for word; do case $word in
  --workdir=gs://*) workdir=$CLOUD/bucket/${word#*gs://} ;;
  --workdir=*) workdir=${word#*=} ;;
esac; done
mkdir -p "$workdir"
echo "here on $(basename "$HOME")" >> "$workdir/metrics.jsonl"
"""
ENDLESS = (
    TRAIN
    + "trap 'echo saved >> \"$workdir/metrics.jsonl\"; exit 75' TERM\necho training\nwhile :; do sleep 0.1; done\n"
)


def train(code: int = 0, before: str = "") -> str:
    """A training that ends at once with this code; `before` is bash."""
    return f"{TRAIN}{before}\nexit {code}\n"


# Whoever runs the tests in the background ignores these signals, and no shell can catch what it was started to ignore.
AS_IN_A_TERMINAL = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Cloud:
    """The folder of the cloud, a checkout that scripts are run from, and tools that come first in PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.checkout, self.tools = folder / "cloud", folder / "checkout", folder / "tools"
        for part in (self.folder, self.checkout / "lowrank", self.tools):
            part.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "lowrank" / "train.py").write_text("# tracked\n")
        (self.checkout / "secret.txt").write_text("not tracked\n")
        git = ["git", "-C", self.checkout]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "add", "launch", "lowrank"], check=True)
        self.tool("gcloud", GCLOUD)
        self.tool("make", MAKE)
        self.tool("python3", "#!/bin/sh\nexit 0\n")  # asked whether it is new enough

    def tool(self, name: str, text: str):
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def trainings(self, *scripts: str):
        """What `python` is on the machines that are created first, second, ..."""
        for number, script in enumerate(scripts, 1):
            (self.folder / f"python.{number}").write_text(script)

    def start(self, script: str, *arguments: str, stdin=subprocess.DEVNULL, **environment: str) -> subprocess.Popen:
        settings = {"ZONE": "there-1a", "NAME": "mine", "PAUSE": "0", "YES": "1", "CLOUD": str(self.folder)}
        path = f"{self.tools}:{os.environ['PATH']}"
        words = [sys.executable, "-c", AS_IN_A_TERMINAL, self.checkout / "launch" / script, *arguments]
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            words, env={**os.environ, **settings, "PATH": path, **environment}, start_new_session=True, **pipes
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        return self.finish(self.start(script, *arguments, **environment))

    def finish(self, process: subprocess.Popen, timeout: float = 60) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, out, err

    def wait_for(self, holds, timeout: float = 30):
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, f"did not come about; calls so far:\n{self.calls()}"
            time.sleep(0.05)

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def verbs(self) -> list[str]:
        """The calls that gcloud got, by their verbs: `create`, `ssh`, ..."""
        lines = [line.split() for line in self.calls() if line.startswith(("compute ", "storage "))]
        return [line[3] if line[0] == "compute" else line[1] for line in lines]

    def exists(self) -> bool:
        """Whether something is there that costs money."""
        return (self.folder / "state").exists()

    def made(self) -> list[str]:
        return (self.folder / "made").read_text().splitlines()

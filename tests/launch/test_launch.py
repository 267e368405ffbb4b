"""The launch scripts, with a fake `ssh` that runs its command on this machine, in a folder that plays the other one.

`local_processes.py` with a fake training; with real ones it is tested in runs/test_processes.py."""

import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_ssh_copies_the_checkout_and_hands_the_arguments_on(tmp_path):
    there, tools = tmp_path / "there", tmp_path / "tools"
    for folder in (there, tools):
        folder.mkdir()
    (tools / "ssh").write_text(f'#!/bin/sh\n[ "$1" = me@host ] || exit 9\ncd {there} && exec sh -c "$2"\n')
    # `make` would install for minutes: this one leaves a python that says what it was asked to do.
    (tools / "make").write_text(
        '#!/bin/sh\nmkdir -p .venv/bin && echo "make $@" && printf \'#!/bin/sh\\nfor a; do echo "<$a>"; done; exit 75\\n\' '
        "> .venv/bin/python && chmod +x .venv/bin/python\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    arguments = ["--config=configs/demo.py", "--workdir=runs/demo", "--config.sample.prompts=('one two',)"]
    result = subprocess.run(
        [ROOT / "launch" / "ssh.sh", "me@host", *arguments],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "EXTRAS": "tpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 75, result.stderr  # the training's own
    log = (there / "lowrank" / "launch.log").read_text().splitlines()
    assert log == ["<-m>", "<lowrank.train>", *(f"<{argument}>" for argument in arguments)]
    assert "make .venv/.installed EXTRAS=tpu" in result.stdout
    assert "<lowrank.train>" in result.stdout
    assert (there / "lowrank" / "lowrank" / "train.py").is_file()


def test_ssh_without_a_host_says_so():
    result = subprocess.run([ROOT / "launch" / "ssh.sh"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "say USER@HOST first" in result.stderr


def test_local_processes_are_numbered_and_get_a_stop_signal(tmp_path):
    (tmp_path / "lowrank").mkdir()
    (tmp_path / "lowrank" / "train.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(os.environ['JAX_NUM_CPU_DEVICES'], *sys.argv[1:], flush=True)\n"
        "time.sleep(60)\n"
    )
    words = [
        sys.executable,
        ROOT / "launch" / "local_processes.py",
        "--processes=2",
        "--devices=3",
        "--",
        "--workdir=a b",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    lines = sorted(script.stdout.readline() for _ in range(2))
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 75  # stopped and saved
    for number, line in enumerate(lines):
        beginning, _, rest = line.partition(" --coordinator=localhost:")
        assert beginning == f"[{number}] 3"
        assert rest.split(" ", 1)[1] == f"--processes=2 --process={number} --workdir=a b\n"

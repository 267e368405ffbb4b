"""The launch scripts, with a fake `ssh` that runs its command on this machine, in a folder that plays the other one."""

import os
import pathlib
import subprocess

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

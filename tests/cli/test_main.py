"""The console script `lowrank`: what it lists, what it runs, what it refuses."""

import ast
import pathlib
import runpy
import subprocess
import sys

import pytest

import lowrank
from lowrank.cli import main as console

PACKAGE = pathlib.Path(lowrank.__file__).parent


def call(monkeypatch, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["lowrank", *arguments])
    return console.main()


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("help",)])
def test_lists_the_commands(monkeypatch, capsys, arguments):
    assert call(monkeypatch, *arguments) is None
    out = capsys.readouterr().out
    for name, summary in console.summaries().items():
        assert f"  {name:<9} {summary}" in out
        assert summary  # the first line of its docstring


def test_every_command_file_is_listed_and_no_other():
    rooms = ("__init__", "__main__", "config", "errors", "formatting")
    assert set(console.summaries()) == {file.stem for file in PACKAGE.glob("*.py")} - set(rooms)


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") is None
    assert capsys.readouterr().out == f"lowrank {lowrank.__version__}\n"


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian", "error: unknown command trian; did you mean train?\n"),
        ("xyz", "error: unknown command xyz; the commands are train, "),
    ],
)
def test_unknown_command(monkeypatch, capsys, word, answer):
    assert call(monkeypatch, word) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(answer)


def test_runs_the_module_with_the_arguments(monkeypatch):
    seen = {}

    def run_module(name, run_name, alter_sys):
        seen.update(name=name, run_name=run_name, alter_sys=alter_sys, argv=sys.argv[1:])

    monkeypatch.setattr(runpy, "run_module", run_module)
    assert call(monkeypatch, "train", "--config=configs/demo.py", "--dry_run") is None
    assert seen == {
        "name": "lowrank.train",
        "run_name": "__main__",
        "alter_sys": True,
        "argv": ["--config=configs/demo.py", "--dry_run"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", pytest.param("--base", marks=pytest.mark.slow)])
def test_is_the_same_as_python_m(argument):
    """Exit code and both outputs, in processes of their own: absl finds the flags of the module that runs as __main__."""
    code = "import sys; from lowrank.cli.main import main; sys.exit(main())"
    script = [sys.executable, "-c", code, "generate", argument]
    module = [sys.executable, "-m", "lowrank.generate", argument]
    console_script, python_m = (subprocess.run(words, capture_output=True, text=True) for words in (script, module))
    assert (console_script.returncode, console_script.stdout, console_script.stderr) == (
        python_m.returncode,
        python_m.stdout,
        python_m.stderr,
    )
    assert python_m.returncode == (argument != "--help")


def imported_at_top(file: pathlib.Path, seen: set[pathlib.Path]):
    """The libraries that a file of the package imports when it is imported, through other files too."""
    parents = [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(PACKAGE)]
    for one in {file, *parents} - seen:
        seen.add(one)
        for node in ast.parse(one.read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                    parts = [PACKAGE.parent.joinpath(*name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
                    inside = [
                        path
                        for part in parts
                        for path in (part.with_suffix(".py"), part / "__init__.py")
                        if path.exists()
                    ]
                    yield name.split(".")[0]
                    for path in inside:
                        yield from imported_at_top(path, seen)


@pytest.mark.parametrize("name", [*console.COMMANDS, "cli/main"])
def test_help_waits_for_no_jax(name):
    """JAX takes a second to import; what else is heavy, Flax, Orbax, Grain and Optax, imports it."""
    found = set(imported_at_top(PACKAGE / f"{name}.py", seen := set()))
    assert PACKAGE / "cli" / ("__init__.py" if name == "cli/main" else "run.py") in seen
    assert not found & {"jax", "flax", "optax", "orbax", "grain", "numpy", "matplotlib", "tokenizers"}

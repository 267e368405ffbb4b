"""The console script `lowrank`: `lowrank train --config=FILE` runs the same as `python -m lowrank.train --config=FILE`.

Alone, or with -h, it lists the commands; it starts without importing JAX.
"""

import ast
import difflib
import pathlib
import runpy
import sys

import lowrank
from lowrank import cli

COMMANDS = ("train", "sweep", "generate", "evaluate", "convert", "export", "analyze", "plan")
PACKAGE = pathlib.Path(lowrank.__file__).parent


def main() -> int | None:
    """Run the command that `sys.argv` names -> exit code, where the command does not exit by itself."""
    cli.end_at_interrupt()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"lowrank {lowrank.__version__}")
    elif name in summaries():
        sys.argv = [f"lowrank {name}", *arguments]
        runpy.run_module(f"lowrank.{name}", run_name="__main__", alter_sys=True)
    else:
        close = difflib.get_close_matches(name, summaries(), n=1)
        meant = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(summaries())}"
        print(f"error: unknown command {name}; {meant}", file=sys.stderr)
        return 1
    return None


def summaries() -> dict[str, str]:
    """The first line of each command's docstring, by name."""
    docstrings = {name: ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))) for name in COMMANDS}
    return {name: (text or "").partition("\n")[0] for name, text in docstrings.items()}


def usage() -> str:
    lines = "".join(f"  {name:<9} {summary}\n" for name, summary in summaries().items())
    return f"usage: lowrank COMMAND --FLAG=VALUE ...\n\n{lines}\nlowrank COMMAND --help lists its flags."

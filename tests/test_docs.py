"""README and docs/: links and paths exist, commands name real configs, and the Python page runs."""

import ast
import functools
import inspect
import pathlib
import re

import jax
import pytest

from lowrank.cli import main as console
from lowrank.parallel import mesh

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    """`room/file.py` is meant from the root or from lowrank/."""
    if page.name == "CHANGELOG.md":
        return  # names files that are gone
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|sh|md|yaml|sbatch))\b", page.read_text())
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "lowrank", page.parent))
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_configs_exist(page):
    text = "\n".join(blocks(page.read_text()))
    commands = re.findall(r"^(?:lowrank |.*python -m lowrank\.)(\w+)", text, re.MULTILINE)
    assert set(commands) <= console.summaries().keys() | {"COMMAND"}
    files = re.findall(r"(?:--config=|python )((?:configs|bench|launch|docs)/[\w/]+\.py)", text)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_python_page_imports_and_calls_what_there_is():
    """Each name that its blocks import exists and takes the arguments that it is given."""
    tree = ast.parse("\n".join(blocks((ROOT / "docs" / "python.md").read_text(), "python")))
    names: dict = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([statement], []), "docs/python.md", "exec"), names)
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    for call in called:
        arguments = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(names[ast.unparse(call.func)]).bind(*call.args, **arguments)
    assert {ast.unparse(call.func) for call in called} >= {"train", "evaluate", "sweep", "export", "analyze", "plan"}


@pytest.mark.slow
def test_the_python_page_runs(tmp_path, monkeypatch):
    """Its blocks from top to bottom, on one device, in a folder that has the clone's configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mesh, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:1]))
    namespace: dict = {}
    for block in blocks((ROOT / "docs" / "python.md").read_text(), "python"):
        exec(compile(block, "docs/python.md", "exec"), namespace)
    result = namespace["result"]
    assert sorted(result.losses) == [1, 2, 3, 4, 5, 6]
    assert sorted(result.eval_losses) == [0, 3, 6]
    assert (tmp_path / "runs" / "python_peft" / "adapter_model.safetensors").is_file()
    assert {file.name for file in (tmp_path / "runs" / "python_sweep").iterdir()} >= {
        "sweep.md",
        "sweep.csv",
        "members",
    }
    assert (tmp_path / "runs" / "python_analysis" / "analysis.md").is_file()

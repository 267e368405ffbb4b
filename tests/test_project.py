"""The project's own files: the picture of the architecture, CI, hooks, packaging."""

import ast
import os
import pathlib
import re
import runpy

import pytest

import lowrank

ROOT = pathlib.Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.py"


@pytest.fixture(scope="module")
def architecture() -> dict:
    return runpy.run_path(str(ARCHITECTURE))


def load_yaml(path: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.load((ROOT / path).read_text(), Loader=yaml.BaseLoader)


def test_no_import_runs_to_the_right(architecture):
    assert architecture["upward_imports"]() == []


def test_the_picture_is_what_the_script_draws(architecture):
    assert architecture["draw"]() == ARCHITECTURE.with_suffix(".svg").read_text(), "run python docs/architecture.py"


def test_workspace_states_the_rule_of_imports(architecture):
    rule = re.search(r"```\n(errors, formatting <[^`]*)```", (ROOT / "WORKSPACE.md").read_text()).group(1)
    columns = [tuple(name.strip() for name in column.split(",")) for column in rule.split("<")]
    assert tuple(columns) == architecture["COLUMNS"]


def test_flax_and_orbax_stay_in_their_rooms():
    """Flax in model/, Orbax in runs/checkpoint.py: everything else sees plain trees of arrays."""
    found = {"flax": set(), "orbax": set()}
    for path in (ROOT / "lowrank").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {module.split(".")[0] for module in modules} & found.keys():
                found[name].add(path.relative_to(ROOT / "lowrank"))
    assert found["orbax"] == {pathlib.Path("runs/checkpoint.py")}
    assert {path.parts[0] for path in found["flax"]} == {"model"}


def test_ci_runs_the_checks_on_both_pythons():
    job = load_yaml(".github/workflows/ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    setup, checks = job["steps"][-2:]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    assert checks == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_ci_names_folders_of_tests_that_exist():
    folders = re.findall(r"tests/\w+", (ROOT / ".ci" / "run").read_text())
    assert folders
    assert all((ROOT / folder).is_dir() for folder in folders), folders


def test_hooks_run_what_lint_runs():
    (repository,) = load_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    assert tools == ["ruff check", "ruff format", "mypy"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert all(f"$(BIN)/{tool}" in lint for tool in tools)


def test_packaging(monkeypatch):
    """setup.py as setuptools sees it."""
    seen = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **options: seen.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    assert seen["version"] == lowrank.__version__
    assert seen["entry_points"] == {"console_scripts": ["lowrank = lowrank.cli.main:main"]}
    assert seen["package_data"] == {"lowrank": ["py.typed"]}
    assert (ROOT / "lowrank" / "py.typed").is_file()
    rooms = {f"lowrank.{folder.parent.name}" for folder in (ROOT / "lowrank").glob("*/__init__.py")}
    assert rooms <= set(seen["packages"])

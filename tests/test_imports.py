"""Rooms import to their left only: read from the files, imports inside functions and of types included."""

import ast
import itertools
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "lowrank"
# From left to right; rooms of one line do not import each other.
ORDER = (
    ("errors", "formatting"),
    ("parallel",),
    ("files",),
    ("families",),
    ("adapters", "data"),
    ("model",),
    ("training", "weights"),
    ("config",),
    ("cli", "generation"),
    ("runs",),
    ("inference",),
    ("analysis", "planning", "evaluation", "serving"),
    ("sweeping",),
)
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def room_of(module: str) -> str:
    """Of a dotted name below the package: "runs.loop.train" -> "runs"."""
    return module.split(".")[0]


def own_room(file: pathlib.Path) -> str:
    return room_of(".".join(file.relative_to(PACKAGE).with_suffix("").parts))


COMMANDS = {own_room(file) for file in FILES if file.parent == PACKAGE} - PLACE.keys() - {"__init__", "__main__"}


def imports(file: pathlib.Path):
    """(line, dotted name) of everything that a file imports: `from a import b` is a.b, which may be a module."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = ("lowrank", *file.relative_to(PACKAGE).parts[:-1])
            start = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            yield from ((node.lineno, ".".join(filter(None, (start, node.module, alias.name)))) for alias in node.names)


def internal(file: pathlib.Path):
    """(line, room) of what a file imports of the package."""
    for line, name in imports(file):
        package, *rooms = name.split(".")
        if package == "lowrank" and rooms:  # `import lowrank` alone imports no room
            yield line, room_of(".".join(rooms))


def where(file: pathlib.Path, line: int) -> str:
    return f"{file.relative_to(PACKAGE.parent)}:{line}"


def test_every_file_has_a_room():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert rooms <= PLACE.keys()
    assert {"train", "sweep", "generate", "evaluate", "convert", "export", "analyze", "plan"} <= COMMANDS


def test_rooms_import_only_to_their_left():
    wrong = [
        f"{where(file, line)} {own_room(file)} imports {room}"
        for file in FILES
        if own_room(file) in PLACE
        for line, room in internal(file)
        if room in PLACE and room != own_room(file) and PLACE[room] >= PLACE[own_room(file)]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_command():
    wrong = [
        f"{where(file, line)} {own_room(file)} imports {room}"
        for file in FILES
        for line, room in internal(file)
        if room in COMMANDS
    ]
    assert not wrong, "\n".join(wrong)


def test_flax_stays_in_the_model_and_orbax_in_the_checkpoint():
    homes = {"flax": PACKAGE / "model", "orbax": PACKAGE / "runs" / "checkpoint.py"}
    wrong = [
        f"{where(file, line)} {own_room(file)} imports {library}"
        for file, (library, home) in itertools.product(FILES, homes.items())
        for line, name in imports(file)
        if name.split(".")[0] == library and home not in (file, *file.parents)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_commands_read_flags():
    wrong = []
    for file in FILES:
        if own_room(file) in COMMANDS or file == PACKAGE / "cli" / "run.py":  # which fills them from the command line
            continue
        for node in ast.walk(TREES[file]):
            if (isinstance(node, ast.Name) and node.id == "FLAGS") or (
                isinstance(node, ast.Attribute) and node.attr == "FLAGS"
            ):
                wrong.append(f"{where(file, node.lineno)} {own_room(file)} reads FLAGS")
    assert not wrong, "\n".join(wrong)

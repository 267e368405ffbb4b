"""Draw docs/architecture.svg: the rooms of lowrank with their imports, and the data flow of one training step.

    python docs/architecture.py

Rooms, files, imports and the fields of the arrays are read from the code with `ast`. An import that runs to the right, a
room without a place, or a function of the data flow that no longer exists is an error. Only the standard library is used.
"""

import ast
import itertools
import pathlib
import textwrap
import xml.sax.saxutils

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "lowrank"
PICTURE = pathlib.Path(__file__).with_suffix(".svg")

# The rule of imports: a room imports only rooms of earlier columns. Rooms of one column do not import each other.
COLUMNS = (
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
    ("commands",),
)
PLACE = {room: index for index, column in enumerate(COLUMNS) for room in column}
FIRST_ROW = 8  # columns; the others stand below
DROP = {"analysis": 64, "commands": 112}  # how far a column stands lower, so that arrows of others pass above it
FILES_AS_ROOMS = ("errors", "formatting", "config")

WIDTH, MARGIN, LINE = 1180, 24, 14
INK, FAINT, PAPER = "#1f2937", "#6b7280", "#ffffff"
FILLS = {"parts": "#eff6ff", "uses": "#fefce8", "host": "#f3f4f6", "device": "#eff6ff", "output": "#f0fdf4"}


def room_files() -> dict[str, list[pathlib.Path]]:
    """The source files of each room that exists; the commands are a room of their own."""
    files: dict[str, list[pathlib.Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first.startswith("__"):
            continue
        is_command = path.parent == PACKAGE and first not in FILES_AS_ROOMS
        files.setdefault("commands" if is_command else first, []).append(path)
    unplaced = files.keys() - PLACE.keys()
    if unplaced:
        raise SystemExit(f"no place in COLUMNS for {', '.join(sorted(unplaced))}")
    return files


def imported_rooms(path: pathlib.Path) -> set[str]:
    """The rooms from which a file imports, at its top or inside a function."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "lowrank":
            modules += [f"lowrank.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.append(node.module)
    return {name.split(".")[1] for name in modules if name.startswith("lowrank.")}


def upward_imports() -> list[str]:
    """Every import that breaks the rule, as `file imports room`; a command file is imported by nothing."""
    offenders = []
    for room, paths in room_files().items():
        for path in paths:
            for other in sorted(imported_rooms(path) - {room, "__version__"}):
                if PLACE.get(other, len(COLUMNS)) >= PLACE[room]:
                    offenders.append(f"{path.relative_to(ROOT)} imports {other}")
    return offenders


def direct_imports() -> dict[str, set[str]]:
    """Room -> the rooms that it imports and that none of its other imports leads to (the transitive reduction)."""
    files = room_files()
    imports = {room: set().union(*(imported_rooms(path) for path in paths)) - {room} for room, paths in files.items()}
    imports = {
        room: {one for one in others & files.keys() if PLACE[one] < PLACE[room]} for room, others in imports.items()
    }

    def reachable(room: str) -> set[str]:
        return imports[room].union(*(reachable(other) for other in imports[room]))

    return {
        room: {one for one in others if not any(one in reachable(other) for other in others - {one})}
        for room, others in imports.items()
    }


def definition(file: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class of this name in a file of the package, at any depth."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise SystemExit(f"lowrank/{file} has no {name}: change the data flow in docs/architecture.py")


def fields(file: str, name: str) -> str:
    """The fields of a NamedTuple or dataclass."""
    return ", ".join(node.target.id for node in definition(file, name).body if isinstance(node, ast.AnnAssign))


def text(
    x: float, y: float, words: str, size: float = 11, weight: str = "normal", fill: str = INK, anchor: str = "start"
) -> str:
    attributes = f'x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f"<text {attributes}>{xml.sax.saxutils.escape(words)}</text>"


def wrap(words: str, width: float, size: float = 10.5) -> list[str]:
    return textwrap.wrap(words, int(width / (0.54 * size)), break_long_words=False) if words else []


class Box:
    """A titled box with wrapped lines; its height follows from the lines."""

    def __init__(self, x: float, y: float, width: float, title: str, words: str | list[str], fill: str):
        self.x, self.y, self.width, self.title, self.fill = x, y, width, title, FILLS[fill]
        paragraphs = [words] if isinstance(words, str) else words
        self.lines = [line for paragraph in paragraphs for line in wrap(paragraph, width - 14)]
        self.height = 26 + LINE * len(self.lines) + (4 if self.lines else 0)

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    def draw(self) -> list[str]:
        shape = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="5"'
        parts = [f'<rect {shape} fill="{self.fill}" stroke="{INK}" stroke-width="1"/>']
        parts.append(text(self.x + 8, self.y + 18, self.title, 12.5, "bold"))
        parts += [text(self.x + 8, self.y + 34 + LINE * i, line, 10.5) for i, line in enumerate(self.lines)]
        return parts


def curve(start: tuple[float, float], end: tuple[float, float], vertical: bool = False) -> str:
    """An arrow from `start` to `end`."""
    (x0, y0), (x1, y1) = start, end
    if vertical:
        bend = (y1 - y0) / 2
        path = f"M{x0:g},{y0:g} C{x0:g},{y0 + bend:g} {x1:g},{y1 - bend:g} {x1:g},{y1:g}"
    else:
        bend = (x1 - x0) / 2
        path = f"M{x0:g},{y0:g} C{x0 + bend:g},{y0:g} {x1 - bend:g},{y1:g} {x1:g},{y1:g}"
    return arrow(path)


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#64748b" stroke-width="1.4" marker-end="url(#arrow)"/>'


def list_files(room: str, paths: list[pathlib.Path]) -> str:
    """The names of a room's files and folders."""
    if room in FILES_AS_ROOMS:
        return ""
    folder = PACKAGE if room == "commands" else PACKAGE / room
    parts = {path.relative_to(folder).parts for path in paths if path != folder / "__init__.py"}
    return ", ".join(sorted({names[0].removesuffix(".py") + "/" * (len(names) > 1) for names in parts}))


def place_rooms(top: float) -> tuple[dict[str, Box], float]:
    """The rooms' boxes in two rows -> the boxes and the y below them."""
    files, boxes = room_files(), {}
    for columns, gap, fill in ((COLUMNS[:FIRST_ROW], 34, "parts"), (COLUMNS[FIRST_ROW:], 40, "uses")):
        width = (WIDTH - 2 * MARGIN - gap * (len(columns) - 1)) / len(columns)
        bottom = top
        for index, column in enumerate(columns):
            y = top + DROP.get(column[0], 0)
            for room in (room for room in column if room in files):
                boxes[room] = Box(MARGIN + index * (width + gap), y, width, room, list_files(room, files[room]), fill)
                y += boxes[room].height + 32
            bottom = max(bottom, y)
        top = bottom + 40
    return boxes, top - 40


def facing(box: Box, target: Box) -> tuple[float, float]:
    """The heights at which an arrow leaves `box` and reaches `target`: the same, where both have it."""
    low, high = max(box.y, target.y), min(box.y + box.height, target.y + target.height)
    if high - low > 16:
        return (low + high) / 2, (low + high) / 2
    if box.y > target.y:
        return box.y + 14, target.y + target.height - 12
    return box.y + box.height - 14, target.y + 12


def draw_edges(boxes: dict[str, Box]) -> list[str]:
    """An arrow from each room to the rooms that it imports directly."""
    order = list(boxes)
    first_row = {room for column in COLUMNS[:FIRST_ROW] for room in column}
    edges = [(room, other) for room, others in direct_imports().items() for other in others]
    edges.sort(key=lambda edge: (order.index(edge[0]), order.index(edge[1])))
    between = [(room, other) for room, other in edges if (room in first_row) != (other in first_row)]
    channel = min(box.y for room, box in boxes.items() if room not in first_row) - 14
    parts, ends = [], set()
    for room, other in edges:
        box, target = boxes[room], boxes[other]
        if (room, other) in between:  # up to the channel between the rows, along it, and up to the target
            number = [other for one, other in between if one == room].index(other)
            is_under = any(one.x == box.x and one.y < box.y for name, one in boxes.items() if name not in first_row)
            x = (
                box.x - 8 - 7 * number if is_under else box.x + 30 + 22 * number
            )  # beside the boxes above it, or from its top
            is_covered = any(one.x == target.x and one.y > target.y for name, one in boxes.items() if name in first_row)
            up = target.x + target.width + 11 if is_covered else target.x + target.width / 2
            across = channel - 9 * between.index((room, other))
            corner = 6 if up > x else -6
            start = f"M{box.x:g},{box.middle + 7 * number:g} H{x:g}" if is_under else f"M{x:g},{box.y:g}"
            path = f"{start} V{across + 6:g} q0,-6 {corner},-6 H{up - corner:g} q{corner},0 {corner},-6"
            if is_covered:  # past the boxes below it, to its right side
                end = target.y + target.height - 12
                path += f" V{end + 6:g} q0,-6 -6,-6 H{target.x + target.width:g}"
            else:
                path += f" V{target.y + target.height:g}"
            parts.append(arrow(path))
            continue
        start, end = facing(box, target)
        while (other, end) in ends:
            end += 9
        ends.add((other, end))
        parts.append(curve((box.x, start), (target.x + target.width, end)))
    return parts


def draw_flow(top: float) -> tuple[list[str], float]:
    """One training step, from the loader to the metrics -> the drawing and the y below it."""
    for file, name in (
        ("data/loader.py", "TrainLoader"),
        ("data/batch.py", "Batch"),
        ("runs/loop.py", "run_steps"),
        ("training/objectives/cross_entropy.py", "cross_entropy_sum"),
        ("training/optimizer.py", "make_optimizer"),
    ):
        definition(file, name)
    batch, state = fields("data/batch.py", "Batch"), fields("training/step.py", "State")
    metrics = fields("training/step.py", "StepMetrics")
    gap, full = 30, WIDTH - 2 * MARGIN
    parts, boxes = [], []

    def row(y: float, specs: list[tuple[float, str, str | list[str], str]], x: float, width: float) -> list[Box]:
        """Boxes side by side, their widths in the given proportions, joined by arrows."""
        total = sum(spec[0] for spec in specs)
        usable, placed = width - gap * (len(specs) - 1), []
        for share, title, words, fill in specs:
            placed.append(Box(x, y, usable * share / total, title, words, fill))
            x += placed[-1].width + gap
        height = max(box.height for box in placed)
        for box in placed:
            box.height = height
        for left, right in itertools.pairwise(placed):
            parts.append(curve((left.x + left.width, left.middle), (right.x, right.middle)))
        boxes.extend(placed)
        return placed

    host = row(
        top,
        [
            (2, "records", "files or a bucket: data/records, prompts, tokenizer, examples", "host"),
            (2, "loader", "data/loader: shuffled, packed into rows, its place remembered", "host"),
            (2.4, "Batch", [f"{batch}: each [B, T]", "rows spread over the mesh's data and fsdp axes"], "host"),
            (
                3.2,
                "train_step(state, frozen, batch)",
                [f"state: {state}; donated", "frozen: the base, with holes where it is trained; not donated"],
                "device",
            ),
        ],
        MARGIN,
        full,
    )
    below = host[0].y + host[0].height
    scan_top, scan_left, scan_width = below + 50, MARGIN + 12, full - 24
    scan = row(
        scan_top + 14,
        [
            (1.3, "embed", "inputs -> [B, T, D], looked up where the table lies", "device"),
            (
                3,
                "blocks, scanned over layers",
                [
                    "attention and MLP; `remat` chooses what the backward pass recomputes",
                    "every projection: x W + scale · (x A) B",
                ],
                "device",
            ),
            (1, "norm", "RMS, [B, T, D]", "device"),
            (
                2.2,
                "chunked head and loss",
                "float32, trained tokens only; the gradient is made in the same pass",
                "device",
            ),
            (1.7, "sums", "of losses and of the gradient of trainable alone", "device"),
        ],
        scan_left + 12,
        scan_width - 24,
    )
    scan_bottom = scan[0].y + scan[0].height + 30
    frame = f'x="{scan_left:g}" y="{scan_top:g}" width="{scan_width:g}" height="{scan_bottom - scan_top:g}" rx="7"'
    parts.insert(0, f'<rect {frame} fill="none" stroke="{FAINT}" stroke-dasharray="5 4"/>')
    parts.append(
        text(
            scan_left + 12,
            scan_bottom - 10,
            "scan over micro-batches (row i of the batch goes to micro-batch i mod n)",
            11.5,
            fill=FAINT,
        )
    )
    parts.append(
        curve((host[3].x + host[3].width / 2, below), (scan[0].x + scan[0].width / 2, scan[0].y), vertical=True)
    )
    last = row(
        scan_bottom + 46,
        [
            (
                1.7,
                "one division",
                "loss and gradient by the count of trained tokens in all micro-batches, on all devices",
                "device",
            ),
            (1.5, "optax update", "clip, AdamW, the schedule's rate: of trainable alone", "device"),
            (
                3,
                "new state, metrics",
                [
                    "state: laid out as the old one, so the step compiles once",
                    f"metrics: {metrics}; they stay on the device and are read one step late",
                ],
                "output",
            ),
        ],
        MARGIN,
        full,
    )
    parts.append(
        curve(
            (scan[-1].x + scan[-1].width / 2, scan[-1].y + scan[-1].height),
            (last[0].x + last[0].width / 2, last[0].y),
            vertical=True,
        )
    )
    for box in boxes:
        parts += box.draw()
    return parts, last[0].y + last[0].height


def draw() -> str:
    """The picture, as SVG."""
    offenders = upward_imports()
    if offenders:
        raise SystemExit("imports that run to the right:\n" + "\n".join(offenders))
    boxes, bottom = place_rooms(76)
    flow, end = draw_flow(bottom + 60)
    height = end + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#64748b"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>',
        text(MARGIN, 34, "Rooms of lowrank and their imports", 18, "bold"),
        text(
            MARGIN,
            54,
            "An arrow points to the room that is imported. A room imports only rooms to its left (and, from the second row, any of the first); arrows that others imply are left out.",
            11,
            fill=FAINT,
        ),
        *draw_edges(boxes),
        *(part for box in boxes.values() for part in box.draw()),
        text(MARGIN, bottom + 20, "One training step", 18, "bold"),
        text(
            MARGIN,
            bottom + 40,
            "B rows, T tokens in a row, D embed, R rank. Grey: on the host. Blue: one compiled program on the devices. Green: what it returns.",
            11,
            fill=FAINT,
        ),
        *flow,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")

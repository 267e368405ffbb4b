"""What a run tells: `metrics.jsonl` always, the console, and TensorBoard or W&B if asked for.

The step's scalars stay on the device; the loop hands them over one step late, so that reading them never keeps the
next step from being dispatched. Of several processes the first one writes; in the others the same calls write nothing.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
import uuid

import rich.console
import rich.progress

from lowrank import storage
from lowrank.errors import UserError
from lowrank.parallel import distributed


@contextlib.contextmanager
def writing(file: pathlib.Path):
    """A disk that is full or read-only is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} could not be written ({error.strerror}); make room and run the same command again"
        ) from error


def replace(file: storage.Path, text: str):
    """Give the file a new content: whole, or (after a power cut, too) still the old one."""
    if not distributed.first():
        return
    if storage.is_remote(file):
        _lines.pop(file, None)
        file.write_bytes(text.encode())
        return
    fresh = file.with_suffix(".tmp")
    with writing(file):
        with open(fresh, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)


def append_line(file: storage.Path, record: dict):
    """Append one JSON object and have it on the disk before going on; in a bucket it is there after `flush_lines`."""
    if not distributed.first():
        return
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if storage.is_remote(file):
        _lines.setdefault(file, BucketLines(file)).append(line)
        return
    with writing(file), open(file, "a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


class BucketLines:
    """The lines of an object, which can only be replaced whole, and about once a second at most.

    So it is not written for each line, but where 10 seconds have passed (more if writing takes long: it may take a twentieth
    of the time), and before every checkpoint. A run that is killed loses lines after its last checkpoint alone, and these
    are written again when it goes on from there.
    """

    def __init__(self, file: storage.BucketPath):
        self.file = file
        self.content = bytearray(file.read_bytes() if file.exists() else b"")
        self.written, self.next = True, 0.0

    def append(self, line: str):
        self.content += line.encode()
        self.written = False
        if time.monotonic() >= self.next:
            self.flush()

    def flush(self):
        if not self.written:
            began = time.monotonic()
            self.file.write_bytes(bytes(self.content))
            now = time.monotonic()
            self.written, self.next = True, now + max(SECONDS_BETWEEN, 20 * (now - began))


SECONDS_BETWEEN = 10.0
_lines: dict[storage.BucketPath, BucketLines] = {}


def flush_lines():
    """Have every line in its bucket; those on a disk are there already."""
    for lines in _lines.values():
        lines.flush()


def read_lines(file: storage.Path) -> list[dict]:
    """The whole lines of a JSON-lines file; a last line that was cut short by a kill is left out."""
    if file in _lines:
        _lines[file].flush()
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def forget_after(file: storage.Path, step: int):
    """Drop the lines of steps after `step`, which a resumed run is about to write again. Atomic."""
    if distributed.first() and file.exists():
        kept = [record for record in read_lines(file) if record["step"] <= step]
        replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def due(step: int, every: int, last: int) -> bool:
    """At every multiple of `every` and at the last step; 0 is off."""
    return every > 0 and (step == last or step % every == 0)


class Metrics:
    """Writes the scalars of a step to every place that was asked for."""

    def __init__(self, workdir: storage.Path, config: dict, tensorboard: bool, wandb: str | None, step: int):
        """`step`: what was written after it is about to come again."""
        self.file = workdir / "metrics.jsonl"
        self.tensorboard = self.wandb = None
        if not distributed.first():
            return
        if tensorboard:
            try:
                import tensorboardX
            except ImportError:
                raise UserError("config.log.tensorboard needs tensorboardX; pip install 'lowrank[logging]'") from None
            self.tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if wandb:
            try:
                import wandb as wandb_library
            except ImportError:
                raise UserError("config.log.wandb needs wandb; pip install 'lowrank[logging]'") from None
            id_file = workdir / "wandb_id"  # the same workdir goes on in the same run
            if not id_file.exists():
                replace(id_file, uuid.uuid4().hex)
            run_id = id_file.read_text()
            place = None if storage.is_remote(workdir) else str(workdir)
            self.wandb = wandb_library.init(project=wandb, id=run_id, resume="allow", config=config, dir=place)

    def write(self, step: int, scalars: dict[str, float]):
        append_line(self.file, {"step": step, **scalars})
        if self.tensorboard:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def close(self):
        flush_lines()
        _lines.clear()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


SHARES = ("mfu", "waiting")


class Console:
    """A progress bar on a terminal; plain lines elsewhere, one for each line of metrics."""

    def __init__(self, steps: int, first: int):
        self.steps = steps
        self.bar = None
        if sys.stdout.isatty():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(highlight=False),
            )
            self.task = self.bar.add_task("starting", total=steps, completed=first)
            self.bar.start()

    def say(self, text: str):
        if self.bar:
            self.bar.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def step(self, step: int, scalars: dict[str, float] | None):
        """Show that `step` is done; `scalars` are given when they are due."""
        text = None
        if scalars is not None:
            named = {name.split("/")[1]: value for name, value in scalars.items()}
            text = "  ".join(f"{name} {f'{x:.1%}' if name in SHARES else show(x)}" for name, x in named.items())
        if self.bar:
            self.bar.update(self.task, completed=step, **({} if text is None else {"description": text}))
        elif text is not None:
            print(f"step {step}/{self.steps}  {text}", flush=True)

    def close(self):
        if self.bar:
            self.bar.stop()


def show(x: float) -> str:
    """A number for people: thousands grouped, small ones with four digits that mean something."""
    if isinstance(x, int) or (abs(x) >= 1000 and math.isfinite(x)):
        return f"{x:,.0f}"
    return f"{x:.4g}"


def human_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def plot_curves(metrics_file: storage.Path, picture: storage.Path, title: str):
    """Training and evaluation loss over steps, and beneath them the learning rate and the gradient's norm."""
    if not distributed.first():
        return
    import matplotlib

    matplotlib.use("agg")  # no display is needed, nor looked for
    from matplotlib import pyplot as plt

    records = read_lines(metrics_file)

    def series(name):
        points = [(record["step"], record[name]) for record in records if name in record]
        return list(zip(*points, strict=True)) if points else None

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    for name, style in (("train/loss", {"alpha": 0.7}), ("eval/loss", {"marker": "o"})):
        if points := series(name):
            top.plot(*points, label=name, **style)
    top.set(ylabel="loss (nats per token)", title=title)
    top.grid(alpha=0.3)
    if top.get_legend_handles_labels()[0]:
        top.legend()
    if points := series("train/learning_rate"):
        bottom.plot(*points, color="tab:green", label="learning rate")
        bottom.set(xlabel="step", ylabel="learning rate")
    if points := series("train/grad_norm"):
        right = bottom.twinx()
        right.plot(*points, color="tab:gray", alpha=0.6)
        right.set(ylabel="gradient norm")
    bottom.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    with writing(picture):
        picture.write_bytes(content.getvalue())
    plt.close(figure)

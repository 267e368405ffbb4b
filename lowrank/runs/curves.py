"""`curves.png` of a run."""

from lowrank.files import figure as figure_lib
from lowrank.files import paths
from lowrank.files.lines import read_lines
from lowrank.parallel import distributed


def plot_curves(workdir: paths.Path) -> None:
    """Draw training and evaluation loss over steps and, beneath them, the learning rate and the gradient's norm."""
    if not distributed.is_first():
        return
    records = read_lines(workdir / "metrics.jsonl")

    def series(name):
        points = [(record["step"], record[name]) for record in records if name in record]
        return list(zip(*points, strict=True)) if points else None

    figure, (top, bottom) = figure_lib.figure(2, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
    for name, style in (("train/loss", {"alpha": 0.7}), ("eval/loss", {"marker": "o"})):
        if points := series(name):
            top.plot(*points, label=name, **style)
    top.set(ylabel="loss (nats per token)", title=workdir.name)
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
    figure_lib.save(figure, workdir / "curves.png")

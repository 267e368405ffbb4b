"""TODO runs.curves"""

import io

from lowrank.files import paths
from lowrank.files.lines import read_lines, writing
from lowrank.parallel import distributed


def plot_curves(metrics_file: paths.Path, picture: paths.Path, title: str):
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

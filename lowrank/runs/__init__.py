"""One run, on the disk and in time. `train(config, workdir)` is the way in from Python."""

from lowrank.runs.train import Result, Run, describe, prepare_run, train

__all__ = ["Result", "Run", "describe", "prepare_run", "train"]

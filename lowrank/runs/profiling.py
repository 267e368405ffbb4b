"""`--profile=START:STOP`: a trace of some steps, for xprof."""

import pathlib
import re

import jax

from lowrank.errors import UserError
from lowrank.files import paths

USAGE = "--profile=START:STOP is the first and the last step to trace, as --profile=11:13"


class Profile:
    """JAX's trace from just before step `start` until step `stop` is done; nothing where `text` is None."""

    def __init__(self, text: str | None, workdir: paths.Path, steps: int = 0):
        """UserError unless `text` is a range of a run's `steps` and the workdir is on a disk."""
        self.start = self.stop = 0
        self.running = False
        if text is None:
            return
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--profile={text} is no range of steps; {USAGE}")
        if not isinstance(workdir, pathlib.Path):
            raise UserError("--profile writes to a disk; leave it out, or name a local --workdir")
        if int(found[2]) > steps:
            raise UserError(f"--profile={text}: this run ends at step {steps}")
        self.start, self.stop, self.folder = int(found[1]), int(found[2]), workdir / "profile"

    def skip_until(self, first: int) -> str | None:
        """For a run resumed after step `first`: nothing is traced if some of the steps are done -> what to say then."""
        if not 0 < self.start <= first:
            return None
        message = f"--profile={self.start}:{self.stop}: step {self.start} is done already, so nothing is traced"
        self.start = self.stop = 0
        return message

    def begin(self, step: int) -> None:
        if step == self.start:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def describe(self) -> str:
        return f"profile of steps {self.start} to {self.stop} in {self.folder}; pip install xprof; xprof {self.folder}"

    def close(self) -> None:
        """Write the trace; of a run that ends before step `stop`, what there is of it."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

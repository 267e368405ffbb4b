"""`--profile=START:STOP`: a trace of some steps, for xprof."""

import pathlib
import re

import jax

from lowrank.errors import UserError
from lowrank.files import paths

GENERAL = "--profile=START:STOP is the first and the last step to trace, as --profile=11:13"


class Profile:
    """What JAX traces from just before step `start` until step `stop` is done; `text` None: nothing."""

    def __init__(self, text: str | None, workdir: paths.Path):
        self.start = self.stop = 0
        self.running = False
        if text is None:
            return
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--profile={text} is no range of steps; {GENERAL}")
        if paths.is_remote(workdir):
            raise UserError("--profile writes to a disk; leave it out, or name a local --workdir")
        self.start, self.stop = int(found[1]), int(found[2])
        self.folder = pathlib.Path(workdir) / "profile"

    def check(self, steps: int):
        """UserError if a run of so many steps does not do these."""
        if self.stop > steps:
            raise UserError(f"--profile={self.start}:{self.stop}: this run ends at step {steps}")

    def resumed(self, first: int) -> str | None:
        """A run that goes on after step `first` traces nothing if some of the steps are behind it; that is said."""
        if not 0 < self.start <= first:
            return None
        said = f"--profile={self.start}:{self.stop}: step {self.start} is done already, so nothing is traced"
        self.start = self.stop = 0
        return said

    def before(self, step: int):
        if step == self.start:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    @property
    def written(self) -> str:
        return f"profile of steps {self.start} to {self.stop} in {self.folder}; pip install xprof; xprof {self.folder}"

    def close(self):
        """Write the trace: when step `stop` is done, or what there is of it where a run ends before."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

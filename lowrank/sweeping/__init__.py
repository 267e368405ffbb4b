"""Many adapters over one base in one compiled step. `sweep(grid, workdir)` is the way in from Python."""

from lowrank.sweeping.grid import Grid, make_grid, read
from lowrank.sweeping.sweep import SweepResult, describe, plan_groups, sweep

__all__ = ["Grid", "SweepResult", "describe", "make_grid", "plan_groups", "read", "sweep"]

"""What a training needs and costs, before it runs: its step compiled for TPUs that need not be here.

`plan(config, "v5e:2x4")` is the way in from Python; `describe` and `record` show its result.
"""

from lowrank.planning.measure import measure_seconds
from lowrank.planning.plan import Plan, Result, plan
from lowrank.planning.report import describe, record

__all__ = ["Plan", "Result", "describe", "measure_seconds", "plan", "record"]

"""What the scripts beside this one share: shapes, clocks, peak memory, the machine's name, and how a spread is shown.

JAX is not imported here: a process that measures another library must not carry it.
"""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES

SHAPES: dict[str, ModelConfig] = {
    "15m": ModelConfig(32000, 288, 768, 6, 6, 6, 48, tied_head=True),
    "135m": SIZES["smollm2-135m"],
    "1.1b": SIZES["tinyllama-1.1b"],
    "1b": SIZES["llama3.2-1b"],
    "3b": SIZES["llama3.2-3b"],
    "8b": SIZES["llama3.1-8b"],
}


def clock(on_cpu: bool) -> Callable[[], float]:
    """CPU seconds of this process, which its neighbours on the machine do not change; elsewhere the wall clock."""
    return time.process_time if on_cpu else time.perf_counter


def process_peak_bytes() -> int:
    """VmHWM: as ru_maxrss, but without what a process inherits of it from the one that started it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

"""lowrank: adapt LLaMA-style models with low-rank adapters, in JAX. `load(base, adapter=None)` is the way in from Python."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m lowrank.COMMAND` is starting: Python says so until it has found the command
    from lowrank.cli import end_at_interrupt

    end_at_interrupt()


def load(base, adapter=None, **options):
    """Load a base, with an adapter or without: see `lowrank.inference.load`, which this calls."""
    from lowrank import inference  # JAX and Flax take seconds to import: only whoever loads a model waits for them

    return inference.load(base, adapter, **options)

"""lowrank: adapt LLaMA-style models with low-rank adapters, in JAX. `load(base, adapter=None)` is the way in from Python."""

__version__ = "0.1.0"


def load(base, adapter=None, **options):
    """Load a base, with an adapter or without: see `lowrank.inference.load`, which this calls."""
    from lowrank import inference  # JAX and Flax take seconds to import: only whoever loads a model waits for them

    return inference.load(base, adapter, **options)

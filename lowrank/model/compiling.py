"""How the model's programs are compiled: `jax.jit`, with what each kind of device wants said to its compiler."""

import jax

# XLA's CPU slices bfloat16 arrays as float32. In the scan over layers it then takes that conversion out of the loop, as
# any computation that is the same each time: all layers' kernels and kept activations at once, twice their size (1.1B
# parameters, 256 tokens: temporaries of 5.2 GB instead of 0.8, a step of 11.6 CPU seconds instead of 8.0).
OPTIONS = {"cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}}


def jit(function, platform: str | None = None, **arguments):
    """`jax.jit(function, **arguments)` for devices of this platform; None: of those here."""
    return jax.jit(function, compiler_options=OPTIONS.get(platform or jax.default_backend()), **arguments)


def platform_of(tree) -> str | None:
    """Where a tree of arrays, or of their shapes, lies; None if nothing in it says so."""
    layouts = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((min(layout.device_set, key=id).platform for layout in layouts if layout is not None), None)

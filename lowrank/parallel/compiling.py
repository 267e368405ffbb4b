"""How programs are compiled: `jax.jit` with compiler options for each platform, ahead of time, with or without the cache."""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Callable

import jax
from jax.experimental.compilation_cache import compilation_cache

from lowrank.parallel import distributed

# XLA's CPU backend slices bfloat16 arrays as float32. It then hoists that conversion out of the scan over layers, as
# loop-invariant: the kernels and saved activations of all layers at once, in twice their size (1.1B parameters, 256
# tokens: temporaries of 5.2 GB instead of 0.8, a step of 11.6 CPU seconds instead of 8.0).
#
# On a v6e a fusion may use 64 MiB of VMEM, more than libtpu's default, so that the products of the MLP need no small windows: Llama 3
# 8B, 32 x 1,024 tokens, 3.61 -> 3.34 s a step by the compiler's cycles (corrected 3.17 -> 2.78).
#
# On a v5p libtpu gathers synchronously unless asked: Llama 3 8B on v5p:2x2x1, fsdp 4: of 0.20 s of collectives a step all were exposed,
# now 0.11 (1.31 -> 1.22 s).
OPTIONS = {  # of a platform, or of a kind of device
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "TPU v5": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


def jit(function: Callable, device: jax.Device | None = None, **arguments):
    """`jax.jit(function, **arguments)` for devices such as this one; None: the default ones."""
    device = device or jax.devices()[0]
    options = OPTIONS.get(device.platform) or OPTIONS.get(device.device_kind)
    return jax.jit(function, compiler_options=options, **arguments)


def lazy_jit(function: Callable, **arguments) -> Callable:
    """As `jit`, but asks for the devices at the first call and not when a module is imported."""
    jitted = functools.cache(lambda: jit(function, **arguments))
    return functools.wraps(function)(lambda *given: jitted()(*given))


def device_of(tree) -> jax.Device | None:
    """A device of a tree of arrays, or of their shapes; None if none has a sharding."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((next(iter(each.device_set)) for each in shardings if each is not None), None)


def compile_for(function, *arguments) -> jax.stages.Compiled:
    """Compile a jitted function for these arguments (or their shapes). On Linux, the memory that compiling took goes back
    to the operating system: 360 MB of a peak of 1,480 MB at 135M parameters."""
    program = function.lower(*arguments).compile()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return program


def compile_once(function, before_first_run: Callable[[], None] = lambda: None) -> Callable:
    """A jitted function -> the same, compiled at its first call, after which `before_first_run` is called.

    Arguments of another shape, dtype or sharding compile it again, with a warning that names them: recompiling may take
    a minute.
    """
    program, signature = None, None

    def call(*arguments):
        nonlocal program, signature
        if program is not None:
            try:
                return program(*arguments)
            except (TypeError, ValueError) as error:  # raised before anything runs, if arguments do not fit
                if _signature(arguments) == signature:
                    raise
                changed = " ".join(str(error).split())
                warnings.warn(f"{function.__name__} is compiled again: {changed}", stacklevel=2)
        program, signature = compile_for(function, *arguments), _signature(arguments)
        before_first_run()
        return program(*arguments)

    return call


def compile_together(function) -> Callable:
    """As `compile_once`, with a barrier between compiling and the first run, in which gloo would wait 30 seconds at most."""
    return compile_once(function, lambda: distributed.barrier("compiled"))


def _signature(arguments):
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves]


@contextlib.contextmanager
def without_compile_cache():
    """Compile without JAX's persistent cache, which cannot load programs for a TPU where there is none."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX reads the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()

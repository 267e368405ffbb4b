"""How programs of the model are compiled: `jax.jit`, with what each kind of device wants said to its compiler."""

import contextlib
import ctypes
import functools
import os
import pathlib
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

# XLA's CPU slices bfloat16 arrays as float32. In the scan over layers it then takes that conversion out of the loop, as
# any computation that is the same each time: all layers' kernels and kept activations at once, twice their size (1.1B
# parameters, 256 tokens: temporaries of 5.2 GB instead of 0.8, a step of 11.6 CPU seconds instead of 8.0).
OPTIONS = {"cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}}


def jit(function, platform: str | None = None, **arguments):
    """`jax.jit(function, **arguments)` for devices of this platform; None: of those here."""
    return jax.jit(function, compiler_options=OPTIONS.get(platform or jax.default_backend()), **arguments)


def lazy_jit(function, **arguments):
    """As `jit`, which is asked for the devices at the first call: not when a module is imported."""
    made = functools.cache(lambda: jit(function, **arguments))
    return functools.wraps(function)(lambda *given: made()(*given))


def platform_of(tree) -> str | None:
    """Where a tree of arrays, or of their shapes, lies; None if nothing in it says so."""
    layouts = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((next(iter(layout.device_set)).platform for layout in layouts if layout is not None), None)


def compile_once(function, then=lambda: None):
    """A jitted function -> the same, compiled at its first call and not again; `then` is called before it first runs.

    Arguments of another shape, dtype or layout are compiled for anew, and a warning says which: whoever waits for that
    once a minute should know.
    """
    program, kinds = None, None

    def call(*arguments):
        nonlocal program, kinds
        if program is not None:
            try:
                return program(*arguments)
            except (TypeError, ValueError) as error:  # raised before anything runs, of arguments that do not fit
                if _kinds(arguments) == kinds:
                    raise
                changed = " ".join(str(error).split())
                warnings.warn(f"{function.__name__} is compiled again: {changed}", stacklevel=2)
        program, kinds = compile_for(function, *arguments), _kinds(arguments)
        then()
        return program(*arguments)

    return call


def _kinds(arguments):
    """Shapes, dtypes and layouts of a tree of arrays, to be compared."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves]


def compile_for(function, *arguments) -> jax.stages.Compiled:
    """A jitted function, compiled for these arguments (or their shapes). The memory that compiling took and left in pieces
    goes back to the operating system, where that is Linux: 360 MB of a peak of 1,480 MB at 135M parameters."""
    program = function.lower(*arguments).compile()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return program


# What libtpu, where it is installed and there is no TPU, would look for in vain, ask the network for, and complain about in
# five lines on stderr. To be set before JAX looks for devices, and only where nothing is said.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
GOOGLE = "0x1ae0"  # as a vendor of PCI devices, which TPUs are


def silence_libtpu():
    """Keep libtpu from looking for TPUs on a machine that has none. Harmless without libtpu, and twice."""
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    if not any(vendor.read_text().strip() == GOOGLE for vendor in vendors):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def without_compile_cache():
    before = jax.config.jax_enable_compilation_cache

    def use(on: bool):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # it asks once only whether it is on

    use(False)
    try:
        yield
    finally:
        use(before)

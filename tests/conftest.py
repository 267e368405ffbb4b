"""Fixtures that the whole suite shares. Eight CPU devices, so that shardings are real ones."""

import gc
import importlib.util
import os
import pathlib
import sys

# Four fifths of the suite's time is compiling, and of that LLVM's optimiser takes a third: it is off here, also in the
# processes that tests start. XLA's own passes, and so the order of sums, are those of a user. XLA_FLAGS set outside win.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub; fake_hub.py serves one

import fake_gcs
import jax
import pytest
import running

from lowrank.parallel import launchers

launchers.silence_libtpu()
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the suite's time: programs that several tests (or two runs of the suite) share are compiled once.
for name, value in running.CACHE.items():
    jax.config.update(name, value)

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real weights, tokenizers and data sets beside the project; a test that needs it skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def demo_base() -> pathlib.Path:
    """The folder of the small base that the repository holds: 4 layers, embed 128, vocab 1,024."""
    return ROOT / "configs" / "demo" / "base"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The --config flag of a run of six steps over the embedded base."""
    return running.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny) -> pathlib.Path:
    """The workdir of that run, finished; to be read only."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    finished = running.run("train", tiny, f"--workdir={workdir}")
    assert finished.code == 0, finished.err
    return workdir


@pytest.fixture(autouse=True, scope="module")
def release_memory():
    """Compiled programs are kept for the tests of one file, not for the whole run: that took 6 GB."""
    yield
    running.forget_programs()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Two workers on two cores, and matrices too small to be shared out."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def bucket():
    """The content of gs://bucket, on a server in this process."""
    if importlib.util.find_spec("gcsfs") is None:  # looked for, not imported, which is files/bucket.py's to do
        pytest.skip("gcsfs is not installed")
    with fake_gcs.serving() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def torch_llama():
    """Tiny random Llamas made by transformers; a test that needs them skips without PyTorch."""
    return pytest.importorskip("torch_llama")

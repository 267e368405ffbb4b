"""Fixtures that the whole suite shares. Eight CPU devices, so that shardings are real ones."""

import importlib.util
import pathlib

import fake_gcs
import jax
import pytest
import running

from lowrank.cli import run as cli
from lowrank.parallel import compiling

compiling.silence_libtpu()
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the suite's time: programs that several tests (or two runs of the suite) share are compiled once.
cli.use_compile_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real weights, tokenizers and data sets beside the project; a test that needs it skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, shared_data) -> str:
    """The --config flag of a run of six steps over the real small base."""
    return running.write_tiny(tmp_path_factory.mktemp("tiny"), shared_data)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny) -> pathlib.Path:
    """The workdir of that run, finished; to be read only."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    finished = running.run("train", tiny, f"--workdir={workdir}")
    assert finished.code == 0, finished.err
    return workdir


@pytest.fixture
def bucket():
    """The content of gs://bucket, on a server in this process."""
    if importlib.util.find_spec("gcsfs") is None:  # looked for, not imported, which is lowrank.storage's to do
        pytest.skip("gcsfs is not installed")
    with fake_gcs.serving() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def torch_llama():
    """Tiny random Llamas made by transformers; a test that needs them skips without PyTorch."""
    return pytest.importorskip("torch_llama")

"""Fixtures that the whole suite shares. Eight CPU devices, so that shardings are real ones."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real weights, tokenizers and data sets beside the project; a test that needs it skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED

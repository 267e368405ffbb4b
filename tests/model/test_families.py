"""Every family against `transformers`, with random tiny models (`torch_families.CASES`); and what windows mean."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.families.config_json import hf_config, read_config
from lowrank.generation.decode import Sampling, generate_ids
from lowrank.model.kernels import window_mask

torch_families = pytest.importorskip("torch_families")
transformers = pytest.importorskip("transformers")

# Each of their settings is in another case too.
SLOW = ("llama", "mistral, own head_dim", "mistral, window, tied", "qwen2, upper layers windowed, tied")
SLOW += ("qwen3, tied", "qwen3, own head_dim")
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in torch_families.CASES]
# float32 on both sides, sums in another order: a few units in the last place of the largest logit.
CLOSE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model of transformers, (decoder, variables) read from the folder that it saved, and the folder."""
    folder = tmp_path_factory.mktemp("base")
    theirs = torch_families.make(request.param, seed=0)
    theirs.save_pretrained(folder)
    return theirs, torch_families.load(folder), folder


def test_logits_equal_transformers(case):
    theirs, ours, _ = case
    assert torch_families.plain(theirs, *ours) < CLOSE


def test_segments_of_a_row_equal_transformers_on_each_alone(case):
    theirs, ours, _ = case
    assert torch_families.packed(theirs, *ours) < CLOSE


def test_cached_generation_has_transformers_logits(case):
    theirs, ours, _ = case
    assert torch_families.cached(theirs, *ours) < CLOSE


@pytest.mark.parametrize(
    "name",
    [
        "qwen2, layer_types",
        pytest.param("llama, biases, tied", marks=pytest.mark.slow),
        pytest.param("mistral, window", marks=pytest.mark.slow),
        pytest.param("qwen3, own head_dim", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_transformers(name, tmp_path):
    theirs = torch_families.make(name, seed=7)
    theirs.save_pretrained(tmp_path)
    ours = torch_families.load(tmp_path)
    expected, _ = torch_families.generated(theirs)
    found = generate_ids(*ours, torch_families.prompts(), torch_families.NEW, Sampling())
    np.testing.assert_array_equal(np.stack(list(found), axis=1), expected)


def test_both_spellings_read_the_same(case):
    _, (model, _), folder = case
    fields = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in fields  # so it is the new spelling that was read
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": fields.pop("dtype")}
    fields["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
    (folder / "config.json").write_text(json.dumps(fields))
    assert read_config(folder) == model.config


def test_transformers_computes_the_same_from_the_config_that_is_written(case):
    theirs, (model, _), folder = case
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = np.arange(40)[None]
    np.testing.assert_array_equal(torch_families.logits(again, ids), torch_families.logits(theirs, ids))


def test_a_window_is_the_query_and_the_tokens_before_it():
    assert window_mask(jnp.arange(2, 5), 5, jnp.int32(2)).astype(int).tolist() == [
        [0, 1, 1, 1, 1],  # what comes later is for causality to hide
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    assert window_mask(jnp.arange(3), 3, jnp.int32(0)).all()

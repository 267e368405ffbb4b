"""The decoder against PyTorch, and the identities that a reader would assume of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.model import decoder
from lowrank.model.architecture import ModelConfig, RopeScaling
from lowrank.model.attention import attend, rotary_frequencies, visible
from lowrank.model.decoder import Decoder
from lowrank.model.lora import TARGETS, LoraConfig
from lowrank.training import partition
from lowrank.weights.base import load_params, read_base
from lowrank.weights.merged import merge

TINY = ModelConfig(vocab=40, embed=24, mlp=20, layers=3, heads=4, kv_heads=2, head_dim=8, max_length=64)


def randomized(tree, seed=0):
    """Every leaf random: zeros and ones hide mistakes."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure,
        [leaf + 0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)],
    )


def logits(model, variables, ids, positions=None, segment_ids=None, **options):
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else jnp.asarray(positions)
    segment_ids = jnp.ones_like(ids) if segment_ids is None else jnp.asarray(segment_ids)
    hidden, head, _ = model.apply(variables, ids, positions, segment_ids, **options)
    return np.asarray(hidden.astype(jnp.float32) @ head.astype(jnp.float32))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_heads": 4},
        {"kv_heads": 2},
        {"kv_heads": 1, "tied": True},
        {"kv_heads": 2, "head_dim": 16, "tied": True},
        {"kv_heads": 2, "rope_parameters": {"rope_theta": 100.0, "original_max_position_embeddings": 16, **LLAMA3}},
    ],
    ids=["all-kv-heads", "gqa", "mqa-tied", "own-head-dim", "llama3-rope"],
)
def test_logits_equal_transformers(fields, tmp_path, torch_llama):
    theirs = torch_llama.make(**fields)
    base = read_base(torch_llama.saved(theirs, tmp_path / "base"))
    model = Decoder(base.config)
    shapes, _ = decoder.abstract(model)
    params = load_params(base, shapes["params"])
    ids = np.random.default_rng(0).integers(0, 40, (2, 33))
    expected, found = torch_llama.logits(theirs, ids), logits(model, {"params": params}, ids)
    # float32 on both sides, sums in another order: 1e-5 of the largest logit is a few units in the last place.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_adapted_logits_equal_peft(tmp_path, torch_llama):
    peft, torch = map(pytest.importorskip, ("peft", "torch"))
    theirs = torch_llama.make()
    base = read_base(torch_llama.saved(theirs, tmp_path / "base"))
    lora = LoraConfig(rank=3, alpha=7.0, scaling="rslora")
    model = Decoder(base.config, lora)
    shapes, _ = decoder.abstract(model)
    adapter = randomized(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["lora"]))
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=list(TARGETS), bias="none")
    ).eval()
    for name, leaf in partition.named_leaves(adapter).items():
        _, block, target, factor = name.split("/")
        for layer in range(base.config.layers):
            letter = factor[-1].upper()
            weight = adapted.get_parameter(
                f"base_model.model.model.layers.{layer}.{block}.{target}.lora_{letter}.default.weight"
            )
            weight.data = torch.tensor(np.asarray(leaf[layer]).T.copy())
    ids = np.random.default_rng(1).integers(0, 40, (2, 17))
    expected = torch_llama.logits(adapted, ids)
    found = logits(model, {"params": load_params(base, shapes["params"]), "lora": adapter}, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # as above


@pytest.fixture(scope="module")
def adapted():
    model = Decoder(TINY, LoraConfig(rank=2, alpha=4.0))
    return model, randomized(decoder.init(model, jax.random.key(0)))


def test_lora_b_zero_leaves_the_bases_logits_bit_for_bit():
    ids = np.arange(20).reshape(2, 10)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Decoder(TINY, LoraConfig(rank=2), dtype=dtype, param_dtype=dtype)
        variables = decoder.init(model, jax.random.key(0))
        bare = logits(dataclasses.replace(model, lora=None), {"params": variables["params"]}, ids)
        np.testing.assert_array_equal(logits(model, variables, ids), bare)


def test_adapter_is_initialised_as_peft_does():
    variables = decoder.init(Decoder(TINY, LoraConfig(rank=8)), jax.random.key(0))
    for name, leaf in partition.named_leaves(variables["lora"]).items():
        assert leaf.dtype == jnp.float32
        if name.endswith("lora_b"):
            assert not leaf.any()
        else:
            bound = leaf.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            # Uniform in ±b has the deviation b / sqrt(3); 10 % is more than 3 standard errors of the smallest leaf.
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_bases_initial_weights_do_not_depend_on_the_adapter():
    bare = decoder.init(Decoder(TINY), jax.random.key(0))["params"]
    beside = decoder.init(Decoder(TINY, LoraConfig(rank=2)), jax.random.key(0))["params"]
    jax.tree.map(np.testing.assert_array_equal, bare, beside)


def test_merged_equals_adapted(adapted):
    model, variables = adapted
    ids = np.arange(20).reshape(2, 10)
    merged = merge(variables["params"], variables["lora"], model.lora.scale)
    expected, found = logits(model, variables, ids), logits(Decoder(TINY), {"params": merged}, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # rounded in another order


def test_packed_row_equals_its_examples_alone(adapted):
    model, variables = adapted
    rng = np.random.default_rng(0)
    lengths = [5, 9, 3]
    examples = [rng.integers(0, 40, n) for n in lengths]
    row = np.concatenate([*examples, [0, 0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3])[None]
    positions = np.concatenate([np.arange(n) for n in [*lengths, 3]])[None]
    packed = logits(model, variables, row, positions, segments)[0]
    start = 0
    for example in examples:
        alone = logits(model, variables, example[None])[0]
        # The same numbers in a longer sum of which the rest is exactly zero: only the blocking of sums differs.
        np.testing.assert_allclose(packed[start : start + len(example)], alone, rtol=0, atol=2e-5)
        start += len(example)


@pytest.mark.parametrize("length", [12, 64])  # at once, and in causal chunks
def test_no_segment_sees_another(length):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray([[1] * 5 + [2] * (length - 7) + [0] * 2])
    mask = visible(jnp.arange(length), segments, segments)
    before = attend(q, k, v, mask)
    k, v = k.at[:, 2].add(3.0), v.at[:, 2].add(3.0)
    after = attend(q, k, v, mask)
    assert (np.asarray(after) != np.asarray(before)).any(axis=(0, 2, 3)).tolist() == [False] * 2 + [True] * 3 + [
        False
    ] * (length - 5)


@pytest.mark.parametrize("length", [5, 50, 64])
def test_attention_equals_jax_nn(length):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(rng.integers(1, 3, (2, length)).cumsum(axis=1) // 20)
    mask = visible(jnp.arange(length), segments, segments)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    np.testing.assert_allclose(attend(q, k, v, mask), expected, rtol=0, atol=2e-6)  # float32, values of about 1


def test_scanned_equals_unrolled(adapted):
    model, variables = adapted
    ids = jnp.arange(14).reshape(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    segments = jnp.ones_like(ids)
    params = variables["params"]
    x = params["embed_tokens"]["embedding"][ids]
    angles = positions[..., None] * rotary_frequencies(TINY)
    mask = visible(jnp.arange(7), segments, segments)
    block = decoder.Block(TINY, model.lora, model.dtype, model.param_dtype, True)
    for layer in range(TINY.layers):
        one = jax.tree.map(
            lambda leaf, layer=layer: leaf[layer], {c: variables[c]["layers"] for c in ("params", "lora")}
        )
        x, _ = block.apply(one, x, None, 0, angles, mask)
    x = decoder.RMSNorm(TINY.norm_eps, model.param_dtype).apply({"params": params["norm"]}, x)
    expected = np.asarray(x @ params["lm_head"]["kernel"])
    np.testing.assert_allclose(logits(model, variables, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(adapted, remat):
    model, variables = adapted
    ids = jnp.arange(14).reshape(2, 7)

    def loss(lora, model):
        hidden, head, _ = model.apply({**variables, "lora": lora}, ids, ids % 7, jnp.ones_like(ids))
        return jnp.mean(jnp.square(hidden @ head))

    expected = jax.value_and_grad(loss)(variables["lora"], model)
    found = jax.value_and_grad(loss)(variables["lora"], dataclasses.replace(model, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_dropout_is_on_the_adapters_input_and_only_in_training(adapted):
    _, variables = adapted
    model = Decoder(TINY, LoraConfig(rank=2, alpha=4.0, dropout=0.5))
    ids = np.arange(20).reshape(2, 10)
    still = logits(model, variables, ids)
    np.testing.assert_array_equal(still, logits(dataclasses.replace(model, lora=adapted[0].lora), variables, ids))
    rngs = {"dropout": jax.random.key(1)}
    assert (logits(model, variables, ids, deterministic=False, rngs=rngs) != still).any()
    silent = {"params": variables["params"], "lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    np.testing.assert_array_equal(
        logits(model, silent, ids, deterministic=False, rngs=rngs),
        logits(Decoder(TINY), {"params": variables["params"]}, ids),
    )


def test_adapters_stand_on_the_targets_and_nowhere_else():
    shapes, axes = decoder.abstract(Decoder(TINY, LoraConfig(rank=2, targets=("v_proj", "down_proj"))))
    assert {name: leaf.shape for name, leaf in partition.named_leaves(shapes["lora"]).items()} == {
        "layers/self_attn/v_proj/lora_a": (3, 24, 2),
        "layers/self_attn/v_proj/lora_b": (3, 2, 16),
        "layers/mlp/down_proj/lora_a": (3, 20, 2),
        "layers/mlp/down_proj/lora_b": (3, 2, 24),
    }
    assert axes["lora"]["layers"]["self_attn"]["v_proj"] == {
        "lora_a": ("layers", "embed", "rank"),
        "lora_b": ("layers", "rank", "kv_heads"),
    }


LLAMA2_7B = ModelConfig(vocab=32000, embed=4096, mlp=11008, layers=32, heads=32, kv_heads=32, head_dim=128)


@pytest.mark.parametrize(
    ("targets", "expected"), [(("q_proj", "v_proj"), 4_194_304), (TARGETS, 19_988_480)], ids=["q-v", "all-seven"]
)
def test_trainable_count_of_llama2_7b(targets, expected):
    shapes, _ = decoder.abstract(Decoder(LLAMA2_7B, LoraConfig(rank=8, targets=targets)))
    trainable, frozen = partition.split(shapes, partition.trainable_mask(shapes, "lora"))
    assert partition.count(trainable) == expected
    assert partition.count(frozen) == 6_738_415_616


def test_llama3_frequencies_keep_the_fast_and_stretch_the_slow():
    plain = dataclasses.replace(TINY, head_dim=64, rope_theta=5e5)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    before, after = rotary_frequencies(plain), rotary_frequencies(scaled)
    assert after[0] == before[0]
    assert after[-1] == before[-1] / 8
    assert (np.diff(after) < 0).all()

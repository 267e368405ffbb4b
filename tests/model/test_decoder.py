"""The decoder against PyTorch, and the identities that a reader would assume of it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import running

from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.families.config import ModelConfig, RopeScaling
from lowrank.families.tensor_names import hf_tensors
from lowrank.model import decoder
from lowrank.model.attention import LayerInputs, rotary_cos_sin, rotary_frequencies
from lowrank.model.decoder import Decoder, layer_inputs
from lowrank.model.kernels import AttentionMask, causal_mask
from lowrank.parallel import mesh as mesh_lib
from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, make_optimizer
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params
from lowrank.weights.merged import merge

TINY = ModelConfig(vocab=40, embed=24, mlp=20, layers=3, heads=4, kv_heads=2, head_dim=8, max_length=64)
LORA = LoraConfig(rank=8, alpha=8.0)


def randomized(model):
    """Variables of which every leaf is random: zeros and ones hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray((path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract(model)[0])


def logits(model, variables, ids, positions=None, segment_ids=None, **options):
    ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else jnp.asarray(positions)
    segment_ids = jnp.ones_like(ids) if segment_ids is None else jnp.asarray(segment_ids)
    return np.asarray(_logits(model, variables, ids, positions, segment_ids, **options))


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def _logits(model, variables, ids, positions, segment_ids, **options):
    hidden, head, _ = model.apply(variables, ids, positions, segment_ids, **options)
    return hidden.astype(jnp.float32) @ head.astype(jnp.float32)


def test_adapted_logits_equal_peft(tmp_path, torch_llama):
    peft, torch = map(pytest.importorskip, ("peft", "torch"))
    theirs = torch_llama.make()
    base = read_base(torch_llama.saved(theirs, tmp_path / "base"))
    lora = LoraConfig(rank=3, alpha=7.0, scaling="rslora")
    model = Decoder(base.config, lora)
    shapes, adapter = decoder.abstract(model)[0], randomized(model)["lora"]
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
    model = Decoder(TINY, LORA)
    return model, randomized(model)


def test_lora_b_zero_leaves_the_bases_logits_bit_for_bit():
    ids = np.arange(20).reshape(2, 10)
    fresh = running.init(Decoder(TINY, LORA))
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Decoder(TINY, LORA, dtype=dtype, param_dtype=dtype)
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), fresh["params"])
        bare = logits(dataclasses.replace(model, lora=None), {"params": params}, ids)
        np.testing.assert_array_equal(logits(model, {"params": params, "lora": fresh["lora"]}, ids), bare)


def test_adapter_is_initialised_as_peft_does():
    variables = running.init(Decoder(TINY, LORA))
    for name, leaf in partition.named_leaves(variables["lora"]).items():
        assert leaf.dtype == jnp.float32
        if name.endswith("lora_b"):
            assert not leaf.any()
        else:
            bound = leaf.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            # Uniform in ±b has the deviation b / sqrt(3); 10 % is more than 3 standard errors of the smallest leaf.
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_zero_draws_b_as_peft_does_and_leaves_the_padding_zero():
    """PEFT draws both factors where `init_lora_weights` is false: B is torch's Linear of `rank` inputs."""
    config = ModelConfig(vocab=40, embed=256, mlp=24, layers=4, heads=8, kv_heads=2, head_dim=8, max_length=64)
    lora = LoraConfig(rank=4, targets=("q_proj", "down_proj"), ranks=(("q_proj", (4, 1, 0, 3)),), init="a_zero")
    layers = running.init(Decoder(config, lora))["lora"]["layers"]
    assert not any(
        leaf.any() for leaf in (layers["self_attn"]["q_proj"]["lora_a"], layers["mlp"]["down_proj"]["lora_a"])
    )
    for layer, rank in enumerate((4, 1, 0, 3)):
        b = layers["self_attn"]["q_proj"]["lora_b"][layer]
        assert b[:rank].all() and not b[rank:].any()
        assert rank == 0 or 0.95 / rank**0.5 < np.abs(b).max() <= 1 / rank**0.5
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(8, 2048))
    made = peft.get_peft_model(linear, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    theirs = made.base_model.model[0].lora_B["default"].weight.detach().numpy()
    ours, shares = layers["mlp"]["down_proj"]["lora_b"], np.linspace(0, 1, 21)
    # 4,096 draws of ours and 8,192 of theirs, uniform in ±0.5: a quantile's standard error is at most 0.013.
    np.testing.assert_allclose(np.quantile(ours, shares), np.quantile(theirs, shares), atol=0.04)


def test_the_bases_initial_weights_do_not_depend_on_the_adapter():
    bare = running.init(Decoder(TINY))["params"]
    beside = running.init(Decoder(TINY, LORA))["params"]
    jax.tree.map(np.testing.assert_array_equal, bare, beside)


def test_merged_equals_adapted(adapted):
    model, variables = adapted
    ids = np.arange(20).reshape(2, 10)
    merged = merge(variables["params"], variables["lora"], model.lora)
    expected, found = logits(model, variables, ids), logits(Decoder(TINY), {"params": merged}, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # rounded in another order


def test_packed_row_equals_its_examples_alone(adapted):
    model, variables = adapted
    rng = np.random.default_rng(0)
    lengths = [5, 9, 5]
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


def test_scanned_equals_unrolled(adapted):
    model, variables = adapted
    ids = jnp.arange(14).reshape(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    segments = jnp.ones_like(ids)
    params = variables["params"]
    x = params["embed_tokens"]["embedding"][ids]
    mask = AttentionMask(segments, causal_mask(jnp.arange(7), segments, segments))
    block = decoder.Block(TINY, model.lora, model.dtype, model.param_dtype, True)
    run = jax.jit(lambda one, x: block.apply(one, (x, None), 0, rotary_cos_sin(TINY, positions), mask, LayerInputs({})))
    for layer in range(TINY.layers):
        one = jax.tree.map(
            lambda leaf, layer=layer: leaf[layer], {c: variables[c]["layers"] for c in ("params", "lora")}
        )
        (x, _), _ = run(one, x)
    x = decoder.RMSNorm(TINY.norm_eps, model.param_dtype).apply({"params": params["norm"]}, x)
    expected = np.asarray(x @ params["lm_head"]["kernel"])
    np.testing.assert_allclose(logits(model, variables, ids), expected, rtol=0, atol=2e-5)


def test_dropout_is_on_the_adapters_input_and_only_in_training(adapted):
    _, variables = adapted
    model = Decoder(TINY, dataclasses.replace(LORA, dropout=0.5))
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


QWEN3 = dataclasses.replace(
    TINY, family="qwen3", qk_norm=True, biased=("q_proj", "k_proj", "v_proj", "o_proj"), windows=(4, 0, 5)
)


def test_leaves_of_biases_and_of_head_norms():
    shapes, axes = decoder.abstract(Decoder(dataclasses.replace(QWEN3, biased=("q_proj", "o_proj", "up_proj"))))
    leaves = {name: leaf.shape for name, leaf in partition.named_leaves(shapes["params"]["layers"]).items()}
    assert {name: shape for name, shape in leaves.items() if "kernel" not in name and "layernorm" not in name} == {
        "self_attn/q_proj/bias": (3, 32),
        "self_attn/o_proj/bias": (3, 24),
        "mlp/up_proj/bias": (3, 20),
        "self_attn/q_norm/scale": (3, 8),
        "self_attn/k_norm/scale": (3, 8),
    }
    axes = axes["params"]["layers"]
    assert axes["self_attn"]["q_proj"]["bias"] == ("layers", "heads")
    assert axes["self_attn"]["o_proj"]["bias"] == ("layers", "embed")
    assert axes["mlp"]["up_proj"]["bias"] == ("layers", "mlp")
    assert axes["self_attn"]["q_norm"]["scale"] == axes["self_attn"]["k_norm"]["scale"] == ("layers", "head_dim")


def test_the_table_of_names_has_every_leaf():
    for config in (TINY, QWEN3, dataclasses.replace(QWEN3, biased=("up_proj", "down_proj"), tied_head=True)):
        shapes, _ = decoder.abstract(Decoder(config))
        leaves = partition.named_leaves(shapes["params"])
        assert hf_tensors(config).keys() == leaves.keys()
        for path, (_, shape) in hf_tensors(config).items():
            assert math.prod(leaves[path].shape) == math.prod(shape) * (
                config.layers if path.startswith("layers/") else 1
            )


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    model = Decoder(QWEN3, dataclasses.replace(UNEVEN, dropout=0.0))
    variables = randomized(model)
    ids = np.arange(40).reshape(4, 10)
    run = jax.jit(lambda variables: model.apply(variables, ids, ids % 10, np.ones_like(ids))[0])
    expected = run(variables)
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
    shapes, axes = decoder.abstract(model)
    layout = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.with_shardings(mesh, axes, shapes))
    with jax.set_mesh(mesh):
        found = run(jax.device_put(variables, layout))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # sums in another order


# Ranks differ from layer to layer of q_proj, one of them is no adapter at all, and only alphas differ in up_proj.
UNEVEN = LoraConfig(
    rank=2,
    alpha=3.0,
    dropout=0.2,
    targets=("q_proj", "v_proj", "up_proj"),
    ranks=(("q_proj", (3, 0, 1)),),
    alphas=(("q_proj", (4.0, 3.0, 0.5)), ("up_proj", (1.0, 2.0, 8.0))),
)


def test_uniform_layers_add_no_arrays_to_the_program():
    assert jax.tree.leaves([layer_inputs(TINY, LoraConfig()), layer_inputs(TINY, None)]) == []
    uneven = layer_inputs(QWEN3, UNEVEN)
    assert uneven.window.tolist() == [4, 0, 5] and set(uneven.adapters) == {"q_proj", "v_proj", "up_proj"}


def test_an_uneven_adapter_is_zero_beyond_each_layers_rank():
    lora = running.init(Decoder(TINY, UNEVEN))["lora"]["layers"]
    lora_a, lora_b = lora["self_attn"]["q_proj"]["lora_a"], lora["self_attn"]["q_proj"]["lora_b"]
    assert (lora_a.shape, lora_b.shape) == ((3, 24, 3), (3, 3, 32))
    assert np.asarray(lora_a != 0).all(axis=1).tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert np.asarray(lora_a != 0).any(axis=1).tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert not lora_b.any()
    assert lora["mlp"]["up_proj"]["lora_a"].shape == (3, 24, 2) and lora["mlp"]["up_proj"]["lora_a"].all()


def own_ranks_only(lora):
    """The factors of UNEVEN with the padding of q_proj set to zero."""
    kept = jnp.arange(3) < jnp.asarray([3, 0, 1])[:, None]
    q = lora["layers"]["self_attn"]["q_proj"]
    q = {"lora_a": q["lora_a"] * kept[:, None, :], "lora_b": q["lora_b"] * kept[:, :, None]}
    return {"layers": lora["layers"] | {"self_attn": lora["layers"]["self_attn"] | {"q_proj": q}}}


@pytest.fixture(scope="module")
def uneven():
    model = Decoder(TINY, UNEVEN)
    variables = randomized(model)
    return model, variables | {"lora": own_ranks_only(variables["lora"])}


def test_every_layer_of_an_uneven_adapter_has_its_own_scale(uneven):
    model, variables = uneven
    ids = np.arange(20).reshape(2, 10)
    layers = jax.tree.map(lambda leaf: leaf, variables["params"]["layers"])  # to be changed
    for block, target, scales in (
        ("self_attn", "q_proj", (4 / 3, 0.0, 0.5 / 1)),  # alpha / rank
        ("self_attn", "v_proj", (3 / 2, 3 / 2, 3 / 2)),
        ("mlp", "up_proj", (1 / 2, 2 / 2, 8 / 2)),
    ):
        factors = variables["lora"]["layers"][block][target]
        delta = jnp.einsum("L,LIR,LRO->LIO", jnp.asarray(scales), factors["lora_a"], factors["lora_b"])
        layers[block][target]["kernel"] += delta
    merged = {"params": variables["params"] | {"layers": layers}}
    expected, found = logits(Decoder(TINY), merged, ids), logits(model, variables, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # rounded in another order


def test_an_adapter_that_says_its_even_ranks_layer_by_layer_is_the_even_one(adapted):
    model, variables = adapted
    lora = dataclasses.replace(model.lora, ranks=(("q_proj", (8, 8, 8)),), alphas=(("o_proj", (8.0,) * 3),))
    assert lora.uneven
    spelled = Decoder(TINY, lora)
    ids = np.arange(20).reshape(2, 10)
    np.testing.assert_allclose(
        logits(spelled, variables, ids), logits(model, variables, ids), rtol=0, atol=1e-5
    )  # the scale is a constant in the one program and an argument in the other: float32, logits of about 1
    jax.tree.map(np.testing.assert_array_equal, running.init(spelled), running.init(model))


@pytest.mark.slow
def test_the_padding_of_an_uneven_adapter_has_no_gradient_and_stays_zero(uneven):
    model, variables = uneven
    mask = partition.trainable_mask(variables, "lora")
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1), optax.constant_schedule(0.01), mask)
    trainable, frozen = partition.split(variables, mask)
    state, ids = optimizer.init(trainable), jnp.arange(20).reshape(2, 10)

    @jax.jit
    def step(trainable, state, key):
        def loss(trainable):
            both = partition.merge(trainable, frozen)
            rngs = {"dropout": key}
            hidden, head, _ = model.apply(both, ids, ids % 10, jnp.ones_like(ids), deterministic=False, rngs=rngs)
            return jnp.mean(jnp.square(hidden @ head))

        gradients = jax.grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return gradients, optax.apply_updates(trainable, updates), state

    start = trainable
    for number in range(3):
        gradients, trainable, state = step(trainable, state, jax.random.key(number))
        jax.tree.map(np.testing.assert_array_equal, gradients["lora"], own_ranks_only(gradients["lora"]))
    jax.tree.map(np.testing.assert_array_equal, trainable["lora"], own_ranks_only(trainable["lora"]))
    for name, leaf in partition.named_leaves(trainable).items():  # and all the rest has moved
        before = partition.named_leaves(start)[name]
        assert ((leaf != before) == (before != 0)).all(), name


def test_remat_changes_nothing(uneven):
    """With windows, uneven ranks and dropout."""
    _, variables = uneven
    ids = jnp.arange(20).reshape(2, 10)
    params = randomized(Decoder(QWEN3))["params"]

    def loss(lora, remat):
        model = Decoder(QWEN3, UNEVEN, remat=remat)
        rngs = {"dropout": jax.random.key(1)}
        both = {"params": params, "lora": lora}
        hidden, head, _ = model.apply(both, ids, ids % 10, jnp.ones_like(ids), deterministic=False, rngs=rngs)
        return jnp.mean(jnp.square(hidden @ head))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(variables["lora"], "none")
    for remat in ("dots", "full"):
        found = gradient(variables["lora"], remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)  # float32


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

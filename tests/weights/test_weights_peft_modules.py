"""Which modules a PEFT adapter touches, of what rank and alpha: as `peft` itself decides it, in both directions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import torch_llama
from safetensors.numpy import load_file, save_file
from test_weights_merged import IDS
from torch_llama import torch

import lowrank
from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.errors import UserError
from lowrank.weights.base import read_base
from lowrank.weights.peft import HARMLESS, SUPPORTED, UNDERSTOOD, read_peft, write_peft

peft = pytest.importorskip("peft")

LAYERS = 3
ADAPTERS = {
    "lists": {"target_modules": ["q_proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.[02]\..*(q_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.2\..*o_proj"},
    "some layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 1, ".*down_proj": 4, "down_proj": 7},
    },
    "ranks and alphas": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 6},
        "alpha_pattern": {"up_proj": 9, "layers.2.self_attn.q_proj": 0.5},
    },
    "everything": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "layers_to_transform": [1, 2],
        "rank_pattern": {"v_proj": 4, "layers.2.mlp.up_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3.0},
        "use_rslora": True,
    },
    "everywhere another rank": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {".*_proj": 4}},
}


def adapted(settings, seed=0, base=None):
    """A tiny Llama with an adapter of random factors, made by peft."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(base or torch_llama.make(), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = torch_llama.saved(torch_llama.make(), tmp_path_factory.mktemp("base"))
    torch_llama_tokenizer(folder)
    return folder


def torch_llama_tokenizer(folder):
    """Some tokenizer of 40 ids, which loading a base asks for."""
    import tokenizers

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(97, 123))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, tmp_path_factory):
    """(name, peft's model, the folder that it was saved in)."""
    model = adapted(ADAPTERS[request.param])
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return request.param, model, folder


def test_modules_ranks_scales_and_factors_are_peft_s(adapter):
    _, model, folder = adapter
    lora, config, _ = read_peft(folder, LAYERS)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = (module.r["default"], module.scaling["default"], module)
    count = 0
    for block, targets in lora["layers"].items():
        for target, factors in targets.items():
            ranks, scales = config.layer_ranks(target, LAYERS), config.layer_scales(target, LAYERS)
            for layer in range(LAYERS):
                name = f"base_model.model.model.layers.{layer}.{block}.{target}"
                rank, scale, module = found.get(name, (0, 0.0, None))
                assert (ranks[layer], scales[layer]) == (rank, pytest.approx(scale)), name
                a, b = factors["lora_a"][layer], factors["lora_b"][layer]
                assert not a[:, rank:].any() and not b[rank:].any()
                if module is not None:
                    np.testing.assert_array_equal(a[:, :rank].T, module.lora_A["default"].weight.detach().numpy())
                    np.testing.assert_array_equal(b[:rank].T, module.lora_B["default"].weight.detach().numpy())
                    count += 1
    assert count == len(found) > 0


QUICK = ("regex", "everything")  # the others' ranks, scales and factors are PEFT's: the test before


@pytest.mark.parametrize(
    "adapter",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS],
    indirect=True,
)
def test_logits_are_peft_s(adapter, base):
    _, model, folder = adapter
    found = np.asarray(lowrank.load(base, folder, dtype="float32").logits(IDS))
    expected = torch_llama.logits(model, IDS)
    # float32 sums in another order
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    plain = torch_llama.logits(torch_llama.make(), IDS)
    assert np.abs(expected - plain).max() > 0.01 * np.abs(expected).max()


def test_there_and_back_gives_the_same_tensors(adapter, tmp_path):
    _, model, folder = adapter
    lora, config, name = read_peft(folder, LAYERS)
    write_peft(tmp_path / "back", lora, config, base_name=name or "base")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    reloaded = peft.PeftModel.from_pretrained(torch_llama.make(), tmp_path / "back").eval()
    np.testing.assert_array_equal(torch_llama.logits(reloaded, IDS), torch_llama.logits(model, IDS))


def test_an_adapter_of_one_rank_everywhere_is_even_in_whatever_words_it_is_said(tmp_path):
    for name in ("all-linear", "everywhere another rank"):
        adapted(ADAPTERS[name]).save_pretrained(tmp_path / name)
        assert not read_peft(tmp_path / name, LAYERS)[1].uneven
    assert read_peft(tmp_path / "everywhere another rank", LAYERS)[1] == LoraConfig(
        rank=4, alpha=5.0, targets=("q_proj", "v_proj")
    )


def test_the_words_all_linear_are_understood(tmp_path):
    adapted({"target_modules": list(TARGETS)}).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": "all-linear"}))
    assert read_peft(tmp_path, LAYERS)[1].targets == TARGETS


def test_a_bin_file_is_the_safetensors_file(tmp_path):
    model = adapted(ADAPTERS["everything"])
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    (one, config, _), (other, same, _) = (read_peft(tmp_path / name, LAYERS) for name in ("safe", "bin"))
    assert config == same
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_read_exactly(tmp_path, dtype):
    model = adapted(ADAPTERS["lists"]).to(dtype)
    model.save_pretrained(tmp_path)
    lora, _, _ = read_peft(tmp_path, LAYERS)
    expected = model.get_parameter("base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight")
    found = lora["layers"]["self_attn"]["q_proj"]["lora_a"][2].T
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.detach().float().numpy())


def test_every_field_of_peft_is_understood_harmless_or_refused_when_it_is_set(tmp_path):
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    named = {field.name for field in dataclasses.fields(peft.LoraConfig)} | fields.keys()
    assert "use_dora" in named and len(named) > 30
    for name in sorted(named - set(UNDERSTOOD) - set(HARMLESS) - {"runtime_config"}):  # the last is never saved
        path.write_text(json.dumps(fields | {name: "something" if name in SUPPORTED else True}))
        with pytest.raises(UserError, match=f"adapter_config.json: {name} = .* is not supported"):
            read_peft(tmp_path)
    path.write_text(json.dumps(fields))
    read_peft(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora = true"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight is saved whole, and only the base tells"),
        (
            {"modules_to_save": ["input_layernorm"]},
            'modules_to_save = ["input_layernorm"] is not supported: embed_tokens',
        ),
        ({"lora_bias": True}, "lora_bias = true"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa"'),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "base_model.model.model.embed_tokens.lora_embedding_A",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules puts adapters on lm_head"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = "),
    ],
)
def test_what_peft_can_do_beyond_is_refused_by_name(tmp_path, settings, said):
    adapted({"target_modules": ["q_proj"]} | settings).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        read_peft(tmp_path, LAYERS)
    assert said in str(error.value) and "\n" not in str(error.value)


def change_json(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_folder_a_little_off_is_what_peft_makes_of_it(base, tmp_path):
    """Tables saved along and equal to the base's, keys of a state dict, settings that mean nothing for linear layers."""
    model = adapted(ADAPTERS["everything"] | {"bias": "all"})
    expected = torch_llama.logits(model, IDS)
    opened = read_base(base)
    model.save_pretrained(tmp_path / "plain")
    plain, config, _ = read_peft(tmp_path / "plain", base=opened)
    model.save_pretrained(tmp_path / "tables", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "tables" / "adapter_model.safetensors")
    change_json(tmp_path / "tables" / "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "keys")
    change_json(tmp_path / "keys" / "adapter_config.json", fan_in_fan_out=True)
    file = tmp_path / "keys" / "adapter_model.safetensors"
    save_file({name.replace(".weight", ".default.weight"): leaf for name, leaf in load_file(file).items()}, file)
    for name in ("tables", "keys"):
        found, same, _ = read_peft(tmp_path / name, base=opened)
        assert same == config
        jax.tree.map(np.testing.assert_array_equal, found, plain)
        reloaded = peft.PeftModel.from_pretrained(torch_llama.make(), tmp_path / name).eval()
        np.testing.assert_allclose(torch_llama.logits(reloaded, IDS), expected, atol=1e-5, rtol=0, err_msg=name)
    save_file(load_file(file) | load_file(tmp_path / "plain" / "adapter_model.safetensors"), file)
    with pytest.raises(UserError, match=r"up_proj\.lora_A\.weight is there twice, also as .*default\.weight"):
        read_peft(tmp_path / "keys", base=opened)


def test_tables_and_biases_that_were_trained_are_refused_by_name(base, tmp_path):
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path, save_embedding_layers=True)
    file, head = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    opened = read_base(base)
    rounded = {head: tensors[head].astype(jnp.bfloat16)}
    save_file(tensors | rounded, file)  # saved in fewer bits: still the base's own
    read_peft(tmp_path, base=opened)
    tensors[head][-1, -1] += 1
    embedding = {"base_model.model.model.embed_tokens.weight": np.zeros((41, 24), np.float32)}
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": np.zeros(32, np.float32)}
    save_file(tensors | embedding | bias, file)
    with pytest.raises(UserError) as error:
        read_peft(tmp_path, base=opened)
    assert (
        "base_model.model.model.embed_tokens.weight is [41, 24] and the base's own [40, 24]: another vocabulary; "
        "base_model.model.lm_head.weight is saved whole and is not the base's own: it was trained, which is not supported; "
        "unknown: base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias; give"
    ) in str(error.value)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_saved_along_are_the_bases_own_or_refused_by_name(tmp_path, bias):
    model = torch_llama.make(attention_bias=True)
    opened = read_base(torch_llama.saved(model, tmp_path / "base"))
    model = adapted({"target_modules": ["q_proj"], "bias": bias}, base=model)
    model.save_pretrained(tmp_path / "own")
    assert any(name.endswith(".bias") for name in load_file(tmp_path / "own" / "adapter_model.safetensors"))
    assert read_peft(tmp_path / "own", base=opened)[1].targets == ("q_proj",)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers[1:]:
            layer.self_attn.q_proj.base_layer.bias += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        UserError, match=r": base_model\.\S+\.layers\.\{1,2\}\.\S+\.q_proj\.\S+\.bias was trained, which is not"
    ):
        read_peft(tmp_path / "trained", base=opened)


@pytest.fixture
def mlx(tmp_path):
    """An adapter as mlx-lm saves it, on the last two of three layers: y = x W + scale · (x lora_a) lora_b."""
    random = np.random.default_rng(0)
    tensors = {}
    for target, inputs, outputs in (("self_attn.q_proj", 24, 32), ("mlp.down_proj", 20, 24)):
        for layer in (1, 2):
            for name, shape in (("a", (inputs, 4)), ("b", (4, outputs))):
                tensors[f"model.layers.{layer}.{target}.lora_{name}"] = random.normal(0, 0.3, shape).astype(np.float32)
    save_file(tensors, tmp_path / "adapters.safetensors")
    parameters = {"rank": 4, "dropout": 0.1, "scale": 2.5, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "a/b", "iters": 50}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    return tmp_path, tensors, parameters


def test_an_adapter_of_mlx_lm_computes_what_it_says(mlx, base):
    folder, tensors, parameters = mlx
    model = torch_llama.make()
    with torch.no_grad():
        for name in [name[:-1] for name in tensors if name.endswith("lora_a")]:
            weight = model.get_parameter(name.replace("lora_", "weight"))
            weight += torch.tensor(2.5 * (tensors[f"{name}a"] @ tensors[f"{name}b"]).T)
    expected = torch_llama.logits(model, IDS)
    found = np.asarray(lowrank.load(base, folder, dtype="float32").logits(IDS))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # float32 sums in another order
    lora, config, name = read_peft(folder, LAYERS)
    assert (config.layer_ranks("q_proj", LAYERS), config.layer_scales("q_proj", LAYERS)[1:]) == ((0, 4, 4), (2.5, 2.5))
    assert (config.alpha, config.dropout, config.targets, name) == (10.0, 0.1, ("q_proj", "down_proj"), "a/b")
    # Without keys they are those in the file; more layers than there are, or -1, are all of them.
    del parameters["keys"]
    change_json(folder / "adapter_config.json", lora_parameters=parameters)
    jax.tree.map(np.testing.assert_array_equal, read_peft(folder, LAYERS)[0], lora)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fine_tune_type": "dora"}, 'fine_tune_type = "dora" is not supported'),
        ({"fine_tune_type": "full", "lora_parameters": None}, "lora_parameters = null is not an object"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "alpha": 16}}, "lora_parameters.alpha belongs to releases"),
        ({"lora_parameters": {"rank": 0}}, "scale is missing; lora_parameters.rank = 0 is not a positive integer"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_layers": -1}, "missing: model.layers.0.self_attn.q_proj.lora_a, model.layers.0.self_attn.q_proj.lora_b"),
        ({"num_layers": 1}, "unknown: model.layers.1.mlp.down_proj.lora_a"),
    ],
)
def test_what_an_adapter_of_mlx_lm_has_wrong_is_named(mlx, change, said):
    change_json(mlx[0] / "adapter_config.json", **change)
    with pytest.raises(UserError) as error:
        read_peft(mlx[0], LAYERS)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": None}, "target_modules is missing"),
        ({"lora_alpha": None, "r": None}, "r is missing; lora_alpha is missing"),
        ({"lora_alpha": float("inf")}, "lora_alpha = Infinity is not a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "is not a table from patterns to alphas"),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5 is not"),
        ({"lora_dropout": "some"}, 'lora_dropout = "some" is not'),
        ({"use_rslora": "false"}, 'use_rslora = "false" is not true or false'),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path = "),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules puts adapters on lm_head, which is not supported"),
        ({"target_modules": ".*"}, "target_modules puts adapters on model.embed_tokens and lm_head"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "is not a table from patterns to ranks"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["("]},
            'layers_pattern = ["("] is not a name or a list of them',
        ),
        ({"target_modules": ["c_attn"]}, '["c_attn"] matches no projection'),
        ({"exclude_modules": ".*"}, "matches no projection"),
        ({"layers_to_transform": [7]}, "unknown: base_model.model.model.layers.{0,1,2}.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_settings_of_the_wrong_kind_are_one_line(tmp_path, change, said):
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_peft(tmp_path, LAYERS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_layer_of_an_absurd_number_is_an_unknown_key(tmp_path):
    """A damaged digit must not make the reader count that far, nor list that many missing layers."""
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    far = "base_model.model.model.layers.200000.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {far: np.zeros((2, 24), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        read_peft(tmp_path)
    assert f"unknown: {far}" in str(error.value) and "missing" not in str(error.value)


def test_what_peft_ignores_in_a_file_is_ignored(tmp_path):
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": False}}))
    assert read_peft(tmp_path, LAYERS)[1].targets == ("q_proj",)


def test_overlapping_patterns_mean_what_peft_makes_of_the_file(tmp_path):
    """PEFT sorts the patterns when it saves and takes the first that matches: a file may say other than the training did."""
    model = adapted({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 9, ".*_proj": 3}})
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert model.get_submodule(name).scaling["default"] == 9 / 2
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(torch_llama.make(), tmp_path)
    assert again.get_submodule(name).scaling["default"] == 3 / 2
    assert read_peft(tmp_path, LAYERS)[1].layer_scales("q_proj", LAYERS) == (1.5, 1.5, 1.5)


def test_an_adapter_of_another_base_is_refused_with_every_misfit(base, tmp_path):
    adapted({"target_modules": ["q_proj", "v_proj"]}, base=torch_llama.make(layers=5)).save_pretrained(
        tmp_path / "deeper"
    )
    with pytest.raises(
        UserError, match=r"unknown: base_model\.model\.model\.layers\.\{3,4\}\.self_attn\.q_proj\.lora_A"
    ):
        lowrank.load(base, tmp_path / "deeper")
    adapted({"target_modules": ["q_proj"]}, base=torch_llama.make(layers=2)).save_pretrained(tmp_path / "shallower")
    with pytest.raises(UserError, match=r"missing: base_model\.model\.model\.layers\.2\.self_attn\.q_proj\.lora_A"):
        lowrank.load(base, tmp_path / "shallower")
    adapted({"target_modules": ["q_proj", "o_proj"]}, base=torch_llama.make(head_dim=4)).save_pretrained(
        tmp_path / "wide"
    )
    fields = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "a/b"}))
    with pytest.raises(UserError) as error:
        lowrank.load(base, tmp_path / "wide")
    for said in (
        "which was made for a/b, does not fit",
        "q_proj/lora_b is (3, 2, 16) there and (3, 2, 32)",
        "o_proj/lora_a",
    ):
        assert said in str(error.value)


def test_factors_that_are_not_finite_are_named(tmp_path):
    adapted({"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"infinite or undefined values in base_model.*layers\.1\.self_attn\.q_proj\.lora_B"
    ):
        read_peft(tmp_path)


@pytest.mark.slow  # tests/runs/test_train.py starts an uneven run through PEFT; the logits above are PEFT's
def test_from_peft_through_training_and_back_to_peft(base, tmp_path):
    """An uneven adapter is started from, trained (what is padding stays zero), exported, and loaded by peft."""
    adapted(ADAPTERS["everything"]).save_pretrained(tmp_path / "start")
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "abc", "completion": "defg" * i} for i in range(1, 9)]))
    (tmp_path / "config.py").write_text(
        "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict()\n"
    )
    overrides = {
        "base": base,
        "init_adapter": tmp_path / "start",
        "data.train": tmp_path / "data.json",
        "data.format": "completion",
        "data.max_length": 32,
        "lora.rank": 2,
        "lora.alpha": 5.0,
        "lora.scaling": "rslora",
        "lora.targets": "q_proj,v_proj,up_proj",
        "train.steps": 2,
        "train.batch_size": 2,
        "optim.learning_rate": 0.01,
        "optim.weight_decay": 0.1,
        "dtype": "float32",
        "param_dtype": "float32",
    }
    flags = [f"--config={tmp_path / 'config.py'}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    run = tmp_path / "run"
    finished = running.run("train", *flags, f"--workdir={run}")
    assert finished.code == 0, finished.err
    assert "rank 1 to 4, none in 3 of 9 places" in finished.out
    for folder in (tmp_path / "start").iterdir():
        folder.unlink()  # a run that has begun does not need it any more
    finished = running.run("train", *flags, f"--workdir={run}", "--config.train.steps=3")
    assert finished.code == 0 and "resumed from step 2" in finished.out, finished.err

    finished = running.run("export", f"--workdir={run}", "--format=peft", f"--to={tmp_path / 'out'}")
    assert finished.code == 0, finished.err
    config = read_peft(tmp_path / "out", LAYERS)[1]
    assert config.layer_ranks("up_proj", LAYERS) == (0, 2, 1) and config.layer_alphas("q_proj", LAYERS)[1] == 3.0
    loaded = peft.PeftModel.from_pretrained(torch_llama.make(), tmp_path / "out").eval()
    expected, found = torch_llama.logits(loaded, IDS), np.asarray(lowrank.load(base, run).logits(IDS))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    finished = running.run(
        "export", f"--workdir={run}", "--format=merged", f"--to={tmp_path / 'merged'}", "--dtype=float32"
    )
    assert finished.code == 0, finished.err
    import transformers

    merged = torch_llama.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS)
    assert np.abs(merged - expected).max() < 1e-5 * np.abs(expected).max()

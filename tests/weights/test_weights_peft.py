"""PEFT folders: the real `peft` loads what is written and computes the same, and what it writes is read."""

import json
import os

import numpy as np
import pytest
import torch_llama
from safetensors.numpy import load_file, save_file
from test_weights_merged import IDS, random_lora, read
from torch_llama import torch

from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.errors import UserError
from lowrank.weights.peft import read_peft, verify_peft, write_peft

peft = pytest.importorskip("peft")

CONFIG = LoraConfig(rank=3, alpha=4.0, dropout=0.05, targets=("q_proj", "v_proj", "down_proj"), scaling="rslora")


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return read(torch_llama.saved(torch_llama.make(), tmp_path_factory.mktemp("base")))[1]


@pytest.fixture
def written(params, tmp_path):
    lora = random_lora(params, CONFIG.targets)
    write_peft(tmp_path / "adapter", lora, CONFIG, base_name="someone/base")
    return tmp_path / "adapter", lora


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS])
def test_peft_loads_what_is_written_and_computes_the_same(params, tmp_path, targets, scaling):
    config = LoraConfig(rank=3, alpha=1.0, dropout=0.1, targets=targets, scaling=scaling)
    lora = random_lora(params, targets)
    write_peft(tmp_path / "adapter", lora, config, base_name="base")
    adapted = torch_llama.make()
    torch_llama.add_delta(adapted, lora, 1 / 3 if scaling == "standard" else 1 / 3**0.5)
    loaded = peft.PeftModel.from_pretrained(torch_llama.make(), tmp_path / "adapter").eval()
    # x W + s (x A) B against x (W + s A B) in float32: sums in another order, through three layers, logits of size 10.
    np.testing.assert_allclose(torch_llama.logits(loaded, IDS), torch_llama.logits(adapted, IDS), rtol=0, atol=2e-4)
    assert np.abs(torch_llama.logits(loaded, IDS) - torch_llama.logits(torch_llama.make(), IDS)).max() > 1


@pytest.mark.parametrize("targets", [["v_proj", "gate_proj"], list(TARGETS)])
def test_what_peft_writes_is_read(tmp_path, targets):
    settings = peft.LoraConfig(
        r=2, lora_alpha=5, lora_dropout=0.25, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_llama.make(), settings)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    model.save_pretrained(tmp_path)
    lora, config, _ = read_peft(tmp_path)
    assert config == LoraConfig(
        rank=2, alpha=5.0, dropout=0.25, targets=tuple(t for t in TARGETS if t in targets), scaling="rslora"
    )
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for target in targets:
        block = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer in range(3):
                key = f"base_model.model.model.layers.{layer}.{block}.{target}.{theirs}.default.weight"
                np.testing.assert_array_equal(lora["layers"][block][target][ours][layer], state[key].T)
    assert sum(len(modules) for modules in lora["layers"].values()) == len(targets)


def test_the_written_files_are_the_contract(written):
    folder, lora = written
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 3,
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 3 * 3 * 2
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[key], lora["layers"]["mlp"]["down_proj"]["lora_a"][2].T)
    assert tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (16, 3)


def test_what_is_written_reads_back(written):
    folder, lora = written
    found, config, base_name = read_peft(folder)
    assert (config, base_name) == (CONFIG, "someone/base")
    verify_peft(folder, lora, CONFIG)
    np.testing.assert_array_equal(
        found["layers"]["self_attn"]["q_proj"]["lora_a"], lora["layers"]["self_attn"]["q_proj"]["lora_a"]
    )
    assert found["layers"].keys() == {"self_attn", "mlp"}


def test_verification_names_what_differs(written):
    folder, lora = written
    lora["layers"]["mlp"]["down_proj"]["lora_b"][0, 0, 0] += 1
    with pytest.raises(UserError, match=r"other than it was written: layers/mlp/down_proj/lora_b; check the disk"):
        verify_peft(folder, lora, CONFIG)


def test_an_alpha_that_is_no_integer(params, tmp_path):
    config = LoraConfig(rank=3, alpha=4.5, targets=("k_proj",))
    write_peft(tmp_path / "adapter", random_lora(params, ("k_proj",)), config, base_name="base")
    assert read_peft(tmp_path / "adapter")[1] == config


def test_an_existing_folder_is_refused(written):
    folder, lora = written
    with pytest.raises(UserError, match="adapter: exists and is not an empty folder"):
        write_peft(folder, lora, CONFIG, base_name="base")
    verify_peft(folder, lora, CONFIG)


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        read_peft(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_that_are_not_understood_are_refused_by_name(written):
    path = written[0] / "adapter_config.json"
    change = {
        "use_dora": True,
        "rank_pattern": {"q_proj": -8},
        "bias": "some",
        "init_lora_weights": "pissa",
        "layers_to_transform": [0, "1"],
        "target_modules": ["q_proj", 7],
        "alpha_pattern": {"(": 8},
        "r": 0,
        "something_new": 7,
        "something_off": False,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refusal(written[0]) == (
        f'{path}: use_dora = true is not supported; bias = "some" is not supported; init_lora_weights = "pissa" is not '
        "supported; something_new = 7 is not supported; r = 0 is not a positive integer; "
        'target_modules = ["q_proj", 7] is not a list of names or a regex; layers_to_transform = [0, "1"] is not a layer '
        'or a list of them; rank_pattern = {"q_proj": -8} is not a table from patterns to ranks; '
        'alpha_pattern = {"(": 8} is not a table from patterns to alphas; give an adapter that does without'
    )


def test_another_method_than_lora_is_named_alone(written):
    path = written[0] / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "VERA", "r": 256, "d_initial": 0.1}))
    said = "is not supported, it is another method than LoRA"
    assert refusal(written[0]) == f'{path}: peft_type = "VERA" {said}; give an adapter whose peft_type is "LORA"'


def test_keys_that_match_nothing_are_refused_with_all_names(written):
    """The commonest complaint about the peers: a wrong prefix that loads as a silent no-op."""
    path = written[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    wrong = {name.replace("base_model.model.model", "base_model.model"): value for name, value in tensors.items()}
    save_file(wrong, path)
    text = refusal(written[0])
    assert "unknown: base_model.model.layers.{0,1,2}.mlp.down_proj.lora_A.weight" in text
    form = "base_model.model.model.layers.*.self_attn.q_proj.lora_A.weight"
    assert f"no tensor has a name that target_modules stands for (such as {form})" in text


def test_missing_layers_and_wrong_shapes_are_one_error(written):
    path = written[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] = np.zeros((16, 4), np.float32)
    tensors["base_model.model.lm_head.weight"] = np.zeros((40, 24), np.float32)
    save_file(tensors, path)
    assert refusal(written[0]) == (
        f"{path} (an adapter of someone/base): base_model.model.lm_head.weight is saved whole, and only the base tells whether "
        "it is its own; missing: base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight; base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight is "
        "[16, 4], which does not fit a rank of 3; give the base it belongs to, or fetch the adapter again"
    )


def test_no_adapter_folder_no_tensors_and_broken_json(written, tmp_path):
    assert "nowhere/adapter_config.json: cannot be read as PEFT's settings" in refusal(tmp_path / "nowhere")
    (written[0] / "adapter_model.safetensors").rename(written[0] / "adapter_model.bin")
    assert "adapter_model.bin cannot be read (not a zip" in refusal(written[0])
    (written[0] / "adapter_model.bin").unlink()
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in refusal(written[0])
    (written[0] / "adapter_config.json").write_text("[]")
    assert "adapter_config.json: cannot be read as PEFT's settings" in refusal(written[0])

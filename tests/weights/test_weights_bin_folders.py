"""Hugging Face folders of PyTorch's `.bin` files."""

import json

import pytest
import torch_llama
from torch_llama import torch

from lowrank.errors import UserError
from lowrank.weights import huggingface
from lowrank.weights.base import read_base


@pytest.fixture(scope="module")
def model():
    model = torch_llama.make(dtype=torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def save_bin(model, folder, shards=1):
    """A folder as transformers 4 wrote it: the state dict in one file, or in several with an index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_bin_files_is_the_folder_of_safetensors(model, tmp_path, shards):
    ours = read_base(save_bin(model, tmp_path / "bin", shards))
    theirs = read_base(torch_llama.saved(model, tmp_path / "safe"))
    assert (ours.fingerprint, ours.config) == (theirs.fingerprint, theirs.config)


def test_safetensors_are_taken_where_a_folder_has_both(model, tmp_path):
    folder = torch_llama.saved(model, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"broken, and not looked at")
    assert read_base(folder).fingerprint == read_base(torch_llama.saved(model, tmp_path / "safe")).fingerprint


def test_an_index_of_bin_files_is_held_to(model, tmp_path):
    folder = save_bin(model, tmp_path / "bin", shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"00002-of-00003\.bin missing, pytorch_model\.bin\.index\.json names them"):
        read_base(folder)
    first = torch.load(folder / "pytorch_model-00001-of-00003.bin")
    twice = dict([next(iter(first.items()))])
    torch.save(twice, folder / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is in .*1-of.* and .*2-of.*; the index names"):
        read_base(folder)


def test_a_dtype_that_no_model_has_is_refused(model, tmp_path):
    folder = save_bin(model, tmp_path / "bin")
    torch.save({"model.norm.weight": torch.ones(24, dtype=torch.float64)}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"model\.norm\.weight is held in float64, supported are float32, float16, bfloat16"
    ):
        huggingface.open_folder(folder)

"""PyTorch's files: what torch saves is read bit for bit without it, and what is no dict of tensors is refused unrun."""

import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch_llama
from torch_llama import torch

from lowrank.errors import UserError
from lowrank.weights import huggingface
from lowrank.weights.base import read_base
from lowrank.weights.torch_file import open_torch_file

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def opened(path) -> dict:
    problems = []
    tensors = open_torch_file(path, problems)
    assert problems == []
    return tensors


def refused(path) -> str:
    problems = []
    assert open_torch_file(path, problems) == {}
    (problem,) = problems
    assert "\n" not in problem and problem.startswith(path.name)
    return problem


def as_bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(tensor.numpy())


def test_tensors_of_every_dtype_view_and_sharing_arrive_bit_for_bit(tmp_path):
    draw = torch.Generator().manual_seed(0)
    big = torch.randn(40, 50, generator=draw)
    tensors = {str(dtype): (big * 3).to(dtype) for dtype in DTYPES}
    tensors |= {
        "parameter": torch.nn.Parameter(big[:3].clone()),
        "transposed": big.t(),
        "rows": big[5:9, 3:40:2],
        "whole": big,
        "same": big,
        "expanded": torch.ones(1, 4).expand(3, 4),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    torch.save(tensors, tmp_path / "x.bin")
    found = opened(tmp_path / "x.bin")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].whole().tobytes() == as_bits(tensor), name
    part = found["transposed"].read((slice(3, 20), slice(1, 7)))
    np.testing.assert_array_equal(part, big.t()[3:20, 1:7].numpy())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_module_s_state_dict_with_its_metadata_is_read(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "x.pth", pickle_protocol=protocol)
    found = opened(tmp_path / "x.pth")
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(found[name].whole(), tensor.numpy())


def test_it_needs_no_torch(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "x.bin")
    script = (
        "import sys, pathlib; sys.modules['torch'] = None\n"
        "from lowrank.weights.torch_file import open_torch_file\n"
        f"print(open_torch_file(pathlib.Path({str(tmp_path / 'x.bin')!r}), [])['x'].whole().sum())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "3.0\n"


# ---- Pickles that are programs ---------------------------------------------------------------------------------------


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def with_pickle(path, content: bytes):
    """A file of torch.save with another pickle in it, whole in every other way."""
    torch.save({"x": torch.ones(3)}, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as before, zipfile.ZipFile(path, "w") as after:
        for entry in before.infolist():
            after.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else before.read(entry))
    return path


def test_a_foreign_global_is_refused_by_name_and_never_run(tmp_path):
    import os

    mark = tmp_path / "executed"
    programs = {
        "posix.system": Calls(os.system, f"touch {mark}"),
        "builtins.eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": {"weight": [Calls(exec, f"open({str(mark)!r}, 'w')")]},
        "builtins.getattr": Calls(getattr, "x", "upper"),
        "_io.open": (Calls(open, str(mark), "w"),),
    }
    for name, program in programs.items():
        path = with_pickle(tmp_path / "evil.bin", pickle.dumps(program, protocol=2))
        assert name in refused(path).replace("__builtin__", "builtins").replace("io.open", "_io.open").replace(
            "__io", "_io"
        )
        assert "was not run" in refused(path)
        assert not mark.exists()


def test_all_foreign_globals_are_listed(tmp_path):
    program = {"a": Calls(print, "x"), "b": [Calls(eval, "1")], "c": Calls(np.zeros, 3)}
    message = refused(with_pickle(tmp_path / "evil.bin", pickle.dumps(program, protocol=4)))
    assert all(name in message for name in ("builtins.print", "builtins.eval", "zeros"))


def test_a_module_saved_whole_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "a pickle with 2147483647 notes"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "a pickle with NEWOBJ"),
        (b"\x80\x02\x82\x01.", "a pickle with EXT1"),
        (b"\x80\x02(K\x01K\x02i__main__\nx\n.", "a pickle with INST"),
        (b"\x80\x02K\x05.", "holds a int, not a dict"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x05s.", "'a' is a int"),
        (b"\x80\x02}(K\x05K\x06u.", "5 is no name"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "TypeError"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x05sb0.", "pickle"),
        (b"\x80\x02", "pickle"),
        (b"", "pickle"),
    ],
)
def test_strange_pickles_are_refused(tmp_path, content, said):
    assert said in refused(with_pickle(tmp_path / "x.bin", content))


# ---- Files that are damaged, or something else -----------------------------------------------------------------------


def test_other_files_are_told_apart(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert "older than 1.6: load it with torch and save it again" in refused(tmp_path / "old.bin")
    for name, content in (("text.bin", b"version https://git-lfs"), ("nothing.bin", b"")):
        (tmp_path / name).write_bytes(content)
        assert "is no file of torch.save (no zip archive)" in refused(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("a.txt", "x")
    assert "holds 0 entries data.pkl, not one" in refused(tmp_path / "other.bin")
    assert "cannot be read (No such file" in refused(tmp_path / "absent.bin")


def test_compressed_entries_and_big_endian_files_are_refused(tmp_path):
    torch.save({"x": torch.ones(300)}, tmp_path / "plain.bin")
    for name, change in (("packed", None), ("endian", b"big")):
        with zipfile.ZipFile(tmp_path / "plain.bin") as before, zipfile.ZipFile(tmp_path / f"{name}.bin", "w") as after:
            for entry in before.infolist():
                content = change if change and entry.filename.endswith("byteorder") else before.read(entry)
                packed = change is None and "data/0" in entry.filename
                after.writestr(entry.filename, content, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    assert "data/0 compressed" in refused(tmp_path / "packed.bin")
    assert "big-endian" in refused(tmp_path / "endian.bin")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    torch.save({"x": torch.arange(1000.0), "y": torch.ones(7)}, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    for twentieth in range(20):
        (tmp_path / "cut.bin").write_bytes(content[: len(content) * twentieth // 20])
        assert refused(tmp_path / "cut.bin")


def test_no_flipped_bit_gives_other_numbers(tmp_path):
    tensors = {
        "x": torch.arange(40.0).reshape(5, 8),
        "y": torch.ones(7, dtype=torch.bfloat16),
        "z": torch.arange(20000.0),
    }
    torch.save(tensors, tmp_path / "x.bin")
    content, draw = (tmp_path / "x.bin").read_bytes(), np.random.default_rng(0)
    outcomes = {"refused": 0, "the same": 0}
    places = [
        *draw.integers(0, len(content), 250),
        *draw.integers(0, 2500, 250),
        *draw.integers(len(content) - 1500, len(content), 250),
    ]
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << draw.integers(8)
        (tmp_path / "spoilt.bin").write_bytes(spoilt)
        problems = []
        try:
            found = {
                name: tensor.whole().tobytes()
                for name, tensor in open_torch_file(tmp_path / "spoilt.bin", problems).items()
            }
        except UserError as error:
            assert "were written (CRC-32), it is corrupt; fetch it again" in str(error)
            found = {}
        # A flip in padding between the entries, or in a time stamp, harms nothing; any other must not pass.
        right = found == {name: as_bits(tensor) for name, tensor in tensors.items()}
        renamed = sorted(found.values()) == sorted(as_bits(tensor) for tensor in tensors.values())
        assert right or not found, (place, found.keys(), renamed)
        outcomes["the same" if right else "refused"] += 1
    assert outcomes["refused"] > 300 and outcomes["the same"] > 0


def test_a_flipped_bit_in_a_large_tensor_is_found_when_it_is_loaded_and_not_before(tmp_path):
    torch.save({"x": torch.arange(100_000.0)}, tmp_path / "x.bin")
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "x.bin").write_bytes(content)
    (tensor,) = opened(tmp_path / "x.bin").values()
    tensor.read((slice(0, 100),))
    with pytest.raises(UserError, match=r"x\.bin holds other bytes in x/data/0 than were written"):
        tensor.whole()


# ---- Hugging Face folders of them ------------------------------------------------------------------------------------


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
    import json

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
    with pytest.raises(UserError, match=r"model\.norm\.weight is held in float64, supported are F32, F16, BF16"):
        huggingface.open_folder(folder)

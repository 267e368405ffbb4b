"""PyTorch's files: everything that torch writes for a dict of tensors arrives to the bit, and nothing in a file is run."""

import builtins
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from lowrank.errors import UserError
from lowrank.weights.torch_file import open_torch_file

torch = pytest.importorskip("torch")


def opened(path):
    problems = []
    tensors = open_torch_file(path, problems)
    assert problems == []
    return tensors


def refusal(path) -> str:
    problems = []
    assert open_torch_file(path, problems) == {}
    (problem,) = problems
    assert "\n" not in problem and problem.startswith(path.name)
    return problem.removeprefix(path.name + " ")


def saved(tmp_path, value, name="model.bin", **options):
    torch.save(value, tmp_path / name, **options)
    return tmp_path / name


def with_entries(path, changes: dict, compression=zipfile.ZIP_STORED):
    """The file again, some entries with other contents; the zip itself is sound, checksums included."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in contents.items():
            new.writestr(name, changes.get(name.partition("/")[2], content))
    return path


def with_pickle(tmp_path, program: bytes):
    return with_entries(saved(tmp_path, {"w": torch.ones(3)}), {"data.pkl": program})


def bits(tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def assert_equal(tensors, reference):
    assert list(tensors) == list(reference)
    for name, tensor in reference.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert tensors[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.frombuffer(tensors[name].whole().tobytes(), np.uint8), bits(tensor))


# ---------------------------------------------------------------------------------------------------- what torch writes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_dtype_arrive_to_the_bit(tmp_path, dtype, protocol):
    torch.manual_seed(0)
    reference = {
        "matrix": torch.randn(37, 5).to(dtype),
        "parameter": torch.nn.Parameter(torch.randn(4).to(dtype)),
        "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0]).to(dtype),
    }
    assert_equal(opened(saved(tmp_path, reference, pickle_protocol=protocol)), reference)


def test_a_modules_state_dict_with_its_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    assert_equal(opened(saved(tmp_path, module.state_dict())), module.state_dict())


def test_views_of_one_storage_are_read_from_it(tmp_path):
    whole = torch.randn(6, 8)
    reference = {
        "whole": whole,
        "again": whole,
        "transposed": whole.T,
        "inner": whole[1:5, 2:7:2],
        "repeated": whole[2].expand(4, 8),
    }
    path = saved(tmp_path, reference)
    tensors = opened(path)
    assert_equal(tensors, reference)
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1  # else nothing is shared here
    part = (slice(1, 3), slice(1, 2))
    for name, tensor in reference.items():
        np.testing.assert_array_equal(tensors[name].read(part), tensor[part].numpy())


def test_a_file_written_to_a_buffer_or_under_another_alphabet_is_read(tmp_path):
    with open(tmp_path / "buffer.bin", "wb") as file:
        torch.save({"w": torch.ones(3)}, file)
    assert_equal(opened(tmp_path / "buffer.bin"), {"w": torch.ones(3)})
    assert_equal(opened(saved(tmp_path, {"w": torch.ones(3)}, "modèle.bin")), {"w": torch.ones(3)})


def test_other_dtypes_are_refused_by_name_unless_they_are_rotary_frequencies(tmp_path):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    path = saved(tmp_path, {"w": torch.ones(2), **frequencies})
    assert_equal(opened(path), {"w": torch.ones(2)})
    problems = []
    wrong = {"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(2, dtype=torch.bool), "c": torch.ones(2).double()}
    assert open_torch_file(saved(tmp_path, wrong), problems) == {}
    assert problems == [
        "a is held in int64, supported are float32, float16, bfloat16",
        "b is held in bool, supported are float32, float16, bfloat16",
        "c is held in float64, supported are float32, float16, bfloat16",
    ]


def test_a_dict_around_the_state_dict_is_named(tmp_path):
    problems = []
    assert open_torch_file(saved(tmp_path, {"state_dict": {"w": torch.ones(2)}, "epoch": 3}), problems) == {}
    assert problems == [
        "model.bin: state_dict is a dict of 1, not a tensor",
        "model.bin: epoch is a value of type int, not a tensor",
    ]
    message = "holds a value of type list, not a dict of tensors; save the model's state_dict"
    assert refusal(saved(tmp_path, [torch.ones(2)])) == message


def test_torch_is_not_needed(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3)})
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from lowrank.weights.torch_file import open_torch_file\n"
        f"print(open_torch_file({str(path)!r}, [])['w'].whole())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[1. 1. 1.]\n"


# ------------------------------------------------------------------------------------------------------ hostile pickles


class Calls:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Stated:
    def __reduce__(self):
        return object, (), {"x": 1}


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), ["posix.system"]),
        (lambda mark: Calls(eval, f"open({mark!r}, 'w')"), ["builtin", ".eval"]),
        (lambda mark: Calls(exec, f"open({mark!r}, 'w')"), ["builtin", ".exec"]),
        (lambda mark: Calls(open, mark, "w"), ["io.open"]),
        (lambda mark: Calls(subprocess.check_output, ["touch", mark]), [".check_output"]),
        (lambda mark: [{"deep": (Calls(os.system, f"touch {mark}"),)}], ["posix.system"]),
        (lambda mark: Calls(getattr, "x", "upper"), ["builtin", ".getattr"]),
        (lambda mark: {Calls(os.mkdir, mark): 1}, ["posix.mkdir"]),
        (lambda mark: np.ones(3), ["numpy", "_reconstruct"]),
        (lambda mark: torch.ones(3).as_subclass(Tagged), ["torch._tensor._rebuild_from_type_v2", "Tagged"]),
        (lambda mark: torch.ones(3).to(torch.float8_e4m3fn), ["torch._utils._rebuild_tensor_v3"]),
        (lambda mark: Stated(), ["builtin", ".object"]),
    ],
)
def test_a_foreign_global_is_refused_by_name_and_not_run(tmp_path, make, names, protocol):
    mark = tmp_path / "was_run"
    value = {"w": torch.ones(2), "x": make(str(mark)), "y": Calls(print, "run")}
    path = saved(tmp_path, value, pickle_protocol=protocol)
    text = refusal(path)
    assert text.startswith("asks for ") and "nothing of it was run" in text
    for name in [*names, ".print"]:  # all of them, not the first
        assert name in text
    assert not mark.exists()


OPENING = b"\x80\x02}X\x01\x00\x00\x00w"  # {"w": what follows
CHAIN = OPENING + (  # getattr(__import__("os"), "system")
    b"c__builtin__\ngetattr\nc__builtin__\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86Rs."
)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (OPENING + b"(X\x01\x00\x00\x00xios\nsystem\ns.", "asks for os.system,"),
        (OPENING + b"cos\nsystem\nX\x04\x00\x00\x00true\x85R0", "asks for os.system,"),  # called, and dropped
        (OPENING + b"cos\nsystem\n", "asks for os.system,"),  # with nothing behind it
        (CHAIN, "asks for __builtin__.getattr, __builtin__.__import__, which"),
        (OPENING + b"\x82\x01s.", "has the instruction EXT1, which torch.save does not write"),
        (OPENING + b"\x8c\x09os\nsystem\x8c\x01x\x93s.", "asks for os?system.x,"),
        (OPENING + b"K\x01)Rs.", "cannot be read ('int' object is not callable), it is"),
        (OPENING + b"ccollections\nOrderedDict\nK\x01\x85Rs.", "takes 1 positional argument but 2 were given), it is"),
        (
            OPENING + b"ccollections\nOrderedDict\n)\x81\x8e" + b"\xff" * 6 + b"\x00\x00s.",
            "the instruction BINBYTES8, which",
        ),
        (OPENING + b"r\xff\xff\xff\xffs.", "cannot be read (list index out of range), it is"),  # no memo of that size,
        (OPENING + b"ccollections\nOrderedDict\n)\x81K\x01}bs.", "gives a state to what has none"),
        (OPENING + b"(X\x06\x00\x00\x00modulecos\nsystem\ntQs.", "asks for os.system,"),
        (OPENING + b"K\x01Qs.", "refers to something other than a storage"),
        (OPENING + b"X\x01\x00\x00\x00xK\x01as.", "cannot be read ('str' object has no attribute 'append'), it is"),
        (OPENING + b"h\x05s.", "cannot be read (Memo value not found at index 5), it is"),
        (OPENING + b"s.", "cannot be read (list index out of range), it is"),
        (
            b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
            "has a key that is no name",
        ),  # its hash would end the process
        (
            OPENING + b"ccollections\nOrderedDict\n])" + b"\x85" * 300_000 + b"K\x01\x86a\x85Rs.",
            "takes 1 positional argument",
        ),  # the same key, handed to a dict's constructor
        (b"\x80\x02}", "has no end"),
        (b"", "cannot be read ("),
        (b"\x80\x02K\x07.", "not a dict of tensors"),
    ],
)
def test_a_pickle_that_torch_does_not_write_is_one_line(tmp_path, program, said):
    assert said in refusal(with_pickle(tmp_path, program))


def test_a_registered_extension_is_not_looked_up(tmp_path):
    """pickle itself keeps what a code was once unpickled to, and gives it out without asking anybody."""
    script = f"""
import copyreg, os, pickle, pathlib
copyreg.add_extension("os", "system", 77)
copyreg.add_extension("posix", "system", 78)
pickle.loads(pickle.dumps(os.system, 2))
from lowrank.weights.torch_file import open_torch_file
problems = []
print(open_torch_file({str(tmp_path / "model.bin")!r}, problems), problems)
"""
    mark = str(tmp_path / "was_run").encode()
    call = b"X" + struct.pack("<I", 6 + len(mark)) + b"touch " + mark + b"\x85R"
    with_pickle(tmp_path, OPENING + b"\x82\x4e" + call + b"s.")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("{} ['model.bin cannot be read (the pickle has the instruction EXT1")
    assert not (tmp_path / "was_run").exists()


def test_no_import_and_no_builtin_is_reached_while_a_pickle_is_run(tmp_path, monkeypatch):
    path = saved(tmp_path, {"w": torch.ones(2), "x": Calls(os.system, "true"), "y": Calls(eval, "1")})
    reached = []
    for module, name in ((builtins, "eval"), (builtins, "exec"), (os, "system")):
        monkeypatch.setattr(module, name, lambda *_, name=name: reached.append(name))
    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: reached.append(name) or importing(name, *rest))
    open_torch_file(path, [])
    monkeypatch.undo()
    assert reached == []


def test_a_tensor_with_pending_changes_is_refused(tmp_path):
    negated = torch.randn(4, dtype=torch.complex64).conj().imag  # its bytes have the other sign
    assert negated.is_neg()
    assert "has a tensor with hooks or pending changes" in refusal(saved(tmp_path, {"w": negated}))


# ------------------------------------------------------------------------------------------------------- damaged files


def test_files_of_another_kind_are_named(tmp_path):
    old = saved(tmp_path, {"w": torch.ones(3)}, _use_new_zipfile_serialization=False)
    assert refusal(old) == "is in the format of PyTorch before 1.6; load it there and save it again"
    pointer = tmp_path / "pointer.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(pointer) == "cannot be read (not a zip, as PyTorch's files are), it is truncated or corrupt"
    (tmp_path / "none.bin").touch()
    assert refusal(tmp_path / "none.bin").startswith("cannot be read (not a zip")
    (tmp_path / "folder.bin").mkdir()
    assert refusal(tmp_path / "folder.bin") == "cannot be read (Is a directory)"
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("readme", "nothing")
    assert refusal(tmp_path / "other.bin") == "is a zip with no data.pkl, PyTorch's have one; fetch it again"
    assert refusal(with_entries(saved(tmp_path, {}), {}, zipfile.ZIP_DEFLATED)).startswith(
        "holds compressed entries (model/data.pkl)"
    )
    assert refusal(with_entries(saved(tmp_path, {}), {"byteorder": b"big"})).startswith("was written by a big-endian")


def test_a_storage_that_is_too_short_is_named(tmp_path):
    path = with_entries(saved(tmp_path, {"w": torch.ones(30)}), {"data/0": b"\0" * 80})
    assert "(model/data/0 holds 80 bytes, its tensors 120)" in refusal(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(30)[10:]})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("model/data.pkl")
    assert program.count(b"QK\nK\x14\x85") == 1  # offset 10, shape (20,)
    for broken in (b"QK\x0bK\x14\x85", b"QK\nK\x15\x85"):
        path = with_entries(path, {"data.pkl": program.replace(b"QK\nK\x14\x85", broken)})
        assert "model/data/0 is too short for a tensor of shape" in refusal(path)
        program = program.replace(broken, b"QK\nK\x14\x85")


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/data/0", struct.pack("<3f", 7, 7, 7))
    assert "two entries have one name" in refusal(path)


def test_a_large_storage_is_checked_when_it_is_loaded_and_not_when_it_is_sampled(tmp_path):
    path = saved(tmp_path, {"w": torch.arange(400_000.0).reshape(1000, 400)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    row = (slice(0, 1), slice(0, 400))
    tensor = opened(path)["w"]
    for _ in range(100):
        tensor.read(row)  # 160 KB in all: what a fingerprint takes
    with pytest.raises(UserError, match=r"model\.bin: model/data/0 does not have its checksum"):
        tensor.whole()
    tensor = opened(path)["w"]
    with pytest.raises(UserError, match="does not have its checksum"):  # in however small parts it is read
        for start in range(1000):
            tensor.read((slice(start, start + 1), slice(0, 400)))


def test_entries_beyond_four_gigabytes_are_found(tmp_path):
    """A sparse file: a hole of 4 GiB stands where another tensor's bytes would."""
    small = saved(tmp_path, {"w": torch.arange(5.0)}, "small.bin")
    with zipfile.ZipFile(small) as archive:
        contents = {name: archive.read(name) for name in ("small/data.pkl", "small/data/0")}
    hole, directory = (1 << 32) + 4096, b""
    with open(tmp_path / "large.bin", "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(hole)
        for name, content in contents.items():
            at, crc, padding = file.tell(), zipfile.crc32(content), b"FB\x05\x00ZZZZZ"
            sizes = struct.pack("<LLL", crc, len(content), len(content))
            lengths = struct.pack("<HH", len(name), len(padding))
            file.write(b"PK\x03\x04" + struct.pack("<HHHHH", 45, 0, 0, 0, 33) + sizes + lengths)
            file.write(name.encode() + padding + content)
            extra = struct.pack("<HHQ", 1, 8, at)
            directory += b"PK\x01\x02" + struct.pack("<HHHHHH", 45, 45, 0, 0, 0, 33) + sizes
            directory += struct.pack("<HHHHHLL", len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + name.encode() + extra
        at = file.tell()
        file.write(directory)
        file.write(b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 2, 2, len(directory), at))
        file.write(b"PK\x06\x07" + struct.pack("<LQL", 0, at + len(directory), 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 2, 2, len(directory), 0xFFFFFFFF, 0))
    assert_equal(opened(tmp_path / "large.bin"), {"w": torch.arange(5.0)})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(1)
    reference = {"a": torch.randn(5, 7), "b": torch.nn.Parameter(torch.randn(9).bfloat16()), "c": torch.randn(4).half()}
    reference["d"] = reference["a"].T
    path = saved(tmp_path_factory.mktemp("small"), reference)
    return path.read_bytes(), reference


def outcome(path, reference) -> str:
    """ "read" or "refused"; anything else, above all other numbers, fails the test."""
    problems = []
    try:
        tensors = open_torch_file(path, problems)
        contents = {name: tensor.whole() for name, tensor in tensors.items()}
    except UserError:
        return "refused"
    if problems:
        return "refused"
    assert contents.keys() == reference.keys()
    assert_equal(tensors, reference)
    return "read"


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, small):
    content, reference = small
    for length in [len(content) * part // 20 for part in range(20)] + [len(content) - 1]:
        (tmp_path / "cut.bin").write_bytes(content[:length])
        assert outcome(tmp_path / "cut.bin", reference) == "refused"


def test_a_flipped_bit_is_refused_or_harmless(tmp_path, small):
    content, reference = small
    draw = np.random.default_rng(0)
    counts = {"read": 0, "refused": 0}
    for _ in range(600):
        place, bit = int(draw.integers(len(content))), int(draw.integers(8))
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        (tmp_path / "flipped.bin").write_bytes(changed)
        counts[outcome(tmp_path / "flipped.bin", reference)] += 1
    assert counts["refused"] > 300 and counts["read"] > 30  # padding and dates are harmless, and there is much of both


def test_a_flipped_bit_in_a_pickle_with_a_right_checksum_is_refused_or_a_sound_dict(tmp_path, small):
    """Whoever makes a file can make its checksums: the interpreter stands alone then."""
    content, _ = small
    (tmp_path / "x.bin").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        program = archive.read("model/data.pkl")
    draw = np.random.default_rng(0)
    for _ in range(600):
        changed = bytearray(program)
        for _ in range(int(draw.integers(1, 4))):
            changed[int(draw.integers(len(program)))] = int(draw.integers(256))
        path, problems = with_entries(tmp_path / "x.bin", {"data.pkl": bytes(changed)}), []
        tensors = open_torch_file(path, problems)  # must not raise
        assert problems or all(tensor.whole().shape == tensor.shape for tensor in tensors.values())

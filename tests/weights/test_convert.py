"""The converting command: the new base says, learns and exports what the old one did, and a failure leaves nothing."""

import json
import re
import shutil

import numpy as np
import pytest
import running
from running import largest_file
from safetensors.numpy import load_file, save_file

import lowrank
from lowrank.weights import native as native_files
from lowrank.weights.base import read_base
from lowrank.weights.convert import convert as convert_base


def convert(source, to, *arguments, **options):
    return running.run("convert", f"--from={source}", f"--to={to}", *arguments, **options)


@pytest.fixture(scope="module")
def base(demo_base):
    return demo_base


@pytest.fixture(scope="module")
def native(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "native"
    finished = convert(base, folder)
    assert finished.code == 0, finished.err
    return folder


def test_what_was_made_is_said_in_one_line(base, tmp_path):
    finished = convert(base, tmp_path / "native")
    assert finished.code == 0 and finished.err == ""
    assert re.fullmatch(
        rf"converted {base} to {tmp_path}/native: 918,656 parameters, 0\.00368 GB in 1 file, float32, fingerprint "
        r"67c9e823bd0a3eca99f793ac07ff4ef4; \d+\.\d s, \d+ MB/s; read back, every bit equal\n",
        finished.out,
    )


def test_the_function_says_what_was_made(base, tmp_path):
    made = convert_base(base, tmp_path / "native")
    assert (made.parameters, made.dtypes, made.files) == (918_656, ("float32",), 1)
    assert made.fingerprint == read_base(tmp_path / "native").fingerprint == "67c9e823bd0a3eca99f793ac07ff4ef4"
    assert made.nbytes == (made.folder / "params-00001-of-00001.safetensors").stat().st_size


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """A native base of weights whose text is published."""
    folder = tmp_path_factory.mktemp("stories") / "native"
    convert_base(shared_data / "stories260k" / "hf", folder)
    return folder


@pytest.mark.slow  # a test below generates over a native base, of the demo's weights
def test_the_published_text_comes_out_of_the_native_base(shared_data, stories):
    expected = json.loads((shared_data / "stories260k" / "expected.json").read_text())
    tokens = len(expected["greedy_ids"]) - 1
    finished = running.run("generate", f"--base={stories}", "--prompt=", f"--max_new_tokens={tokens}")
    assert (finished.code, finished.out, finished.err) == (0, expected["greedy_text"] + "\n", "")


def test_every_folder_of_the_same_weights_becomes_the_same_base(shared_data, stories, tmp_path):
    for name in ("hf_sharded", "hf_bin", "meta"):
        convert_base(shared_data / "stories260k" / name, tmp_path / name)
    convert_base(stories, tmp_path / "again")

    def files(folder):
        manifest = json.loads((folder / "lowrank.json").read_text())
        del manifest["config"]["max_length"]  # which Meta's params.json does not know
        weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        return weights | {"lowrank.json": manifest, "tokenizer": (folder / "tokenizer.model").read_bytes()}

    for name in ("hf_sharded", "hf_bin", "meta", "again"):
        assert files(tmp_path / name) == files(stories), name


@pytest.mark.slow  # its parameters are the same to the bit: test_weights_native.py
def test_training_over_the_native_base_is_bitwise_the_same(tiny, trained, native, tmp_path):
    finished = running.run("train", tiny, f"--workdir={tmp_path / 'run'}", f"--config.base={native}")
    assert finished.code == 0, finished.err
    runs = [running.lines(workdir / "metrics.jsonl") for workdir in (trained, tmp_path / "run")]
    for line in (line for run in runs for line in run):
        line.pop("train/tokens_per_second", None)
    assert runs[0] == runs[1] and len(runs[0]) == 9
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (trained / "samples.jsonl").read_text()


def test_an_adapter_trained_over_the_folder_loads_over_the_native_base(trained, base, native):
    arguments = (f"--adapter={trained}", "--prompt=Once", "--max_new_tokens=20")
    over = [running.run("generate", f"--base={folder}", *arguments) for folder in (base, native)]
    assert over[0] == over[1] and over[0].code == 0  # on stderr, too: there is no warning


@pytest.mark.parametrize(
    ("form", "file"),
    [
        pytest.param("peft", "adapter_model.safetensors", marks=pytest.mark.slow),  # has nothing of the base
        ("merged", "model.safetensors"),
    ],
)
def test_exports_over_the_native_base_are_the_same(trained, base, native, tmp_path, form, file):
    for folder in (base, native):
        to = tmp_path / folder.name
        finished = running.run("export", f"--workdir={trained}", f"--base={folder}", f"--format={form}", f"--to={to}")
        assert finished.code == 0, finished.err
    made, expected = (load_file(tmp_path / name / file) for name in ("native", "base"))
    assert made.keys() == expected.keys()
    for name in made:
        np.testing.assert_array_equal(made[name], expected[name])
    assert form == "peft" or (tmp_path / "native" / "tokenizer.model").is_file()


def test_everything_beside_the_weights_is_carried(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "base", copy_function=shutil.copyfile)
    carried = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
    for name in carried:
        (source / name).write_text(json.dumps({}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("mine")
    assert convert(source, tmp_path / "native").code == 0
    assert lowrank.load(tmp_path / "native").tokenizer.chat_template == "{{ messages }}"
    names = {path.name for path in (tmp_path / "native").iterdir()}
    params = "params-00001-of-00001.safetensors"
    assert names == {*carried, "chat_template.jinja", "tokenizer.model", "config.json", "lowrank.json", params}


def test_a_dtype_is_said_and_kept(base, native, tmp_path):
    finished = convert(base, tmp_path / "half", "--dtype=bfloat16")
    assert ", bfloat16, " in finished.out
    assert convert(native, tmp_path / "again", "--dtype=bfloat16").code == 0
    half, again = read_base(tmp_path / "half"), read_base(tmp_path / "again")
    assert half.fingerprint == again.fingerprint != read_base(base).fingerprint
    assert half.config.stored_dtype == "bfloat16"
    assert lowrank.load(tmp_path / "half").model.param_dtype == "bfloat16"


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def refused(finished, *said: str):
    assert finished.code == 1 and finished.err.startswith("error: ") and finished.err.count("\n") == 1
    for words in said:
        assert words in finished.err


def test_flags_that_are_missing_or_unknown(base, tmp_path):
    refused(running.run("convert"), "--from, --to missing; see --help")
    refused(running.run("convert", f"--from={base}"), "error: --to missing")
    refused(convert(base, tmp_path / "out", "--dtype=int8"), "--dtype=int8")
    refused(convert(base, tmp_path / "out", "--config.seed=1"), "unknown argument --config.seed=1")
    refused(convert(tmp_path / "none", tmp_path / "out"), "none: no such folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_converted_into_itself_or_over_another(base, tmp_path):
    refused(convert(base, base.parent / "x" / ".." / base.name), "is the folder to convert; give another one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(convert(base, tmp_path / "out"), "out: exists and is not an empty folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "base", copy_function=shutil.copyfile)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    finished = convert(source, tmp_path / "out", "--dtype=float16")
    refused(
        finished, "params.layers.3.mlp.up_proj.kernel: holds infinite or undefined values in float16; choose another"
    )
    assert convert(source, tmp_path / "wide", "--dtype=bfloat16").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "wide"]


def test_a_full_disk_is_one_line_and_leaves_nothing(base, tmp_path):
    with largest_file(500_000):
        finished = convert(base, tmp_path / "out")
    refused(finished, "out: cannot be written (", "free some space")
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_otherwise_is_named_and_leaves_nothing(base, tmp_path):
    """A disk that loses a bit: after the check sums are made, and before anybody reads."""
    write = native_files.write

    def lossy(folder, *arguments):
        write(folder, *arguments)
        path = folder / "params-00001-of-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-4] ^= 1
        path.write_bytes(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_files, "write", lossy)
        refused(convert(base, tmp_path / "out"), "holds other weights than its lowrank.json says")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_errs_is_found_out(base, tmp_path):
    """Wrong values under right check sums: the comparison with the source sees what the check sums cannot."""
    write = native_files.write

    def wrong(folder, config, dtypes, pieces, identity):
        def changed():
            for number, piece in enumerate(pieces):
                yield piece + (number == 7)

        write(folder, config, dtypes, changed(), identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_files, "write", wrong)
        refused(convert(base, tmp_path / "out"), "reads back other than it was written: params.layers.2.")
    assert list(tmp_path.iterdir()) == []

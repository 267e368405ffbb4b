"""Names on the hub, over the fake one on 127.0.0.1: what is fetched, what is said, what is uploaded."""

import json
import pathlib
import subprocess
import sys

import fake_hub
import huggingface_hub
import pytest
from huggingface_hub import constants

from lowrank.data.hub_data import data_files
from lowrank.errors import UserError
from lowrank.files import hub as hub_lib

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 300_000 for i in (1, 2)}
INDEX = json.dumps(
    {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
)
SETTINGS = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ x }}",
}
OTHERS = {
    **dict.fromkeys(("README.md", ".gitattributes", "LICENSE", "original/params.json", "onnx/config.json"), "x"),
    **dict.fromkeys(("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "q.gguf"), b"x"),
    "onnx/model.onnx": b"x",
}
BASE = {**SETTINGS, **WEIGHTS, "model.safetensors.index.json": INDEX}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake_hub.serving(tmp_path / "cache") as hub:
        yield hub


forget = hub_lib.open_repository.cache_clear  # as in a new process


def names(folder: pathlib.Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# ---- Bases and adapters ----------------------------------------------------------------------------------------------


def test_only_the_files_that_a_base_needs_are_fetched_and_each_once(hub, capsys):
    hub.page = 4  # the listing comes in pages
    commit = hub.put("org/base", BASE | OTHERS)
    folder = hub_lib.base_folder("org/base")
    assert folder.name == commit
    assert names(folder) == BASE.keys()
    assert all((folder / name).read_bytes() == content for name, content in WEIGHTS.items())
    assert "downloading 600.0 KB of org/base: model-00001-of-00002.safetensors, " in capsys.readouterr().err
    sent = hub.sent.copy()
    hub.requests.clear()
    assert hub_lib.base_folder("org/base") == folder  # the same process asks nothing more
    forget()
    assert hub_lib.base_folder("org/base") == folder
    assert (hub.sent, len(hub.requests)) == (sent, 1)  # to learn the commit
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"), {"model.safetensors"}),
        (("pytorch_model.bin", "rust_model.ot", "flax_model.msgpack"), {"pytorch_model.bin"}),
        (
            ("consolidated.00.pth", "consolidated.01.pth", "params.json"),
            {"consolidated.00.pth", "consolidated.01.pth", "params.json"},
        ),
    ],
)
def test_one_format_of_weights_is_fetched(hub, files, fetched):
    hub.put("org/base", dict.fromkeys(("config.json", *files), "{}"))
    assert names(hub_lib.base_folder("org/base")) == {"config.json", *fetched}


def test_a_plan_needs_the_config_alone(hub):
    hub.put("org/base", BASE)
    assert names(hub_lib.base_folder("org/base", weights=False)) == {"config.json"}


def test_a_tokenizer_alone_is_fetched(hub):
    hub.put("org/base", BASE)
    assert names(hub_lib.tokenizer_folder("org/base")) == {"tokenizer.json", "chat_template.jinja"}


def test_an_adapter_is_fetched_without_what_its_trainer_left(hub):
    files = (
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "optimizer.pt",
        "training/config.json",
    )
    hub.put("org/adapter", dict.fromkeys(files, "{}"))
    assert names(hub_lib.adapter_folder("org/adapter")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_revision_is_a_branch_a_tag_a_commit_or_a_pull_request(hub):
    first = hub.put("org/base", {"config.json": "1", "model.safetensors": b"1"})
    hub.put("org/base", {"config.json": "2", "model.safetensors": b"2"}, ref="refs/pr/4")
    hub.put("org/base", {"config.json": "3", "model.safetensors": b"3"})
    for name, config in (("org/base", "3"), (f"org/base@{first}", "1"), ("org/base@refs/pr/4", "2")):
        assert (hub_lib.base_folder(name) / "config.json").read_text() == config


def test_a_file_or_folder_of_the_name_wins_and_paths_are_no_names(hub, tmp_path):
    hub.put("org/base", BASE)
    (tmp_path / "org" / "base").mkdir(parents=True)
    for path in (
        "org/base",
        str(tmp_path),
        "../org/other",
        "./org/other",
        "org/other/more",
        "data/train.jsonl",
        "gs://bucket/c",
    ):
        assert str(hub_lib.base_folder(path)) == path.removeprefix("./")
    assert hub_lib.base_folder(pathlib.Path("org/other")) == pathlib.Path("org/other")
    assert data_files("data/train.jsonl.gz") is None
    assert hub.requests == []


def test_a_renamed_repository_is_followed(hub):
    hub.put("new/base", BASE)
    hub.renamed["models/old/base"] = "models/new/base"
    assert names(hub_lib.base_folder("old/base")) == BASE.keys()


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub):
    hub.put("org/base", BASE)
    file = "org/base/model-00002-of-00002.safetensors"
    hub.cut[file] = 100_000
    folder = hub_lib.base_folder("org/base")
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == WEIGHTS["model-00002-of-00002.safetensors"]
    assert hub.sent[file] == 300_000


def test_a_transfer_that_cannot_go_on_says_so_and_complete_files_stay(hub):
    hub.put("org/base", BASE)
    hub.cut["org/base/model-00002-of-00002.safetensors"] = 100_000
    cdn = []

    def refuse(method, path):
        cdn.extend([path] * path.startswith("/get/"))
        return (503, "Service Unavailable") if len(cdn) > 2 else None

    hub.refuse = refuse
    with pytest.raises(
        UserError, match=r"cannot serve org/base now \(Service Unavailable\); run the same command again later"
    ):
        hub_lib.base_folder("org/base")
    hub.refuse, sent = None, hub.sent.copy()
    hub_lib.base_folder("org/base")
    assert hub.sent["org/base/model-00001-of-00002.safetensors"] == sent["org/base/model-00001-of-00002.safetensors"]


def test_the_token_is_not_sent_to_the_cdn(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    hub.put("org/base", BASE, private=True)
    hub_lib.base_folder("org/base")  # the fake CDN refuses requests that carry it


def test_a_process_of_its_own_finds_the_hub_by_its_environment(hub):
    hub.put("org/base", BASE)
    hub.put("org/data", {"train.jsonl": "{}"}, kind="datasets")
    code = "from lowrank.data import hub_data; from lowrank.files import hub; "
    code += "print(hub.base_folder('org/base').name, *hub_data.data_files('org/data')); hub.base_folder('org/nothing')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.split()[0] == hub.repositories["models/org/base"].refs["main"]
    assert "UserError: org/nothing is no file or folder here" in ran.stderr


# ---- Errors ----------------------------------------------------------------------------------------------------------


def said(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_gated(hub, monkeypatch):
    hub.put("org/base", BASE, gated=True)
    wanted = (
        f"org/base is gated, and this account may not read it yet; accept its licence at {hub.address}/org/base and "
        "log in with `hf auth login`, or set HF_TOKEN"
    )
    assert said(hub_lib.base_folder, "org/base") == wanted
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert said(hub_lib.base_folder, "org/base") == wanted
    hub.allowed.add("models/org/base")
    assert names(hub_lib.base_folder("org/base")) == BASE.keys()


def test_missing_or_private(hub, monkeypatch):
    hub.put("org/secret", BASE, private=True)
    for name in ("org/nothing", "org/secret"):
        assert said(hub_lib.base_folder, name).startswith(
            f"{name} is no file or folder here, and there is no model of that name on "
        )
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert names(hub_lib.base_folder("org/secret")) == BASE.keys()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not allow that with org/base (Invalid credentials in Authorization header)" in said(
        hub_lib.base_folder, "org/base"
    )


def test_wrong_revision(hub):
    hub.put("org/base", BASE)
    assert (
        said(hub_lib.base_folder, "org/base@v2")
        == f"org/base has no revision v2; give another after @, one that {hub.address}/org/base/tree/main lists"
    )


def test_not_what_it_should_be(hub):
    hub.put("org/adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b"x"})
    hub.put("org/gguf", {"config.json": "{}", "q4.gguf": b"x", "q8.gguf": b"x"})
    hub.put("org/base", BASE)
    assert (
        said(hub_lib.base_folder, "org/adapter")
        == "org/adapter on the hub is no base: it is an adapter; give the name of a base"
    )
    assert said(hub_lib.base_folder, "org/gguf").startswith(
        "org/gguf on the hub has no weights as safetensors or .bin (there is .gguf)"
    )
    assert (
        said(hub_lib.adapter_folder, "org/base")
        == "org/base on the hub is no adapter: it has no adapter_config.json; give it as the base"
    )


def test_offline_what_is_in_the_cache_is_used_and_nothing_else(hub, monkeypatch, capfd):
    hub.put("org/base", BASE | OTHERS)
    hub.put("org/half", BASE)
    folder = hub_lib.base_folder("org/base")
    hub_lib.base_folder("org/half", weights=False)  # as `plan` does
    capfd.readouterr()
    hub.requests.clear()
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_lib.base_folder("org/base") == folder
    for name in ("org/half", "org/nothing", "org/base@v2"):
        assert f"{name.partition('@')[0]} is no file or folder here and not, or not whole, in the cache" in said(
            hub_lib.base_folder, name
        )
    assert hub.requests == []
    assert capfd.readouterr().err == ""


def test_offline_what_another_program_has_fetched_is_used(hub, monkeypatch):
    hub.put("org/base", BASE)
    for name in BASE:
        huggingface_hub.hf_hub_download("org/base", name)
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert names(hub_lib.base_folder("org/base")) == BASE.keys()


def test_without_a_network_the_cache_is_used_and_said(hub, monkeypatch, caplog):
    hub.put("org/base", BASE)
    folder = hub_lib.base_folder("org/base")
    forget()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{fake_hub.HOST}:9")  # nothing listens there
    assert hub_lib.base_folder("org/base") == folder
    assert "Could not reach the Hub" in caplog.text
    assert said(hub_lib.base_folder, "org/other") == (
        "org/other is no file or folder here or in the cache, and 127.0.0.1:9 cannot be reached ([Errno 111] Connection "
        "refused); check the network and the name"
    )


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    hub.put("org/base", BASE)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "org/base cannot be kept in the cache" in said(hub_lib.base_folder, "org/base")


# ---- Data sets -------------------------------------------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test.jsonl, "more/**"]
- config_name: socratic
  data_files: socratic/*.jsonl
- config_name: 2024
  data_dir: nested
---
# Card
"""
FILES = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl", "more/a/b.jsonl")
NESTED = ("socratic/x.jsonl", "socratic/deep/y.jsonl", "nested/train.jsonl", "nested/dev.jsonl")


def found(where: str) -> list[str]:
    """The files' names within the repository."""
    return ["/".join(file.parts[file.parts.index("snapshots") + 2 :]) for file in data_files(where)]


@pytest.mark.parametrize(
    ("suffix", "files"),
    [
        ("", FILES[:2]),
        (":test", FILES[2:]),
        (":main:test", FILES[2:]),
        ("::test", FILES[2:]),
        (":socratic", NESTED[:1]),
        (":2024:validation", NESTED[3:]),
    ],
)
def test_the_card_names_the_files(hub, suffix, files):
    hub.put("org/data", {"README.md": CARD, "socratic.py": "", **dict.fromkeys(FILES + NESTED, "{}")}, kind="datasets")
    assert found(f"org/data{suffix}") == list(files)
    assert {file.removeprefix("org/data/") for file in hub.sent} == {"README.md", *files}


def test_a_config_or_split_that_is_not_there(hub):
    hub.put("org/data", {"README.md": CARD, **dict.fromkeys(FILES + NESTED, "{}")}, kind="datasets")
    hub.put("org/two", {"README.md": CARD.replace("  default: true\n", "")}, kind="datasets")
    hub.put("org/bad", {"README.md": "---\nconfigs: [3]\n---\n"}, kind="datasets")
    assert (
        said(data_files, "org/data:x:train")
        == "data set org/data:x:train has no config x; say org/name:CONFIG with one of 2024, main, socratic"
    )
    assert (
        said(data_files, "org/data:x")
        == "data set org/data:x has no split x in its config main; say org/name:main:SPLIT with one of train, test"
    )
    assert said(data_files, "org/two").startswith(
        "data set org/two has several configs; say org/name:CONFIG with one of 2024, main, "
    )
    assert said(data_files, "org/two:main").startswith(
        "data set org/two:main: its card names files for the split train, and none of them is there"
    )
    assert said(data_files, "org/bad").startswith("the card of org/bad names no data files that can be understood")
    assert "there is no data set of that name on" in said(data_files, "org/nothing:x:train")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("a.jsonl", "b.jsonl", "README.md", ".hidden.jsonl", "dataset_infos.json"), {"train": ["a.jsonl", "b.jsonl"]}),
        (("my_train.json", "my_test.json", "notes.txt"), {"train": ["my_train.json"], "test": ["my_test.json"]}),
        (
            ("x/validation/a.csv.gz", "x/training/a.csv.gz"),
            {"train": ["x/training/a.csv.gz"], "validation": ["x/validation/a.csv.gz"]},
        ),
        (("data/train_sft-00000-of-00001.parquet",), {"train_sft": ["data/train_sft-00000-of-00001.parquet"]}),
        (("train.jsonl", "test.json", "a.csv"), {"train": ["train.jsonl"], "test": ["test.json"]}),
        (("contest.jsonl", "latest.jsonl"), {"train": ["contest.jsonl", "latest.jsonl"]}),
    ],
)
def test_without_a_card_names_of_files_say_the_split(hub, files, splits):
    hub.put("org/data", dict.fromkeys(files, "{}"), kind="datasets")
    for split, expected in splits.items():
        assert found(f"org/data:{split}") == expected


def test_what_a_script_makes_is_taken_from_the_parquet_copy(hub):
    hub.put("org/data", {"data.py": "", "raw/train.jsonl": "{}"}, kind="datasets")
    assert "no files of records" in said(data_files, "org/data")
    hub.put(
        "org/data",
        dict.fromkeys(("en/train/0000.parquet", "en/train/0001.parquet", "de/partial-train/0000.parquet"), b"x"),
        ref="refs/convert/parquet",
        kind="datasets",
    )
    assert found("org/data:en") == ["en/train/0000.parquet", "en/train/0001.parquet"]
    assert said(data_files, "org/data:de:train").endswith("say org/name:de:SPLIT with one of partial-train")


def test_offline_a_data_set_is_whole_or_refused(hub, monkeypatch):
    hub.put("org/data", {"README.md": CARD, **dict.fromkeys(FILES + NESTED, "{}")}, kind="datasets")
    files = data_files("org/data")
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert data_files("org/data") == files
    files[1].unlink()  # as if its download had been cut off
    assert "not whole, in the cache" in said(data_files, "org/data")


# ---- Uploading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path) -> pathlib.Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n# A card\n")
    return folder


@pytest.mark.parametrize("revision", ["", "v1"])
def test_push_uploads_the_folder_and_the_logs_in_one_commit(hub, export, tmp_path, monkeypatch, revision):
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    to = "me/adapter" + f"@{revision}" * bool(revision)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):  # where the repository exists, too
        hub_lib.create(to)
    url = hub_lib.push(export, to, {"training/metrics.jsonl": tmp_path / "metrics.jsonl"})
    repository = hub.repositories["models/me/adapter"]
    assert url == f"{hub.address}/me/adapter/commit/{repository.refs[revision or 'main']}"
    files = repository.files(revision or "main")
    assert files.keys() == {".gitattributes", "README.md", "adapter_model.safetensors", "training/metrics.jsonl"}
    assert files["adapter_model.safetensors"] == b"weights"
    assert repository.private
    assert hub.asked("/commit/") == 1


def test_push_without_a_login_or_the_right_to_write(hub, export, monkeypatch):
    assert "does not allow that with me/adapter (Invalid username or password.); log in with" in said(
        hub_lib.create, "me/adapter"
    )
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert "does not allow that with you/adapter" in said(hub_lib.create, "you/adapter")
    assert (
        said(hub_lib.create, "adapter")
        == "adapter is no name on the hub to upload to; say org/name, or org/name@branch"
    )
    hub_lib.create("me/adapter")
    (export / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")
    assert 'refuses me/adapter (Invalid metadata in README.md. - "base_model" with value' in said(
        hub_lib.push, export, "me/adapter", {}
    )

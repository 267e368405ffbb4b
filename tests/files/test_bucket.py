"""Paths in buckets: what they answer, and what is said when a bucket does not."""

import pathlib
import sys
from unittest import mock

import pytest
import running

from lowrank.data.records import read_records
from lowrank.errors import UserError
from lowrank.files import bucket as bucket_lib
from lowrank.files import paths

ALPACA = '[{"instruction": "Say it.", "output": "It."}, {"instruction": "Again.", "output": "It.\\u00e9"}]'


def test_a_path_is_local_or_in_a_bucket_by_how_it_begins():
    assert paths.path("runs/a") == pathlib.Path("runs/a")
    there = paths.path("gs://bucket//runs/a.json/")
    assert (str(there), there.name, there.suffix, str(there.parent)) == (
        *("gs://bucket/runs/a.json", "a.json", ".json"),
        "gs://bucket/runs",
    )
    assert str(there.with_suffix(".tmp")) == "gs://bucket/runs/a.tmp"
    assert str(there.parent / "checkpoints/3") == "gs://bucket/runs/checkpoints/3"


def test_a_bucket_path_is_never_taken_for_a_local_one():
    """pathlib.Path("gs://bucket/a") is the local gs:/bucket/a, and nothing says so."""
    with pytest.raises(TypeError):
        pathlib.Path(paths.path("gs://bucket/a"))
    with pytest.raises(TypeError):
        open(paths.path("gs://bucket/a"))  # noqa: SIM115 (it does not open)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gs:/bucket/a",
            "gs:/bucket/a: gs:/ paths are not supported; give gs://BUCKET/PATH or a local path",
        ),
        ("s3://bucket/a", "s3://bucket/a: s3:// paths are not supported"),
        ("gs://", "gs://: '' is no name of a bucket"),
        ("gs://Bucket/a", "gs://Bucket/a: 'Bucket' is no name of a bucket"),
    ],
)
def test_other_schemes_and_slips_are_refused(text, message):
    with pytest.raises(UserError) as refused:
        paths.path(text)
    assert message in str(refused.value)


def test_an_object_is_written_read_and_listed(bucket):
    file = paths.path("gs://bucket/a/b.txt")
    assert not file.exists() and not file.parent.is_dir()
    file.write_bytes(b"one\r\ntwo")
    assert bucket.files("bucket/a") == {"b.txt": b"one\r\ntwo"}
    assert file.exists() and file.is_file() and not file.is_dir()
    assert file.parent.is_dir() and not file.parent.is_file()
    assert (file.read_text(), file.read_range(2, 6), file.stat().st_size) == ("one\ntwo", b"e\r\nt", 8)
    paths.path("gs://bucket/a/c/d").write_bytes(b"x" * 5)
    assert [*file.parent.iterdir()] == [file, file.parent / "c"]
    assert file.parent.glob("*.txt") == [file]
    assert paths.sizes(file.parent) == {"gs://bucket/a/b.txt": 8, "gs://bucket/a/c/d": 5}
    before = file.stat().st_mtime_ns
    file.write_bytes(b"one\r\ntwo")
    assert file.stat().st_mtime_ns > before  # the same bytes, but written anew


def test_what_another_process_wrote_is_seen_at_once(bucket):
    folder = paths.path("gs://bucket/a")
    bucket.put("bucket/a/1", b"")
    assert [file.name for file in folder.iterdir()] == ["1"]
    bucket.put("bucket/a/2", b"")
    assert [file.name for file in folder.iterdir()] == ["1", "2"]
    del bucket.objects["bucket/a/1"]
    assert not (folder / "1").exists()


def test_a_large_object_goes_in_several_requests(bucket):
    content = bytes(range(256)) * 2**18  # 64 MB
    paths.path("gs://bucket/large").write_bytes(content)
    assert bucket.files("bucket") == {"large": content}


def test_data_in_a_bucket_gives_the_same_records_and_the_same_hash(bucket, tmp_path):
    for name, text in {"a.json": ALPACA, "b.txt": "One\r\n\r\nTwo"}.items():
        (tmp_path / name).write_text(text)
    bucket.put_folder("bucket/data", tmp_path)
    for name, form in (("a.json", "alpaca"), ("b.txt", "text")):
        assert read_records(f"gs://bucket/data/{name}", form) == read_records(tmp_path / name, form)
        assert paths.file_hash(f"gs://bucket/data/{name}") == paths.file_hash(str(tmp_path / name))
    before = paths.file_hash("gs://bucket/data/b.txt")
    bucket.put("bucket/data/b.txt", b"Three")
    assert paths.file_hash("gs://bucket/data/b.txt") != before


def test_broken_records_are_named_by_their_path_in_the_bucket(bucket):
    bucket.put("bucket/a.json", b'{"output": "b"}')
    with pytest.raises(
        UserError, match=r"gs://bucket/a.json has broken records.*line 1: field 'instruction' is missing"
    ):
        read_records("gs://bucket/a.json", "alpaca")


# ---- What goes wrong, in one line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/none.json", "data file gs://bucket/none.json cannot be read (No such file or directory)"),
        ("gs://nowhere/none.json", "gs://nowhere: no such bucket; check its name"),
    ],
)
def test_what_is_not_there(bucket, path, message):
    with pytest.raises(UserError) as refused:
        read_records(path, "alpaca")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_base_that_is_not_there(bucket):
    finished = running.run("generate", "--base=gs://bucket/llama", "--prompt=a")
    assert (finished.code, finished.err) == (
        1,
        "error: gs://bucket/llama: no such folder; give the folder of a base model, or its name on the hub\n",
    )


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, "Anonymous caller does not have storage.objects.get access", "gcloud auth application-default login"),
        (403, "me@here does not have storage.objects.get access", "(me@here does not have storage.objects.get access)"),
        (400, "Unknown project", "gs://bucket/a: Google Cloud Storage refused (Unknown project, 400)"),
    ],
)
def test_what_is_not_allowed(bucket, status, answer, message):
    bucket.put("bucket/a", b"content")
    bucket.refuse = lambda method, path: (status, answer)
    file = paths.path("gs://bucket/a")
    for ask in (file.exists, file.read_bytes, lambda: file.write_bytes(b"")):
        with pytest.raises(UserError) as refused:
            ask()
        assert message in str(refused.value) and str(refused.value).startswith("gs://bucket/a: ")


def test_a_server_that_is_busy_is_asked_again(bucket):
    bucket.put("bucket/a", b"content")
    answers = [(503, "busy"), (429, "slow down"), None]
    bucket.refuse = lambda method, path: answers.pop(0)
    assert paths.path("gs://bucket/a").read_bytes() == b"content"
    assert not answers


def test_without_gcsfs_it_is_said_what_to_install():
    bucket_lib.bucket_files.cache_clear()
    with mock.patch.dict(sys.modules, {"gcsfs": None}), pytest.raises(UserError) as refused:
        paths.path("gs://bucket/a").exists()
    assert str(refused.value) == "gs:// paths need gcsfs; pip install 'lowrank[gcs]' (or, with make, EXTRAS=gcs)"

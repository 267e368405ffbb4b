"""Paths on a local disk or in a bucket of Google Cloud Storage (`gs://BUCKET/PATH`).

One idea: `path(text)` returns an object with the methods of `pathlib.Path` that lowrank uses, so code that reads a base, a
data file or a workdir is the same for both. `pathlib.Path("gs://b/x")` would silently be the local `gs:/b/x`; a
`BucketPath` has no `__fspath__`, so code that expects a local file refuses it. Left out: other clouds, and removing
anything but a file.
"""

import functools
import hashlib
import os
import pathlib
import re

from lowrank.errors import UserError
from lowrank.files.bucket import SCHEME, BucketPath, bucket_errors, bucket_files

Path = pathlib.Path | BucketPath
PathLike = str | os.PathLike | BucketPath


def path(where: PathLike) -> Path:
    """A local path, or a BucketPath for a text that begins with gs://. `~` is the user's home, also after `--flag=`, where no
    shell puts it in."""
    if isinstance(where, BucketPath):
        return where
    text = str(os.fspath(where))
    if text.startswith(SCHEME):
        bucket, _, name = text.removeprefix(SCHEME).partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket):
            raise UserError(f"{text}: {bucket!r} is no name of a bucket; say {SCHEME}BUCKET/PATH")
        return BucketPath("/".join([bucket, *(part for part in name.split("/") if part)]))
    if on_hub := re.match(r"(?:https?://(?:www\.)?(?:huggingface|hf)\.co|hf:/)/(?:datasets/)?([\w.-]+/[\w.-]+)", text):
        raise UserError(f"{text}: what is on the hub goes by its name; say {on_hub[1]}")
    if scheme := re.match(r"gs:/|[a-z0-9]+://", text):
        raise UserError(f"{text}: {scheme[0]} paths are not supported; give {SCHEME}BUCKET/PATH or a local path")
    expanded = os.path.expanduser(text)
    if expanded.split("/")[0] == "~":
        raise UserError(f"{text}: the home folder is not known (HOME is not set); give the whole path")
    return pathlib.Path(expanded)


def local(where: PathLike) -> pathlib.Path:
    """A path on this machine. UserError for one in a bucket, where nothing can be renamed."""
    found = path(where)
    if isinstance(found, BucketPath):
        raise UserError(f"{where}: this is written on this machine only; copy it there with `gcloud storage cp`")
    return found


def is_remote(where: PathLike) -> bool:
    return isinstance(where, BucketPath) or str(os.fspath(where)).startswith(SCHEME)


def sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file in the folder and below it, by its name."""
    if not isinstance(folder, BucketPath):
        return {str(file): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    with bucket_errors(folder):
        found = bucket_files().find(folder.where, detail=True)
    return {SCHEME + name: int(info["size"]) for name, info in found.items()}


def file_hash(file: PathLike) -> str:
    """Of the file's content."""
    found = path(file).stat()
    return _hash_of(str(file), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=64)
def _hash_of(file: str, modified: int, size: int) -> str:
    """Cached for the members of a sweep; `modified` and `size` tell when it is another file."""
    with path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]

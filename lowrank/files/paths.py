"""Where files lie: on this machine's disks, or in a bucket of Google Cloud Storage, named `gs://BUCKET/PATH`.

One idea: `path(text)` gives something with the methods of `pathlib.Path` that lowrank uses, so whoever reads a base, a
data file or a workdir need not know where it lies. `pathlib.Path("gs://b/x")` would quietly be the local `gs:/b/x`; a
`BucketPath` has no `__fspath__`, so whatever expects a local file refuses it. A bucket knows whole objects only: none can be
appended to or renamed, and each appears, or is replaced, at once. Left out: other clouds, and removing anything but a file.

What a bucket answers becomes one line (`UserError`), or, if there is no such object, FileNotFoundError as on a disk.
"""

import os
import pathlib
import re

from lowrank.errors import UserError
from lowrank.files.bucket import SCHEME, BucketPath, bucket_errors, bucket_files


def path(where: "str | os.PathLike | BucketPath") -> "pathlib.Path | BucketPath":
    """A path on a disk or in a bucket, by what the text begins with."""
    if isinstance(where, BucketPath):
        return where
    text = os.fspath(where)
    if text.startswith(SCHEME):
        bucket, _, name = text.removeprefix(SCHEME).partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket):
            raise UserError(f"{text}: {bucket!r} is no name of a bucket; say {SCHEME}BUCKET/PATH")
        return BucketPath("/".join([bucket, *(part for part in name.split("/") if part)]))
    if scheme := re.match(r"gs:/|[a-z0-9]+://", text):
        raise UserError(
            f"{text}: paths that begin with {scheme[0]} are not known; say {SCHEME}BUCKET/PATH, or a local path"
        )
    return pathlib.Path(text)


def local(where: "str | os.PathLike") -> pathlib.Path:
    """A path of this machine's; UserError for one in a bucket, where what is renamed when it is whole cannot be made."""
    if is_remote(where):
        raise UserError(
            f"{where}: this is written on this machine only; name a local folder, and copy it with `gcloud storage cp`"
        )
    return pathlib.Path(where)


def is_remote(where: "str | os.PathLike | BucketPath") -> bool:
    return isinstance(where, BucketPath) or os.fspath(where).startswith(SCHEME)


Path = pathlib.Path | BucketPath


def sizes(folder: Path) -> dict[str, int]:
    """How many bytes every file has that lies in the folder or a folder in it."""
    if not isinstance(folder, BucketPath):
        return {str(file): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    with bucket_errors(folder):
        return {
            SCHEME + name: int(info["size"]) for name, info in bucket_files().find(folder.where, detail=True).items()
        }

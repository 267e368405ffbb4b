"""Google Cloud Storage: `BucketPath`, an object in a bucket with those methods of `pathlib.Path` that lowrank uses.

A bucket holds whole objects: each appears or is replaced at once, and none can be appended to or renamed. Failures of
storage, credentials and network become a `UserError`; a missing object is a FileNotFoundError, as on a disk.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import errno
import fnmatch
import functools
import io
import json
import logging
import os
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

from lowrank.errors import UserError

SCHEME = "gs://"
LOGIN = "run `gcloud auth application-default login`, or give the machine's service account access to storage"


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """An object in a bucket, or a folder: a prefix of objects' names."""

    where: str  # bucket/some/name

    def __str__(self) -> str:
        return SCHEME + self.where

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath("/".join([self.where, *(part for part in str(name).split("/") if part)]))

    @property
    def bucket(self) -> str:
        return self.where.partition("/")[0]

    @property
    def key(self) -> str:
        """The object's name within its bucket."""
        return self.where.partition("/")[2]

    @property
    def name(self) -> str:
        return self.where.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.where.rpartition("/")[0] or self.where)

    def with_suffix(self, suffix: str) -> "BucketPath":
        return self.parent / pathlib.PurePosixPath(self.name).with_suffix(suffix).name

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self

    def _info(self) -> dict | None:
        """gcsfs's description of the object or folder; None if there is neither."""
        try:
            with bucket_errors(self):
                return bucket_files().info(self.where)
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> types.SimpleNamespace:
        """`st_size`, and as `st_mtime_ns` the object's generation: the microseconds of its writing, new each time."""
        info = self._info()
        if info is None or info["type"] != "file":
            raise self._missing()
        return types.SimpleNamespace(st_size=int(info["size"]), st_mtime_ns=int(info["generation"]) * 1000)

    def iterdir(self) -> Iterator["BucketPath"]:
        """The entries of the folder. A bucket has no empty folders: a missing one has no entries."""
        found = []
        with contextlib.suppress(FileNotFoundError), bucket_errors(self):
            found = bucket_files().ls(self.where, detail=False)
        yield from (BucketPath(name.rstrip("/")) for name in found if name.rstrip("/") != self.where)

    def glob(self, pattern: str) -> list["BucketPath"]:
        """The folder's own entries whose names match."""
        return [file for file in self.iterdir() if fnmatch.fnmatchcase(file.name, pattern)]

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """The bytes from `start` to before `stop`, in one request."""
        with bucket_errors(self):
            return bucket_files().cat_file(self.where, start=start, end=stop)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding).replace("\r\n", "\n")  # as `open` does

    def open(self, mode: str) -> io.BytesIO:
        """The whole object, in memory, to read."""
        if mode != "rb":
            raise ValueError(f"mode {mode}: objects are opened only to read bytes")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, content: bytes) -> None:
        """Replace the object atomically."""
        with bucket_errors(self):
            bucket_files().pipe_file(self.where, content)

    def create(self, metadata: dict[str, str]) -> None:
        """Create an empty object with `metadata`; FileExistsError if the object exists."""
        with bucket_errors(self):
            bucket_files().pipe_file(self.where, b"", metadata=metadata, mode="create")

    def request(self, method: str, **parameters) -> tuple[Any, datetime.datetime]:
        """A request of the JSON API about the object -> the answer and the server's time.

        FileExistsError if a precondition among the parameters fails.
        """
        with bucket_errors(self):
            headers, content = bucket_files().call(method, "b/{}/o/{}", self.bucket, self.key, **parameters)
        return json.loads(content or b"null"), email.utils.parsedate_to_datetime(headers["Date"])

    def check_bucket(self) -> None:
        """UserError without the permission to query the bucket itself: Orbax does so when it removes an old checkpoint."""
        with bucket_errors(self):
            bucket_files().call("GET", "b/{}", self.bucket)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a folder exists as soon as an object is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), bucket_errors(self):
            bucket_files().rm_file(self.where)

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))


@functools.cache
def bucket_files():
    """fsspec's file system for gs:// (gcsfs), which Orbax uses too. It finds credentials as Google's own programs do."""
    # Its experimental class queries over gRPC what kind of bucket it is, and without an answer again for every range. Only
    # zonal buckets need that; their users set this to true.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401 (imported here to tell its absence from other failures)
    except ImportError:
        raise UserError("gs:// paths need gcsfs; pip install 'lowrank[gcs]' (or, with make, EXTRAS=gcs)") from None
    # Cached listings never expire and would hide what other hosts write. Set in fsspec's own settings, so that it holds for
    # Orbax's file system too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of every error that it raises
    with bucket_errors(SCHEME):
        return fsspec.filesystem("gcs")


@functools.cache
def _check_bucket(bucket: str) -> None:
    """UserError if there is no such bucket, which otherwise looks like a missing object."""
    try:
        bucket_files().ls(bucket, max_results=1)
    except FileNotFoundError:
        raise UserError(f"{SCHEME}{bucket}: no such bucket; check its name") from None
    except Exception as error:  # reading an object needs no permission to list the bucket
        if explain(error) is None:
            raise


@contextlib.contextmanager
def bucket_errors(where: BucketPath | str) -> Iterator[None]:
    """Turn errors of gcsfs, credentials and network into a UserError; FileNotFoundError stays, with the path's name."""
    try:
        yield
    except FileNotFoundError:
        if isinstance(where, str):
            raise
        _check_bucket(where.bucket)
        raise where._missing() from None
    except (UserError, FileExistsError):
        raise
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        raise UserError(f"{where}: {line}") from error


def explain(error: BaseException) -> str | None:
    """A failure of storage, credentials or network in one line, with what to do; None for any other error."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    text = (" ".join(str(error).split()).partition(" [http_response")[0] or type(error).__name__)[:300]
    code = getattr(error, "code", None)
    if code in (401, "401") or "google.auth.exceptions.GoogleAuthError" in kinds:
        return f"Google Cloud Storage needs credentials ({text}); {LOGIN}"
    if code == 403 or (isinstance(error, OSError) and text.startswith("Forbidden")) or "PERMISSION_DENIED" in text:
        reason = re.sub(r"^(Forbidden: \S+|403 [A-Z]+ \S+:|PERMISSION_DENIED:) ?", "", text) or "forbidden"
        return (
            f"Google Cloud Storage does not allow it ({reason}); give this account the role Storage Object Viewer on the "
            "bucket, and for a workdir there Storage Object User and Storage Legacy Bucket Reader"
        )
    network = {"aiohttp.client_exceptions.ClientError", "requests.exceptions.RequestException"}
    if kinds & network or isinstance(error, TimeoutError):
        return f"Google Cloud Storage cannot be reached ({text}); check the network and run the same command again"
    if "gcsfs.retry.HttpError" in kinds or (isinstance(error, ValueError) and text.startswith("Bad Request")):
        return f"Google Cloud Storage refused ({text})"
    return None

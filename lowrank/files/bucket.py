"""TODO files.bucket"""

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

from lowrank.errors import UserError

SCHEME = "gs://"
LOGIN = "run `gcloud auth application-default login`, or give the machine's service account access to storage"


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """An object in a bucket, or the folder that a prefix of objects' names looks like."""

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

    # ---- Asking ------------------------------------------------------------------------------------------------------

    def _info(self) -> dict | None:
        """What the bucket knows of the object or the folder; None if there is neither."""
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
        """`st_size`, and as `st_mtime_ns` the object's generation: microseconds of when it was written, another each time."""
        info = self._info()
        if info is None or info["type"] != "file":
            raise self._missing()
        return types.SimpleNamespace(st_size=int(info["size"]), st_mtime_ns=int(info["generation"]) * 1000)

    def iterdir(self) -> Iterator["BucketPath"]:
        """What is in the folder; nothing where there is no such folder, which for a bucket is the same."""
        found = []
        with contextlib.suppress(FileNotFoundError), bucket_errors(self):
            found = bucket_files().ls(self.where, detail=False)
        yield from (BucketPath(name.rstrip("/")) for name in found if name.rstrip("/") != self.where)

    def glob(self, pattern: str) -> list["BucketPath"]:
        """The folder's own objects of such names."""
        return [file for file in self.iterdir() if fnmatch.fnmatchcase(file.name, pattern)]

    # ---- Reading and writing -----------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """The bytes from `start` to before `stop`, in one request."""
        with bucket_errors(self):
            return bucket_files().cat_file(self.where, start=start, end=stop)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding).replace("\r\n", "\n")  # as `open` does

    def open(self, mode: str) -> io.BytesIO:
        """The whole object, to read."""
        if mode != "rb":
            raise ValueError(f"{mode}: an object is opened to be read as bytes, and written whole")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, content: bytes) -> None:
        """Replace the object: whole, or not at all."""
        with bucket_errors(self):
            bucket_files().pipe_file(self.where, content)

    def create(self, metadata: dict[str, str]) -> None:
        """Make an empty object that carries `metadata`; FileExistsError if there is one of this name."""
        with bucket_errors(self):
            bucket_files().pipe_file(self.where, b"", metadata=metadata, mode="create")

    def request(self, method: str, **parameters) -> tuple[dict | None, datetime.datetime]:
        """One request of the bucket's JSON interface about the object -> what it says of it, and its own time.

        FileExistsError if a precondition among the parameters is not met.
        """
        with bucket_errors(self):
            headers, content = bucket_files().call(method, "b/{}/o/{}", self.bucket, self.key, **parameters)
        return json.loads(content or b"null"), email.utils.parsedate_to_datetime(headers["Date"])

    def check_bucket(self) -> None:
        """UserError if the bucket itself may not be asked what kind it is: Orbax asks, when it removes an old checkpoint."""
        with bucket_errors(self):
            bucket_files().call("GET", "b/{}", self.bucket)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """A folder is there as soon as something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), bucket_errors(self):
            bucket_files().rm_file(self.where)

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))


@functools.cache
def bucket_files():
    """gcsfs, by fsspec's name for it: what Orbax uses, too. It finds the user's credentials as Google's own programs do."""
    # Its experimental class asks over gRPC what kind of bucket it is, again for every range where it gets no answer. Only
    # zonal buckets need that; whoever has one sets this to true.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401 (asked for here, so that its absence is told from other failures)
    except ImportError:
        raise UserError("gs:// paths need gcsfs; pip install 'lowrank[gcs]' (or, with make, EXTRAS=gcs)") from None
    # What another host writes must be seen; listings would be remembered for ever. Said in fsspec's own settings, so that
    # Orbax's file system has it, too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback for what it then raises
    with bucket_errors(SCHEME):
        return fsspec.filesystem("gcs")


@functools.cache
def _check_bucket(bucket: str) -> None:
    """UserError if there is no such bucket, which looks like a missing object otherwise."""
    try:
        bucket_files().ls(bucket, max_results=1)
    except FileNotFoundError:
        raise UserError(f"{SCHEME}{bucket}: no such bucket; check its name") from None
    except Exception as error:  # whoever may read an object need not be allowed to list them all
        if said_of(error) is None:
            raise


@contextlib.contextmanager
def bucket_errors(where: BucketPath | str) -> Iterator[None]:
    """What gcsfs, Google's credentials and the network raise -> one line; files that are missing stay what they are."""
    try:
        yield
    except FileNotFoundError:
        _check_bucket(where.bucket)
        raise where._missing() from None
    except (UserError, FileExistsError):
        raise
    except Exception as error:
        line = said_of(error)
        if line is None:
            raise
        raise UserError(f"{where}: {line}") from error


def said_of(error: BaseException) -> str | None:
    """A failure of storage, its credentials or the network, in words and with what to do; None if it is something else."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    text = (" ".join(str(error).split()).partition(" [http_response")[0] or type(error).__name__)[:300]
    code = getattr(error, "code", None)
    if code in (401, "401") or "google.auth.exceptions.GoogleAuthError" in kinds:
        return f"Google Cloud Storage does not know who asks ({text}); {LOGIN}"
    if code == 403 or (isinstance(error, OSError) and text.startswith("Forbidden")) or "PERMISSION_DENIED" in text:
        reason = re.sub(r"^(Forbidden: \S+|403 [A-Z]+ \S+:|PERMISSION_DENIED:) ?", "", text) or "forbidden"
        return (
            f"Google Cloud Storage does not allow it ({reason}); give this account the role Storage Object Viewer on the "
            "bucket, and for a workdir there Storage Object User and Storage Legacy Bucket Reader"
        )
    if kinds & {"aiohttp.client_exceptions.ClientError", "requests.exceptions.RequestException"} or isinstance(
        error, TimeoutError
    ):
        return f"Google Cloud Storage cannot be reached ({text}); check the network and run the same command again"
    if "gcsfs.retry.HttpError" in kinds or (isinstance(error, ValueError) and text.startswith("Bad Request")):
        return f"Google Cloud Storage refused ({text})"
    return None

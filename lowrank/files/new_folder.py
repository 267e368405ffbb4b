"""A folder that appears whole or not at all: filled under a name beside it, then renamed."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

from safetensors import SafetensorError

from lowrank.errors import UserError
from lowrank.files import bucket, paths


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder to fill; it becomes `folder` when the block ends without an error, else it is removed."""
    folder = pathlib.Path(os.path.abspath(paths.local(folder)))  # "." has no name
    # Beside the target, for only a rename within one file system is atomic.
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not an empty folder; give a new name or remove it")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed and had the same number
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes its files unreadable to anybody else
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())  # before the rename, or a power cut can leave the name with empty files
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # SafetensorError is how a full disk shows while tensors are written
        raise UserError(f"{folder}: cannot be written ({error}); free some space or give another place") from None
    except UserError as error:  # of a reader, who knows the folder by the name that it has while it is filled
        raise UserError(str(error).replace(str(partial), str(folder))) from error.__cause__
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def carry(source: str | os.PathLike | bucket.BucketPath, target: pathlib.Path, names: Iterable[str]) -> None:
    """Copy those of the named files that `source` has."""
    for name in names:
        if (paths.path(source) / name).is_file():
            (target / name).write_bytes((paths.path(source) / name).read_bytes())

"""A folder that appears whole or not at all: filled under a temporary name beside the target, then renamed."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

from safetensors import SafetensorError

from lowrank.errors import UserError
from lowrank.files import paths


@contextlib.contextmanager
def new_folder(folder: paths.PathLike) -> Iterator[pathlib.Path]:
    """Yield an empty folder to fill. Without an error it becomes `folder`, which may not hold anything; else it is removed."""
    folder = pathlib.Path(os.path.abspath(paths.local(folder)))  # "." has no name
    # Beside the target: only a rename within one file system is atomic.
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not an empty folder; give a new name or remove it")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes its files readable only to their owner
            with open(file, "rb") as handle:  # before the rename, or a power cut could leave empty files
                os.fsync(handle.fileno())
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk can be either
        raise UserError(f"{folder}: cannot be written ({error}); free some space or give another place") from None
    except UserError as error:  # a reader's, which names the temporary folder
        raise UserError(str(error).replace(str(partial), str(folder))) from error.__cause__
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def carry(source: paths.PathLike, target: pathlib.Path, names: Iterable[str]) -> None:
    """Copy those of the named files that `source` has into `target`."""
    for name in names:
        file = paths.path(source) / name
        if file.is_file():
            (target / name).write_bytes(file.read_bytes())

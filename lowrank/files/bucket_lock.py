"""A lock on a workdir in a bucket, where no lock is released when the process that holds it dies.

The lock is an object: of all processes that try to create it, the bucket lets one succeed. Its holder touches it every 15
seconds. A process that finds a lock touched less than a minute ago watches it: if it is touched again, the workdir is in
use; if not, or if the holder was a process of this machine that is gone, exactly that lock is removed (by its generation,
so never a newer one) and a new one is created. All times are the bucket's, so clocks may differ.

So no two processes write: a holder that could not touch its lock for 45 seconds, or finds another's in its place, exits at
once, before others may take it for dead. Left out: a process that is stopped for a minute (SIGSTOP, a suspended machine)
learns of it at its next touch, and writes until then.
"""

import concurrent.futures
import contextlib
import datetime
import itertools
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from lowrank.errors import UserError
from lowrank.files.bucket import BucketPath
from lowrank.parallel import distributed

BEAT = 15.0  # seconds between two touches
GIVE_UP = 45.0  # seconds without a touch after which the holder exits
STALE = 60.0  # seconds without a touch after which the lock may be taken
LOOK = 2.0  # seconds between two reads of another process's lock


@contextlib.contextmanager
def locked(file: BucketPath, workdir: str) -> Iterator[None]:
    """Hold the lock `file`; UserError if another process holds it."""
    generation = _acquire(file, workdir)
    over = threading.Event()
    toucher = threading.Thread(target=_touch, args=(file, workdir, generation, over), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        over.set()
        toucher.join()
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            file.request("DELETE", ifGenerationMatch=generation)


def _acquire(file: BucketPath, workdir: str) -> str:
    """Create the lock -> its generation."""
    own = {"id": uuid.uuid4().hex, **this_process()}
    first_seen = None
    while True:
        with contextlib.suppress(FileExistsError):
            file.create(own)
        try:
            found, now = file.request("GET")
        except FileNotFoundError:
            continue  # released since
        holder = found.get("metadata", {})
        if holder.get("id") == own["id"]:  # also where `create` failed: its answer may be lost after success
            return found["generation"]
        age = (now - datetime.datetime.fromisoformat(found["updated"])).total_seconds()
        if age > STALE or is_gone(holder):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                file.request("DELETE", ifGenerationMatch=found["generation"])
            continue
        who = f"process {holder.get('process')} on {holder.get('host')}"
        seen = (found["generation"], found["metageneration"])
        if seen != (first_seen or seen):
            raise UserError(f"workdir {workdir} is in use by {who}; wait for it or choose another")
        if first_seen is None:
            print(
                f"workdir {workdir} was in use by {who} {max(age, 0):.0f} s ago; looking for up to {STALE - age:.0f} s "
                "whether it still is",
                flush=True,
            )
        first_seen = seen
        time.sleep(LOOK)


def _touch(file: BucketPath, workdir: str, generation: str, over: threading.Event) -> None:
    """Touch the lock until `over`; exit the process if that fails."""
    touched = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number in itertools.count(1):
            if over.wait(BEAT):
                return
            change = {"metadata": {"touched": str(number)}}
            request = pool.submit(file.request, "PATCH", ifGenerationMatch=generation, json=change)
            try:
                request.result(touched + GIVE_UP - time.monotonic())
                touched = time.monotonic()
            except (FileNotFoundError, FileExistsError):
                _exit(distributed.FAILED, f"workdir {workdir} was taken over by a process that took this one for dead")
            except (UserError, TimeoutError) as error:
                if time.monotonic() > touched + GIVE_UP - BEAT:  # a retry would end too late
                    _exit(
                        distributed.LOST,
                        f"workdir {workdir} cannot be reached for {GIVE_UP:.0f} s ({error or 'no answer'}), so others may "
                        "take it; run the same command again to go on from the last checkpoint",
                    )


def _exit(code: int, message: str) -> None:
    distributed.fail(message, code)
    os.write(2, f"error: {message}\n".encode())
    os._exit(code)  # an exception in this thread would not stop the main thread's writes


def this_process() -> dict[str, str]:
    """What others are told of a lock's holder."""
    return {"host": socket.gethostname(), "process": str(os.getpid()), "machine": _machine()}


def _machine() -> str:
    """The same for two processes that can see each other; empty where unknown."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def is_gone(holder: dict) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        pass
    return False

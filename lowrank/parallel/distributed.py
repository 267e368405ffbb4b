"""Several processes that train one run together: how they find each other, agree, and end together.

One idea: words, not arrays. Whatever processes have to tell each other beside the step goes through the key-value store of
JAX's coordination service, which process 0 holds; so they can talk while their devices wait for each other. A thread in
each process says every second that it is alive and reads whether the run is over: if one process fails, or is gone without a
word, all the others end with that message instead of waiting for ever in a sum that nobody else comes to.
"""

import contextlib
import ctypes
import errno
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax

from lowrank.errors import UserError
from lowrank.parallel.compiling import compile_once
from lowrank.parallel.launchers import Start, decide, tpu_hosts

BEAT = 1.0  # seconds between two signs of life
GONE_AFTER = 20.0  # seconds without one: long for a thread that a busy machine starves, short for a user who waits
PARTING = 10.0  # seconds that process 0, which holds the store, stays for the others to read why the run is over
LOST, FAILED = (
    75,
    1,
)  # exit codes: another process is lost, start all again (as after SIGTERM); this or another one failed
GO_ON = "start the same command again, on all of them, to go on from the last checkpoint"


# ---- Beginning and ending --------------------------------------------------------------------------------------------


class _Processes:
    """This process among the others; there is one, or none where a run is one process."""

    def __init__(self, index: int, count: int, coordinator: str, store):
        self.index, self.count, self.coordinator, self.store = index, count, coordinator, store
        self.name = name_of(index, count, socket.gethostname())
        self.calls = itertools.count()
        self.ending = threading.Lock()  # taken by whoever prints the last line, and never given back
        self.finished = threading.Event()
        self.gone = 0
        self.heard = dict.fromkeys(range(count), (None, time.monotonic()))
        self._put(f"name/{index}", self.name)
        self.thread = threading.Thread(target=self._watch, name="watching the other processes", daemon=True)
        self.thread.start()

    def _put(self, key: str, value: str):
        self.store.key_value_set(f"lowrank/{key}", value, allow_overwrite=True)

    def _found(self, folder: str) -> dict[str, str]:
        return {key.rsplit("/", 1)[-1]: value for key, value in self.store.key_value_dir_get(f"lowrank/{folder}/")}

    def _watch(self):
        for beat in itertools.count():
            if self.finished.wait(BEAT):
                return
            try:
                self._put(f"alive/{self.index}", str(beat))
                over = self._found("over")
                if not over and self.index == 0:
                    over = self._missed()
            except Exception as error:
                if not self.finished.is_set():
                    self._end(LOST, f"{self.name} has lost process 0, which coordinates ({first_line(error)}); {GO_ON}")
                return
            if over:
                self._end(*json.loads(over["why"]))

    def _missed(self) -> dict[str, str]:
        """In process 0: whether one of the others has not been heard of for too long. Then all are told."""
        alive, now = self._found("alive"), time.monotonic()
        for index in range(1, self.count):
            beat = alive.get(str(index))
            if beat != self.heard[index][0]:
                self.heard[index] = (beat, now)
            if now - self.heard[index][1] > GONE_AFTER:
                name = self._found("name").get(str(index), f"process {index}")
                why = json.dumps([LOST, f"{name} is gone without a word (killed, or its machine is); {GO_ON}"])
                self._put("over/why", why)
                self.gone = 1
                return {"why": why}
        return {}

    def fail(self, message: str, code: int):
        """Tell the others why, and end."""
        with contextlib.suppress(Exception):
            # The first to fail is the reason; others only follow.
            self.store.key_value_set("lowrank/over/why", json.dumps([code, message]))
        self._end(code, message)

    def _end(self, code: int, message: str):
        if not self.ending.acquire(blocking=False):
            time.sleep(2 * PARTING)  # another thread is at it
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"error: {message}\n".encode())
        with contextlib.suppress(Exception):
            self._put(f"left/{self.index}", "")
            deadline = time.monotonic() + PARTING
            while self.index == 0 and time.monotonic() < deadline and len(self._found("left")) < self.count - self.gone:
                time.sleep(0.1)
        # Not sys.exit: the main thread may wait in a sum that nobody else comes to, and JAX's own farewell for all.
        os._exit(code)


_processes: _Processes | None = None


def start(coordinator: str | None, processes: int | None, process: int | None, timeout: float) -> str | None:
    """Join the other processes, if there are any; then JAX sees the devices of all -> a line that says how.

    To be called before anything asks for a device. Raises UserError; ends the process if the others do not come within
    `timeout` seconds.
    """
    global _processes
    how = decide(coordinator, processes, process, os.environ, tpu_hosts)
    if how is None or _processes is not None:
        return None
    if how.arguments.get("process_id") == 0:
        _refuse_busy_port(how.arguments["coordinator_address"])
    giving_up = threading.Timer(timeout, _give_up, [how, timeout])
    giving_up.daemon = True
    giving_up.start()
    try:
        # The runtime ends a process with a page of addresses when its time is out: ours is out before.
        with _interruptible():
            jax.distributed.initialize(**how.arguments, initialization_timeout=int(timeout) + 60)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the processes (found through {how.how}) could not join: {first_line(error)}") from error
    finally:
        giving_up.cancel()
    # The one private name: JAX has no public way to this store, which Orbax takes in the same way.
    from jax._src.distributed import global_state

    _catch_aborts()
    _processes = _Processes(
        jax.process_index(), jax.process_count(), global_state.coordinator_address, global_state.client
    )
    if jax.process_index():  # what a run says, process 0 says; mistakes go to stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return f"{jax.process_count()}, found through {how.how}; process 0 is at {global_state.coordinator_address}"


def _give_up(how: Start, timeout: float):
    index, count = how.arguments.get("process_id"), how.arguments.get("num_processes")
    address = how.arguments.get("coordinator_address", "the first host of the slice")
    reason = f"not all of the {count or 'other'} processes came to {address}"
    if index and (trouble := _unreachable(address)):
        reason = f"nobody answers at {address} ({trouble}): is process 0 running there, and is that port open?"
    me = "a process" if index is None else name_of(index, count, socket.gethostname())
    os.write(2, f"error: {me} waited {timeout:g} s: {reason}\n".encode())
    os._exit(LOST)  # they may come yet, if all are started again


def _refuse_busy_port(address: str):
    """JAX's runtime crashes where it cannot open its port."""
    port = int(address.rsplit(":", 1)[1])
    for family in (socket.AF_INET6, socket.AF_INET):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise UserError(
                        f"--coordinator={address}: port {port} cannot be opened here ({error.strerror}); is an earlier run "
                        "still there? Choose another port"
                    ) from None


@contextlib.contextmanager
def _interruptible():
    """Let Ctrl-C end the process while it waits in C, where Python would notice it only afterwards."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # the training loop's: it saves
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unreachable(address: str) -> str | None:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _catch_aborts():
    """JAX's runtime aborts a process that has lost process 0, and lets nobody in Python know. So the last line is written
    from the signal: it says what has happened, beneath the runtime's page of addresses."""

    def last_words(_):
        if _processes is not None and _processes.ending.acquire(blocking=False):
            trouble = _unreachable(_processes.coordinator) if _processes.index else None
            lost = f"has lost process 0, which coordinates ({trouble})" if trouble else "was aborted by JAX's runtime"
            os.write(2, f"error: {_processes.name} {lost}; {GO_ON}\n".encode())
            os._exit(LOST if trouble else FAILED)
        os._exit(FAILED)

    global _last_words
    _last_words = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)  # held: C keeps the address alone
    ctypes.CDLL(None).signal(signal.SIGABRT, _last_words)


_last_words = None


def is_running() -> bool:
    """Whether this process is one of several."""
    return _processes is not None


def fail(message: str, code: int = FAILED):
    """Where there are several processes: end all of them with this process's message. Elsewhere: nothing."""
    if _processes is not None:
        _processes.fail(f"{_processes.name}: {message}", code)


def wait_for_reason():
    """After an error that may come of another process's end: wait until that is known, which ends this process, too."""
    if _processes is not None:
        time.sleep(GONE_AFTER + 5)


def finish():
    """At the end of a run: all wait for all, then part."""
    global _processes
    if _processes is None:
        return
    barrier("finish")
    _processes.finished.set()
    _processes.thread.join()
    _processes = None
    jax.distributed.shutdown()


# ---- Agreeing --------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the process that writes logs, samples and pictures."""
    return _processes is None or _processes.index == 0


def barrier(name: str):
    """Wait until all processes are here, however long that takes: a process that fails ends the others anyhow."""
    if _processes is not None:
        with _interruptible():
            _processes.store.wait_at_barrier(f"lowrank/{name}/{next(_processes.calls)}", 7 * 24 * 3600 * 1000)


def compile_together(function):
    """A jitted function -> the same, compiled once (`compiling.ahead`); before it first runs, all processes have done so.

    gloo, which carries sums between CPU processes, waits 30 seconds for the others and no longer; two processes that trace
    and compile beside other work were seen to be further apart.
    """
    return compile_once(function, lambda: barrier("compiled"))


def broadcast_from_first(value: Callable[[], object]):
    """What `value` gives in process 0, in all processes; as JSON."""
    if _processes is None:
        return value()
    key = f"lowrank/from_first/{next(_processes.calls)}"
    if _processes.index == 0:
        result = value()
        _processes.store.key_value_set(key, json.dumps(result))
        return result
    with _interruptible():
        return json.loads(_processes.store.blocking_key_value_get(key, 7 * 24 * 3600 * 1000))


def refuse_differences(facts: Mapping[str, object], remedy: str):
    """UserError if `facts` are not the same in all processes; it names each fact and process that differs from process 0."""
    if _processes is None:
        return
    call = next(_processes.calls)
    _processes.store.key_value_set(f"lowrank/facts/{call}/{_processes.index}", json.dumps([_processes.name, facts]))
    barrier("facts")
    if _processes.index:
        barrier("facts are the same")  # or process 0 ends all
        return
    found = {int(index): json.loads(text) for index, text in _processes._found(f"facts/{call}").items()}
    reference = found[0][1]
    differing = [
        f"{name} is {there.get(name)} in {who} and {value} in {_processes.name}"
        for _, (who, there) in sorted(found.items())
        for name, value in reference.items()
        if there.get(name) != value
    ]
    if differing:
        raise UserError(f"the processes do not run the same thing: {'; '.join(differing)}; {remedy}")
    barrier("facts are the same")


def name_of(index: int, count: int, host: str) -> str:
    return f"process {index} of {count} ({host})"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""Several processes that train one run together: how they find each other, agree, and end together.

What processes tell each other beside the training step goes through the key-value store of JAX's coordination service,
which process 0 holds; so they can talk while their devices wait for each other. A thread in each process writes a
heartbeat every second and reads whether the run is over: if one process fails or vanishes, the others end with that
message instead of waiting for ever in a collective that it does not join.
"""

import contextlib
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
from typing import TypeVar

from lowrank.errors import UserError
from lowrank.parallel.launchers import Cluster, detect_cluster, tpu_hosts

HEARTBEAT = 1.0  # seconds
GONE_AFTER = 20.0  # seconds without a heartbeat: long for a thread on a busy machine, short for a user who waits
PARTING = 10.0  # seconds that process 0, which holds the store, stays for the others to read why the run is over
LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds: a process that fails ends the others anyhow
LOST = 75  # exit code: another process is lost, start all of them again (as after SIGTERM)
FAILED = 1  # exit code: this process, or another one, failed
RESTART = "start the same command again, on all of them, to go on from the last checkpoint"
T = TypeVar("T")


class _Processes:
    """This process among the others, and the thread that watches them."""

    def __init__(self, index: int, count: int, store):
        self.index, self.count, self.store = index, count, store
        self.name = _name_of(index, count)
        self.calls = itertools.count()
        self.ending = threading.Lock()  # acquired by the thread that prints the last line, and never released
        self.finished = threading.Event()
        self.gone = 0
        self.heard: dict[int, tuple[str | None, float]] = dict.fromkeys(range(count), (None, time.monotonic()))
        self.put(f"name/{index}", self.name)
        self.thread = threading.Thread(target=self._watch, name="watching the other processes", daemon=True)
        self.thread.start()

    def put(self, key: str, value: str):
        self.store.key_value_set(f"lowrank/{key}", value, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        return {key.rsplit("/", 1)[-1]: value for key, value in self.store.key_value_dir_get(f"lowrank/{folder}/")}

    def _watch(self):
        for beat in itertools.count():
            if self.finished.wait(HEARTBEAT):
                return
            try:
                self.put(f"alive/{self.index}", str(beat))
                if self.index == 0:
                    self._find_gone()
                over = self.read("over")
            except Exception as error:
                if not self.finished.is_set():
                    why = f"{self.name} has lost process 0, which coordinates ({first_line(error)}); {RESTART}"
                    self._end(LOST, why)
                return
            if over:
                self._end(*json.loads(over["why"]))

    def _find_gone(self):
        """In process 0: if a process has been silent for too long, tell all others."""
        alive, now = self.read("alive"), time.monotonic()
        for index in range(1, self.count):
            beat = alive.get(str(index))
            if beat != self.heard[index][0]:
                self.heard[index] = (beat, now)
            if now - self.heard[index][1] > GONE_AFTER:
                name = self.read("name").get(str(index), f"process {index}")
                self._say_why(LOST, f"{name} is gone without a word (killed, or its machine is); {RESTART}")
                self.gone = 1

    def _say_why(self, code: int, message: str):
        with contextlib.suppress(Exception):  # set already: the first process to fail has given the reason
            self.store.key_value_set("lowrank/over/why", json.dumps([code, message]))

    def fail(self, message: str, code: int):
        """Tell the others why, and end."""
        self._say_why(code, message)
        self._end(code, message)

    def _end(self, code: int, message: str):
        if not self.ending.acquire(blocking=False):
            time.sleep(2 * PARTING)  # another thread is ending the process
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"error: {message}\n".encode())
        with contextlib.suppress(Exception):
            self.put(f"left/{self.index}", "")
            deadline = time.monotonic() + PARTING
            while self.index == 0 and time.monotonic() < deadline and len(self.read("left")) < self.count - self.gone:
                time.sleep(0.1)
        # Not sys.exit: the main thread may wait in a collective that cannot complete, and JAX's exit hook for all processes.
        os._exit(code)


_processes: _Processes | None = None


def start(coordinator: str | None, processes: int | None, process: int | None, timeout: float) -> str | None:
    """Join the other processes, if there are any -> a line that says how; then JAX sees the devices of all.

    Call it before anything asks for a device. Raises UserError; exits with LOST if the others do not come within
    `timeout` seconds, because they may come if all are started again.
    """
    import jax  # takes a second; files ask this module only whether this is the first process

    global _processes
    cluster = detect_cluster(coordinator, processes, process, os.environ, tpu_hosts)
    if cluster is None or _processes is not None:
        return None
    if cluster.arguments.get("process_id") == 0:
        _refuse_busy_port(cluster.arguments["coordinator_address"])
    timer = threading.Timer(timeout, _give_up, [cluster, timeout])
    timer.daemon = True
    timer.start()
    try:
        # JAX's own timeout ends a process with a page of addresses: ours comes first.
        with _interruptible():
            jax.distributed.initialize(**cluster.arguments, initialization_timeout=int(timeout) + 60)
    except (RuntimeError, ValueError, OSError) as error:
        why = first_line(error)
        raise UserError(f"the processes (found through {cluster.found_through}) could not join: {why}") from error
    finally:
        timer.cancel()
    # The one private name: JAX has no public access to this store; Orbax uses it in the same way.
    from jax._src.distributed import global_state

    _processes = _Processes(jax.process_index(), jax.process_count(), global_state.client)
    if jax.process_index():  # process 0 alone prints; errors go to stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    address = global_state.coordinator_address
    return f"{jax.process_count()}, found through {cluster.found_through}; process 0 is at {address}"


def _give_up(cluster: Cluster, timeout: float):
    index, count = cluster.arguments.get("process_id"), cluster.arguments.get("num_processes")
    address = cluster.arguments.get("coordinator_address", "the first host of the slice")
    reason = f"not all of the {count or 'other'} processes came to {address}"
    if index:
        host, port = address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
        except OSError as error:
            why = error.strerror or str(error)
            reason = f"nobody answers at {address} ({why}): is process 0 running there, and is that port open?"
    name = "a process" if index is None or count is None else _name_of(index, count)
    os.write(2, f"error: {name} waited {timeout:g} s: {reason}\n".encode())
    os._exit(LOST)


def _refuse_busy_port(address: str):
    """UserError if the port is taken: JAX's runtime crashes then."""
    port = int(address.rsplit(":", 1)[1])
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            socket.create_server(("", port), family=family).close()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"--coordinator={address}: port {port} cannot be opened here ({os.strerror(error.errno)}); is an "
                    "earlier run still there? Choose another port"
                ) from None


@contextlib.contextmanager
def _interruptible():
    """Let Ctrl-C end the process while it waits in C, where Python's own handler would run only afterwards."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # the training loop's, which saves
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_running() -> bool:
    """Whether this process is one of several."""
    return _processes is not None


def fail(message: str, code: int = FAILED):
    """End all processes with this one's message; a single process goes on."""
    if _processes is not None:
        _processes.fail(f"{_processes.name}: {message}", code)


def wait_for_reason():
    """After an error that another process's end may have caused: wait until that is known, which ends this one too."""
    if _processes is not None:
        time.sleep(GONE_AFTER + 5)


def finish():
    """At the end of a run: wait for all processes, then leave."""
    global _processes
    if _processes is None:
        return
    barrier("finish")
    _processes.finished.set()
    _processes.thread.join()
    _processes = None
    import jax

    jax.distributed.shutdown()


def place() -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (_processes.index, _processes.count) if _processes else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes logs, samples and pictures."""
    return _processes is None or _processes.index == 0


def barrier(name: str):
    """Wait until all processes are here, however long that takes."""
    if _processes is not None:
        with _interruptible():
            _processes.store.wait_at_barrier(f"lowrank/{name}/{next(_processes.calls)}", LONGEST_WAIT)


def broadcast_from_first(value: Callable[[], T]) -> T:
    """What `value` returns in process 0, in all processes; as JSON."""
    if _processes is None:
        return value()
    key = f"lowrank/from_first/{next(_processes.calls)}"
    if _processes.index == 0:
        result = value()
        _processes.store.key_value_set(key, json.dumps(result))
        return result
    with _interruptible():
        return json.loads(_processes.store.blocking_key_value_get(key, LONGEST_WAIT))


def refuse_differences(facts: Mapping[str, object], remedy: str):
    """UserError unless `facts` are the same in all processes; it names each fact and process that differs from process 0."""
    if _processes is None:
        return
    call = next(_processes.calls)
    _processes.store.key_value_set(f"lowrank/facts/{call}/{_processes.index}", json.dumps([_processes.name, facts]))
    barrier("facts")
    if _processes.index == 0:
        found = {int(index): json.loads(text) for index, text in _processes.read(f"facts/{call}").items()}
        differing = [
            f"{name} is {theirs.get(name)} in {process} and {value} in {_processes.name}"
            for _, (process, theirs) in sorted(found.items())
            for name, value in found[0][1].items()
            if theirs.get(name) != value
        ]
        if differing:
            raise UserError(f"the processes do not run the same thing: {'; '.join(differing)}; {remedy}")
    barrier("facts are the same")  # or process 0 ends all of them


def _name_of(index: int, count: int) -> str:
    return f"process {index} of {count} ({socket.gethostname()})"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

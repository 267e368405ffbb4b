"""Train with several processes on this machine's CPU, as several hosts would: to try a run out before it costs anything.

    python launch/local_processes.py --processes=2 --devices=2 -- --config=configs/demo.py --workdir=runs/two

Needs nothing but the installed package. Starts `python -m lowrank.train` so many times with so many CPU devices each; what
follows `--` goes to each of them as it is. What they say comes out line by line with the process's number before it. Ctrl-C, SIGTERM
and SIGHUP are handed on, so the run saves and stops. The exit code is the first one that is not 0 (75: stopped and saved).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("arguments", nargs="*", help="after --: arguments of lowrank.train")
    options = parser.parse_args()
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")

    command = [sys.executable, "-m", "lowrank.train", f"--coordinator=localhost:{free_port()}"]
    command += [f"--processes={options.processes}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    processes = [
        subprocess.Popen([*command, f"--process={index}", *options.arguments], env=environment, **pipes)
        for index in range(options.processes)
    ]

    def hand_on(number, _):
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    readers = [threading.Thread(target=tell, args=(index, process)) for index, process in enumerate(processes)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def tell(index: int, process: subprocess.Popen):
    """Print the process's lines; gloo, which carries sums between CPU processes, announces each of its connections."""
    for line in process.stdout:
        if not line.startswith("[Gloo]"):
            print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

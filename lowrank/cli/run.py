"""Run a command: parse absl's flags, turn a UserError into one line and an exit code, keep compiled programs.

JAX and the rooms that import it take seconds: they are imported in `main` functions, so that --help does not wait for them.
"""

import contextlib
import os
import pathlib
import shlex
import signal
import sys
import traceback
import typing
import warnings

from absl import app, flags, logging

from lowrank import cli
from lowrank.cli import streams
from lowrank.errors import HALF_CHARACTER, UserError
from lowrank.parallel import distributed, launchers

STOPPED = 75  # exit code after SIGTERM, SIGHUP or Ctrl-C: saved, run the same command again (EX_TEMPFAIL of sysexits.h)


def run(main: typing.Callable[[list[str]], int | None], more_help: str = ""):
    """Run `main(arguments that are no absl flag)`, whose result is the exit code (None: 0). A UserError exits with 1.

    --help prints the command's docstring, its flags and `more_help`.
    """

    def parse_flags(argv):
        if {"-h", "--help"} & {*argv[1:]}:
            try:
                app.usage(shorthelp=True, writeto_stdout=True, detailed_error=more_help or None)
                sys.stdout.flush()
            except UserError as error:  # a stdout that is full
                return _fail(str(error))
            sys.exit(0)
        if broken := [argument for argument in argv[1:] if HALF_CHARACTER.search(argument)]:
            shown = " ".join(os.fsencode(argument).decode(errors="backslashreplace") for argument in broken)
            return _fail(f"{shown}: not UTF-8 text; type it in a terminal of UTF-8, or rename the file")
        try:
            rest = flags.FLAGS(argv, known_only=True)
            if flags.FLAGS["verbosity"].using_default_value:
                flags.FLAGS.verbosity = logging.FATAL  # libraries log too much; their errors are raised anyway
            return rest
        except flags.Error as error:
            return _fail(f"{str(error).splitlines()[0]}; see --help")

    def guarded(argv):
        import jax

        if signal.getsignal(signal.SIGINT) is cli.interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _end_if_interrupted
        cli.in_command = True
        launchers.silence_libtpu()
        use_compile_cache()
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            code = main(argv[1:])
            sys.stdout.flush()  # what fails here is a command's mistake, and at the exit Python's
            distributed.finish()
            return code
        except UserError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            distributed.fail("interrupted")
            with contextlib.suppress(OSError, UserError):
                sys.stdout.flush()
            cli.interrupted()  # not through Python's exit, where XLA's threads or another Ctrl-C end it otherwise
        except BrokenPipeError:  # `... | head`: no mistake, but the command did not finish
            distributed.fail("its output was closed (a broken pipe)")
            return 141  # as shells count it: 128 + SIGPIPE
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                return _fail(
                    f"the device is out of memory ({str(error).splitlines()[0]}); more config.train.microbatches, "
                    "config.remat='full' or more devices along config.mesh.fsdp need less, and the run resumes with them; so does a "
                    "smaller config.data.max_length, in another --workdir"
                )
            if why := _no_device():
                return _fail(why)
            if distributed.is_running():  # the end of another process may have caused it: that is reported instead
                distributed.wait_for_reason()
                traceback.print_exc()
                distributed.fail(f"{type(error).__name__}: {distributed.first_line(error)}")
            raise

    streams.open_streams()
    app.run(guarded, flags_parser=parse_flags)


def command_line(name: str) -> str:
    """How this command was called, to be recorded beside what it makes."""
    return shlex.join(["python", "-m", f"lowrank.{name}", *sys.argv[1:]])


def refuse_unknown(arguments: list[str]):
    """UserError for any argument left after absl's flags, in a command that takes none."""
    if arguments:
        raise UserError(f"unknown argument{'s' * (len(arguments) > 1)} {' '.join(arguments)}; see --help")


def require(*names: str):
    """UserError for all of these flags that are not given."""
    if missing := [f"--{name}" for name in names if not flags.FLAGS[name].value]:
        raise UserError(f"{', '.join(missing)} missing; see --help")


def use_compile_cache():
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's own cache folder.

    Nobody else may write there: whoever can replace a compiled program can run code as this user.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        try:
            home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
            folder = home / "lowrank" / "compiled"
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(folder, 0o700)
        except (OSError, RuntimeError):
            return  # without a writable home, only compile time is lost
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # JAX's 1 s leaves most programs out


def _end_if_interrupted(unraisable) -> None:
    """A Ctrl-C that came while Python ran a callback, of the garbage collector for instance, which passes no exception on."""
    if unraisable.exc_type is KeyboardInterrupt:
        cli.interrupted()
    sys.__unraisablehook__(unraisable)


def _no_device() -> str | None:
    """Why JAX finds nothing to compute on; None where it does."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        why = distributed.first_line(error).split(" (set ")[0] if str(error) else "there is no such platform"
        return (
            f"JAX finds no device, JAX_PLATFORMS={platforms!r}: {why}; it is not installed here, or another process holds "
            "it; unset JAX_PLATFORMS to take what there is, or say JAX_PLATFORMS=cpu"
        )
    return None


def _fail(message: str):
    message = " ".join(message.splitlines())  # messages of libraries may have several
    distributed.fail(message)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)

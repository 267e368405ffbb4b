"""How every command runs: absl's flags, one line for a user's mistake, the compile cache, and signals to stop."""

import os
import pathlib
import sys
import traceback
import typing
import warnings

import jax
from absl import app, flags, logging

from lowrank.errors import UserError
from lowrank.parallel import compiling, distributed

STOPPED = 75  # exit code after SIGTERM or Ctrl-C: saved, run the same command again (sysexits' "temporary failure")


def run(main: typing.Callable[[list[str]], int | None]):
    """Run a command: `main(arguments that are no absl flag)`, whose result is the exit code (None: 0).

    A UserError, in the flags or later, ends the command with one line on stderr and exit code 1.
    """

    def parse_flags(argv):
        try:
            rest = flags.FLAGS(argv, known_only=True)
            if flags.FLAGS["verbosity"].using_default_value:
                flags.FLAGS.verbosity = logging.FATAL  # libraries' lines drown the run's; their errors are raised
            return rest
        except flags.Error as error:
            return _fail(f"{str(error).splitlines()[0]}; see --help")

    def guarded(argv):
        compiling.silence_libtpu()
        use_compile_cache()
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            code = main(argv[1:])
            distributed.finish()
            return code
        except UserError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            distributed.fail("interrupted")
            print("interrupted", file=sys.stderr)
            return 130  # as shells count it: 128 + SIGINT
        except BrokenPipeError:  # `... | head` is no mistake, but nor is it done
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            distributed.fail("nobody reads its output any more (a closed pipe)")
            return 141  # as shells count it: 128 + SIGPIPE
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                _end_others(error)
                raise
            return _fail(
                f"the device is out of memory ({str(error).splitlines()[0]}); more config.train.microbatches, "
                "config.remat='full', a smaller config.data.max_length or more devices along config.mesh.fsdp need less"
            )
        except Exception as error:
            _end_others(error)
            raise

    app.run(guarded, flags_parser=parse_flags)


def refuse_unknown(arguments: list[str]):
    """For a command without a config: whatever is left after absl's flags is a mistake."""
    if arguments:
        raise UserError(f"unknown argument{'s' * (len(arguments) > 1)} {' '.join(arguments)}; see --help")


def use_compile_cache():
    """Keep compiled programs between runs, in the user's own cache folder unless JAX_COMPILATION_CACHE_DIR says where.

    Nobody else may write there: a compiled program that others can replace is code that others can run.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = home / "lowrank" / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(folder, 0o700)
        except OSError:
            return  # a home that cannot be written to costs compile time, nothing else
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # JAX's 1 s leaves out most of a start


def _end_others(error: Exception):
    """An error that nobody foresaw, in one of several processes: if it is another's end that caused it, that is said;
    else the others end with this one's."""
    if distributed.is_running():
        distributed.wait_for_reason()
        traceback.print_exc()
        distributed.fail(f"{type(error).__name__}: {distributed.first_line(error)}")


def _fail(message: str):
    message = " ".join(message.splitlines())  # what libraries say may have several
    distributed.fail(message)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)

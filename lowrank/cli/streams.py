"""A command's stdin, stdout and stderr, whatever the shell has made of them: closed, full, a broken pipe, another encoding."""

import codecs
import errno
import functools
import io
import os
import sys

from lowrank.errors import UserError


class Output(io.FileIO):
    """The file under stdout or stderr. The first write that fails points it to /dev/null, so that no later one fails."""

    lasts = False  # whether the command goes on without it
    note: str | None = None  # is then said on stderr

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            why = f"stdout cannot be written to ({'closed' if error.errno == errno.EBADF else error.strerror})"
            if self.lasts:
                if self.note:
                    print(f"{why}: {self.note}", file=sys.stderr, flush=True)
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"{why}; give it a file with room, or a pipe that is read") from error


def open_streams() -> None:
    """Replace the streams of this process by such that write what they can; those that are no files stay as they are.

    A closed one becomes a file that is empty and refuses writes: otherwise the next file to be opened would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            file = os.open(os.devnull, os.O_RDONLY)
            sys.__dict__[name] = stream = open(file, closefd=False)  # noqa: SIM115 (for as long as the process lives)
        elif not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            continue
        if name == "stdin":
            stream.reconfigure(
                errors="strict"
            )  # in the C locale Python would make half characters of what is not UTF-8
        else:
            if stream.writable():
                stream.flush()
            raw = Output(stream.fileno(), "w", closefd=False)
            raw.lasts = name == "stderr"  # where it fails there is nobody to tell
            sys.__dict__[name] = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="lowrank.escape" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering or name == "stderr",
                write_through=stream.write_through,
            )


def outlive_stdout(note: str) -> None:
    """From here on the command goes on without a stdout that fails, which is said once on stderr."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", getattr(sys.stdout, "buffer", None))
    if isinstance(raw, Output):
        raw.lasts, raw.note = True, note


def _escape(error: UnicodeError):
    """The errors handler of stdout: a character that its encoding lacks is shown as its escape."""
    if isinstance(error, UnicodeEncodeError) and not error.encoding.startswith("utf"):
        _say_escaped(error.encoding)
    return codecs.backslashreplace_errors(error)


@functools.cache
def _say_escaped(encoding: str) -> None:
    note = f"stdout is {encoding}: characters that it lacks are shown as escapes; PYTHONIOENCODING=utf-8 shows them"
    print(note, file=sys.stderr, flush=True)


codecs.register_error("lowrank.escape", _escape)

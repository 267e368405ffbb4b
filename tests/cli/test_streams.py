"""What becomes of a command whose stdout is closed, full, or lacks a character."""

import contextlib
import io
import os

import pytest

from lowrank.cli import streams
from lowrank.errors import UserError

NOTE = "the run goes on"


@pytest.fixture
def unread():
    """A stdout that is a pipe, which nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(io.BufferedWriter(streams.Output(writer, "w")), line_buffering=True)
    yield stream
    stream.close()


def test_a_run_outlives_its_stdout_and_says_so_once(unread, capsys):
    with contextlib.redirect_stdout(unread):
        streams.outlive_stdout(NOTE)
        for _ in range(3):
            print("a line")
    assert capsys.readouterr().err == f"stdout cannot be written to (Broken pipe): {NOTE}\n"


def test_another_command_ends_at_a_closed_pipe_and_nothing_fails_at_the_exit(unread):
    with pytest.raises(BrokenPipeError):
        print("a line", file=unread)
    unread.flush()


def test_a_full_disk_is_a_mistake_in_one_line():
    stream = io.TextIOWrapper(streams.Output(os.open("/dev/full", os.O_WRONLY), "w"), write_through=True)
    with stream, pytest.raises(UserError, match=r"stdout cannot be written to \(No space left on device\)"):
        stream.write("a line")


def test_a_character_that_the_encoding_lacks_is_shown_as_its_escape_and_said_once(capsys):
    streams._say_escaped.cache_clear()
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="lowrank.escape")
    stream.write("\u201cé\u201d")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u201c\xe9\\u201d"
    assert capsys.readouterr().err.startswith("stdout is latin-1: ") and streams._say_escaped.cache_info().misses == 1

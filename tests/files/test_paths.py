"""Paths as users write them."""

import pathlib

import pytest

from lowrank.errors import UserError
from lowrank.files import paths


def test_a_tilde_is_the_home_folder_which_no_shell_puts_in_after_a_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.path("~/runs/x") == tmp_path / "runs" / "x" and paths.local("~") == tmp_path
    assert paths.path("~no_such_user/x") == pathlib.Path("~no_such_user/x")  # as in a shell
    assert paths.path("a/~/b") == pathlib.Path("a/~/b")


def test_a_home_folder_that_is_not_known_is_named(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(UserError, match=r"~/runs: the home folder is not known \(HOME is not set\)"):
        paths.path("~/runs")

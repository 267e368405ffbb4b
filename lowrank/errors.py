"""The one exception that commands show to a user as a line instead of a traceback, and what a misspelled name was to be."""

import difflib
import re
from collections.abc import Iterable

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8, and of a cut JSON escape


class UserError(Exception):
    """A mistake of the user's, said in one line: the thing, what is wrong with it, and what to do."""


def meant(text: str, choices: Iterable[str]) -> str:
    """The choice that is spelled nearly so, as a question; nothing where none is."""
    close = difflib.get_close_matches(text, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""

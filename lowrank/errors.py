"""The one exception that commands show to a user as a line instead of a traceback."""

import re

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8, and of a cut JSON escape


class UserError(Exception):
    """A mistake of the user's, said in one line: the thing, what is wrong with it, and what to do."""

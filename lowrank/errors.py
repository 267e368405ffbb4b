"""The one exception that commands show to a user as a line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's, said in one line: the thing, what is wrong with it, and what to do."""

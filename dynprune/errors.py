"""The one exception that users see as a single line instead of a traceback."""


class DynpruneError(Exception):
    """A known problem, told as: what was received, what was expected, what to do next.

    Only `cli.py` catches it: it prints the message on stderr and exits with status 1.
    """

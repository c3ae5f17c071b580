"""What users see as a single line instead of a traceback."""


class DynpruneError(Exception):
    """A known problem, told as: what was received, what was expected, what to do next.

    Only the command line catches it: it prints the message on stderr, with --json as an object on stdout too, and exits
    with `exit_code`.
    told: a result that names the problem was printed already.
    """

    exit_code = 1
    told = False


class ModelFails(DynpruneError):
    """A network that does not run on its example input. Commands add the option of theirs that sets the input."""


class Stopped(DynpruneError):
    """A run that was asked to stop, and did so after saving its state. The command line exits with 128 + the signal's
    number."""


class DynpruneWarning(UserWarning):
    """What users should know although the command goes on. The command line shows it as one line on stderr."""

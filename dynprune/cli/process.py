"""The command as a process: signals, exit codes, what goes to stdout and stderr."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

import typer

from dynprune.errors import DynpruneError, DynpruneWarning, Stopped
from dynprune.listener import Listener

BEGAN = time.perf_counter()  # when the process did, but for a moment
VOICE = "normal"  # how much is said meanwhile: quiet, normal or verbose


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Progress on stderr, by the first process where torchrun started several. Ctrl-C and SIGTERM ask the training loop
    to stop."""
    from dynprune.display.progress import Display

    heard = int(os.environ.get("RANK", "0")) == 0 and VOICE != "quiet"
    display = Display(verbose=VOICE == "verbose") if heard else Display.silent()
    with display.live():
        yield Listener(display.note, display.live_note, display.say, display.step, display.work)


@contextlib.contextmanager
def stoppable() -> Iterator[Listener]:
    """As `listening`, for training: Ctrl-C and SIGTERM ask it to stop after its step, and to save."""
    with listening() as listener, stop_requested() as stop:
        yield dataclasses.replace(listener, stop=stop)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the training loop to stop after its step; a second one stops at once."""
    asked: list[int] = []
    own = os.getpid()

    def ask(number: int, frame: object) -> None:
        if os.getpid() != own or asked:  # processes that decode photos inherit this
            interrupt(number, frame)
        asked.append(number)
        print("stopping after this step and saving; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    except Stopped as error:
        error.exit_code = 128 + asked[0] if asked else error.exit_code
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(message: str) -> DynpruneError:
    """An error about a result that was printed already."""
    error = DynpruneError(message)
    error.told = True
    return error


def finish(json_output: bool, result: dict, tables: Callable[[], list]) -> None:
    from dynprune.display.tables import show

    if json_output:
        print(json.dumps(result))
    else:
        show(*tables())


def refuse_missed(result) -> None:
    """A budget that is missed is an error, after everything was shown."""
    from dynprune.budgets.fit import first_missed

    if missed := first_missed(result.budgets):
        raise told(
            f"budget {missed['budget']} missed: measured {missed['actual']:.4g}, allowed "
            f"{missed['limit']:.4g}. On a quiet machine measure again; if it stays so, train with a smaller "
            f"budget."
        )


class Interrupted(BaseException):
    """A signal asked the program to end at once. No `except Exception` stops it; every `finally` runs."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def interrupt(number: int, _frame: object) -> None:
    raise Interrupted(number)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as one line; others as Python shows them."""
    if issubclass(category, DynpruneWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def fail(message: str, code: int, told: bool = False) -> NoReturn:
    """One line on stderr and, with --json, an object on stdout, unless a result stands there already."""
    if VOICE == "verbose" and sys.exc_info()[1] is not None:
        traceback.print_exc()
    if message:
        print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv and not told:
        print(json.dumps({"error": message, "exit_code": code}))
    sys.exit(code)


def run_app(app: typer.Typer) -> None:
    """Run a command. Exit codes: 0, 1 for errors, 2 for options that make no sense, 130 after Ctrl-C, 143 after
    SIGTERM."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        run_alone(app)
    try:
        run_alone(app)
    except SystemExit as stop:
        end_now(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        end_now(1)


def end_now(code: int) -> NoReturn:
    """End one of torchrun's processes without taking the interpreter apart.

    gloo's threads may still hold tensors then, and a thread that asks for an interpreter that is ending is killed in
    the middle of C++ code: "terminate called without an active exception", after everything was done and written.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def run_alone(app: typer.Typer) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know a sign, and names of files need not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    warnings.showwarning = show_warning
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except DynpruneError as error:
        fail(str(error), error.exit_code, error.told)
    except PermissionError as error:
        fail(
            f"Permission denied: {error.filename}. Make it readable (and a run directory writable), or choose "
            f"another place.",
            1,
        )
    except Interrupted as error:
        fail(f"interrupted by {error}", error.exit_code)
    except typer.Abort:
        fail("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        if not (hasattr(error, "format_message") and hasattr(error, "show")):  # Typer's own: options that make no sense
            raise
        if "--json" in sys.argv:
            fail(error.format_message(), 2)
        error.show()
        sys.exit(2)

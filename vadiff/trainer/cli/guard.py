"""What every command does with errors that the user can mend, with signals, and with a closed pipe."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from ...errors import Stopped, UserError
from ...extras import MissingExtraError
from ...files import problem


def status_of(command: Callable[[], object]) -> int:
    """Run a command, and print an error that the user can mend in one line. Other errors are raised.

    Returns:
        The exit status: 0; 1 for an error that the user can mend, as a path that cannot be written or a full disk; 130
        when interrupted, 143 after SIGTERM; 141 when the reader of the output closed the pipe.
    """
    try:
        command()
        sys.stdout.flush()
    except (MissingExtraError, UserError) as error:
        print(f"vadiff: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"\nvadiff: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt as stop:
        print(f"\nvadiff: interrupted {stop}".rstrip(), file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        _close_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        told = problem(error) or _trouble_with_output()
        if told is None:
            raise
        print(f"vadiff: {told}", file=sys.stderr)
        return 1
    return 0


def _trouble_with_output() -> str | None:
    """Why standard output cannot be written, as where it is a file on a full disk."""
    try:
        print(flush=True)  # what failed to be printed is no longer in the buffer
    except OSError as error:
        _close_output()
        return f"the output cannot be written: {os.strerror(error.errno or 0).lower()}"
    return None


def _close_output() -> None:
    """Let what is still to be printed go nowhere: Python would print an error of its own at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in for standard output, as tests have
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Errors that the user can fix, which the command line prints in one line, without a traceback; and warnings."""


class UserError(Exception):
    """A problem outside the program; the message says what is wrong and what to do."""


class DataError(UserError):
    """A data set is missing, truncated, corrupt or in an unknown layout."""


class RunError(UserError):
    """A folder is not a run directory, or not one that can be used for this purpose."""


class CheckpointError(UserError):
    """A checkpoint is missing, corrupt or could not be written; the message names the last intact one."""


class TrainingError(UserError):
    """Training cannot go on."""


class Stopped(Exception):
    """Work was stopped by a signal; the message says what is kept and how to go on.

    Attributes:
        signal: its number.
        exit_code: what the process should return: 128 + the number, as in shells and schedulers.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number
        self.exit_code = 128 + number


class DiffusionLossWarning(UserWarning):
    """A criterion is probably used in a wrong way; the message says what it is and what to write instead."""

"""Errors that the person at the keyboard can mend: the command line prints them as one line, without a traceback."""


class UserError(Exception):
    """Something outside the program is not as it should be; the message says what, and what to do."""


class DataError(UserError):
    """A data set is missing, truncated, corrupt or not in a layout that is known."""


class RunError(UserError):
    """A folder is not a run directory, or not one that can be used as asked."""


class CheckpointError(UserError):
    """A checkpoint is missing, corrupt or could not be written; the message names the last good one."""


class TrainingError(UserError):
    """Training cannot go on."""

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


class DiffusionLossWarning(UserWarning):
    """A criterion is probably used in a wrong way; the message says what it is and what to write instead."""

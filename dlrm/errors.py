"""The error tree, and the exit code that each branch ends a process with.

::

    CrosslaneError              1  anything below without a code of its own
    ├── ConfigError             2  a config, an option or an argument is wrong
    ├── DataError               3  a data set, file, row or key is wrong or missing
    │   └── FaultyDataError     9  a check of a data set came to its end and found faults
    ├── DeviceError             4  the device that was asked for is not there or failed
    ├── CommError               5  ranks cannot reach each other, or disagree
    ├── CheckpointError         6  a checkpoint is missing, damaged or of another model
    ├── LaunchError             7  a job could not be started, or a rank died
    └── ServiceError            8  the control service cannot be reached or refused

Two more exit codes are no errors: 0 (done) and 75 (``STOPPED``: stopped on request after writing a
checkpoint; running the same command again resumes). 1 is also any uncaught exception. A message is one
sentence that says what is wrong, the value, the limit and the remedy.
"""

STOPPED = 75


class CrosslaneError(Exception):
    """Base of every error that Crosslane raises on purpose."""

    exit_code = 1


class ConfigError(CrosslaneError):
    """A config, an option or an argument is wrong."""

    exit_code = 2


class DataError(CrosslaneError):
    """A data set, file, row or key is wrong or missing."""

    exit_code = 3


class FaultyDataError(DataError):
    """A check of a data set came to its end and found faults."""

    exit_code = 9


class DeviceError(CrosslaneError):
    """The device that was asked for is not there or failed."""

    exit_code = 4


class CommError(CrosslaneError):
    """Ranks cannot reach each other, or disagree."""

    exit_code = 5


class CheckpointError(CrosslaneError):
    """A checkpoint is missing, damaged or of another model."""

    exit_code = 6


class LaunchError(CrosslaneError):
    """A job could not be started, or a rank died."""

    exit_code = 7


class ServiceError(CrosslaneError):
    """The control service cannot be reached or refused."""

    exit_code = 8

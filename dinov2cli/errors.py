"""Errors the program explains in one line, sorted by whose fault they are; each carries its exit code."""


class DinoError(Exception):
    """Base of every error whose message is written for the user. The command line prints it without a traceback."""

    exit_code = 1

    rank: int | None = None
    """Under a launch: the rank that met the error, where all ranks raise it together."""


class WorkError(DinoError):
    """The work itself failed although command and input were fine (disk full, loss not finite): exit 1."""

    exit_code = 1


class UserError(DinoError):
    """The command, an option or a config key is wrong: exit 2."""

    exit_code = 2


class InputError(DinoError):
    """An input is missing, unreadable or of the wrong kind: exit 3."""

    exit_code = 3


class Preempted(DinoError):
    """The process was told to stop (SIGTERM, SIGUSR1), saved its state and can be started again: exit 75."""

    exit_code = 75

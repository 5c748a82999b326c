"""Defines the two types of error that this project raises deliberately.

    raise FatalError("part_1.gz is truncated; download it again", "part_1.gz", line=12)

`FatalError`: the user has to fix the cause (a wrong setting, a damaged file, a full disk); a retry does not help.
`RetryableError`: the cause is temporary (a connection reset, a throttled request); the same call may succeed later.
Any other exception is a bug and keeps its traceback.
"""


def printable(text: str) -> str:
    """Escapes unprintable characters, except newlines, as in \\x1b. Escaping a text twice changes nothing."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode() for mark in text
    )


class DistilError(Exception):
    """An error message of one sentence (cause, remedy), with the input file and line that caused it, if known."""

    def __init__(self, message: str, file: str = "", line: int | None = None) -> None:
        # Names and excerpts are untrusted input: escaped, they cannot control a terminal or break an encoder.
        message, file = printable(message), printable(file)
        # Exception.args contains all three, so that the error survives pickling between processes.
        super().__init__(message, file, line)
        self.message = message
        self.file = file
        self.line = line

    def __str__(self) -> str:
        return self.message


class FatalError(DistilError):
    """An error that persists until the user fixes its cause."""


class DamagedError(FatalError):
    """A file or receipt in the store differs from the one that was committed.

    It must not be raised for any other reason: `verify` withdraws damaged artifacts, and must not withdraw an artifact
    that is only temporarily unreadable.
    """


class RetryableError(DistilError):
    """A temporary error: the same call may succeed later."""

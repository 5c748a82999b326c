"""The two types of error that this project raises on purpose.

    raise FatalError("part_1.gz is truncated; download it again", "part_1.gz", line=12)

`FatalError`: the user has to fix the cause (a wrong setting, a broken file, a full disk); a retry changes nothing.
`RetryableError`: the cause is temporary (a connection reset, a throttled request); the same call may succeed later.
Any other exception is a bug and keeps its traceback.
"""


def printable(text: str) -> str:
    """The text with unprintable characters, except newlines, escaped as in \\x1b; idempotent."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode() for mark in text
    )


class DistilError(Exception):
    """One sentence (cause, remedy), with the input file and line that it is about if they are known."""

    def __init__(self, message: str, file: str = "", line: int | None = None) -> None:
        # Names and excerpts are untrusted input: escaped, they cannot control a terminal or break an encoder.
        message, file = printable(message), printable(file)
        # Exception.args holds all three, so that the error survives pickling between processes.
        super().__init__(message, file, line)
        self.message = message
        self.file = file
        self.line = line

    def __str__(self) -> str:
        return self.message


class FatalError(DistilError):
    """A retry fails again until the user fixes the cause."""


class DamagedError(FatalError):
    """The store's files or receipts differ from those that were committed.

    Raised for nothing else: `verify` withdraws damaged artifacts, and must not withdraw one that is merely unreadable
    at the moment.
    """


class RetryableError(DistilError):
    """The same call may succeed later."""

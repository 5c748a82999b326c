"""The two kinds of error that this project raises on purpose.

`FatalError` is the user's to mend (a wrong field, a broken file, a full disk): trying again changes nothing.
`RetryableError` passes by itself (a network that resets, a store that says slow down): trying again is right.
Anything else that is raised is a fault of the program and keeps its traceback.
"""


def printable(text: str) -> str:
    """Any text with what is not to be printed, but for newlines, shown as \\x1b and the like; twice is as once."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode() for mark in text
    )


class DistilError(Exception):
    """One clear sentence, and where known the file and the line that it is about."""

    def __init__(self, message: str, file: str = "", line: int | None = None) -> None:
        # Names and excerpts come from outside; escaped here, none of them can command a terminal or break an encoder.
        message, file = printable(message), printable(file)
        # All three go to Exception so that the error survives the way back from a worker process.
        super().__init__(message, file, line)
        self.message = message
        self.file = file
        self.line = line

    def __str__(self) -> str:
        return self.message


class FatalError(DistilError):
    """Trying again without changing something cannot help."""


class DamagedError(FatalError):
    """What the store holds is not what was put there: bytes, sizes, files or a receipt are others. Nothing else is
    damage, so that whoever takes damaged things away never takes one that merely could not be read just now.
    """


class RetryableError(DistilError):
    """The same call may succeed later."""

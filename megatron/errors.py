"""The one exception that means "the user can fix this", and others in words."""


class UserError(ValueError):
    """A wrong flag, file or combination of them.

    The message is one line that names the flag, file or line number and says what to do instead. Entry points print it
    as ``error: ...`` and exit with code 2 on every rank; everything else that is raised is a defect and keeps its
    traceback.
    """


def one_line(error: Exception) -> str:
    """The type of ``error`` and all that it says, on one line."""
    return " ".join(f"{type(error).__name__} {error}".split())


class OneRankError(UserError):
    """A user's mistake that this process alone sees, before it can tell the others: it prints the line itself."""

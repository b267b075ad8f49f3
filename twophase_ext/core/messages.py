"""Parts that error messages share."""


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def type_and_line(error: BaseException) -> str:
    """The error's type and first line, 200 characters at most."""
    line = (str(error).strip().splitlines() or [""])[0]
    return (f"{type(error).__name__}: {line}" if line else type(error).__name__)[:200]

"""The entry of the command `twophase`, which may be installed without what it needs."""

import sys


def main() -> int:
    """Run the command line; one line where packages of the extra "cli" are missing."""
    try:
        from .cli import main as run  # with every package of the extra
    except ModuleNotFoundError as error:
        sys.exit(
            f"twophase: the command line needs {error.name}, which is not installed: "
            'pip install ".[cli]"'
        )
    return run()

"""The entry of the command `twophase`, which may be installed without what it needs.

Help, and a command that there is not, are answered without importing torch.
"""

import argparse
import sys

from .commands import DESCRIPTION, SUMMARIES, did_you_mean
from .help import help_of


def outline() -> argparse.ArgumentParser:
    """A parser that knows the commands and none of their options."""
    parser = argparse.ArgumentParser(
        prog="twophase",
        description=DESCRIPTION,
        epilog="twophase COMMAND --help lists its options.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in SUMMARIES.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def main() -> int:
    """Run the command line; one line where packages of the extra "cli" are missing."""
    words = sys.argv[1:]
    if words and words[0] in ("-h", "--help"):
        outline().print_help()
        return 0
    if words and words[0] in SUMMARIES and {"-h", "--help"} & {*words[1:]}:
        print(help_of(words[0]))
        return 0
    if words and not words[0].startswith("-") and words[0] not in SUMMARIES:
        outline().error(f"there is no command {words[0]!r}{did_you_mean(words[0], SUMMARIES)}")
    try:
        from .cli import main as run  # with every package of the extra
    except ModuleNotFoundError as error:
        sys.exit(
            f"twophase: the command line needs {error.name}, which is not installed: "
            'pip install ".[cli]"'
        )
    return run()

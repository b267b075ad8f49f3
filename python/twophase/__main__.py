"""python -m twophase: the command `twophase`."""

import sys

from .console import main

if __name__ == "__main__":
    sys.exit(main())

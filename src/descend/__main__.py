"""``python -m descend`` is the command ``descend``."""

import sys

from descend.command.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m descend.compare digits`` does the same as ``descend compare digits``."""

import sys

from descend.compare.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

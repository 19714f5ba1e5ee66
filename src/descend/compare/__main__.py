"""``python -m descend.compare digits`` is ``descend compare digits``."""

import sys

from descend.compare.cli import main

sys.exit(main(["compare", *sys.argv[1:]]))

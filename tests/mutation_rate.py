"""Prints how many mutants of each file the tests noticed in `make mutate`; exits with 1 below 95 % of all."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

MUTANTS = Path("mutants")
REQUIRED = 0.95
# Exit codes of pytest on a mutant. Anything else, a timeout or a test that was not found, does not count as noticed.
NOTICED, SURVIVED = 1, 0


def row(name: str, codes: Counter[int]) -> str:
    rate = codes[NOTICED] / codes.total()
    other = codes.total() - codes[NOTICED] - codes[SURVIVED]
    return f"| {name} | {codes.total()} | {codes[NOTICED]} | {codes[SURVIVED]} | {other} | {rate:.1%} |"


def main() -> int:
    all_codes: Counter[int] = Counter()
    print("| file | mutants | noticed | survived | other | rate |\n| --- | --: | --: | --: | --: | --: |")
    for path in sorted(MUTANTS.rglob("*.meta")):
        codes = Counter(json.loads(path.read_text())["exit_code_by_key"].values())
        if codes:
            print(row(f"`{path.relative_to(MUTANTS / 'src/descend').with_suffix('')}`", codes))
            all_codes += codes
    print(row("together", all_codes))
    return int(all_codes[NOTICED] < REQUIRED * all_codes.total())


if __name__ == "__main__":
    sys.exit(main())

"""The pages of the documentation, the README among them, and what is in them."""

from __future__ import annotations

import re
import unicodedata
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block of a page.

    Attributes:
        code: its text.
        line: number of its first line in the page.
        output: the ``text`` block that follows at once, if any: what the block prints.
    """

    code: str
    line: int
    output: str | None


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    """The page's blocks that run: those marked ``python``."""
    text = page.read_text("utf-8")
    found = list(FENCE.finditer(text))
    blocks = []
    for fence, following in zip_longest(found, found[1:]):
        if fence[2].split(" ")[0] != "python":
            continue
        is_output = (
            following is not None and following[2] == "text" and not text[fence.end() : following.start()].strip()
        )
        line = text.count("\n", 0, fence.start(3)) + 1
        blocks.append(Block(fence[3], line, following[3] if following and is_output else None))
    return blocks


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """What a link to the page may name behind ``#``."""
    text = FENCE.sub("", page.read_text("utf-8"))
    seen: set[str] = set(re.findall(r"(?<=\{#)[\w.-]+|(?<=<a id=\")[\w.-]+", text))
    for heading in re.findall(r"^#{1,6} (.*?)(?: \{[^}]*\})?$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).encode("ascii", "ignore")
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.decode()).strip().lower())
        name, number = slug, 1
        while name in seen:
            name, number = f"{slug}_{number}", number + 1
        seen.add(name)
    return seen

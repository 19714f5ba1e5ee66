"""Links of the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, anchors, name_of, prose

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
DEFINITION = re.compile(r"^()\[(\w+)\]: (\S+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_exist(page: Path) -> None:
    for is_image, text, link in LINK.findall(prose(page)) + DEFINITION.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} does not exist."
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link} is outside of the repository."
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)}: {path or name_of(page)} has no heading #{anchor}."
        if is_image:
            assert len(text) > 10, f"{name_of(page)}: {link} needs words for those who do not see it."


def test_anchors_are_those_of_the_site(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# One `two`: (3)\n\n## Same\n\n## Same\n\n## A {#named}\n\n<a id="old"></a>\n\n```sh\n# no heading\n```\n'
    )
    assert anchors(page) == {"one-two-3", "same", "same_1", "a", "named", "old"}

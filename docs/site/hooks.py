"""What mkdocs does not do by itself: formulas, quotations and links to the repository's files.

Formulas become MathML when the site is built, so that pages load no script. ``[source: adamw](../../src/...)`` on a
line of its own is replaced by that function, read from the file: it cannot go stale. ``[output](adam.txt)`` is replaced
by the file's text. In any other viewer both are links that work. A link to a file outside of docs leads to a page with
its text.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
SOURCE = re.compile(r"^\[source: ([\w.]+)\]\(([^)#\s]+)\)$", re.MULTILINE)
OUTPUT = re.compile(r"^\[output\]\(([^)#\s]+)\)$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown"}


def with_mathml(page: str) -> str:
    """The page with each formula as MathML."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"),
        page,
    )


def definition(path: Path, name: str) -> str:
    """The lines of a function or class of a file, or of a method (``Class.method``)."""
    text = path.read_text("utf-8")
    body = ast.parse(text).body
    lines: list[str] = []
    for part in name.split("."):
        inside = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        if part not in inside:
            raise LookupError(f"{path.name} defines no {name}.")
        body, lines = inside[part].body, text.splitlines()[inside[part].lineno - 1 : inside[part].end_lineno]
    return textwrap.dedent("\n".join(lines))


def repository_path(page: str, link: str) -> str | None:
    """The path in the repository of the file, outside of docs, that a page links to; None for any other link."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    is_outside = not path.startswith(("docs/", "../")) and (ROOT / path).is_file()
    return path if is_outside else None


def with_quotations(markdown: str, page: str) -> str:
    """The page's text with what it quotes, and links to pages of the site instead of files of the repository."""
    folder = ROOT / "docs" / posixpath.dirname(page)

    def source(found: re.Match[str]) -> str:
        code = definition(folder / found[2], found[1])
        return f'```python title="{posixpath.normpath(found[2]).replace("../", "")}"\n{code}\n```'

    def output(found: re.Match[str]) -> str:
        return f"```{{.text .printed}}\n{(folder / found[1]).read_text('utf-8').rstrip()}\n```"

    def link(found: re.Match[str]) -> str:
        path = repository_path(page, found[2])
        if path is None:
            return found[0]
        lines = re.sub(r"^#L(\d+).*\)$", r"#__codelineno-0-\1)", found[3])
        return f"{found[1]}{posixpath.relpath(f'source/{path}.md', posixpath.dirname(page) or '.')}{lines}"

    return LINK.sub(link, OUTPUT.sub(output, SOURCE.sub(source, markdown)))


def source_page(path: str) -> str:
    """A page with the text of a file of the repository."""
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    text = (ROOT / path).read_text("utf-8").rstrip()
    return f'---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n````{language} linenums="1"\n{text}\n````\n'


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file of the repository that a page links to."""
    from mkdocs.structure.files import File, InclusionLevel

    linked = {
        path
        for file in files.documentation_pages()
        for found in LINK.finditer(file.content_string)
        if (path := repository_path(file.src_uri, found[2])) is not None
    }
    for path in sorted(linked):
        files.append(
            File.generated(config, f"source/{path}.md", content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Quote functions and outputs."""
    uri: str = page.file.src_uri
    return markdown if uri.startswith("source/") else with_quotations(markdown, uri)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML."""
    return with_mathml(content)

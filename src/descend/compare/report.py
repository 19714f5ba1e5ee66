"""The files of a report: ``report.html``, ``curves.png`` and ``curves.svg``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from descend.compare.records import Comparison, Run
from descend.compare.results.content import report_page
from descend.compare.results.pictures import picture
from descend.reporting.whole_files import write_whole


def write(folder: Path, comparison: Comparison, runs: Sequence[Run]) -> None:
    """Write the three files into ``folder``; each is written completely or not at all.

    Args:
        folder: an existing folder; files of these names are replaced.
        comparison: what the runs share.
        runs: all runs, interrupted and failed ones too.
    Raises:
        UsageError: if plotly is not installed.
        OSError: if the folder cannot be written.
    """
    text = report_page(comparison, runs)
    write_whole(folder / "report.html", lambda path: path.write_text(text, encoding="utf-8"))
    figure = picture(comparison, runs)
    write_whole(folder / "curves.png", lambda path: figure.savefig(path, format="png", dpi=150))
    write_whole(folder / "curves.svg", lambda path: figure.savefig(path, format="svg"))

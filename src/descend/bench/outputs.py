"""Where results go, and that nothing is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

from descend.bench.picture import draw
from descend.bench.report import Report
from descend.bench.settings import FOLDER, Settings
from descend.reporting.errors import UsageError
from descend.reporting.whole_files import write_whole

FILES = ("bench.json", "bench.png", "bench.svg")


class Outputs:
    """The files of one run, found to be writable before anything is measured.

    Args:
        settings: where they are to go.
    Raises:
        UsageError: something is there already, or cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        self._json, self._markdown = settings.json, settings.markdown
        taken = [file for file in (settings.json, settings.markdown) if file and file.exists()]
        if settings.out:
            taken += [settings.out / name for name in FILES if (settings.out / name).exists()]
        if taken and not settings.overwrite:
            raise UsageError(f"{taken[0]} exists; choose another name, or give --overwrite.")
        for file in (settings.json, settings.markdown):
            if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
                raise UsageError(f"{file} cannot be written.")
        self.folder = settings.out or _unused(FOLDER, settings.overwrite)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the folder {self.folder} cannot be made: {error.strerror}.") from None
        if not os.access(self.folder, os.W_OK):
            raise UsageError(f"the folder {self.folder} cannot be written to.")

    def write(self, report: Report) -> list[Path]:
        """Write all files, each completely or not at all; return them."""
        text = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
        figure = draw(report)
        written: list[Path] = []

        def write(file: Path, write_to: Callable[[Path], object]) -> None:
            write_whole(file, write_to)
            written.append(file)

        for file in (self.folder / "bench.json", *([self._json] if self._json else [])):
            write(file, lambda path: path.write_text(text, encoding="utf-8"))
        write(self.folder / "bench.png", lambda path: figure.savefig(path, format="png", dpi=150))
        write(self.folder / "bench.svg", lambda path: figure.savefig(path, format="svg"))
        if self._markdown:
            write(self._markdown, lambda path: path.write_text(report.markdown(), encoding="utf-8"))
        return written

    def give_up(self) -> None:
        """Remove the folder if nothing was written to it."""
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _unused(folder: Path, overwrite: bool) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3``, ... that does not exist."""
    if overwrite or not folder.exists():
        return folder
    return next(other for number in count(2) if not (other := folder.with_name(f"{folder.name}-{number}")).exists())

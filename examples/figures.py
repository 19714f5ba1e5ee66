"""What the scripts behind the Learn chapters share: options, how figures look, and where their numbers go.

A script writes ``docs/learn/NAME-*.svg`` and ``docs/learn/NAME.txt``, which the chapter quotes. The text begins with
the date, the machine and a digest of the script: a test fails when the script is newer than its figures.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LEARN = Path(__file__).parents[1] / "docs" / "learn"

# Okabe & Ito's palette, which colour-blind people can tell apart. On a dark background each has a lighter sister.
INK, PALE, PAPER = "#24292f", "#d0d7de", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#c75000", "#007a5a", "#8a4f8a"
DARK = {
    INK: "#d7dae0",
    PALE: "#444a56",
    PAPER: "#1e2129",
    BLUE: "#56b4e9",
    ORANGE: "#f0a04b",
    GREEN: "#2fc79d",
    PURPLE: "#d79bd0",
}

STYLE = {
    "axes.edgecolor": PALE,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "figure.figsize": (5.2, 3.3),
    "font.size": 9.5,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "descend",
    "text.color": INK,
    "xtick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.color": PALE,
    "ytick.labelcolor": INK,
}
matplotlib.rcParams.update(STYLE)


def new_figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = Figure()
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def power_of_ten(value: float) -> str:
    """The label of a tick."""
    if 1e-3 <= value < 1e5:
        return f"{value:,g}" if value < 1e3 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def use_log_scale(axes: Axes, axis: str) -> None:
    """Make ``"x"``, ``"y"`` or both (``"xy"``) logarithmic, with labels such as 0.01 and 1,000, or 10⁻⁴ and 10⁵."""
    for name in axis:
        getattr(axes, f"set_{name}scale")("log")
        which = getattr(axes, f"{name}axis")
        which.set_major_formatter(lambda value, _: power_of_ten(value))
        which.set_minor_formatter("")


def name_curve(axes: Axes, x: float, y: float, text: str, color: str, *, dx: float = 0, dy: float = 0) -> None:
    """Write a curve's name beside the point (x, y), in its colour; dx and dy move it, in points."""
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=color, va="center")


class Chapter:
    """The figures and the numbers of a chapter.

    Args:
        name: that of the chapter's files.
        script: the script's own path.
        arguments: of the command line; None for ``sys.argv``.
    """

    def __init__(self, name: str, script: str, arguments: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(description=f"Compute the figures of docs/learn/{name}.md.")
        parser.add_argument("--quick", action="store_true", help="a few steps only: does the script run?")
        parser.add_argument("--out", type=Path, default=LEARN, help="folder of the figures. Default: docs/learn")
        options = parser.parse_args(arguments)
        self.name, self.script, self.out = name, Path(script), options.out
        self.quick: bool = options.quick
        self.lines: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)

    def say(self, line: str) -> None:
        """Print a line that the chapter quotes."""
        print(line)
        self.lines.append(line)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure that follows the reader's light or dark colour scheme."""
        path = self.out / f"{self.name}-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        path.write_text(with_dark_scheme(path.read_text("utf-8")), "utf-8")

    def close(self) -> None:
        """Write the numbers, with what they depend on."""
        head = f"examples/{self.script.name}, {datetime.date.today()}, {machine()}\n{digest(self.script)}\n\n"
        (self.out / f"{self.name}.txt").write_text(head + "\n".join(self.lines) + "\n", "utf-8")


def digest(script: Path) -> str:
    """The line that names the version of a script."""
    return f"script {hashlib.sha256(script.read_bytes()).hexdigest()[:16]}"


def machine() -> str:
    """Processor, threads and version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def with_dark_scheme(svg: str) -> str:
    """The picture in the system's font, with colours for readers who prefer a dark background."""
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans'")
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{{rules}}}</style>"
    return svg.replace("<defs>", f"{style}\n <defs>", 1)

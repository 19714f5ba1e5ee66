"""The page that ``Monitor.report`` writes: a map of layers over time, curves of some layers, alerts, dead rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from descend.diagnostics.monitoring.alerts import Alert
from descend.diagnostics.monitoring.dead_rows import DeadRows
from descend.diagnostics.monitoring.records import Record, metrics_of
from descend.reporting.axes import log_axis
from descend.reporting.errors import UsageError, unknown
from descend.reporting.page import Block, Chart, Entry, Legend, Prose, Section, Table, chart_text, page
from descend.reporting.palette import style
from descend.reporting.text import number, plural
from descend.reporting.whole_files import write_whole

_CURVES = 8  # layers drawn as curves, unless they are named
_LOST = 0.01  # a smaller share of updates lost to rounding is not drawn
_TITLES = {
    "update_ratio": "update-to-weight ratio",
    "grad_norm": "gradient norm",
    "signal_to_noise": "signal to noise",
    "lost_updates": "share of updates lost to rounding",
}


def report(
    path: Path,
    overwrite: bool,
    optimizer: str,
    records: Sequence[Record],
    alerts: Sequence[Alert],
    dead_rows: Mapping[str, DeadRows],
    layers: Sequence[str],
) -> Path:
    """Write the page, see ``Monitor.report``."""
    if not records:
        raise UsageError("Monitor.report: there is no sample yet; take `every` steps first.")
    if path.exists() and not overwrite:
        raise UsageError(f"Monitor.report: {path} exists; pass overwrite=True to replace it.")
    if not path.parent.is_dir():
        raise UsageError(f"Monitor.report: there is no folder {path.parent}.")
    # Samples from before the groups have changed have other layers.
    records = [record for record in records if record.names.of_layers == records[-1].names.of_layers]
    names, steps = records[-1].names.of_layers, [record.step for record in records]
    values = _values(records)
    for layer in layers:
        if layer not in names:
            raise unknown("Monitor.report: there is no layer", layer, names)
    chosen = [names.index(layer) for layer in layers] or _most_varied(values["update_ratio"])
    shown = [names[i] for i in chosen]
    sections = [
        Section("Update-to-weight ratio", _map(names, steps, values["update_ratio"])),
        Section("Layers", [Legend(_entries(shown)), *_curves(shown, steps, values, chosen)]),
        Section("Alerts", [_alerts(alerts)]),
        Section("Last sample", [_last(names, records[-1], values)]),
    ]
    if dead_rows:
        sections.insert(3, Section("Dead rows", _dead(dead_rows)))
    span = f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"
    lead = f"{optimizer}: {plural(len(steps), 'sample')} of {plural(len(names), 'layer')}, {span}; "
    text = page("What the optimizer did", f"{lead}{plural(len(alerts), 'alert')}.", sections)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _values(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """By metric, a row a layer and a column a sample; NaN where nothing is known."""
    samples = []
    for record in records:
        layers = len(record.names.of_layers)
        stepped = np.bincount(record.names.layer, record.stepped, layers) > 0
        found = metrics_of(record.of_layers())
        samples.append({metric: np.where(stepped, values, np.nan) for metric, values in found.items()})
    return {metric: np.stack([sample[metric] for sample in samples], axis=1) for metric in samples[0]}


def _logs(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _most_varied(ratios: np.ndarray) -> list[int]:
    """The layers whose ratio varies most, in their order."""
    logs = _logs(ratios)
    known = ~np.isnan(logs)
    spread = np.where(known, logs, -np.inf).max(axis=1) - np.where(known, logs, np.inf).min(axis=1)
    return sorted(np.argsort(-spread, kind="stable")[:_CURVES].tolist())


def _map(names: Sequence[str], steps: Sequence[int], ratios: np.ndarray) -> list[Block]:
    logs = _logs(ratios)
    known = logs[~np.isnan(logs)]
    if not len(known):
        return [Prose("No layer has had weights and an update.")]
    powers = range(math.floor(known.min()), math.ceil(known.max()) + 1)
    trace = {
        "type": "heatmap",
        "x": list(steps),
        "y": [chart_text(name) for name in names],
        "z": logs.tolist(),
        "customdata": ratios.tolist(),
        "hovertemplate": "%{y}<br>step %{x}<br>ratio %{customdata:.3g}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": {"tickvals": list(powers), "ticktext": [f"{10.0**power:g}" for power in powers], "thickness": 12},
    }
    # Phones have no room for long names beside the map.
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "showlegend": False,
    }
    if max(map(len, names)) > 24:
        layout["yaxis"] |= {
            "tickvals": trace["y"],
            "ticktext": [chart_text("…" + name[-22:]) if len(name) > 23 else chart_text(name) for name in names],
        }
    layer, sample = divmod(int(np.nanargmax(logs)), len(steps))
    description = (
        f"A map of the update-to-weight ratio, a row for each of {plural(len(names), 'layer')}, over the steps. The "
        f"largest is {number(ratios[layer, sample], 3)}, of {names[layer]} at step {steps[sample]}."
    )
    text = (
        "How far a step moves each layer, as a share of the norm of its weights. Around 1/1000 is usual; a ratio that "
        "grows before the loss does is the earliest sign of a spike."
    )
    return [Prose(text), Chart(description, [trace], layout, height=min(max(280, 100 + 16 * len(names)), 1600))]


def _entries(names: Sequence[str]) -> list[Entry]:
    return [Entry(name, name, i) for i, name in enumerate(names)]


def _curves(
    names: Sequence[str], steps: Sequence[int], values: Mapping[str, np.ndarray], chosen: Sequence[int]
) -> list[Block]:
    """A chart for each metric of which something is known."""
    charts: list[Block] = []
    for metric, title in _TITLES.items():
        rows = values[metric][chosen]
        if not np.isfinite(rows).any() or (metric == "lost_updates" and np.nanmax(rows) < _LOST):
            continue
        traces = []
        for i, (name, row) in enumerate(zip(names, rows.tolist(), strict=True)):
            colour, dash, marker = style(i)
            traces.append(
                {
                    "x": list(steps),
                    "y": row,
                    "name": chart_text(name),
                    "legendgroup": name,
                    "mode": "lines+markers" if len(steps) <= 40 else "lines",
                    "line": {"color": f"$series{colour}", "dash": dash},
                    "marker": {"symbol": marker, "size": 6, "color": f"$series{colour}"},
                }
            )
        is_share = metric == "lost_updates"
        axis = {"title": {"text": title}, "range": [0, 1.02]} if is_share else log_axis(title, rows.ravel().tolist())
        layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": axis, "showlegend": False}
        last = ", ".join(f"{name} {number(row[-1], 3)}" for name, row in zip(names, rows.tolist(), strict=True))
        charts.append(Chart(f"The {title} of layers over the steps; at the end: {last}.", traces, layout))
    return charts


def _alerts(alerts: Sequence[Alert]) -> Block:
    if not alerts:
        return Prose("None.")
    rows = [(f"{alert.step:,}", alert.kind, alert.message) for alert in alerts]
    return Table(
        "Alerts, in the order in which they came", ("step", "kind", "what was seen"), rows, ("kind", "what was seen")
    )


def _dead(found: Mapping[str, DeadRows]) -> list[Block]:
    text = "Rows that no gradient has reached since the state was made: tokens that no batch has named, or units."
    rows = [
        (name, f"{dead:,}", f"{count:,}", number(100 * dead / count, 3))
        for name, (dead, count) in sorted(found.items(), key=lambda item: -item[1].dead)
        if dead
    ]
    if not rows:
        return [Prose(f"{text} There are none.")]
    return [Prose(text), Table("Parameters with dead rows", ("parameter", "dead", "rows", "percent"), rows)]


def _last(names: Sequence[str], record: Record, values: Mapping[str, np.ndarray]) -> Block:
    metrics = [metric for metric in values if np.isfinite(values[metric][:, -1]).any()]
    rows = [(name, *(number(float(values[metric][i, -1]), 3) for metric in metrics)) for i, name in enumerate(names)]
    return Table(
        f"Every layer at step {record.step:,}", ("layer", *(metric.replace("_", " ") for metric in metrics)), rows
    )

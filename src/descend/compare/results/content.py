"""The report's page: its sections, sentences and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from descend.compare.records import Comparison, Run
from descend.compare.results import bars, charts, looks
from descend.compare.results.coincide import Pair, pairs
from descend.compare.results.series import (
    Series,
    Setting,
    final_loss,
    gather,
    held_out_loss,
    held_out_metric,
    is_finite,
    state_bytes,
    state_per_parameter,
    window,
)
from descend.compare.results.verdict import SEEDS, findings
from descend.reporting.page import Block, Details, Entry, Fact, Facts, Key, Legend, Prose, Section, Table, Tabs, page
from descend.reporting.palette import style
from descend.reporting.text import joined, number, plural, rate, seconds, size

RULE = (
    f"A difference is shown if both optimizers have at least {SEEDS} seeds, and every seed of one is below all of the "
    "other. Equal optimizers with three seeds each would part like this by chance once in 10 times, with five once in "
    "126. In brackets: the range over the seeds. Step times differ if their quartiles, over all steps, do not overlap."
)


def report_page(comparison: Comparison, runs: Sequence[Run]) -> str:
    """Return the page of a comparison as HTML."""
    series = gather(runs)
    same = pairs(series)
    blocks = [
        ("Verdict", _verdict(comparison, series)),
        ("Training loss", _training(comparison, series, same)),
        ("Held-out data", _held_out(comparison, series, same)),
        ("Learning rates", _rates(comparison, series, same)),
        ("Time of a step", _time(series)),
        ("State", _state(series)),
        ("All numbers", _numbers(comparison, series)),
    ]
    settings, machine = comparison.settings, comparison.machine
    footer = ". ".join(
        [
            f"Started {comparison.started}",
            f"Versions: {_pairs(comparison.versions)}",
            f"Machine: {_pairs(machine)}",
            f"Settings: {_pairs(settings)}",
        ]
    )
    seeds = len({run.seed for run in runs if not run.tuning})
    summary = comparison.summary.rstrip(".")
    lead = f"{summary[:1].upper()}{summary[1:]}. {plural(len(series), 'optimizer')}, {plural(seeds, 'seed')}."
    sections = [Section(title, content) for title, content in blocks if content]
    return page(f"Optimizers on {comparison.task}", lead, sections, f"{footer}.")


def _verdict(comparison: Comparison, series: Sequence[Series]) -> list[Block]:
    found = findings(comparison, series)
    if not found:
        return [Prose("No run has a result.")]
    kinds = {"shown": "good", "open": "plain", "bad": "bad"}
    facts = Facts([Fact(finding.quantity, finding.words, kinds[finding.kind], finding.numbers) for finding in found])
    return [facts, Prose(f"Learning rates: {_source(comparison, series)}.", "note"), Prose(RULE, "note")]


def _source(comparison: Comparison, series: Sequence[Series]) -> str:
    """Say where the learning rates come from."""
    if any(len(one.settings) > 1 for one in series):
        return (
            "of those swept, the one with the lowest held-out loss; chosen and judged by the same data, an optimizer "
            "looks better than it is"
        )
    return comparison.tuned or "as given, or the defaults of the task; they were not tuned"


def _training(comparison: Comparison, series: Sequence[Series], same: Sequence[Pair]) -> list[Block]:
    if not any(len(run.losses) for one in series for run in one.best.runs):
        return []
    tabs = Tabs(
        "Training loss against",
        [
            (name.capitalize(), [charts.loss_chart(comparison, series, same, name)])
            for name in ("steps", "time", "evaluations")
        ],
    )
    steps = window(series)
    words = "Each point is the loss of one step."
    if steps > 1:
        words = f"Each curve is the mean of the last {steps} steps, so that it ends at the number in the table."
    if any(len(one.best.runs) > 1 for one in series):
        words += " Line: median over the seeds. Band: quartiles."
    if steps > 1 and len(series) <= charts.RAW:
        words += " Faint: the losses of single batches, of the first seed."
    if not all(run.alone for one in series for run in one.best.runs):
        words += " Against time: runs that had the machine to themselves, where there are any."
    if any(one.best.diverged for one in series):
        words += " A cross: diverged."
    blocks: list[Block] = [_legend(series, same), tabs, Prose(words, "note")]
    for pair in same:
        if pair.largest == 0:
            blocks.append(Prose(f"{pair.first.label} and {pair.second.label} coincide: all their losses are equal."))
        else:
            blocks.append(
                Prose(
                    f"{pair.first.label} and {pair.second.label} coincide to {number(pair.largest, 1)}, the largest "
                    "difference of their losses at any step. The dashed curve lies on the wide one."
                )
            )
    difference = charts.difference_chart(comparison, same)
    return [*blocks, difference] if difference else blocks


def _held_out(comparison: Comparison, series: Sequence[Series], same: Sequence[Pair]) -> list[Block]:
    if not any(is_finite(loss) for one in series for run in one.best.runs for loss in run.test_losses):
        return []
    loss = charts.held_out_chart(series, same, comparison.loss_name, lambda run: run.test_losses, "free")
    if not comparison.metric_name:
        return [_legend(series, same), loss]
    name = comparison.metric_name
    scale = "free" if comparison.metric_is_error else "share"
    metric = charts.held_out_chart(series, same, name, lambda run: run.test_metrics, scale)
    return [_legend(series, same), Tabs("Held-out", [("Loss", [loss]), (name.capitalize(), [metric])])]


def _rates(comparison: Comparison, series: Sequence[Series], same: Sequence[Pair]) -> list[Block]:
    blocks: list[Block] = []
    swept = [one for one in series if one.swept]
    if swept:
        measures: list[tuple[str, str, Callable[[Run], float | None]]] = [
            ("Held-out loss", f"held-out {comparison.loss_name}", held_out_loss),
            ("Training loss", f"final {comparison.loss_name}", final_loss),
        ]
        panels = [
            (tab, [charts.rate_chart(series, same, name, measure)])
            for tab, name, measure in measures
            if any(setting.values(measure) for one in swept for setting in one.swept)
        ]
        if panels:
            words = (
                "Points: median over the seeds, with their range; only where all seeds finished. Crosses at the top: "
                "rates at which a seed diverged. The other charts show the best rate of each, by held-out loss."
            )
            blocks += [_legend(series, same, swept), Tabs("Against the learning rate", panels), Prose(words, "note")]
    rows = [[one.label, rate(one.best.lr), _tried(one), _options(one.best.runs[0])] for one in series]
    table = Table(
        f"Learning rates used: {_source(comparison, series)}",
        ["optimizer", "lr", "rates tried", "other options"],
        rows,
        words=["rates tried", "other options"],
        marks=[one.index for one in series],
    )
    return [*blocks, table]


def _tried(one: Series) -> str:
    lrs = [setting.lr for setting in one.swept if setting.lr is not None]
    return "-" if len(lrs) < 2 else f"{len(lrs)}, from {rate(lrs[0])} to {rate(lrs[-1])}"


def _options(run: Run) -> str:
    return _pairs({name: value for name, value in run.options.items() if name != "lr"}) or "-"


def _time(series: Sequence[Series]) -> list[Block]:
    drawn = bars.step_bars(series)
    if not drawn:
        shared = any(run.seconds for one in series for run in one.best.runs)
        return [Prose("All runs shared the machine with others: their times are not compared.")] if shared else []
    names = list(dict.fromkeys(name for bar in drawn for name in bar.parts))
    tones = [(_part(name), bars.TONES[name]) for name in names if name in bars.TONES]
    own = (
        [("optimizer (in its own colour)", f"$series{style(drawn[0].series.index).colour}")]
        if "optimizer" in names
        else []
    )
    blocks: list[Block] = [
        Key([*tones, *own]),
        bars.bar_chart("Time of a step by part; the table below has the numbers.", drawn, "time of a step", seconds),
    ]
    alone = [
        bars.Bar(bar.series, {"optimizer": bar.parts["optimizer"]}, seconds(bar.parts["optimizer"]))
        for bar in drawn
        if "optimizer" in bar.parts
    ]
    if alone:
        title = "time in the optimizer per step"
        blocks.append(bars.dot_chart("Time in the optimizer alone, by step.", alone, title, seconds))
    rows = []
    for bar in drawn:
        runs = bar.series.timed
        rows.append(
            [
                bar.series.label,
                *(seconds(bar.parts[name]) if name in bar.parts else "-" for name in names),
                seconds(bar.length),
                _spread(runs, lambda run: run.first_step_seconds, seconds),
                _spread(runs, lambda run: run.prepare_seconds, seconds),
            ]
        )
    headings = ["optimizer", *map(_part, names), "sum", "first step, optimizer", "to build and compile"]
    marks = [bar.series.index for bar in drawn]
    blocks.append(Table("Median time of a step but the first, by part", headings, rows, marks=marks))
    return blocks


def _part(name: str) -> str:
    return "whole step" if name == "step" else name


def _state(series: Sequence[Series]) -> list[Block]:
    drawn = []
    for one in series:
        count = one.best.median(state_bytes)
        if count is not None:
            each = one.best.median(state_per_parameter)
            words = size(count) if each is None else f"{size(count)} ({size(each)} a parameter)"
            drawn.append(bars.Bar(one, {"state": count}, words))
    if not drawn:
        return []
    if not any(bar.length for bar in drawn):
        return [Prose("None of the optimizers keeps state.")]
    words = "Memory of the optimizer's state: " + joined([f"{bar.series.label} {bar.text}" for bar in drawn]) + "."
    blocks: list[Block] = [bars.bar_chart(words, drawn, "bytes of state", size)]
    if any(len(run.state_bytes) > 1 for one in series for run in one.best.runs):
        blocks.append(Prose("Of the rank that keeps most.", "note"))
    return blocks


def _numbers(comparison: Comparison, series: Sequence[Series]) -> list[Block]:
    metric = comparison.metric_name
    show_metric = number if comparison.metric_is_error else _share
    headings = ["optimizer", "lr", "seeds", "result", "held-out loss", *([f"held-out {metric}"] if metric else [])]
    headings += ["training loss", "steps", "evaluations", "total time", "time of a step", "in the optimizer", "state"]
    headings.append("state per parameter")
    rows, marks = [], []
    for one in series:
        for setting in one.settings:
            timed = Setting(setting.lr, [run for run in setting.runs if run.alone])
            parts = bars.parts_of(timed)
            rows.append(
                [
                    one.label,
                    rate(setting.lr),
                    str(len(setting.runs)),
                    _result(setting),
                    _spread(setting, held_out_loss, number),
                    *([_spread(setting, held_out_metric, show_metric)] if metric else []),
                    _spread(setting, final_loss, number),
                    _spread(setting, lambda run: len(run.losses), number),
                    _spread(setting, lambda run: run.evaluations[-1] if run.evaluations else None, number),
                    _spread(timed, lambda run: run.seconds[-1] if run.seconds else None, seconds),
                    seconds(sum(parts.values())) if parts else "-",
                    seconds(parts["optimizer"]) if "optimizer" in parts else "-",
                    _spread(setting, state_bytes, size),
                    _spread(setting, state_per_parameter, size),
                ]
            )
            marks.append(one.index)
    caption = "Median over the seeds, and their range. A run that diverged has no loss."
    if not all(run.alone for one in series for setting in one.settings for run in setting.runs):
        caption += " Times are of runs that had the machine to themselves."
    return [
        Table(caption, headings, rows, words=["result"], marks=marks),
        Details("Every run", [_runs(comparison, series)]),
    ]


def _runs(comparison: Comparison, series: Sequence[Series]) -> Table:
    metric = comparison.metric_name
    headings = [
        "optimizer",
        "class",
        "lr",
        "seed",
        "result",
        "held-out loss",
        *([f"held-out {metric}"] if metric else []),
    ]
    headings += ["training loss", "steps", "evaluations", "total time"]
    rows = []
    for one in series:
        for setting in one.settings:
            for run in setting.runs:
                single = Setting(setting.lr, [run])
                rows.append(
                    [
                        one.label,
                        run.optimizer + (f", {run.helper} for the rest" if run.helper else ""),
                        rate(run.lr),
                        str(run.seed),
                        _result(single) + (f": {run.error or run.stopped}" if run.error or run.stopped else ""),
                        number(held_out_loss(run)),
                        *([number(held_out_metric(run))] if metric else []),
                        number(final_loss(run)),
                        number(len(run.losses)),
                        number(run.evaluations[-1] if run.evaluations else None),
                        seconds(run.seconds[-1]) if run.seconds else "-",
                    ]
                )
    return Table("Every run", headings, rows, words=["class", "result"])


def _result(setting: Setting) -> str:
    """Say how the runs ended: "finished", or each other end with its count."""
    ends: dict[str, int] = {}
    for run in setting.runs:
        at = f" at step {run.diverged_at}" if run.status == "diverged" and run.diverged_at else ""
        end = "stopped early" if run.status == "finished" and run.stopped else run.status
        ends[end + at] = ends.get(end + at, 0) + 1
    if len(ends) == 1:
        return next(iter(ends))
    return ", ".join(f"{count} {end}" for end, count in ends.items())


def _legend(series: Sequence[Series], same: Sequence[Pair], shown: Sequence[Series] | None = None) -> Legend:
    drawn = looks.layers(series, same)
    dashes = {"over": "dash", "under": "solid"}
    return Legend([Entry(one.name, one.group, one.index, dashes.get(drawn[one.index])) for one in shown or series])


def _spread(setting: Setting, measure: Callable[[Run], float | None], show: Callable[[float], str]) -> str:
    values = setting.values(measure)
    middle = setting.median(measure)
    if middle is None:
        return "-"
    texts = show(min(values)), show(max(values))
    return show(middle) if texts[0] == texts[1] else f"{show(middle)}\n({texts[0]} to {texts[1]})"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items() if value not in (None, [], ()))


def _value(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)

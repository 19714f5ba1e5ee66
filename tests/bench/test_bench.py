"""``descend bench``, end to end on small shapes."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from descend.bench import bandwidth, measure, run
from descend.bench.bandwidth import Bandwidth
from descend.bench.machine import Machine, processor
from descend.bench.measure import Case
from descend.bench.methods import METHODS
from descend.bench.picture import draw
from descend.bench.report import DISPENSABLE, HEADINGS, Report
from descend.bench.settings import Settings
from descend.bench.workload import workloads
from descend.command.cli import main

LABELS = ["descend", "torch for-loop", "torch foreach", "torch fused"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bandwidth, "FOOTPRINTS", (2**12, 2**16))
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.chdir(tmp_path)


def bench(*options: str, status: int = 0) -> None:
    assert main(["bench", "--seconds", "60", *options]) == status


def read(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file; assert that it is standard JSON, without NaN."""
    contents: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    return contents


def in_seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[unit]


def test_table_and_files_show_the_same_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    bench("--sizes", "2*3x5,7", "--max-norm", "0.5", "--out", "new/folder", "--json", "x.json", "--markdown", "x.md")
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["bench.json", "bench.png", "bench.svg"]
    assert Path("new/folder/bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("new/folder/bench.svg").read_text()
    results = read(Path("x.json"))
    assert results == read(Path("new/folder/bench.json"))

    [case] = results["cases"]
    assert (case["optimizer"], case["shape"], case["dtype"]) == ("adamw", "2*3x5,7", "float32")
    assert (case["tensors"], case["numbers"], case["max_norm"], case["interleaved"]) == (3, 37, 0.5, True)
    assert [row["label"] for row in case["rows"]] == LABELS
    found = results["machine"]["versions"]["torch"]  # of the package, whose version need not name the CUDA it is for
    assert found.split("+")[0] == torch.__version__.split("+")[0]
    assert results["machine"]["threads"] == torch.get_num_threads()

    ours = case["rows"][0]["median_seconds"]
    output = capsys.readouterr().out
    markdown = [
        line.split(" | ") for line in Path("x.md").read_text().splitlines() if "| descend" in line or "| torch" in line
    ]
    assert len(markdown) == 4
    for row, columns in zip(case["rows"], markdown, strict=True):
        # Parameter read and written, gradient read twice, two states read and written: 8 float32 numbers.
        assert row["bytes_moved"] == 37 * 4 * 8
        assert row["agrees"]
        assert row["counted_steps"] == 3 * (20 - 5)
        assert row["steps"] == 2 + 20 + 3 * 20
        rate = row["bytes_moved"] / row["limit_seconds"]
        assert rate in [pytest.approx(each["bytes_per_second"]) for each in results["bandwidth"]]
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / row["median_seconds"])
        assert row["times_ours"] == pytest.approx(row["median_seconds"] / ours)
        assert 0 < row["quartile1_seconds"] <= row["median_seconds"] <= row["quartile3_seconds"]

        [line] = [line for line in output.splitlines() if line.startswith(f"{row['label']}  ")]
        cells = re.split("  +", line)
        assert cells == [cell.strip(" |") for cell in columns[1:] if cell.strip(" |")]
        assert in_seconds(cells[1]) == pytest.approx(row["median_seconds"], rel=0.006)
        assert in_seconds(cells[3]) == pytest.approx(row["first_seconds"], rel=0.006)
        if row["name"] != "ours":
            assert float(cells[4].removesuffix("x")) == pytest.approx(row["times_ours"], rel=0.006)
        assert float(cells[-2]) == pytest.approx(row["bytes_moved"] / row["median_seconds"] / 1e9, rel=0.006)
        assert float(cells[-1].removesuffix("%")) == pytest.approx(100 * row["share_of_limit"], abs=0.51)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_fits_the_terminal_and_keeps_names(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "a-folder-with-a-long-name/" * 3 + "model.py"
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("import torch\ndef build(): return torch.nn.Linear(2, 3)\n")
    bench("--model", f"{name}:build", "--optimizer", "adamwschedulefree", "--optimizer", "rprop")
    output, errors = capsys.readouterr()
    table = output[output.index("\nstep") : output.index("Written")]
    assert max(map(len, table.splitlines())) <= width
    assert "\x1b" not in output
    assert errors == ""
    dense = re.sub(r"\s", "", table)
    for expected in (f"adamwschedulefree,{name}:build,float32", f"rprop,{name}:build", "9numbersin2tensors"):
        assert expected in dense
    assert [line.split("  ")[0] for line in table.splitlines() if re.match("descend  |torch ", line)] == [
        "descend",
        *("descend", "torch for-loop", "torch foreach"),
    ]
    missing = [heading for heading in DISPENSABLE if heading not in table.splitlines()[1]]
    assert missing == list(DISPENSABLE[: len(missing)])
    assert (width == 120) <= (missing == [])
    assert (width == 40) <= (len(missing) == 3)
    assert all(heading in table for heading in HEADINGS if heading not in missing)
    named = dense.partition("Notshownatthiswidth:")[2].removesuffix(".").split(",")
    assert sorted(named) == sorted(heading.replace(" ", "") for heading in missing or [""])


BAD = {
    "--optimizer adamx": "there is no optimizer 'adamx'; did you mean adamax?",
    "--optimizer lbfgs": "lbfgs needs a closure",
    "--optimizer sparseadam": "sparseadam needs sparse gradients",
    "--shapes gpt3": "there are no shapes 'gpt3'; did you mean gpt2?",
    "--dtype int8": "--dtype cannot be 'int8'",
    "--gradients old": "--gradients cannot be 'old'",
    "--max-norm 0": "--max-norm must be a number > 0, got 0.0",
    "--max-norm nan": "--max-norm must be a number > 0",
    "--max-norm much": "Invalid value for '--max-norm'",
    "--seconds inf": "--seconds must be a number > 0",
    "--threads 0": "Invalid value for '--threads'",
    "--sizes 3xx4": "--sizes must be sizes of tensors, as in 768x768,768 or 1000*64x64 for a thousand, got '3xx4'",
    "--sizes 0": "got '0'",
    "--sizes 9999999999999": "more than a trillion",
    "--sizes=": "--sizes must not be empty",
    "--model=": "--model must not be empty",
    "--json a --markdown ./a": "--json and --markdown must be two files, got a for both",
    "--device tpu": "--device must be cpu, cuda or cuda:N, got 'tpu'",
    "--device meta": "--device must be cpu, cuda or cuda:N, got 'meta'",
    "--model model.py": "--model must be FILE.py:FUNCTION, as in model.py:build, got 'model.py'",
    "--model nothing.py:build": "there is no file nothing.py",
    "--model taken:build": "there is no file taken",
    "--json taken": "taken exists",
    "--markdown no/folder": "no/folder cannot be written",
    "--out file.json/x": "cannot be made",
    "--json file.json": "file.json exists; choose another name, or give --overwrite",
    "--out taken": "taken/bench.png exists",
    "--quick": "Options: --optimizer, --shapes",
}


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the command ends with exit status 2, a line on stderr, and no new file."""
    Path("taken").mkdir()
    Path("taken/bench.png").write_text("old")
    Path("file.json").write_text("old")
    before = sorted(Path().rglob("*"))
    assert main(["bench", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("descend bench: ")
    assert message in line
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts] == before
    assert Path("file.json").read_text() == Path("taken/bench.png").read_text() == "old"


@pytest.mark.parametrize("arguments", BAD)
def test_bad_options_are_refused_in_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(arguments.split(), BAD[arguments], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["--device", "cuda"], "sees no GPU here", capsys)


MODELS = {
    "import nonexistent": "model.py:1: ModuleNotFoundError: No module named 'nonexistent'.",
    "\ndef build(:": "model.py:2: SyntaxError: invalid syntax.",
    "import sys\nsys.exit('no')": "model.py:2: SystemExit: no.",
    "def build():\n    return f()\ndef f():\n    return 1 / 0": "model.py:4: ZeroDivisionError: division by zero.",
    "import torch\ndef build():\n    return torch.nn.Linear(-2, 3)": "model.py:3: RuntimeError: ",
    "def create(): pass": "model.py has no function build; it has create.",
    "build = 3": "model.py has no function build; it has none.",
    "def build(): return 3": "model.py:build must return a torch.nn.Module, got int.",
    "def build(size): return size": "TypeError in build: build() missing 1 required positional argument: 'size'.",
    "import torch\ndef build(): return torch.nn.ReLU()": "model.py:build has no parameters to train.",
    "import torch\ndef build(): return torch.nn.Linear(2, 3).requires_grad_(False)": "has no parameters to train.",
    "import torch\ndef build(): return torch.nn.LazyLinear(3)": "model.py:build has lazy parameters without a size",
}


@pytest.mark.parametrize("source", MODELS)
def test_broken_models_are_refused_in_one_line(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text(source)
    assert_refused(["--model", "model.py:build"], MODELS[source], capsys)


def test_model_has_its_own_dtypes_and_trained_parameters() -> None:
    Path("sizes.py").write_text("WIDTH = 3\n")
    Path("model.py").write_text(
        "import torch\n"
        "def build():\n"
        "    from sizes import WIDTH\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(2, WIDTH), torch.nn.Linear(WIDTH, 1, bias=False).bfloat16())\n"
        "    model[0].bias.requires_grad_(False)\n"
        "    return model\n"
    )
    bench("--model", "model.py:build", "--out", "out")
    [case] = read(Path("out/bench.json"))["cases"]
    assert (case["shape"], case["dtype"]) == ("model.py:build", "float32 and bfloat16")
    assert (case["tensors"], case["numbers"]) == (2, 9)
    assert case["rows"][0]["bytes_moved"] == 7 * (6 * 4 + 3 * 2)


def test_every_dtype_and_shape_is_a_case() -> None:
    bench("--shapes", "6x1", "--sizes", "4", "--dtype", "bfloat16", "--dtype", "float64", "--out", "out")
    cases = read(Path("out/bench.json"))["cases"]
    assert [(case["shape"], case["dtype"]) for case in cases] == [
        *(("6x1", "bfloat16"), ("6x1", "float64"), ("4", "bfloat16"), ("4", "float64")),
    ]
    assert all(row["agrees"] for case in cases for row in case["rows"])


def test_results_go_to_a_new_folder_each_time() -> None:
    bench("--sizes", "3")
    bench("--sizes", "4")
    assert [read(Path(f"runs/{name}/bench.json"))["cases"][0]["shape"] for name in ("bench", "bench-2")] == ["3", "4"]
    bench("--sizes", "5", "--overwrite")
    assert read(Path("runs/bench/bench.json"))["cases"][0]["shape"] == "5"


def test_interrupt_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    time_case = Case.time

    def interrupted(case: Case, *args: Any) -> None:
        if case.workload.name == "4":
            signal.raise_signal(signal.SIGINT)
        time_case(case, *args)

    monkeypatch.setattr(Case, "time", interrupted)
    bench("--shapes", "6x1", "--sizes", "4", "--out", "out", status=130)
    results = read(Path("out/bench.json"))
    assert results["interrupted"]
    assert [row["median_seconds"] is None for case in results["cases"] for row in case["rows"]] == [False] * 4 + [
        True
    ] * 4
    output, errors = capsys.readouterr()
    assert "Interrupted; this is what was measured so far." in output
    assert "not measured" in output
    assert errors == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_before_anything_was_measured_leaves_nothing(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(run, "measure_all", lambda device, memory: signal.raise_signal(number))
    bench("--sizes", "3", "--out", "out", status=status)
    assert signal.getsignal(number) is before
    assert not Path("out").exists()


def test_no_memory_measures_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run, "memory_left", lambda device: 10)
    monkeypatch.setattr(run, "measure_all", lambda device, memory: [Bandwidth(8, 1e9)])
    bench("--sizes", "3", "--out", "out", status=1)
    [line] = capsys.readouterr().err.splitlines()
    assert line == "descend bench: nothing was measured: needs 0.0 GB of memory, 0.0 GB are free."
    assert not Path("out").exists()


def test_short_memory_runs_contenders_one_after_the_other() -> None:
    [load] = workloads(Settings(sizes="100"))
    case = Case.of("adamw", load, None, True, [Bandwidth(8, 1e9)])
    size = 100 * 4
    # Values, three temporaries, and per contender parameter, gradient and two states.
    assert case.memory(together=4) == size * (4 + 4 * 4)
    assert case.memory(together=1) == size * (4 + 4 + 3)
    case.time("cpu", 0.0, case.memory(4) - 1, lambda done: None)
    assert not case.interleaved
    assert all(row.seconds and row.agrees and not row.remark for row in case.rows)
    case.time("cpu", 0.0, case.memory(1) - 1, lambda done: None)
    assert all(row.remark.startswith("needs ") for row in case.rows)


def test_what_torch_refuses_is_said_in_the_row(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(METHODS, "rprop", METHODS["rprop"]._replace(peers=("foreach", "fused")))
    bench("--sizes", "3", "--optimizer", "rprop", "--out", "out", status=1)
    ours, foreach, fused = read(Path("out/bench.json"))["cases"][0]["rows"]
    assert ours["agrees"]
    assert foreach["agrees"]
    assert fused["median_seconds"] is None
    assert "fused" in fused["remark"]
    assert "not measured: TypeError" in " ".join(capsys.readouterr().out.split())


def test_result_that_differs_is_said_in_the_row(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(METHODS, "lion", METHODS["lion"]._replace(yardstick="Adamax", peers=("foreach",)))
    monkeypatch.setattr(type(METHODS["lion"]), "rivals", property(lambda method: method.peers))
    bench("--sizes", "3", "--optimizer", "lion", "--out", "out", status=1)
    ours, other = read(Path("out/bench.json"))["cases"][0]["rows"]
    assert ours["agrees"]
    assert not other["agrees"]
    assert "differs from descend after 82 steps" in " ".join(capsys.readouterr().out.split())


def test_slow_machines_take_shorter_turns() -> None:
    [load] = workloads(Settings(sizes="100"))
    case = Case.of("sgd", load, None, True, [Bandwidth(8, 1e9)])
    case.time("cpu", 0.0, 0, lambda done: None)
    assert [row.steps for row in case.rows] == 4 * [2 + 1 + 3]
    assert [len(row.seconds) for row in case.rows] == 4 * [3]


def test_progress_reaches_the_end() -> None:
    [load] = workloads(Settings(sizes="100"))
    case = Case.of("sgd", load, None, True, [Bandwidth(8, 1e9)])
    done: list[float] = []
    case.time("cpu", 0.0, case.memory(4) - 1, done.append)
    assert done == sorted(done)
    assert done[-1] == 1


def test_report_without_measurements_is_a_table() -> None:
    [load] = workloads(Settings(sizes="100"))
    case = Case.of("sgd", load, None, True, [Bandwidth(8, 1e9)])
    report = Report(Machine("P", 1, "S", {}, "2026-01-01"), 2, "cpu", "fresh", [Bandwidth(2**20, 1e9)], [case])
    assert report.where() == "P, 1 core, 2 threads; S; ; 2026-01-01"
    assert "busy" not in report.notes()
    busy = replace(report, machine=replace(report.machine, load=3.0))
    assert "The machine was busy (load 3.0 on 1 core)" in busy.notes()
    assert report.memory() == "Memory bandwidth in GB/s, by size of the arrays: 1 (1.05 MB)."
    assert "not measured" in report.table(Console(width=80).width)


def test_help_and_refusals_need_no_torch() -> None:
    program = (
        "import sys; from descend.command.cli import main; main(['bench', '--help']); "
        "assert main(['bench', '--shapes', 'x']) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize(("slowest", "scale"), [(0.02, "linear"), (0.04, "log")])
def test_short_bars_are_seen_beside_a_long_one(slowest: float, scale: str) -> None:
    [load] = workloads(Settings(sizes="3"))
    case = Case.of("adamw", load, None, True, [Bandwidth(100, 1e9)])
    for row, seconds in zip(case.rows, (0.001, 0.002, 0.003, slowest), strict=True):
        row.seconds = [seconds]
    [axis] = draw(Report(Machine.this(), 1, "cpu", "fresh", (), [case])).axes
    assert axis.get_xscale() == scale
    assert 0 <= axis.get_xlim()[0] <= case.rows[0].limit * 1e3


def test_bandwidth_is_that_of_the_nearest_size() -> None:
    measured = [Bandwidth(2**10, 3.0), Bandwidth(2**20, 2.0), Bandwidth(2**30, 1.0)]
    footprints = (1, 2**10, 2**14, 2**16, 2**24, 2**26, 2**40)
    assert [bandwidth.bandwidth_for(measured, size).rate for size in footprints] == [3, 3, 3, 2, 2, 1, 1]
    disturbed = [Bandwidth(2**10, 3.0), Bandwidth(2**20, 0.5), Bandwidth(2**30, 1.0)]
    assert bandwidth.bandwidth_for(disturbed, 2**20).rate == 1


def test_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: float(next(clock)))
    assert bandwidth.measure(800).rate == 3 * 400  # a second passes between two looks at the clock


def test_large_arrays_are_left_out_where_memory_is_short() -> None:
    assert [each.footprint for each in bandwidth.measure_all("cpu", memory=4 * 2**12)] == [2**12]
    assert [each.footprint for each in bandwidth.measure_all("cpu", memory=0)] == [2**12, 2**16]


def test_processor_is_named_as_linux_does(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some  CPU @ 3 GHz\n")
    assert processor(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert processor(tmp_path / "missing")
    assert math.isfinite(Machine.this().cores)

"""``benchmarks/gpu.py``: its checks can fail, it writes what it has, and it runs where there is no GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gpu
import gpu_checks
import gpu_times as times
import gpu_tune
import pytest
import torch
from gpu_checks import Guarded, NotApplicableError, Place, WrongError, run_checks
from torch import Tensor

from descend.bench.clock import Timing

SCRIPT = Path(gpu.__file__)
HAS_TRITON = find_spec("triton") is not None
NEED_CUDA = {
    "large",
    "capture",
    "training",
    "devices",
    "offloaded",
    "streams",
    "no-waiting",
    "no-allocation",
    "host-cost",
}


def place() -> Place:
    return Place(torch.device("cpu"), "eager", True, torch.Generator().manual_seed(0))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if HAS_TRITON else "0"}
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def test_all_checks_pass_in_tritons_interpreter(tmp_path: Path) -> None:
    done = run_script("--device", "cpu", "--quick", "--only", "check-*", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {each["name"]: each["outcome"] for each in written["checks"]}
    assert list(outcomes) == list(gpu_checks.CHECKS)
    assert {name for name, outcome in outcomes.items() if outcome == "n/a"} == NEED_CUDA
    assert written["backend"] == ("triton" if HAS_TRITON else "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_cases_are_timed_and_written(tmp_path: Path) -> None:
    done = run_script(
        *(
            "--device",
            "cpu",
            "--quick",
            "--backend",
            "auto",
            "--only",
            "*-float32-1*",
            "--out",
            str(tmp_path / "a.json"),
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "a.json").read_text())
    contenders = {each["case"]: list(each["times"]) for each in written["cases"]}
    assert contenders["adamw-float32-1000x1000-clip"] == ["ours", "fused", "foreach"]
    assert contenders["sparseadam-float32-10Mx64-zipf"] == ["ours", "torch"]
    assert not written["left_out"]
    assert all(each["measured"] > 0 for each in written["figures"])
    assert all(name in done.stdout for name in contenders)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line() -> None:
    done = run_script("--quick")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "sees no GPU" in done.stderr


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.adamw

    def wrong(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> tuple[Tensor, ...]:
        return right(param, grad, exp_avg, exp_avg_sq, step + 1)

    def broken(place: Place) -> str:
        raise IndexError("of something")

    monkeypatch.setattr(gpu_checks, "adamw", wrong)
    monkeypatch.setitem(gpu_checks.CHECKS, "own-rule", broken)
    outcomes = {each.name: each for each in run_checks(place(), ["dtypes", "own-rule", "capture", "nonfinite"])}
    assert [each.outcome for each in outcomes.values()] == ["FAIL", "FAIL", "n/a", "pass"]
    assert "roundings" in outcomes["dtypes"].seen
    assert outcomes["own-rule"].seen == "IndexError: of something"


def test_a_number_written_beside_a_tensor_is_noticed() -> None:
    for offset, index in ((0, -1), (3, -1), (0, 5), (3, 5)):
        guarded = Guarded(torch.ones(5), torch.float32, torch.device("cpu"), offset)
        assert guarded.tensor.data_ptr() % 16 == 4 * offset % 16
        guarded.tensor.fill_(2.0)
        guarded.check("it")
        start = guarded.tensor.storage_offset() + index
        beside = torch.as_strided(guarded.tensor, (1,), (1,), start).view(torch.int32)
        beside += 1
        with pytest.raises(WrongError, match="bytes beside it"):
            guarded.check("it")


def test_nan_is_never_close_enough() -> None:
    for found in (math.nan, math.inf):
        with pytest.raises(WrongError):
            gpu_checks.within("it", gpu_checks.distance(torch.tensor([found]), torch.ones(1)), 1e9)


def test_checks_for_a_gpu_say_so() -> None:
    for name in NEED_CUDA:
        with pytest.raises(NotApplicableError, match="need a CUDA device"):
            gpu_checks.CHECKS[name](place())


def result(case: times.Case, **milliseconds: float) -> times.Result:
    timed = {
        name: times.Times(Timing(value / 1e3, value / 1e3, value / 1e3, 9), value / 1e3, 1e-4, 1.0)
        for name, value in milliseconds.items()
    }
    return times.Result(case, 1, 10, 1, 100.0, 7e-3, timed)


def test_figures_are_the_worst_of_their_cases() -> None:
    plain, uniform, zipf = (times.Case(shape, "float32") for shape in ("1B", "uniform", "zipf"))
    results = {
        plain.name: result(plain, ours=7.5, fused=8.0, foreach=20.0),
        uniform.name: result(uniform, ours=1.0, torch=9.0),
    }
    by_name = {each.says: each.to_json(results) for each in times.FIGURES}
    share = by_name["AdamW float32, 1 B: share of a copy's bandwidth"]
    assert (share["measured"], share["reached"]) == (pytest.approx(7 / 7.5), True)
    fused = by_name["AdamW float32, 1 B: torch fused"]
    assert (fused["measured"], fused["reached"]) == (pytest.approx(8 / 7.5), True)
    table = next(each for each in times.FIGURES if each.against == times.TORCH)
    assert table.measured(results) is None  # only one of its cases was timed
    results[zipf.name] = result(zipf, ours=1.0, torch=4.0)
    assert table.to_json(results)["measured"] == pytest.approx(4.0)
    assert not table.to_json(results)["reached"]


def test_shapes_have_their_published_sizes() -> None:
    sizes = times.llama_1b_sizes()
    assert (len(sizes), sum(map(math.prod, sizes))) == (146, 1_235_814_400)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = times.Clock(torch.device("cpu"), is_quick=True)
    case, plan = times.Case("124M", "float32"), times.QUICK
    size = 4 * math.prod(plan.sizes("124M")[0])
    needed = {name: size * extra for name, extra in (("all", 2 * 8 + 3), ("two", 2 * 6))}
    monkeypatch.setattr(times, "MEMORY", needed["all"])
    assert list(times.time_case(case, plan, clock, "auto").times) == ["ours", "fused", "foreach"]
    monkeypatch.setattr(times, "MEMORY", needed["two"])
    found = times.time_case(case, plan, clock, "auto")
    assert (list(found.times), found.note) == (["ours", "fused"], "foreach left out: memory")
    monkeypatch.setattr(times, "MEMORY", needed["two"] - 1)
    [(_, reason)] = times.run_cases([case], plan, clock, "auto", deadline=math.inf)
    assert "GiB may be taken" in str(reason)
    [(_, reason)] = times.run_cases([case], plan, clock, "auto", deadline=0.0)
    assert reason == "no time was left"


def test_tuning_finds_the_best_and_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    present, tried = gpu_tune.current(), []

    def pretend(settings: gpu_tune.Settings, plan: object, clock: object, start: object) -> gpu_tune.Trial:
        now = gpu_tune.current()
        tried.append(now)
        assert now == {**present, **settings}
        cost = abs(now["THREADS"] - 2 * present["THREADS"]) + abs(now["NORM"] - present["NORM"] // 2)
        return gpu_tune.Trial(settings, {}, 1.0 + cost, "too many registers" if now["BYTES"] == 64 else "")

    monkeypatch.setattr(gpu_tune, "_try", pretend)
    *_, best = gpu_tune.tune(times.QUICK, times.Clock(torch.device("cpu"), is_quick=True))
    assert best.settings == {"THREADS": 2 * present["THREADS"], "NORM": present["NORM"] // 2}
    assert gpu_tune.current() == present == tried[0]
    assert {each["CHUNK"][0] for each in tried} == {present["CHUNK"][0]}  # of a range, the end is varied


def test_a_setting_that_cannot_run_is_a_trial_with_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise ValueError("arange's range must be a power of 2\nmore")

    monkeypatch.setattr(gpu_tune, "time_dense", refused)
    trials = list(gpu_tune.tune(times.QUICK, times.Clock(torch.device("cpu"), is_quick=True)))
    assert trials[0].problem == "ValueError: arange's range must be a power of 2"
    assert len(trials) == 2  # nothing can be compared with it


def test_nothing_but_torch_numpy_and_descend_is_needed() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import gpu; print(*sorted(sys.modules))"
    command = [sys.executable, "-c", program, str(SCRIPT.parent)]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout.split()
    assert "gpu_times" in loaded
    assert not {"matplotlib", "plotly", "pytest", "rich", "scipy", "sklearn", "typer"} & set(loaded)

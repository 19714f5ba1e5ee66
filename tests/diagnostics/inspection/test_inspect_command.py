"""What the command prints, writes and returns; what it says of two files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inspecting import model, train, trained

from descend.command.cli import main


def checkpoint(path: Path, steps: int = 3, **edits: Any) -> Path:
    state = trained(steps)
    state["param_groups"][0].update(edits)
    torch.save(state, path)
    return path


def damaged(path: Path) -> Path:
    state = trained()
    state["state"][0]["exp_avg_sq"][0, 0] = -1.0
    torch.save(state, path)
    return path


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("others", [0, 1])
def test_lines_fit_the_terminal(
    width: int, others: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    paths = ["inspect", str(damaged(Path("a.pt"))), str(checkpoint(Path("b.pt")))][: 2 + others]
    assert main(paths) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert out.isprintable() or set(out) - {"\n"} <= set(map(chr, range(32, 127)))
    assert "0.weight" in out
    flowed = " ".join(out.split())
    assert "exp_avg_sq: 1 of 48, smallest -1" in flowed
    assert "lr=0.001" in flowed


def test_output_says_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = damaged(tmp_path / "a.pt")
    assert main(["inspect", str(path), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "looks like Adam, 6 parameters (108 elements), 864 B of state, step 3" in out
    assert "Looks wrong:" in out
    assert "... and 5 more; --all lists them." in out
    assert main(["inspect", str(path), "--all"]) == 0
    out = capsys.readouterr().out
    assert "--all" not in out
    assert "3.bias  [4] float32, step=3, group 0" in out
    assert main(["inspect", str(checkpoint(tmp_path / "b.pt"))]) == 0
    assert "Nothing looks wrong." in capsys.readouterr().out


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = trained()
    state["param_groups"][0]["param_names"][0] = "\x1b[2Jweight"
    torch.save({"\x1b]0;title": state}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt"), "--all"]) == 0
    torch.save({"\x1b]0;title": 1}, tmp_path / "b.pt")
    assert main(["inspect", str(tmp_path / "b.pt")]) == 2
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "?[2Jweight" in printed.out


def test_check_fails_for_the_last_file(tmp_path: Path) -> None:
    good, bad = str(checkpoint(tmp_path / "good.pt")), str(damaged(tmp_path / "bad.pt"))
    assert main(["inspect", good, "--check"]) == 0
    assert main(["inspect", bad]) == 0
    assert main(["inspect", bad, "--check"]) == 1
    assert main(["inspect", bad, good, "--check"]) == 0
    assert main(["inspect", good, bad, "--check"]) == 1
    # What is only worth knowing does not fail.
    assert main(["inspect", str(checkpoint(tmp_path / "decay.pt", weight_decay=0.1)), "--check"]) == 0


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = damaged(tmp_path / "a.pt"), tmp_path / "a.json"
    assert main(["inspect", str(path), "--json", str(target)]) == 0
    assert "Looks wrong" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(target.read_text())
    (optimizer,) = printed["files"][0]["optimizers"]
    assert optimizer["method"] == "Adam"
    assert optimizer["parameters"][0]["state"]["exp_avg_sq"]["smallest"] == -1.0
    assert optimizer["findings"][0]["cases"] == [{"where": "0.weight", "detail": "exp_avg_sq: 1 of 48, smallest -1"}]
    before = target.read_text()
    assert main(["inspect", str(path), "--json", str(target)]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert target.read_text() == before
    assert main(["inspect", str(path), "--json", str(tmp_path / "no" / "a.json")]) == 2


@pytest.mark.parametrize("words", [["--top", "0"], ["--top", "x"], ["--nothing"], ["a.pt", "b.pt", "c.pt"], []])
def test_bad_arguments(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = [] if not words or words[0].endswith(".pt") else [str(checkpoint(tmp_path / "a.pt"))]
    assert main(["inspect", *path, *words]) == 2
    assert capsys.readouterr().err.startswith("descend inspect: ")


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from descend.command.cli import main; code = main(['inspect', '--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CHECKPOINT" in done.stdout


def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], *files: Any) -> dict[str, Any]:
    paths = []
    for index, content in enumerate(files):
        paths.append(str(tmp_path / f"{index}.pt"))
        torch.save(content, paths[-1])
    assert main(["inspect", *paths, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["comparisons"][0]
    return found


def test_two_files_show_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    optimizer = torch.optim.Adam(net.named_parameters(), lr=0.01)
    train(net, optimizer)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    old = torch.load(tmp_path / "old.pt")
    optimizer.param_groups[0]["lr"] = 0.005
    train(net, optimizer, steps=4, seed=1)
    new = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    found = compared(tmp_path, capsys, old, new)
    assert found["where"] == "optimizer"
    assert found["matched_by"] == "name"
    assert found["groups"] == ["group 0: lr 0.01 -> 0.005"]
    assert (found["added"], found["removed"], found["appeared"], found["vanished"]) == ([], [], [], [])
    for index, change in enumerate(found["changes"]):
        assert change["steps"] == 4
        for name in ("exp_avg", "exp_avg_sq"):
            before = old["optimizer"]["state"][index][name].double().numpy()
            after = new["optimizer"]["state"][index][name].double().numpy()
            expected = (((after - before) ** 2).sum() / (before**2).sum()) ** 0.5
            assert change["relative"][name] == pytest.approx(expected, rel=1e-12)
        assert change["relative"]["weight"] > 0


def test_parameters_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trained(), trained()
    group = second["param_groups"][0]
    group["params"].reverse()
    group["param_names"].reverse()
    found = compared(tmp_path, capsys, first, second)
    assert {value for change in found["changes"] for value in change["relative"].values()} == {0.0}
    group["param_names"][0] = "new"
    found = compared(tmp_path, capsys, first, second)
    assert (found["added"], found["removed"]) == (["new"], ["3.bias"])


def test_reshaped_state_and_new_findings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trained(), trained()
    for name in ("exp_avg", "exp_avg_sq"):
        second["state"][0][name] = torch.ones(2, 6)
    second["state"][1]["exp_avg"][0] = float("nan")
    second["state"][2]["exp_avg"] = second["state"][2]["exp_avg"].double()
    del second["state"][3]["exp_avg"]
    found = compared(tmp_path, capsys, first, second)
    assert [change["other"] for change in found["changes"]] == [
        ["exp_avg [8, 6] -> [2, 6]", "exp_avg_sq [8, 6] -> [2, 6]"],
        [],
        ["exp_avg float32 -> float64"],
        ["exp_avg was removed"],
        [],
        [],
    ]
    assert found["changes"][1]["relative"]["exp_avg"] == "nan"
    assert [(entry["kind"], [case["where"] for case in entry["cases"]]) for entry in found["appeared"]] == [
        ("nonfinite", ["0.bias"]),
        ("incomplete", ["1.bias"]),
    ]
    assert found["vanished"] == []


def test_files_with_other_numbers_of_optimizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained(), tmp_path / "one.pt")
    torch.save({"a": trained(), "b": trained()}, tmp_path / "two.pt")
    assert main(["inspect", str(tmp_path / "one.pt"), str(tmp_path / "two.pt")]) == 2
    assert "nothing to compare" in capsys.readouterr().err

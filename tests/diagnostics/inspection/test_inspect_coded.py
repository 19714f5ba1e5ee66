"""State in 8 bits is shown as the numbers it stands for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, leaves, params_of
from inspecting import inspected, of, trained

from descend.command.cli import main
from descend.core import coded
from descend.core.codecs import Codec, decode, encode
from descend.diagnostics.inspection.state_names import NOT_NEGATIVE

CODECS = {"exp_avg": Codec(True), "exp_avg_sq": Codec(False)}


def in_8_bits(state: dict[str, Any]) -> dict[str, Any]:
    """The state of Adam, its averages encoded."""
    state = copy.deepcopy(state)
    for content in state["state"].values():
        for name, codec in CODECS.items():
            content[name], content[f"{name}_scale"] = encode(content[name], codec)
    return state


@pytest.mark.parametrize("piece", [1 << 20, 3])
def test_numbers_are_those_that_codes_stand_for(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "PIECE", piece)
    state = in_8_bits(trained())
    examination, found = of(tmp_path / "state.pt", state)
    assert not found
    for param, measures in zip(examination.saved.params, examination.measures, strict=True):
        content = state["state"][param.key]
        assert list(param.tensors) == list(CODECS)
        for name, codec in CODECS.items():
            numbers, of_file = decode(content[name], content[f"{name}_scale"], codec), measures.statistics[name]
            assert of_file is not None
            assert of_file.norm == pytest.approx(float(numbers.norm()), rel=1e-6)
            assert (of_file.smallest, of_file.largest) == (float(numbers.min()), float(numbers.max()))
        assert measures.step_sizes
    assert examination.saved.params[0].shape == (8, 6)


def test_text_json_and_comparison_name_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    state = trained()
    torch.save(state, before)
    torch.save(in_8_bits(state), after)
    assert main(["inspect", str(after)]) == 0
    shown = capsys.readouterr().out
    assert "0.weight  [8, 6] 8 bits, step=3, group 0" in shown
    # 108 numbers, twice: a byte each and a scale for each row (of the first dimension, or of the only one).
    assert f"{108 * 2 + 4 * 2 * (8 + 4 + 4)} B of state" in shown
    assert main(["inspect", str(after), "--json", "-"]) == 0
    (optimizer,) = json.loads(capsys.readouterr().out)["files"][0]["optimizers"]
    assert optimizer["parameters"][0]["state"]["exp_avg"]["dtype"] == "8 bits"
    assert main(["inspect", str(before), str(after)]) == 0
    assert "exp_avg float32 -> 8 bits" in capsys.readouterr().out


def test_flattened_safetensors_are_understood(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = in_8_bits(trained())
    names = state["param_groups"][0]["param_names"]
    flat = {
        f"state.{names[key]}.{name}": value
        for key, content in state["state"].items()
        for name, value in content.items()
    }
    save_file(flat, tmp_path / "flat.safetensors")
    examination, _ = inspected(tmp_path / "flat.safetensors")
    params = {param.name: param for param in examination.saved.params}
    numbers = params["3.weight"].tensors["exp_avg_sq"][0].read()
    assert numbers is not None
    key = names.index("3.weight")
    assert torch.equal(
        numbers, decode(*(state["state"][key][f"exp_avg_sq{end}"] for end in ("", "_scale")), Codec(False))
    )


def put(name: str, value: Any) -> Callable[[Any], None]:
    def damage(content: Any) -> None:
        if value is None:
            del content[name]
        else:
            content[name] = value(content[name])

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "detail"),
    [
        (put("exp_avg_scale", None), "codes", "exp_avg has codes of 8 bits, and exp_avg_scale is missing"),
        (put("exp_avg", torch.Tensor.float), "codes", "exp_avg has exp_avg_scale, so it must be torch.uint8"),
        (put("exp_avg_scale", torch.Tensor.double), "codes", "exp_avg_scale must be torch.float32, got torch.float64"),
        (put("exp_avg_scale", lambda scale: scale[:3]), "codes", r"exp_avg_scale has shape (3, 1), expected (8, 1)"),
        (put("exp_avg_scale", torch.neg), "codes", "exp_avg_scale must be >= 0, got -"),
        (put("exp_avg_scale", lambda scale: scale * float("nan")), "nonfinite", "exp_avg: 48 NaN, 0 Inf of 48"),
    ],
)
def test_damage_of_codes_is_found(damage: Callable[[Any], None], kind: str, detail: str, tmp_path: Path) -> None:
    state = in_8_bits(trained())
    damage(state["state"][0])
    examination, found = of(tmp_path / "damaged.pt", state)
    assert list(found) == [kind]
    (case,) = found[kind].cases
    assert case.where == "0.weight"
    assert case.detail.startswith(detail)
    if kind == "codes" and "uint8" not in detail:  # bytes that cannot be decoded have no numbers to show
        assert examination.measures[0].statistics["exp_avg"] is None


def test_bytes_of_other_libraries_are_left_alone(tmp_path: Path) -> None:
    state = trained()
    state["state"][0].update(state1=torch.ones(48, dtype=torch.uint8), loss_scale=torch.ones(2))
    examination, found = of(tmp_path / "foreign.pt", state)
    assert not found
    assert examination.saved.params[0].tensors["state1"][0].format == "uint8"


def test_which_codes_have_a_sign_is_known_of_every_method() -> None:
    for case in CASES:
        optimizer = case.ours(leaves([(3, 2)]), **case.options)
        optimizer.init_state()
        names = {name for content in optimizer.state_dict()["state"].values() for name in content}
        method = optimizer.method_of(optimizer.param_groups[0])
        of_shape = [
            name
            for name in names - {"step", *method.scalar_state}
            if method.state_shape(name, params_of(optimizer)[0], optimizer.param_groups[0]) == (3, 2)
        ]
        assert set(of_shape) & set(method.nonnegative_state) == set(of_shape) & set(NOT_NEGATIVE)

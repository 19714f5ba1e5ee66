"""State in 8 bits and compensation in files: kept bit for bit, converted where another format is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import assert_same_bits, assert_unmoved, give_grads, params_of, snapshot, state_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from descend import SGD, Adagrad, AdamW, Lion
from descend.core.codecs import Codec, decode, encode
from descend.state import lazy_memory

# Rows of 150 numbers are a block that is not full; rows of 300 are two blocks; the last is too small for codes.
SHAPES = [(33, 150), (17, 300), (65_600,), (5,)]
CODED = slice(0, 3)
CODECS = {"exp_avg": Codec(True), "exp_avg_sq": Codec(False), "momentum_buffer": Codec(True), "sum": Codec(False)}


def params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in SHAPES]


def stepped(kind: Any = AdamW, steps: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    optimizer = kind(params(dtype), **{"backend": "eager", "lr": 0.01, **options})
    for seed in range(steps):
        give_grads(params_of(optimizer), seed)
        optimizer.step()
    return optimizer


def new(kind: Any = AdamW, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return kind(params(dtype), backend="eager", **options)


def numbers(content: dict[str, Tensor], name: str) -> Tensor:
    """The state called ``name`` of one parameter as numbers."""
    tensor = content[name]
    return decode(tensor, content[f"{name}_scale"], CODECS[name]) if tensor.dtype == torch.uint8 else tensor


def through_file(state: Any, path: Path) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


# What a file has.


def test_state_dict_has_codes_scales_and_compensation_as_they_are(tmp_path: Path) -> None:
    saved = stepped(dtype=torch.bfloat16, state_dtype="8bit", rounding="compensated").state_dict()
    for key, content in through_file(saved, tmp_path / "file")["state"].items():
        is_coded = key < 3
        dtypes = {name: value.dtype for name, value in content.items()}
        averages = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.uint8 if is_coded else torch.float32)
        scales = {f"{name}_scale": torch.float32 for name in averages} if is_coded else {}
        assert dtypes == {"step": torch.float32, **averages, **scales, "compensation": torch.int16}
        blocks = {(33, 150): (33, 1), (17, 300): (17, 2), (65_600,): (257,)}
        for name in scales:
            assert content[name].shape == blocks[SHAPES[key]]
        assert all(value.is_contiguous() for value in content.values())


def through_safetensors(saved: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """State as a user would flatten it for safetensors: tensors under texts."""
    library = pytest.importorskip("safetensors.torch")
    flat = {f"{key}.{name}": value for key, content in saved["state"].items() for name, value in content.items()}
    library.save_file(flat, tmp_path / "state.safetensors")
    read = library.load_file(tmp_path / "state.safetensors")
    state = {key: {name: read[f"{key}.{name}"] for name in content} for key, content in saved["state"].items()}
    return {**saved, "state": state}


def in_other_strides(saved: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    def turned(value: Tensor) -> Tensor:
        return (
            value.mT.contiguous().mT if value.dim() > 1 else value.repeat_interleave(2)[::2] if value.dim() else value
        )

    state = {key: {name: turned(v) for name, v in content.items()} for key, content in saved["state"].items()}
    return {**saved, "state": state}


WAYS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "torch": lambda saved, tmp_path: through_file(saved, tmp_path / "file"),
    "safetensors": through_safetensors,
    "strides": in_other_strides,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_going_on_equals_not_stopping(way: str, rounding: str, tmp_path: Path) -> None:
    options = dict(state_dtype="8bit", rounding=rounding, rounding_seed=3, dtype=torch.bfloat16)
    straight, first = (stepped(steps=steps, **options) for steps in (4, 2))
    second = new(**options)
    with torch.no_grad():
        for param, value in zip(params_of(second), params_of(first), strict=True):
            param.copy_(value)
    second.load_state_dict(WAYS[way](first.state_dict(), tmp_path))
    assert_same_bits(state_of(second), state_of(first))
    for seed in (2, 3):
        give_grads(params_of(second), seed)
        second.step()
    assert_same_bits(state_of(second), state_of(straight))
    assert all(map(torch.equal, params_of(second), params_of(straight)))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 2)).bfloat16()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is told to do without
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("makes", ["init_state", "torch"])
def test_distributed_checkpoint_has_all_of_it(flatten: bool, makes: str, tmp_path: Path) -> None:
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    first, second = model(), model()
    saving, loading = (
        SGD(each, lr=0.1, momentum=0.9, state_dtype="8bit", rounding=rounding, backend="eager")
        for each, rounding in ((first, "compensated"), (second, "compensated"))
    )
    if makes == "init_state":
        loading.init_state()
    for seed in range(2):
        give_grads(params_of(saving), seed)
        saving.step()
    template = get_optimizer_state_dict(second, loading, options=how)  # torch takes a step if there is no state
    dcp.save({"o": get_optimizer_state_dict(first, saving, options=how)}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load(into := {"o": template}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second, loading, into["o"], options=how)
    assert {value.dtype for content in state_of(loading).values() for value in content.values()} >= {torch.uint8}
    assert_same_bits(state_of(loading), state_of(saving))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_codes_that_a_distributed_checkpoint_has_cast_are_refused(tmp_path: Path) -> None:
    def loaded(module: nn.Module, optimizer: Any) -> Any:
        optimizer.init_state()
        dcp.load(into := {"o": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(module, optimizer, into["o"])
        return optimizer

    module = model()
    saving = AdamW(module.named_parameters(), state_dtype="8bit", backend="eager")
    give_grads(params_of(saving), 0)
    saving.step()
    dcp.save({"o": get_optimizer_state_dict(module, saving)}, checkpoint_id=tmp_path, no_dist=True)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"exp_avg of 0.weight has only whole numbers from 0 to 255: codes"):
            loaded(other := model(), AdamW(other.named_parameters(), state_dtype=dtype))
    cured = AdamW(model().named_parameters(), state_dtype=torch.float32)
    cured.load_state_dict(loaded(other := model(), AdamW(other.named_parameters(), state_dtype="8bit")).state_dict())
    weights = cured.state[params_of(cured)[0]], saving.state[params_of(saving)[0]]
    assert torch.equal(*(numbers(content, "exp_avg") for content in weights))


def test_whole_numbers_alone_are_no_codes() -> None:
    optimizer = new(SGD, momentum=0.5, lr=1.0)
    for param in params_of(optimizer):
        param.grad = torch.arange(param.numel()).remainder(12).view_as(param).float()
    optimizer.step()
    new(SGD, momentum=0.5, lr=1.0).load_state_dict(optimizer.state_dict())


# Conversions.

FORMATS: list[Any] = [None, "8bit", torch.float32, torch.float64, torch.bfloat16, {"exp_avg": "8bit"}]


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
@pytest.mark.parametrize("saved", FORMATS, ids=str)
def test_any_format_loads_into_any(saved: Any, wanted: Any) -> None:
    source = stepped(state_dtype=saved).state_dict()["state"]
    target = new(state_dtype=wanted)
    asked = wanted if isinstance(wanted, dict) else dict.fromkeys(("exp_avg", "exp_avg_sq"), wanted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.load_state_dict(stepped(state_dtype=saved).state_dict())
    lost = set()
    for (key, content), loaded in zip(source.items(), state_of(target).values(), strict=True):
        for name, format in ((name, asked.get(name)) for name in ("exp_avg", "exp_avg_sq")):
            was, stored = numbers(content, name), loaded[name]
            is_small = key == 3
            if format == "8bit" and not is_small:
                assert stored.dtype == torch.uint8
                if content[name].dtype == torch.uint8:
                    expected = (content[name], content[f"{name}_scale"])
                else:
                    expected = encode(was.float(), CODECS[name])
                assert torch.equal(stored, expected[0])
                assert torch.equal(loaded[f"{name}_scale"], expected[1])
            else:
                dtype = torch.promote_types(was.dtype, torch.float32) if format in (None, "8bit") else format
                assert stored.dtype == dtype
                assert torch.equal(stored, was.to(dtype))
                assert f"{name}_scale" not in loaded
            if not torch.equal(numbers(loaded, name).to(was.dtype), was):
                lost.add(name)
    text = " ".join(str(each.message) for each in caught)
    assert len(caught) == bool(lost)
    assert {name for name in asked or CODECS if f"{name} of " in text} == lost
    give_grads(params_of(target), 5)
    target.step()


def test_one_warning_names_what_is_lost_and_where_it_was_loaded() -> None:
    optimizer, before = new(state_dtype="8bit"), stepped().state_dict()
    with pytest.warns(UserWarning, match="AdamW: ") as caught:
        optimizer.load_state_dict(before)
    (warning,) = caught
    assert "exp_avg of 3 parameters (float32 -> 8 bits), exp_avg_sq of 3 parameters (float32 -> 8" in str(
        warning.message
    )
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
        untouched = snapshot(optimizer)
        with pytest.raises(UserWarning):
            optimizer.load_state_dict(before)
        assert_unmoved(optimizer, untouched)


@pytest.mark.parametrize("saved", ["8bit", None])
def test_codes_are_in_the_order_of_indices_whatever_the_strides(saved: Any) -> None:
    shape = (8, 6, 20, 20)
    plain, turned = (AdamW([torch.zeros(shape, requires_grad=True)], state_dtype=saved, backend="eager") for _ in "ab")
    give_grads(params_of(plain), 0)
    plain.step()
    param = torch.zeros(shape).to(memory_format=torch.channels_last).requires_grad_()
    turned = AdamW([param], state_dtype="8bit", backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if saved is None else "error")
        turned.load_state_dict(plain.state_dict())
    ((content,), (loaded,)) = (list(state_of(each).values()) for each in (plain, turned))
    assert loaded["exp_avg"].stride() == param.stride()
    assert loaded["exp_avg_scale"].is_contiguous()
    codes, scale = (
        encode(content["exp_avg"], Codec(True)) if saved is None else (content["exp_avg"], content["exp_avg_scale"])
    )
    assert torch.equal(loaded["exp_avg"], codes)
    assert torch.equal(loaded["exp_avg_scale"], scale)
    back = AdamW([torch.zeros(shape, requires_grad=True)], backend="eager")
    back.load_state_dict(turned.state_dict())
    assert torch.equal(state_of(back)[0]["exp_avg"], decode(codes, scale, Codec(True)))

    straight = AdamW([torch.zeros(shape, requires_grad=True)], state_dtype="8bit", backend="eager")
    straight.load_state_dict(turned.state_dict())
    for each in (straight, turned):
        give_grads(params_of(each), 1)
        each.step()
    assert torch.equal(param, params_of(straight)[0])
    assert_same_bits(state_of(turned), state_of(straight))


def test_zeros_and_nan_are_no_loss() -> None:
    source = stepped(steps=0)
    source.init_state()
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0]["exp_avg"][3] = float("nan")
    target = new(state_dtype="8bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(saved)
    loaded = numbers(target.state[params_of(target)[0]], "exp_avg")
    assert torch.equal(loaded.isnan(), saved["state"][0]["exp_avg"].isnan())
    assert not loaded.nan_to_num().any()


def is_lazy(tensor: Tensor) -> bool:
    return lazy_memory._mapping_of(tensor) is not None


def test_zeros_of_tables_stay_uncommitted() -> None:
    def table(**options: Any) -> Any:
        optimizer = AdamW([torch.zeros(2000, 700, requires_grad=True)], sparse="touched", backend="eager", **options)
        optimizer.init_state()
        return optimizer

    for saved, wanted in (("8bit", "8bit"), (None, "8bit"), ("8bit", None)):
        target = table(state_dtype=wanted)
        target.load_state_dict(table(state_dtype=saved).state_dict())
        (content,) = target.state.values()
        assert not any(value.any() for value in content.values())
        assert content["exp_avg"].dtype == (torch.uint8 if wanted else torch.float32)
        assert is_lazy(content["exp_avg"]) == is_lazy(lazy_memory.zeros((2000, 700), torch.uint8))


@pytest.mark.parametrize("wanted", ["8bit", None])
def test_codes_of_state_that_an_option_has_turned_off_wait_for_it(wanted: Any) -> None:
    source = stepped(amsgrad=True, state_dtype="8bit")
    target = new(state_dtype=wanted)
    target.load_state_dict(source.state_dict(), hyperparameters="current")
    for name in ("max_exp_avg_sq", "max_exp_avg_sq_scale"):
        assert torch.equal(state_of(target)[0][name], state_of(source)[0][name])
    target.param_groups[0]["amsgrad"] = True
    give_grads(params_of(target), 2)
    target.step()
    assert state_of(target)[0]["max_exp_avg_sq"].dtype == torch.uint8


# Compensation and step counts.


def test_compensation_is_loaded_where_it_is_used_and_its_loss_is_told() -> None:
    saved = stepped(dtype=torch.bfloat16, rounding="compensated").state_dict()
    same = new(dtype=torch.bfloat16, rounding="compensated")
    same.load_state_dict(saved)
    assert_same_bits(state_of(same), saved["state"])
    for options in (dict(dtype=torch.bfloat16), dict(dtype=torch.float32, rounding="compensated")):
        other = new(**options)
        with pytest.warns(UserWarning, match=r"compensation of 4 parameters \(left out: it is for bfloat16 and round"):
            other.load_state_dict(saved)
        assert not any("compensation" in content for content in state_of(other).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(stepped(dtype=torch.bfloat16).state_dict())
    give_grads(params_of(same), 2)
    same.step()
    assert all(content["compensation"].any() for content in state_of(same).values())


@pytest.mark.parametrize(("kind", "options"), [(SGD, dict(momentum=0.9, dampening=0.5)), (Lion, {})])
def test_methods_without_steps_count_them_from_the_file_on(kind: Any, options: dict[str, Any]) -> None:
    uncounted = stepped(kind, dtype=torch.bfloat16, **options)
    counting = new(kind, dtype=torch.bfloat16, rounding="stochastic", **options)
    counting.load_state_dict(uncounted.state_dict())
    give_grads(params_of(counting), 2)
    counting.step()
    assert [float(content["step"]) for content in state_of(counting).values()] == [2] * 4
    saved = counting.state_dict()
    uncounted.load_state_dict(saved)
    assert all("step" not in content for content in state_of(uncounted).values())
    fresh = new(kind, dtype=torch.bfloat16, rounding="stochastic", **options)
    fresh.load_state_dict(saved)
    assert_same_bits(state_of(fresh), saved["state"])


# Torch.

TORCH = [
    (AdamW, torch.optim.AdamW, dict(lr=0.01), ("exp_avg", "exp_avg_sq")),
    (SGD, torch.optim.SGD, dict(lr=0.01, momentum=0.9), ("momentum_buffer",)),
    (Adagrad, torch.optim.Adagrad, dict(lr=0.01), ("sum",)),
]


@pytest.mark.parametrize(("ours", "theirs", "options", "names"), TORCH)
def test_files_go_both_ways_between_torch_and_8_bits(
    ours: Any, theirs: Any, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    torchs = theirs(params(), **options)
    give_grads(params_of(torchs), 0)
    torchs.step()
    coded = new(ours, state_dtype="8bit")
    with pytest.warns(UserWarning, match="8 bits"):
        coded.load_state_dict(torchs.state_dict())
    for key, content in state_of(coded).items():
        for name in names:
            was = torchs.state_dict()["state"][key][name]
            codes, scale = encode(was, CODECS[name])
            assert torch.equal(numbers(content, name), decode(codes, scale, CODECS[name]) if key < 3 else was)
    give_grads(params_of(coded), 1)
    coded.step()

    decoded = new(ours)
    decoded.load_state_dict(coded.state_dict())
    going_on = theirs([param.detach().clone().requires_grad_() for param in params_of(decoded)], **options)
    going_on.load_state_dict(copy.deepcopy(decoded.state_dict()))  # torch's would share the tensors
    for each in (going_on, decoded):
        give_grads(params_of(each), 2)
        each.step()
    for mine, its in zip(params_of(decoded), params_of(going_on), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


# Damage.


def put(key: str, change: Callable[[Any], Any] | None) -> Callable[[dict[str, Any]], None]:
    def damage(content: dict[str, Any]) -> None:
        value = content.pop(key)
        if change is not None:
            content[key] = change(value)

    return damage


DAMAGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("exp_avg_scale", None), "exp_avg has codes of 8 bits, and exp_avg_scale is missing"),
    (put("exp_avg_scale", lambda scale: 1.0), "exp_avg has codes of 8 bits, and exp_avg_scale is missing"),
    (put("exp_avg", None), "exp_avg_scale is there, and exp_avg is missing"),
    (put("exp_avg", Tensor.char), "exp_avg has exp_avg_scale, so it must be torch.uint8, got torch.int8"),
    (put("exp_avg", Tensor.float), "exp_avg has exp_avg_scale, so it must be torch.uint8, got torch.float32"),
    (put("exp_avg_sq_scale", Tensor.double), "exp_avg_sq_scale must be torch.float32, got torch.float64"),
    (put("exp_avg_scale", lambda scale: scale[1:]), r"exp_avg_scale has shape [(]32, 1[)], expected [(]33, 1[)]"),
    (put("exp_avg_scale", lambda scale: scale[:, 0]), r"exp_avg_scale has shape [(]33,[)], expected [(]33, 1[)]"),
    (
        put("exp_avg_scale", lambda scale: scale.index_fill(0, torch.tensor(4), -2)),
        "exp_avg_scale must be >= 0, got -2",
    ),
    (put("exp_avg_scale", lambda scale: scale.to("meta")), "exp_avg_scale of .* has no values"),
    (put("exp_avg", lambda codes: codes.to("meta")), "exp_avg of .* has no values"),
    (put("compensation", Tensor.int), "compensation of .* must be a tensor of torch.int16, got torch.int32"),
    (put("compensation", lambda value: 3), "compensation of .* must be a tensor of torch.int16, got 3"),
]


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    saved = stepped(dtype=torch.bfloat16, state_dtype="8bit", rounding="compensated").state_dict()
    return copy.deepcopy(saved)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damage_is_refused_and_changes_nothing(
    damage: Callable[[dict[str, Any]], None], message: str, strict: bool, good: dict[str, Any]
) -> None:
    optimizer = stepped(steps=1, dtype=torch.bfloat16, state_dtype="8bit", rounding="compensated")
    saved = {**good, "state": {key: {**content} for key, content in good["state"].items()}}
    damage(saved["state"][0])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"AdamW: the loaded .*{message}"):
        optimizer.load_state_dict(saved, strict=strict)
    assert_unmoved(optimizer, before)


def test_codes_of_another_parameter_are_a_misfit(good: dict[str, Any]) -> None:
    saved = {**good, "state": {**good["state"], 0: good["state"][1]}}
    optimizer = new(dtype=torch.bfloat16, state_dtype="8bit", rounding="compensated")
    with pytest.raises(ValueError, match=r"has shape [(]17, 300[)], expected [(]33, 150[)]"):
        optimizer.load_state_dict(saved)
    result = optimizer.load_state_dict(saved, strict=False)
    assert len(result.missing_keys) == 1
    assert list(state_of(optimizer)) == [1, 2, 3]

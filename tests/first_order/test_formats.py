"""State in 8 bits, and bfloat16 parameters that keep learning, with every method and option."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import FIRST_ORDER
from programs import OPTIONS as OPTIONS_OF_PROGRAMS
from torch import Tensor, nn

import descend
from descend import AdamW, FirstOrder, from_rule
from descend.core.codecs import COMPENSATION, MIN_NUMEL, MIN_VECTOR, MIN_WIDTH, SCALE, Codec, decode, joined

ROWS, WIDTH = 16, 300  # a block of 256 and one of 44 in each row
OPTIONS = {**OPTIONS_OF_PROGRAMS, "SOAP": {"max_precond_dim": 16}}  # larger bases take seconds
EXACT = {  # state that averages nothing
    "AdamWScheduleFree": {"z"},
    "ASGD": {"ax"},
    "Prodigy": {"s", "p0"},
    "Rprop": {"prev", "step_size"},
}


class Model(nn.Module):
    """A matrix with blocks, one with short rows, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(ROWS, WIDTH, generator=random).to(dtype))
        self.narrow = nn.Parameter(torch.randn(MIN_NUMEL // 8, 8, generator=random).to(dtype))
        self.bias = nn.Parameter(torch.randn(10, generator=random).to(dtype))


def give_grads(model: nn.Module, step: int) -> None:
    """Set gradients that depend on the step, with columns of different sizes."""
    random = torch.Generator().manual_seed(100 + step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=random)
        sizes = torch.logspace(-2, 0, param.shape[-1])
        param.grad = ((0.3 + grad) * sizes).to(param.dtype)


def trained(kind: Any, steps: int = 6, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Model, Any]:
    """Return a model and its optimizer after some steps."""
    model = Model(dtype)
    optimizer = kind(model, **{**OPTIONS.get(kind.__name__, {}), **options})
    for step in range(steps):
        give_grads(model, step)
        optimizer.step()
    return model, optimizer


def bits(tensor: Tensor) -> Tensor:
    """Return what is in memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def are_equal(first: FirstOrder, second: FirstOrder) -> bool:
    """Return whether all parameters and all state of two optimizers are equal, bit for bit."""
    pairs = [
        (a, b)
        for one, other in zip(first.param_groups, second.param_groups, strict=True)
        for a, b in zip(one["params"], other["params"], strict=True)
    ]
    for a, b in pairs:
        assert first.state[a].keys() == second.state[b].keys()
        tensors = [(a, b), *((value, second.state[b][name]) for name, value in first.state[a].items())]
        if not all(torch.equal(bits(x), bits(y)) for x, y in tensors):
            return False
    return True


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_every_method_takes_state_in_8_bits(name: str) -> None:
    kind = FIRST_ORDER[name]
    start = Model().weight.detach()
    exact, plain = trained(kind, backend="eager", state_dtype=torch.float32)
    model, optimizer = trained(kind, backend="eager", state_dtype="8bit")
    state, plain_state = optimizer.state[model.weight], plain.state[exact.weight]
    of_weight = {key for key, value in plain_state.items() if value.shape == (ROWS, WIDTH)}
    coded = {key for key, value in state.items() if value.dtype == torch.uint8}
    assert coded == of_weight - EXACT.get(name, set())
    assert all(state[key + SCALE].shape == (ROWS, 2) for key in coded)
    moved, error = (exact.weight - start).norm(), (model.weight - exact.weight).norm()
    assert bool(error == 0) == (not coded)
    assert error <= 0.2 * moved
    # Nothing is gained for small tensors and short rows: they take the same steps as before.
    for small in ("narrow", "bias"):
        assert all(value.dtype != torch.uint8 for value in optimizer.state[getattr(model, small)].values())
    if not kind.__name__.startswith("Prodigy"):  # whose steps depend on all parameters
        assert torch.equal(model.narrow, exact.narrow)


def trained_like(half: nn.Module, kind: Any, steps: int, **options: Any) -> nn.Module:
    """Return a float32 model trained from the weights of a bfloat16 one, with its gradients."""
    model, whole = copy.deepcopy(half), copy.deepcopy(half).float()
    optimizer = kind(whole, **{**OPTIONS.get(kind.__name__, {}), **options})
    for step in range(steps):
        give_grads(model, step)
        for param, same in zip(model.parameters(), whole.parameters(), strict=True):
            assert param.grad is not None
            same.grad = param.grad.float()
        optimizer.step()
    return whole


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_every_method_takes_bfloat16_that_keeps_learning(name: str) -> None:
    kind = FIRST_ORDER[name]
    options: dict[str, Any] = {"backend": "eager", "state_dtype": torch.float32}
    if name == "Adafactor":
        options["eps"] = (1e-7, 1e-3)  # its default depends on the dtype
    exact = trained_like(Model(torch.bfloat16), kind, 4, **options)
    model, optimizer = trained(kind, 4, torch.bfloat16, rounding="compensated", **options)
    for param, same in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(joined(param.detach(), optimizer.state[param][COMPENSATION]), same)
        assert not torch.equal(param, same)
    model, _ = trained(kind, 4, torch.bfloat16, rounding="stochastic", **options)
    for param, same in zip(model.parameters(), exact.parameters(), strict=True):
        spacing = 2.0 ** (torch.frexp(same.detach()).exponent - 8)
        assert ((param - same).abs() / spacing).median() <= 2  # of a bfloat16: four steps were rounded


def test_compiled_steps_of_compensated_parameters_are_those_of_float32() -> None:
    options: dict[str, Any] = {"state_dtype": torch.float32}
    exact = trained_like(Model(torch.bfloat16), AdamW, 20, **options)
    model, optimizer = trained(AdamW, 20, torch.bfloat16, rounding="compensated", **options)
    for param, same in zip(model.parameters(), exact.parameters(), strict=True):
        # Twenty steps, each with a rounding of float32 that fused multiply-adds may save or not.
        ours = joined(param.detach(), optimizer.state[param][COMPENSATION])
        torch.testing.assert_close(ours, same.detach(), rtol=2e-6, atol=1e-7)


def test_small_steps_are_lost_by_rounding_to_nearest_only() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic", "compensated"):
        param = torch.ones(64, 128, dtype=torch.bfloat16)
        param.requires_grad_()
        optimizer = descend.SGD([param], lr=1e-4, rounding=rounding)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[rounding] = 1 - float(param.detach().float().mean())
    # A bfloat16 below 1 has a spacing of 2**-8; 50 steps are 0.005, or 1.28 spacings. The seed is fixed.
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.005, rel=0.03)
    assert moved["compensated"] == 2.0**-8


def test_state_is_coded_by_name_by_size_and_by_pattern() -> None:
    def formats(**options: Any) -> list[torch.dtype]:
        model, optimizer = trained(AdamW, 1, **options)
        state = optimizer.state[model.weight]
        return [state["exp_avg"].dtype, state["exp_avg_sq"].dtype]

    assert formats(state_dtype="8bit") == [torch.uint8, torch.uint8]
    assert formats(state_dtype={"exp_avg": "8bit"}) == [torch.uint8, torch.float32]
    assert formats(state_dtype={"exp_avg": torch.bfloat16, "exp_avg_sq": "8bit"}) == [torch.bfloat16, torch.uint8]
    for pattern in ("wei*", ["weight"]):
        assert formats(state_dtype="8bit", float32_state=pattern) == [torch.float32, torch.float32]
    assert formats(state_dtype="8bit", float32_state="bias") == [torch.uint8, torch.uint8]
    for shape, is_coded in {
        (MIN_VECTOR,): True,
        (MIN_VECTOR - 1,): False,
        (MIN_NUMEL // MIN_WIDTH, MIN_WIDTH): True,
        (MIN_NUMEL, MIN_WIDTH - 1): False,
        (2, 3, MIN_NUMEL): True,
    }.items():
        param = torch.zeros(shape, requires_grad=True)
        optimizer = AdamW([param], state_dtype="8bit")
        optimizer.init_state()
        assert (optimizer.state[param]["exp_avg"].dtype == torch.uint8) == is_coded, shape


def test_state_that_is_named_is_coded_whatever_it_is() -> None:
    model, optimizer = trained(descend.AdamWScheduleFree, 1, state_dtype={"z": "8bit"})
    assert optimizer.state[model.weight]["z"].dtype == torch.uint8
    before = model.weight.detach().clone()
    optimizer.eval()  # reads z outside of steps
    assert 0 < (model.weight - before).abs().max() < 0.1
    model, optimizer = trained(descend.RMSprop, 1, state_dtype="8bit", centered=True)
    dtypes = {name: value.dtype for name, value in optimizer.state[model.weight].items()}
    assert dtypes["momentum_buffer"] == torch.uint8  # but not what the variance is the difference of
    assert dtypes["square_avg"] == dtypes["grad_avg"] == torch.float32


def test_compensated_weights_go_to_their_average_and_back() -> None:
    model, optimizer = trained(descend.AdamWScheduleFree, 3, torch.bfloat16, rounding="compensated")
    state = optimizer.state[model.weight]
    before = joined(model.weight.detach(), state[COMPENSATION])
    optimizer.eval()
    optimizer.train()
    after = joined(model.weight.detach(), state[COMPENSATION])
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_averages_of_weights_are_never_coded() -> None:
    for asked in ("8bit", {"ema": "8bit"}):
        model, optimizer = trained(AdamW, 1, state_dtype=asked, ema=0.5)
        assert optimizer.state[model.weight]["ema"].dtype == torch.float32


def test_state_that_does_not_start_at_zero_is_encoded() -> None:
    param = torch.ones(64, 64, requires_grad=True)
    optimizer = descend.Adagrad([param], initial_accumulator_value=0.25, state_dtype="8bit")
    optimizer.init_state()
    state = optimizer.state[param]
    numbers = decode(state["sum"], state["sum" + SCALE], Codec(signed=False))
    assert torch.equal(numbers, torch.full((64, 64), 0.25))


def test_rules_of_users_are_coded() -> None:
    def heavy(param: Any, grad: Any, velocity: Any, lr: float = 0.1) -> Any:
        velocity = 0.9 * velocity + grad
        return param - lr * velocity, velocity

    kind = from_rule(heavy, "Heavy", lr=0.1)
    model, optimizer = trained(kind, state_dtype="8bit")
    exact, _ = trained(kind)
    assert optimizer.state[model.weight]["velocity"].dtype == torch.uint8
    start = Model().weight
    assert 0 < (model.weight - exact.weight).norm() <= 0.1 * (exact.weight - start).norm()


def test_squares_of_users_never_become_zero() -> None:
    def squares(param: Any, grad: Any, square: Any) -> Any:
        return param, square + grad * grad

    param = torch.zeros(64, 64, requires_grad=True)
    param.grad = torch.logspace(-4, 0, 64).repeat(64, 1)
    for names, has_zeros in (([], True), (["square"], False)):
        optimizer = from_rule(squares, "Squares", nonnegative_state=names)([param], backend="eager", state_dtype="8bit")
        optimizer.step()
        assert bool((optimizer.state[param]["square"] == 0).any()) == has_zeros
    with pytest.raises(ValueError, match=r"must be among the state of Squares, .*, got \['mean'\]\."):
        from_rule(squares, "Squares", nonnegative_state=["mean"])


@pytest.mark.parametrize("kind", [AdamW, descend.SGD], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind: Any, rounding: str) -> None:
    options = {"rounding": rounding, "state_dtype": {"exp_avg": "8bit", "momentum_buffer": "8bit"}}
    _, whole = trained(kind, 6, torch.bfloat16, **options)
    half, optimizer = trained(kind, 3, torch.bfloat16, **options)
    resumed_model = copy.deepcopy(half)
    resumed = kind(resumed_model, **OPTIONS.get(kind.__name__, {}), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        give_grads(resumed_model, step)
        resumed.step()
    assert are_equal(whole, resumed)


def test_noise_depends_on_the_seed_and_on_nothing_else() -> None:
    options = {"rounding": "stochastic", "state_dtype": "8bit"}
    _, first = trained(AdamW, 3, torch.bfloat16, **options)
    torch.manual_seed(1)  # not torch's generator
    torch.set_num_threads(1)
    _, same = trained(AdamW, 3, torch.bfloat16, **options)
    assert are_equal(first, same)
    _, other = trained(AdamW, 3, torch.bfloat16, rounding_seed=1, **options)
    assert not are_equal(first, other)
    # A parameter whose neighbor has no gradient gets the same noise.
    model = Model(torch.bfloat16)
    alone = AdamW(model, **options)
    for step in range(3):
        give_grads(model, step)
        model.narrow.grad = None
        alone.step()
    weight = first.param_groups[0]["params"][0]
    assert torch.equal(bits(model.weight), bits(weight))


def test_momentum_is_kept_when_rounding_begins_to_count() -> None:
    model, optimizer = trained(descend.SGD, 2, torch.bfloat16, momentum=0.9)
    assert "step" not in optimizer.state[model.weight]
    before = optimizer.state[model.weight]["momentum_buffer"].clone()
    optimizer.rounding = "stochastic"
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["step"] == 2  # at least one, and this one
    torch.testing.assert_close(state["momentum_buffer"], 0.9 * before, rtol=2**-7, atol=0)


def test_options_of_a_step_do_what_they_do() -> None:
    def run(change: Callable[[Any, nn.Module], None] | None = None, **options: Any) -> Tensor:
        model = Model()
        optimizer = AdamW(model, lr=0.1, state_dtype="8bit", **options)
        for step in range(3):
            give_grads(model, step)
            if change is not None:
                change(optimizer, model)
            optimizer.step()
        return model.weight.detach()

    def overflow(optimizer: Any, model: nn.Module) -> None:
        if dict.get(optimizer.state, model.weight) and not hasattr(model, "has_overflowed"):
            model.has_overflowed = True  # type: ignore[assignment]
            kept = [copy.deepcopy(dict(optimizer.state[param])) for param in model.parameters()]
            weight, model.weight.grad = model.weight.detach().clone(), torch.full_like(model.weight, math.inf)
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert torch.equal(weight, model.weight)
            for param, before in zip(model.parameters(), kept, strict=True):
                assert all(torch.equal(bits(value), bits(before[key])) for key, value in optimizer.state[param].items())
            give_grads(model, 1)

    plain = run()
    assert torch.equal(plain, run(overflow, nonfinite="skip"))
    # Adam's steps hardly depend on the scale of all gradients.
    clipped = run(max_norm=0.01)
    assert not torch.equal(clipped, plain)
    assert (clipped - plain).abs().mean() < 0.01  # of three steps of 0.1


@pytest.mark.parametrize("amp", [None, "fused"])
def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(amp: Any) -> None:
    options = {"state_dtype": "8bit", "rounding": "stochastic"}
    _, plain = trained(AdamW, 3, **options)
    model = Model()
    scaled = AdamW(model, amp=amp, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(torch.ones(()))  # makes the scale
        give_grads(model, step)
        for param in model.parameters():
            assert param.grad is not None
            param.grad *= 2.0**10
        scaler.step(scaled)
        scaler.update()
    assert are_equal(plain, scaled)


def test_untouched_rows_keep_their_bits() -> None:
    param = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dense = param.detach().clone().requires_grad_()
    options = {"state_dtype": "8bit", "rounding": "stochastic"}
    optimizer, other = AdamW([param], sparse="touched", **options), AdamW([dense], **options)  # type: ignore[arg-type]
    for step in range(3):
        rows = torch.tensor([[5, 7, 5, 299 - step]])
        values = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        before = {name: value.clone() for name, value in optimizer.state[param].items()}
        old = param.detach().clone()
        param.grad = torch.sparse_coo_tensor(rows, values, param.shape)
        dense.grad = param.grad.to_dense()
        optimizer.step()
        other.step()
        untouched = torch.ones(300, dtype=torch.bool)
        untouched[rows] = False
        assert torch.equal(param[untouched], old[untouched])
        for name, value in before.items():
            if name != "step":
                assert torch.equal(optimizer.state[param][name][untouched], value[untouched]), name
    # Rows that were always touched have taken the steps of a dense parameter, noise included.
    assert torch.equal(param[[5, 7]], dense[[5, 7]])
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        assert torch.equal(optimizer.state[param][name][[5, 7]], other.state[dense][name][[5, 7]]), name


def test_what_cannot_be_is_said_before_anything_moves() -> None:
    param = torch.zeros(64, 64, requires_grad=True)
    for options, message in (
        ({"state_dtype": "7bit"}, r"state_dtype must be one of .*'8bit'\), or a dict .*, got '7bit'\."),
        ({"state_dtype": {"exp_avg": torch.int8}}, r"got torch.int8 for 'exp_avg'\."),
        ({"rounding": "up"}, r"rounding must be one of \('nearest', 'stochastic', 'compensated'\), got 'up'\."),
        ({"rounding_seed": 0.5}, r"rounding_seed must be an integer, got 0\.5\."),
        ({"float32_state": 3}, r"float32_state must be a pattern \(text, regular expression or names\), got 3\."),
        ({"float32_state": "weight"}, r"float32_state='weight': the parameters have no names: give the model\."),
        ({"sparse": "exact", "state_dtype": "8bit"}, r"with '8bit' use 'touched'\."),
        ({"sparse": "exact", "rounding": "stochastic"}, r"cannot catch up with rounding='stochastic'"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW([param], **options)
    with pytest.raises(ValueError, match=r"float32_state: 'w' matches no parameter\. Near names: weight, "):
        AdamW(Model(), float32_state=["weight", "w"])
    param.grad = torch.ones(64, 64)
    for options in ({"state_dtype": "8bit"}, {"rounding": "compensated"}):
        weight = param.detach().bfloat16().requires_grad_() if "rounding" in options else param
        weight.grad = torch.ones_like(weight)
        optimizer = AdamW([weight], differentiable=True, **options)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated .* leave out `differentiable`"):
            optimizer.step()
        assert not weight.any()
    param.grad = torch.eye(64).to_sparse()
    optimizer = AdamW([param], sparse="touched", state_dtype="8bit")
    with pytest.raises(RuntimeError, match=r"2 sparse among 2 dimensions does not name rows"):
        optimizer.step()
    assert not param.any()


def test_codes_without_scales_are_refused() -> None:
    model, optimizer = trained(AdamW, 1, state_dtype="8bit")
    before = model.weight.detach().clone()
    for damage, message in (
        (lambda state: state.pop("exp_avg_scale"), "there is no exp_avg_scale"),
        (
            lambda state: state.update(exp_avg_scale=torch.zeros(ROWS, 2).double()),
            "exp_avg_scale of dtype torch.float64",
        ),
        (
            lambda state: state.update(exp_avg_scale=torch.zeros(3)),
            r"exp_avg_scale of .* has shape \(3,\), expected",
        ),
    ):
        damaged = copy.deepcopy(optimizer)
        param = damaged.param_groups[0]["params"][0]
        damage(damaged.state[param])
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=message):
            damaged.step()
        assert torch.equal(param, before)


def test_compensation_of_another_dtype_is_refused() -> None:
    model, optimizer = trained(AdamW, 1, torch.bfloat16, rounding="compensated")
    before = model.weight.detach().clone()
    optimizer.state[model.weight][COMPENSATION] = torch.zeros(ROWS, WIDTH, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"compensation of weight must be torch\.int16, got torch\.uint8\."):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_scales_go_with_the_codes() -> None:
    model, optimizer = trained(AdamW, 1, state_dtype="8bit")
    optimizer.state_dtype = None
    del optimizer.state[model.weight]["exp_avg"]
    give_grads(model, 1)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert "exp_avg_scale" not in state
    assert state["exp_avg_sq"].dtype == torch.uint8
    optimizer.load_state_dict(optimizer.state_dict())


def test_state_called_like_scales_is_no_scale() -> None:
    def two(param: Any, grad: Any, v: Any, v_scale: Any, lr: float = 0.1) -> Any:
        v = 0.5 * v + grad
        return param - lr * v, v, v_scale + 1

    model, optimizer = trained(from_rule(two, "Two", lr=0.1), 3, state_dtype="8bit")
    state = optimizer.state[model.weight]
    assert state["v"].dtype == torch.float32
    assert state["v_scale"].dtype == torch.uint8
    assert state.keys() == {"v", "v_scale", "v_scale_scale"}


def test_a_step_count_that_noise_cannot_be_made_of_is_refused() -> None:
    model, optimizer = trained(AdamW, 1, torch.bfloat16, rounding="stochastic")
    before = model.weight.detach().clone()
    optimizer.state[model.weight]["step"].fill_(math.nan)
    give_grads(model, 1)
    with pytest.raises(ValueError, match=r"needs the step count, which must be finite, got nan\."):
        optimizer.step()
    assert torch.equal(model.weight, before)

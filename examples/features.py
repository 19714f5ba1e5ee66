"""What optimizer packages do, asked of the packages themselves: the evidence behind docs/comparison.md.

Usage: ``python examples/features.py``, with torch-optimi, pytorch_optimizer and optax installed beside descend. Each
question is a few lines of code that either finish or raise; nothing is read from documentation.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import warnings
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import jax.numpy as jnp
import optax
import optimi
import pytorch_optimizer
import torch
from torch import nn

import descend

LIBRARIES = {"torch": torch.optim, "torch-optimi": optimi, "pytorch_optimizer": pytorch_optimizer, "descend": descend}


def weight_of(dtype: torch.dtype = torch.float32, value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((4,), value, dtype=dtype))


def stepped(library: ModuleType, param: nn.Parameter, grad: torch.Tensor, steps: int = 1, **options: Any) -> None:
    # pytorch_optimizer's AdamW is torch's own; its own class for half precision is StableAdamW.
    kind = library.StableAdamW if library is pytorch_optimizer else library.AdamW
    optimizer = kind([param], **{"lr": 1e-3, **options})
    for _ in range(steps):
        param.grad = grad.clone()
        optimizer.step()


def takes_a_module(library: ModuleType) -> bool:
    library.AdamW(nn.Linear(2, 2), lr=1e-3)
    return True


def clips_inside_the_step(library: ModuleType) -> bool:
    library.AdamW([weight_of()], lr=1e-3, max_norm=1.0)
    return True


def survives_a_nan_gradient(library: ModuleType) -> bool:
    param = weight_of()
    options = {"nonfinite": "skip"} if library is descend else {}
    stepped(library, param, torch.full((4,), math.nan), **options)
    return bool(param.isfinite().all())


def trains_float16_with_its_defaults(library: ModuleType) -> bool:
    param = weight_of(torch.float16)
    stepped(library, param, torch.full((4,), 1e-5, dtype=torch.float16))
    return bool(param.isfinite().all())


def keeps_updates_below_the_rounding_of_bfloat16(library: ModuleType) -> bool:
    param = weight_of(torch.bfloat16)  # neighbours of 1 are 0.004 to 0.008 away, a step is 0.0001
    options: dict[str, Any] = {"rounding": "stochastic"} if library is descend else {}
    stepped(library, param, torch.ones(4, dtype=torch.bfloat16), steps=200, lr=1e-4, weight_decay=0.0, **options)
    return bool((param < 0.99).all())


def takes_sparse_gradients(library: ModuleType) -> bool:
    table = nn.Embedding(10, 2, sparse=True)
    options = {"sparse": "touched"} if library is descend else {}
    optimizer = library.AdamW(table.parameters(), lr=1e-3, **options)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    return True


def gives_reordered_layers_their_own_state(library: ModuleType) -> bool:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    params = {"first": first.weight, "second": second.weight}
    optimizer = library.AdamW(list(params.items()), lr=1e-3)
    for number, param in enumerate(params.values(), 1):
        param.grad = torch.full_like(param, float(number))
    optimizer.step()
    other = library.AdamW(list(reversed(params.items())), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    return all(
        torch.equal(other.state[param]["exp_avg"], optimizer.state[param]["exp_avg"]) for param in params.values()
    )


def loads_a_checkpoint_of_torch(library: ModuleType) -> bool:
    param, twin = weight_of(), weight_of()
    theirs = torch.optim.AdamW([param], lr=1e-3)
    ours = library.AdamW([twin], lr=1e-3)
    for _ in range(2):
        param.grad = torch.ones(4)
        theirs.step()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        twin.copy_(param)
    for each, optimizer in ((param, theirs), (twin, ours)):
        each.grad = torch.ones(4)
        optimizer.step()
    return torch.allclose(param, twin, rtol=0, atol=1e-7)


def refuses_a_damaged_checkpoint(library: ModuleType) -> bool:
    param = weight_of()
    optimizer = library.AdamW([param], lr=1e-3)
    param.grad = torch.ones(4)
    optimizer.step()
    damaged = optimizer.state_dict()
    damaged["state"][0]["exp_avg_sq"] = torch.full((4,), -1.0)
    try:
        library.AdamW([param], lr=1e-3).load_state_dict(damaged)
    except ValueError:
        return True
    return False


def steps_inside_backward(library: ModuleType) -> bool:
    model = nn.Linear(2, 2)
    if library is descend:
        descend.in_backward(descend.AdamW(model.parameters()))
    elif library is optimi:
        optimi.prepare_for_gradient_release(model, optimi.AdamW(model.parameters(), lr=1e-3, gradient_release=True))
    else:
        return False
    model(torch.ones(1, 2)).sum().backward()
    return all(param.grad is None for param in model.parameters())


QUESTIONS: tuple[Callable[[ModuleType], bool], ...] = (
    takes_a_module,
    clips_inside_the_step,
    survives_a_nan_gradient,
    trains_float16_with_its_defaults,
    keeps_updates_below_the_rounding_of_bfloat16,
    takes_sparse_gradients,
    gives_reordered_layers_their_own_state,
    loads_a_checkpoint_of_torch,
    refuses_a_damaged_checkpoint,
    steps_inside_backward,
)


def answer(question: Callable[[ModuleType], bool], library: ModuleType) -> str:
    """Ask one library."""
    try:
        return "yes" if question(library) else "no"
    except Exception as error:  # whatever a library raises is its answer
        return f"no: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"


def weights_of_optax(dtype: Any, grad: float, steps: int, **options: Any) -> Any:
    """Four weights of 1 after steps of optax's AdamW with equal gradients."""
    method, weights = optax.adamw(**options), jnp.ones(4, dtype)
    state = method.init(weights)
    for _ in range(steps):
        updates, state = method.update(jnp.full(4, grad, dtype), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def optimizers_of_optax() -> int:
    """How many functions of optax.alias make an optimizer and are exported."""
    made = vars(optax._src.alias)
    return sum(
        isinstance(value, FunctionType) and value.__module__ == "optax._src.alias" and vars(optax).get(name) is value
        for name, value in made.items()
    )


def optimizers_of(library: ModuleType) -> int:
    """How many classes of optimizers the library exports."""
    if library is pytorch_optimizer:
        return len(pytorch_optimizer.get_supported_optimizers())
    classes = [value for value in map(vars(library).get, dir(library)) if isinstance(value, type)]
    bases = {torch.optim.Optimizer, descend.FirstOrder}
    return sum(issubclass(each, torch.optim.Optimizer) and each not in bases for each in classes)


def main() -> None:
    warnings.simplefilter("ignore")
    descend.warmup(descend.AdamW([weight_of()]))  # also loads the public names
    for name, library in LIBRARIES.items():
        print(f"{name} {importlib.metadata.version(name)}: {optimizers_of(library)} optimizers")
    print(f"optax {importlib.metadata.version('optax')}: {optimizers_of_optax()} optimizers")
    for question, (name, library) in itertools.product(QUESTIONS, LIBRARIES.items()):
        torch.manual_seed(0)
        print(f"{question.__name__.replace('_', ' '):<46} {name:<18} {answer(question, library)}")
    print(f"optax, float16, defaults: {weights_of_optax(jnp.float16, 1e-5, steps=1, learning_rate=1e-3)}")
    small = weights_of_optax(jnp.bfloat16, 1.0, steps=200, learning_rate=1e-4, weight_decay=0.0)
    print(f"optax, bfloat16, 200 updates below its rounding: {small}")


if __name__ == "__main__":
    main()

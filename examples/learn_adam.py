"""Inside Adam: what its averages, its bias correction and its step sizes do while a network learns digits.

python examples/learn_adam.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from figures import BLUE, INK, ORANGE, Chapter, name_curve, new_figure, use_log_scale
from sklearn.datasets import load_digits
from torch import Tensor, nn

import descend
from descend import rules

# The same rule with both corrections switched off: bias1 = bias2 = 1.
Uncorrected = descend.from_rule(
    rules.adam, "Uncorrected", gain1=0.1, gain2=0.001, eps=1e-8, weight_decay=0.0, bias1=1.0, bias2=1.0
)
KINDS = {"corrected": (descend.Adam, BLUE), "uncorrected": (Uncorrected, ORANGE)}


class Training(NamedTuple):
    """What was seen at each step; ``grads`` and ``moves`` are of the first layer, (steps, units, pixels)."""

    losses: Tensor
    grads: Tensor
    moves: Tensor


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8 x 8 pixels between 0 and 1, and their labels."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def train(make: type[descend.FirstOrder], lr: float, seed: int, steps: int) -> Training:
    """Train a network of one hidden layer on batches of 64 digits."""
    torch.manual_seed(seed)
    inputs, labels = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    optimizer = make(model.parameters(), lr=lr)
    losses, grads, moves = [], [], []
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (64,))
        loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        before = weight.detach().clone()
        optimizer.step()
        assert weight.grad is not None
        losses.append(loss.detach())
        grads.append(weight.grad.clone())
        moves.append(weight.detach() - before)
    return Training(torch.stack(losses), torch.stack(grads), torch.stack(moves))


def root_mean_square(values: Tensor, over: tuple[int, ...]) -> Tensor:
    """Of the values that are not zero: a pixel that is dark in all digits has no gradient."""
    return (values.square().sum(over) / (values != 0).sum(over).clamp(min=1)).sqrt()


def step_lengths(chapter: Chapter) -> None:
    """The length of each step, with and without the correction."""
    steps, seeds, lr = (20, 2, 1e-3) if chapter.quick else (1000, 5, 1e-3)
    figure, axes = new_figure("Without the correction, early steps are too long", "step", "length of a step / lr")
    for kind, (make, color) in KINDS.items():
        runs = [train(make, lr, seed, steps).moves for seed in range(seeds)]
        lengths = torch.stack([root_mean_square(moves, (1, 2)) for moves in runs]).median(0).values / lr
        axes.plot(range(1, steps + 1), lengths, color=color)
        name_curve(axes, 1, float(lengths[0]), kind, color, dx=4, dy=12)
        longest = int(lengths.argmax())
        chapter.say(
            f"{kind}: first step {lengths[0]:.2f} lr, longest {lengths[longest]:.2f} lr at step {longest + 1}, "
            f"step {steps} {lengths[-1]:.2f} lr"
        )
    use_log_scale(axes, "xy")
    axes.set_ylim(0.1, 8)
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5])
    chapter.save(figure, "steps")


def learning_rates(chapter: Chapter) -> None:
    """The loss after a hundred steps for each learning rate."""
    steps, seeds = (20, 2) if chapter.quick else (100, 5)
    rates = torch.logspace(-4, -0.5, 3 if chapter.quick else 8).tolist()
    figure, axes = new_figure("Uncorrected, Adam bears a smaller learning rate", "lr", "loss of the last 20 steps")
    for kind, (make, color) in KINDS.items():
        losses = torch.tensor(
            [[float(train(make, lr, seed, steps).losses[-20:].mean()) for seed in range(seeds)] for lr in rates]
        )
        low, middle, high = losses.quantile(torch.tensor([0.25, 0.5, 0.75]), 1)
        axes.plot(rates, middle, "o-", color=color, markersize=4)
        axes.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)
        best = int(middle.argmin())
        chapter.say(
            f"{kind}: best lr {rates[best]:.2g}, loss {middle[best]:.3f}; at lr {rates[-2]:.2g} {middle[-2]:.3f}"
        )
        dx, dy = (-72, 2) if make is Uncorrected else (-48, -42)
        name_curve(axes, rates[-1], float(middle[-1]), kind, color, dx=dx, dy=dy)
    use_log_scale(axes, "xy")
    chapter.save(figure, "rates")


def pixels(chapter: Chapter) -> None:
    """How far gradients and steps differ between the weights of one pixel and another."""
    run = train(descend.Adam, 1e-3, 0, 20 if chapter.quick else 1000)
    grads, moves = (root_mean_square(values, (0, 1)) for values in (run.grads, run.moves))
    order = grads[grads > 0].argsort()
    figure, axes = new_figure(
        "Gradients differ, steps hardly do", "pixel, from dark to bright", "relative to the median"
    )
    for name, values, color in (("gradient", grads, ORANGE), ("Adam's step", moves, BLUE)):
        relative = values[grads > 0][order] / values[grads > 0].median()
        axes.plot(relative, color=color)
        chapter.say(f"{name}: the largest pixel has {relative.max() / relative.min():.0f} times the smallest's")
        name_curve(axes, 0, float(relative[0]), name, color, dx=14, dy=0 if values is grads else -16)
    axes.axhline(1, color=INK, linewidth=0.8)
    use_log_scale(axes, "y")
    chapter.say(f"pixels that are dark in every digit: {int((grads == 0).sum())} of 64")
    chapter.save(figure, "pixels")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the chapter's figures."""
    chapter = Chapter("adam", __file__, arguments)
    step_lengths(chapter)
    learning_rates(chapter)
    pixels(chapter)
    chapter.close()


if __name__ == "__main__":
    main()

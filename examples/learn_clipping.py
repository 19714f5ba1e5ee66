"""A recurrent network learns to add, with and without clipping.

python examples/learn_clipping.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from figures import BLUE, INK, ORANGE, Chapter, name_curve, new_figure, use_log_scale
from torch import Tensor, nn

import descend

LENGTH, HIDDEN, BATCH = 25, 64, 64
ALWAYS_ONE = 1 / 6  # the loss of always answering 1, the mean of the sum: its variance
WINDOW = 50
KINDS = {  # max_norm, color, and where the name stands in the figures
    "without clipping": (math.inf, ORANGE, {"loss": (900, 0.24), "norm": (60, 1e8)}),
    "max_norm=0.3": (0.3, BLUE, {"loss": (450, 0.035), "norm": (30, 0.02)}),
}


def sums(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of random numbers, two of them marked, and the sum of the two: Hochreiter & Schmidhuber 1997.

    One mark is in the first half, one in the second: shapes (time, batch, 2) and (batch,).
    """
    numbers, marks = torch.rand(LENGTH, BATCH, generator=generator), torch.zeros(LENGTH, BATCH)
    for first, last in ((0, LENGTH // 2), (LENGTH // 2, LENGTH)):
        marks[torch.randint(first, last, (BATCH,), generator=generator), torch.arange(BATCH)] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


class Adder(nn.Module):
    """A recurrent network of ReLUs that begins as the identity: Le, Jaitly & Hinton 2015."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.RNN(2, HIDDEN, nonlinearity="relu")
        self.head = nn.Linear(HIDDEN, 1)
        nn.init.eye_(self.recurrent.weight_hh_l0)
        nn.init.normal_(self.recurrent.weight_ih_l0, std=0.1)
        nn.init.zeros_(self.recurrent.bias_hh_l0)
        nn.init.zeros_(self.recurrent.bias_ih_l0)

    def forward(self, inputs: Tensor) -> Tensor:
        """The answer after the last number."""
        answer: Tensor = self.head(self.recurrent(inputs)[0][-1])
        return answer.squeeze(-1)


def train(max_norm: float, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """The loss of each step, and the norm of the gradient before clipping."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Adder()
    optimizer = descend.SGD(model.parameters(), lr=0.03, momentum=0.9, max_norm=max_norm)
    losses, norms = [], []
    for _ in range(steps):
        inputs, targets = sums(generator)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(optimizer.grad_norm))
    return torch.tensor(losses), torch.tensor(norms)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the chapter's figures."""
    chapter = Chapter("clipping", __file__, arguments)
    steps, seeds = (60, 2) if chapter.quick else (1500, 3)
    loss_figure, loss_axes = new_figure("Clipping decides whether it learns", "step", f"loss, mean of {WINDOW} steps")
    norm_figure, norm_axes = new_figure("The cliff", "step", "gradient norm before clipping")
    for name, (max_norm, color, places) in KINDS.items():
        runs = [train(max_norm, seed, steps) for seed in range(seeds)]
        for losses, norms in runs:
            means = losses.unfold(0, WINDOW, WINDOW).mean(1)
            loss_axes.plot(range(WINDOW, steps + 1, WINDOW), means, color=color, linewidth=1.2)
            norm_axes.plot(range(1, len(norms[:100]) + 1), norms[:100], color=color, linewidth=1.2)
        last = [float(losses[-100:].mean()) for losses, _ in runs]
        chapter.say(f"{name}: loss of the last 100 steps {', '.join(f'{loss:.3f}' for loss in last)}")
        highest, steepest = (
            max(float(values[values.isfinite()].max()) for values in kind) for kind in zip(*runs, strict=True)
        )
        chapter.say(f"{name}: largest finite loss {highest:.3g}, largest finite gradient norm {steepest:.3g}")
        name_curve(loss_axes, *places["loss"], name, color)
        name_curve(norm_axes, *places["norm"], name, color)
    loss_axes.axhline(ALWAYS_ONE, color=INK, linewidth=0.8, linestyle=":")
    use_log_scale(loss_axes, "y")
    loss_axes.set_ylim(0.01, 10)
    use_log_scale(norm_axes, "y")
    norm_axes.set_ylim(bottom=1e-3)
    chapter.save(loss_figure, "loss")
    chapter.save(norm_figure, "norms")
    chapter.close()


if __name__ == "__main__":
    main()

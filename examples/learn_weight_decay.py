"""An L2 penalty and weight decay, pulling apart in Adam as gradients differ in scale.

python examples/learn_weight_decay.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from figures import BLUE, INK, ORANGE, Chapter, name_curve, new_figure, use_log_scale
from sklearn.datasets import load_digits
from torch import Tensor, nn

import descend

STEPS, LR = 1000, 3e-3
METHODS = {
    "Adam, L2": (descend.Adam, 3e-3, ORANGE),
    "AdamW, decay": (descend.AdamW, 0.5, BLUE),
}


def train(
    make: type[descend.Adam] | type[descend.AdamW], weight_decay: float, steps: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Train a softmax regression on the digits, with its loss multiplied by ``scale``.

    Returns the weights, (classes, pixels), and the root mean squares of their gradients.
    """
    data = load_digits()
    inputs, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = make(model.parameters(), lr=LR, weight_decay=weight_decay, eps=1e-15)
    squares = torch.zeros_like(model.weight)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (64,))
        loss = scale * nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert model.weight.grad is not None
        squares += model.weight.grad.square() / steps
    return model.weight.detach(), squares.sqrt()


def loss_scales(chapter: Chapter) -> None:
    """The norm of the weights for each scale of the loss."""
    scales = [0.1, 10.0] if chapter.quick else [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
    steps = 20 if chapter.quick else STEPS
    figure, axes = new_figure("Only decay ignores the scale of the loss", "loss multiplied by", "norm of the weights")
    norms: dict[str, list[float]] = {}
    for name, (make, weight_decay, color) in {"neither": (descend.Adam, 0.0, INK), **METHODS}.items():
        norms[name] = [float(train(make, weight_decay, steps, scale)[0].norm()) for scale in scales]
        axes.plot(scales, norms[name], "o-", color=color, markersize=4)
        dx, dy = {"neither": (0, 8), "Adam, L2": (-66, -16), "AdamW, decay": (-66, -10)}[name]
        name_curve(axes, scales[-1 if dx else 0], norms[name][-1 if dx else 0], name, color, dx=dx, dy=dy)
    for i, scale in enumerate(scales):
        chapter.say(f"loss x {scale:g}, norm: " + "; ".join(f"{name} {norms[name][i]:.2f}" for name in norms))
    use_log_scale(axes, "x")
    axes.set_ylim(0, 19)
    chapter.save(figure, "scales")


def pixels(chapter: Chapter) -> None:
    """How much of each pixel's weights is left, against the size of its gradients."""
    steps = 20 if chapter.quick else STEPS
    weights, grads = train(descend.Adam, 0, steps)
    lit = grads.norm(dim=0) > 0
    figure, axes = new_figure(
        "L2 spares the weights with large gradients",
        "root mean square of the pixel's gradient",
        "norm of its weights / with neither",
    )
    for name, (make, weight_decay, color) in METHODS.items():
        left = train(make, weight_decay, steps)[0].norm(dim=0)[lit] / weights.norm(dim=0)[lit]
        size = grads.square().mean(0).sqrt()[lit]
        axes.plot(size, left, "o", color=color, markersize=4, alpha=0.8, label=name)
        small, large = left[size < size.median()].median(), left[size >= size.median()].median()
        chapter.say(
            f"{name}: pixels with small gradients keep {small:.2f} of their weights, with large ones {large:.2f}"
        )
    use_log_scale(axes, "x")
    axes.set_ylim(bottom=0)
    axes.legend()
    chapter.save(figure, "pixels")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the chapter's figures."""
    chapter = Chapter("weight-decay", __file__, arguments)
    loss_scales(chapter)
    pixels(chapter)
    chapter.close()


if __name__ == "__main__":
    main()

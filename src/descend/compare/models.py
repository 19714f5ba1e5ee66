"""The networks to train: small, and random only in their initial weights."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def conv_net(classes: int) -> nn.Module:
    """Return a convolutional net for images of shape (batch, 1, 8, 8); its logits have shape (batch, classes)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, classes),
    )


def bag_of_words(buckets: int, width: int, classes: int) -> nn.Module:
    """Return a linear classifier of averaged embeddings; it maps ids (batch, length), padded with 0, to logits.

    Joulin et al. 2016, "fastText", https://arxiv.org/abs/1607.01759.
    """
    embed = nn.EmbeddingBag(buckets, width, mode="mean", padding_idx=0)
    # torch's default standard deviation of 1 would drown out the first updates.
    nn.init.normal_(embed.weight, std=0.1)
    return nn.Sequential(embed, nn.Linear(width, classes))


class Attention(nn.Module):
    """Causal self-attention: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.

    Position embeddings are rotary, which here learn several times faster than a table: Su et al. 2021,
    https://arxiv.org/abs/2104.09864.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        half = width // heads // 2
        angle = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        split = self.project(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(self._rotate(query), self._rotate(key), value, is_causal=True)
        mixed: Tensor = self.mix(attended.transpose(1, 2).reshape(batch, length, width))
        return mixed

    def _rotate(self, vectors: Tensor) -> Tensor:
        first, second = vectors.chunk(2, dim=-1)
        cosine, sine = self.cosine[: vectors.shape[-2]], self.sine[: vectors.shape[-2]]
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    """Pre-norm block, Xiong et al. 2020: attention and a two-layer net, each with normalized input and a residual."""

    def __init__(self, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(length, width, heads))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden)
        out: Tensor = hidden + self.feed_forward(hidden)
        return out


def transformer(vocabulary: int, length: int, width: int, heads: int, depth: int) -> nn.Module:
    """Return a language model; it maps ids (batch, length) to logits of shape (batch, length, vocabulary)."""
    embed = nn.Embedding(vocabulary, width)
    # torch's default standard deviation of 1 drowns out the first blocks: 0.03 nats worse after 300 steps.
    nn.init.normal_(embed.weight, std=0.2)
    return nn.Sequential(
        embed,
        *(Block(length, width, heads) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary),
    )


class BurgersNet(nn.Module):
    """A function u of points (x, t), shape (n, 2), that is -sin(pi x) at t = 0 and 0 at x = -1 and x = 1.

    What is to be learned is multiplied by t (1 - x^2), so that it cannot touch these values: Lagaris et al. 1998,
    https://arxiv.org/abs/physics/9705023.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [2] + [width] * depth
        layers = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise(sizes)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, points: Tensor) -> Tensor:
        x, t = points.unbind(1)
        u: Tensor = t * (1 - x * x) * self.net(points).squeeze(1) - torch.sin(math.pi * x)
        return u


class Recurrent(nn.Module):
    """A layer of rectified units that feed back; a linear map of the last step's is the output."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, width, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        hidden, _ = self.rnn(sequences)
        out: Tensor = self.head(hidden[:, -1])
        return out


def recurrent_net(inputs: int, width: int, outputs: int) -> nn.Module:
    """Return a net that maps (batch, length, inputs) to (batch, outputs); the recurrent matrix starts as the identity.

    Le et al. 2015, https://arxiv.org/abs/1504.00941.
    """
    net = Recurrent(inputs, width, outputs)
    for name, param in net.named_parameters():
        if "bias" in name:
            nn.init.zeros_(param)
        elif "hh" in name:
            nn.init.eye_(param)
        else:
            nn.init.normal_(param, std=0.1)
    return net

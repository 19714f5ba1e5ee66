"""The autograd graph of a tensor: its nodes, and whether ``torch.compile`` has made one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def nodes_of(tensor: Tensor) -> set[Any]:
    """The nodes of a tensor's graph."""
    nodes: set[Any] = set()
    waiting = {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting |= {following for following, _ in node.next_functions}
    return nodes


def is_compiled(nodes: set[Any]) -> bool:
    """Whether ``torch.compile`` has made one of the nodes, whose backward has no graph of its own."""
    return any(type(node).__name__.startswith("CompiledFunction") for node in nodes)

"""descend: optimizers for PyTorch, each written once as a plain function.

The function runs on tensors of any device, and compiled on CPUs and GPUs.

Example:
    >>> import torch, descend
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = descend.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()

``Optimizer``, ``lr_scheduler``, ``swa_utils``, and where torch has them
``swap_in_optimizer_params_and_state`` (2.13) and ``functional`` (2.15), are torch's own, so that
``import descend as optim`` can replace ``from torch import optim``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descend.public import *
else:  # type checkers would take any name for one of the library

    def __getattr__(name: str) -> Any:
        """Import the library when a public name is first asked for, so that ``descend --help`` needs no torch."""
        if name == "__all__" or not name.startswith("__"):
            if find_spec(f"{__name__}.{name}"):
                return import_module(f"{__name__}.{name}")
            public = import_module(f"{__name__}.public")
            globals().update({key: getattr(public, key) for key in ("__all__", *public.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """The public names."""
        return sorted(__getattr__("__all__"))


__version__ = "0.1.0"

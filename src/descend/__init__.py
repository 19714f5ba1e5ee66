"""descend: optimizers for PyTorch whose mathematics is written once and runs fast everywhere.

Example:
    >>> import torch, descend
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = descend.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
"""

from descend.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from descend.first_order import SGD, Adam, AdamW
from descend.from_rule import from_rule
from descend.in_backward import in_backward
from descend.kernels.library import RuleError
from descend.optimizer import FirstOrder, warmup
from descend.second_order.lbfgs import LBFGS
from descend.second_order.minimize import minimize
from descend.second_order.newton import Newton
from descend.second_order.result import Progress, Result, Status
from descend.sparse_adam import SparseAdam

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "FirstOrder",
    "Newton",
    "Progress",
    "Result",
    "RuleError",
    "SparseAdam",
    "Status",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "from_rule",
    "get_total_norm",
    "in_backward",
    "minimize",
    "warmup",
]

"""The public names; ``descend`` itself imports them when one is first asked for."""

from torch.optim import Optimizer, lr_scheduler, swa_utils

from descend.backends.backend import RuleError
from descend.checkpoint.matching import IncompatibleKeys
from descend.core.groups import combined, no_decay
from descend.core.layer_decay import layer_decay
from descend.diagnostics.monitoring.monitor import Monitor
from descend.first_order.adafactor import Adafactor
from descend.first_order.adam import Adam, AdamW
from descend.first_order.adam_variants import Adamax, NAdam, RAdam
from descend.first_order.adopt import ADOPT
from descend.first_order.from_rule import from_rule
from descend.first_order.in_backward import in_backward
from descend.first_order.lamb import LAMB
from descend.first_order.mars import MARS
from descend.first_order.momenta import Adan, AdEMAMix
from descend.first_order.muon import Muon, NorMuon
from descend.first_order.optimizer import FirstOrder, warmup
from descend.first_order.prodigy import Prodigy
from descend.first_order.rowwise_adagrad import RowwiseAdagrad
from descend.first_order.schedule_free import AdamWScheduleFree
from descend.first_order.sgd import ASGD, SGD
from descend.first_order.signs import Lion, Rprop
from descend.first_order.soap import SOAP
from descend.first_order.sparse_adam import SparseAdam
from descend.first_order.squares import Adadelta, Adagrad, RMSprop
from descend.fit.scipy_minimize import scipy_minimize
from descend.norms.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from descend.second_order.constraints import eq, ineq
from descend.second_order.lbfgs import LBFGS
from descend.second_order.least_squares import least_squares
from descend.second_order.least_squares_optimizer import LeastSquares
from descend.second_order.minimize import minimize
from descend.second_order.newton import Newton
from descend.second_order.solvers.batched_result import BatchedResult, BestResult
from descend.second_order.solvers.constrained_result import ConstrainedResult
from descend.second_order.solvers.least_squares_result import LeastSquaresResult
from descend.second_order.solvers.result import Progress, Result, Status

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LBFGS",
    "MARS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "BatchedResult",
    "BestResult",
    "ConstrainedResult",
    "FirstOrder",
    "IncompatibleKeys",
    "LeastSquares",
    "LeastSquaresResult",
    "Lion",
    "Monitor",
    "Muon",
    "NAdam",
    "Newton",
    "NorMuon",
    "Optimizer",
    "Prodigy",
    "Progress",
    "RAdam",
    "RMSprop",
    "Result",
    "RowwiseAdagrad",
    "Rprop",
    "RuleError",
    "SparseAdam",
    "Status",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "combined",
    "eq",
    "from_rule",
    "get_total_norm",
    "in_backward",
    "ineq",
    "layer_decay",
    "least_squares",
    "lr_scheduler",
    "minimize",
    "no_decay",
    "scipy_minimize",
    "swa_utils",
    "warmup",
]

try:
    from torch.optim import swap_in_optimizer_params_and_state
except ImportError:  # new in torch 2.13
    pass
else:
    __all__ += ["swap_in_optimizer_params_and_state"]

try:
    from torch.optim import functional  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # new in torch 2.15
    pass
else:
    __all__ += ["functional"]

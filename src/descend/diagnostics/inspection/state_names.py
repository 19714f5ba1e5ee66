"""What the state of optimizers is called."""

from __future__ import annotations

# State that has the parameter's shape.
FULL_SHAPED = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_avg_slow",
    "exp_avg_diff",
    "previous_grad",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "acc_delta",
    "grad_avg",
    "sum",
    "prev",
    "step_size",
    "ax",
    "z",
    "variance",
)
# State that no step makes negative; in 8 bits, its codes have no sign. Files do not say so themselves.
NOT_NEGATIVE = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "acc_delta",
    "sum",
    "step_size",
    "row_var",
    "col_var",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "variance",
)

"""The mathematics of first-order methods, in order of complexity.

A rule takes a parameter, its gradient, its state tensors, then numbers; it returns the new parameter and the new
state. It changes nothing and knows nothing of devices, dtypes, threads, clipping or ``maximize`` (the gradient
arrives already scaled). The same functions run eagerly on tensors and compiled on single elements.

Numbers are formed in float64 by the caller: in float32, 1 - 0.999 is already wrong by 1e-5.
Throughout, ``gain_i = 1 - beta_i`` and ``bias_i = 1 - beta_i**step``. Averages are ``(1 - gain) * a + gain * x``: with
``a + gain * (x - a)`` a square that once overflowed would turn into NaN at the next step (Inf - Inf).
"""

from __future__ import annotations

from descend.ops import maximum, sqrt


def sgd(param, grad, lr, weight_decay):
    """Gradient descent: Robbins & Monro 1951. Weight decay and L2 are the same thing here."""
    return param - lr * (grad + weight_decay * param)


def momentum(param, grad, momentum_buffer, lr, weight_decay, decay, gain):
    """Heavy ball: Polyak 1964; Sutskever et al. 2013. ``decay`` is the momentum, ``gain`` is 1 - dampening.

    On a parameter's first step the caller passes decay 0 and gain 1: the buffer starts as the gradient, undamped.
    """
    grad = grad + weight_decay * param
    momentum_buffer = decay * momentum_buffer + gain * grad
    return param - lr * momentum_buffer, momentum_buffer


def nesterov(param, grad, momentum_buffer, lr, weight_decay, decay, gain, momentum):
    """Nesterov momentum: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html."""
    grad = grad + weight_decay * param
    momentum_buffer = decay * momentum_buffer + gain * grad
    return param - lr * (grad + momentum * momentum_buffer), momentum_buffer


def adam(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, bias1, bias2):
    """Adam: Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980; weight decay is L2, in the gradient."""
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq


def adamw(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, bias1, bias2):
    """AdamW: Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101.

    As in PyTorch, weight_decay is multiplied by lr; it never meets the gradient.
    """
    param = (1 - lr * weight_decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq


def adam_amsgrad(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    lr,
    gain1,
    gain2,
    eps,
    weight_decay,
    bias1,
    bias2,
):
    """AMSGrad: Reddi, Kale & Kumar 2018, Algorithm 2, https://arxiv.org/abs/1904.09237; weight decay is L2."""
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    denom = sqrt(max_exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq, max_exp_avg_sq


def adamw_amsgrad(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    lr,
    gain1,
    gain2,
    eps,
    weight_decay,
    bias1,
    bias2,
):
    """AMSGrad with decoupled weight decay: the two papers above, combined as in PyTorch."""
    param = (1 - lr * weight_decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    denom = sqrt(max_exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq, max_exp_avg_sq


# What a row of an embedding misses while it gets no gradient.


def coast(param, grad, exp_avg, exp_avg_sq, shrink, pace1, eps1, pace2, eps2, fade1, fade2):
    """Many steps of Adam or AdamW without a gradient at once; the numbers are made in ``schedule.py``.

    ``grad`` is not used: a rule takes one, so that whatever runs rules runs this one too.
    """
    root = sqrt(exp_avg_sq)
    param = shrink * param - pace1 * exp_avg / (root + eps1) - pace2 * exp_avg / (root + eps2)
    return param, fade1 * exp_avg, fade2 * exp_avg_sq


def decay(param, grad, factor):
    """The same where both averages are zero; ``grad`` is not used."""
    return factor * param

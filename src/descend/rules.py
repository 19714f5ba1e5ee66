"""The mathematics of first-order methods, in order of complexity.

A rule takes a parameter, its gradient, its state tensors, then numbers; it returns the new parameter and the new
state. It modifies nothing, and it is independent of devices, dtypes, threads, clipping and ``maximize`` (the gradient
arrives already scaled). The same functions run eagerly on tensors and compiled on single elements.

The caller computes the numbers in float64: in float32, 1 - 0.999 is already wrong by 1e-5.
Throughout, ``gain_i = 1 - beta_i`` and ``bias_i = 1 - beta_i**step``. Averages are ``(1 - gain) * a + gain * x``: with
``a + gain * (x - a)`` a square that has overflowed would become NaN at the next step (Inf - Inf).
"""

from __future__ import annotations

from descend.ops import abs, maximum, minimum, of_rows, sign, sqrt, summing, where


def sgd(param, grad, lr, weight_decay):
    """Gradient descent: Robbins & Monro 1951. Here weight decay is the same as an L2 penalty."""
    return param - lr * (grad + weight_decay * param)


def momentum(param, grad, momentum_buffer, lr, weight_decay, decay, gain):
    """Heavy ball: Polyak 1964; Sutskever et al. 2013. ``decay`` is the momentum, ``gain`` is 1 - dampening.

    For a parameter's first step the caller passes decay 0 and gain 1, so the buffer starts as the undamped gradient.
    """
    grad = grad + weight_decay * param
    momentum_buffer = decay * momentum_buffer + gain * grad
    return param - lr * momentum_buffer, momentum_buffer


def nesterov(param, grad, momentum_buffer, lr, weight_decay, decay, gain, momentum):
    """Nesterov momentum: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html."""
    grad = grad + weight_decay * param
    momentum_buffer = decay * momentum_buffer + gain * grad
    return param - lr * (grad + momentum * momentum_buffer), momentum_buffer


def asgd(param, grad, ax, eta, lambd, weight_decay, mu):
    """Averaged gradient descent: Polyak & Juditsky 1992; Xu 2011, https://arxiv.org/abs/1107.2490.

    ``ax`` is the average. Until averaging begins, ``mu`` is 1 and ``ax`` equals ``param``.
    """
    grad = grad + weight_decay * param
    param = (1 - lambd * eta) * param - eta * grad
    return param, (1 - mu) * ax + mu * param


def lion(param, grad, exp_avg, lr, gain1, gain2, weight_decay):
    """Lion: Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675; weight decay is decoupled."""
    update = sign((1 - gain1) * exp_avg + gain1 * grad)
    exp_avg = (1 - gain2) * exp_avg + gain2 * grad
    return (1 - lr * weight_decay) * param - lr * update, exp_avg


def rprop(param, grad, prev, step_size, eta_minus, eta_plus, smallest, largest):
    """Rprop: Riedmiller & Braun 1993, in the form iRprop- of Igel & Hüsken 2000.

    A weight's step size grows while its gradient keeps its sign. When the sign changes, the step size shrinks and the
    weight stays where it is for one step.
    """
    agreement = grad * prev
    grown = where(agreement > 0, eta_plus * step_size, where(agreement < 0, eta_minus * step_size, step_size))
    step_size = minimum(maximum(grown, smallest), largest)
    grad = where(agreement < 0, 0.0, grad)
    return param - sign(grad) * step_size, grad, step_size


def adagrad(param, grad, sum, lr, weight_decay, eps):
    """Adagrad: Duchi, Hazan & Singer 2011, Figure 1 (diagonal), https://jmlr.org/papers/v12/duchi11a.html."""
    grad = grad + weight_decay * param
    sum = sum + grad * grad
    return param - lr * grad / (sqrt(sum) + eps), sum


def rmsprop(param, grad, square_avg, lr, gain, eps, weight_decay):
    """RMSprop: Hinton 2012, lecture 6, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf."""
    grad = grad + weight_decay * param
    square_avg = (1 - gain) * square_avg + gain * grad * grad
    return param - lr * grad / (sqrt(square_avg) + eps), square_avg


def rmsprop_momentum(param, grad, square_avg, momentum_buffer, lr, gain, eps, weight_decay, momentum):
    """RMSprop with momentum: the buffer sums the scaled gradients."""
    grad = grad + weight_decay * param
    square_avg = (1 - gain) * square_avg + gain * grad * grad
    momentum_buffer = momentum * momentum_buffer + grad / (sqrt(square_avg) + eps)
    return param - lr * momentum_buffer, square_avg, momentum_buffer


def rmsprop_centered(param, grad, square_avg, grad_avg, lr, gain, eps, weight_decay):
    """RMSprop divided by the standard deviation: Graves 2013, equations 38-41, https://arxiv.org/abs/1308.0850.

    The variance is clamped to zero: if all gradients are equal, rounding could make it negative.
    """
    grad = grad + weight_decay * param
    square_avg = (1 - gain) * square_avg + gain * grad * grad
    grad_avg = (1 - gain) * grad_avg + gain * grad
    variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
    return param - lr * grad / (sqrt(variance) + eps), square_avg, grad_avg


def rmsprop_centered_momentum(
    param, grad, square_avg, momentum_buffer, grad_avg, lr, gain, eps, weight_decay, momentum
):
    """Centered RMSprop with momentum: the buffer sums the scaled gradients."""
    grad = grad + weight_decay * param
    square_avg = (1 - gain) * square_avg + gain * grad * grad
    grad_avg = (1 - gain) * grad_avg + gain * grad
    variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
    momentum_buffer = momentum * momentum_buffer + grad / (sqrt(variance) + eps)
    return param - lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


def adadelta(param, grad, square_avg, acc_delta, lr, gain, eps, weight_decay):
    """Adadelta: Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701."""
    grad = grad + weight_decay * param
    square_avg = (1 - gain) * square_avg + gain * grad * grad
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
    acc_delta = (1 - gain) * acc_delta + gain * delta * delta
    return param - lr * delta, square_avg, acc_delta


def adamax(param, grad, exp_avg, exp_inf, lr, gain1, beta2, eps, weight_decay, bias1):
    """Adamax: Kingma & Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980; ``exp_inf`` is a decaying maximum."""
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_inf = maximum(beta2 * exp_inf, abs(grad) + eps)
    return param - lr / bias1 * exp_avg / exp_inf, exp_avg, exp_inf


def adam(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, bias1, bias2):
    """Adam: Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980; weight decay is L2."""
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq


def adamw(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, bias1, bias2):
    """AdamW: Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101.

    As in PyTorch, weight_decay is multiplied by lr. It does not enter the gradient.
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


def nadam(param, grad, exp_avg, exp_avg_sq, gain1, gain2, eps, weight_decay, bias2, grad_lr, avg_lr):
    """NAdam: Dozat 2016, Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ; weight decay is L2.

    Adam with a first average that looks one step ahead, as in Nesterov momentum.
    """
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - (grad_lr * grad + avg_lr * exp_avg) / denom, exp_avg, exp_avg_sq


def nadamw(param, grad, exp_avg, exp_avg_sq, gain1, gain2, eps, decay, bias2, grad_lr, avg_lr):
    """NAdam with decoupled weight decay: ``decay`` is weight_decay times lr."""
    param = (1 - decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - (grad_lr * grad + avg_lr * exp_avg) / denom, exp_avg, exp_avg_sq


def radam(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, bias1, rectification):
    """RAdam: Liu et al. 2020, Algorithm 2, https://arxiv.org/abs/1908.03265; weight decay is L2.

    ``rectification`` is the paper's r times sqrt(bias2). It is 0 while the variance of the adaptive learning rate is
    infinite; the step then uses momentum alone.
    """
    grad = grad + weight_decay * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    scale = where(rectification > 0, rectification / (sqrt(exp_avg_sq) + eps), 1.0)
    return param - lr / bias1 * exp_avg * scale, exp_avg, exp_avg_sq


def radamw(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, decay, bias1, rectification):
    """RAdam with decoupled weight decay: ``decay`` is weight_decay times lr."""
    param = (1 - decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    scale = where(rectification > 0, rectification / (sqrt(exp_avg_sq) + eps), 1.0)
    return param - lr / bias1 * exp_avg * scale, exp_avg, exp_avg_sq


def schedule_free_adamw(param, grad, z, exp_avg_sq, lr, gain2, eps, weight_decay, bias2, weight, param_lr):
    """Schedule-free AdamW: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682.

    ``param`` is the paper's y, which lies between z, the point that the steps move, and x, the average of all z so far,
    where the newest has weight ``weight``. x is not stored: it is substituted as (y - (1 - beta1) z) / beta1.
    """
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    update = grad / (sqrt(exp_avg_sq / bias2) + eps) + weight_decay * param
    param = (1 - weight) * param + weight * z - param_lr * update
    return param, z - lr * update, exp_avg_sq


def adopt(param, grad, exp_avg, exp_avg_sq, lr, gain1, gain2, eps, weight_decay, decay, clip):
    """ADOPT: Taniguchi et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.02853.

    The gradient is divided by the root of the average before this gradient joins it. For the first step, which only
    fills that average, the caller passes gain2 1, and 0 for ``decay`` and ``clip``. ``weight_decay`` is L2, ``decay``
    is decoupled.
    """
    grad = grad + weight_decay * param
    scaled = where(grad == 0, 0.0, grad / maximum(sqrt(exp_avg_sq), eps))  # 0 / 0 if eps is 0
    exp_avg = (1 - gain1) * exp_avg + gain1 * minimum(maximum(scaled, -clip), clip)
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    return (1 - decay) * param - lr * exp_avg, exp_avg, exp_avg_sq


def ademamix(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    exp_avg_slow,
    lr,
    gain1,
    gain2,
    gain3,
    alpha,
    eps,
    weight_decay,
    bias1,
    bias2,
):
    """AdEMAMix: Pagliardini, Ablin & Grangier 2024, Algorithm 1, https://arxiv.org/abs/2409.03137.

    AdamW whose numerator is a fast average plus ``alpha`` times a slow one, which has no bias correction.
    """
    param = (1 - lr * weight_decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    exp_avg_slow = (1 - gain3) * exp_avg_slow + gain3 * grad
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - (lr / bias1 * exp_avg + lr * alpha * exp_avg_slow) / denom, exp_avg, exp_avg_sq, exp_avg_slow


def adan(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    exp_avg_diff,
    previous_grad,
    gain1,
    gain2,
    gain3,
    eps,
    bias3,
    avg_lr,
    diff_lr,
    shrink,
    shrink_after,
    is_first,
):
    """Adan: Xie et al. 2022, Algorithm 1, https://arxiv.org/abs/2208.06677; here ``gain_i`` is the paper's beta_i.

    Adam with a second average, that of the differences between successive gradients. A parameter's first step, where
    ``is_first`` is 1, has no difference. ``shrink`` decays before the step, ``shrink_after`` after it, as in the paper.
    """
    half_diff = 0.5 * grad - 0.5 * where(is_first > 0, grad, previous_grad)  # the whole could overflow
    ahead = grad + 2 * (1 - gain2) * half_diff
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain3) * exp_avg_sq + gain3 * ahead * ahead
    exp_avg_diff = (1 - gain2) * exp_avg_diff + 2 * gain2 * half_diff
    update = (avg_lr * exp_avg + diff_lr * exp_avg_diff) / (sqrt(exp_avg_sq / bias3) + eps)
    return shrink_after * (shrink * param - update), exp_avg, exp_avg_sq, exp_avg_diff, grad


def mars_sums(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    previous_grad,
    lr,
    gain1,
    gain2,
    eps,
    weight_decay,
    bias1,
    bias2,
    correction,
):
    """What ``mars`` needs of a whole tensor: the square of the corrected gradient."""
    corrected = (1 + correction) * grad - correction * previous_grad
    return corrected * corrected


@summing(mars_sums)
def mars(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    previous_grad,
    lr,
    gain1,
    gain2,
    eps,
    weight_decay,
    bias1,
    bias2,
    correction,
    clip,
):
    """MARS-AdamW: Yuan et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.10438, with the previous step's gradient.

    AdamW of a gradient that is extrapolated: ``correction``, the paper's gamma * beta1 / (1 - beta1), times its change
    is added. ``clip`` is 1 over the norm of the result for the whole tensor, at most 1.
    """
    corrected = clip * (1 + correction) * grad - clip * correction * previous_grad
    param = (1 - lr * weight_decay) * param
    exp_avg = (1 - gain1) * exp_avg + gain1 * corrected
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * corrected * corrected
    denom = sqrt(exp_avg_sq / bias2) + eps
    return param - lr / bias1 * exp_avg / denom, exp_avg, exp_avg_sq, grad


def lamb_sums(param, grad, exp_avg, exp_avg_sq, gain1, gain2, eps, weight_decay, bias1, bias2):
    """What ``lamb`` needs of a whole tensor: the squares of the parameter and of the update."""
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    update = exp_avg / bias1 / (sqrt(exp_avg_sq / bias2) + eps) + weight_decay * param
    return param * param, update * update


@summing(lamb_sums)
def lamb(param, grad, exp_avg, exp_avg_sq, gain1, gain2, eps, weight_decay, bias1, bias2, rate):
    """LAMB: You et al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962.

    ``rate`` is lr times the trust ratio, the norm of the whole parameter over that of its update.
    """
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    update = exp_avg / bias1 / (sqrt(exp_avg_sq / bias2) + eps) + weight_decay * param
    return param - rate * update, exp_avg, exp_avg_sq


def prodigy_sums(
    param,
    grad,
    s,
    p0,
    exp_avg,
    exp_avg_sq,
    lr,
    d,
    gain1,
    gain2,
    beta3,
    pull,
    push,
    weight_decay,
    decay,
):
    """What ``prodigy`` needs of all tensors together: numerator and denominator of its estimate of the distance.

    Where ``lr`` is 0, it counts in neither.
    """
    grad = grad + weight_decay * param
    return pull * grad * (p0 - param), where(lr > 0, abs(beta3 * s + push * grad), 0 * s)


@summing(prodigy_sums)
def prodigy(
    param,
    grad,
    s,
    p0,
    exp_avg,
    exp_avg_sq,
    lr,
    d,
    gain1,
    gain2,
    beta3,
    pull,
    push,
    weight_decay,
    decay,
    eps,
):
    """Prodigy: Mishchenko & Defazio 2024, Algorithm 4, https://arxiv.org/abs/2306.06101, with weights that decay.

    Adam whose ``lr`` has the factor ``d``, an estimate of the distance from ``p0``, where training began, to the
    solution. ``eps`` has the new estimate as a factor. ``weight_decay`` is L2, ``decay`` is decoupled.
    """
    grad = grad + weight_decay * param
    s = beta3 * s + push * grad
    exp_avg = (1 - gain1) * exp_avg + gain1 * d * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * (d * grad) * (d * grad)
    return (1 - decay) * param - lr * exp_avg / (sqrt(exp_avg_sq) + eps), s, p0, exp_avg, exp_avg_sq


def first_average(param, grad, exp_avg, gain1):
    """Where Adam and its relatives move before they divide, for cautious updates, which need the sign alone."""
    return (1 - gain1) * exp_avg + gain1 * grad


# Rules of rows: what is averaged over each row of a table, then what is done with the mean.


def rowwise_adagrad_square(param, grad, sum, lr, weight_decay, eps):
    """The square of the gradient of the loss and its L2 penalty."""
    grad = grad + weight_decay * param
    return grad * grad


@of_rows(rowwise_adagrad_square)
def rowwise_adagrad(param, grad, sum, lr, weight_decay, eps, mean_square):
    """Adagrad with one sum for each row, as in FBGEMM, https://github.com/pytorch/FBGEMM; weight decay is L2."""
    grad = grad + weight_decay * param
    sum = sum + mean_square
    return param - lr / (sqrt(sum) + eps) * grad, sum


def rowwise_adagradw_square(param, grad, sum, lr, weight_decay, eps):
    """The square of the gradient."""
    return grad * grad


@of_rows(rowwise_adagradw_square)
def rowwise_adagradw(param, grad, sum, lr, weight_decay, eps, mean_square):
    """Row-wise Adagrad with decoupled weight decay, which is multiplied by lr."""
    sum = sum + mean_square
    return (1 - lr * weight_decay) * param - lr / (sqrt(sum) + eps) * grad, sum


# The steps that a row of an embedding misses while it gets no gradient.


def coast(param, grad, exp_avg, exp_avg_sq, shrink, pace1, eps1, pace2, eps2, fade1, fade2):
    """Many steps of Adam or AdamW with a gradient of zero, in one; the caller forms the scalars.

    ``grad`` is unused. It is there so that this function has the signature of a rule.
    """
    root = sqrt(exp_avg_sq)
    param = shrink * param - pace1 * exp_avg / (root + eps1) - pace2 * exp_avg / (root + eps2)
    return param, fade1 * exp_avg, fade2 * exp_avg_sq


def decay(param, grad, factor):
    """``coast`` for a row whose averages are both zero; ``grad`` is unused."""
    return factor * param

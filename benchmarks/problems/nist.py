"""The 27 nonlinear regressions of NIST's Statistical Reference Datasets, from both starts.

``nist.json`` has the data, the starts, and parameters, their standard deviations and the residual sum of squares as
certified to 10 or 11 digits.

Source: National Institute of Standards and Technology, StRD, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from problems.fit import Certified, Fit, moved, slots_sorted
from problems.problem import Function, data

Model = Callable[[Tensor, Tensor], Tensor]
"""Maps parameters and predictors to responses."""


def misra1a(b: Tensor, x: Tensor) -> Tensor:  # and BoxBOD
    return b[0] * (1 - torch.exp(-b[1] * x))


def misra1b(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def misra1c(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5)


def misra1d(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * b[1] * x / (1 + b[1] * x)


def chwirut(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


def lanczos(b: Tensor, x: Tensor) -> Tensor:
    return sum((b[i] * torch.exp(-b[i + 1] * x) for i in (0, 2, 4)), torch.zeros_like(x))


def peak(height: Tensor, centre: Tensor, width: Tensor, x: Tensor) -> Tensor:
    return height * torch.exp(-(((x - centre) / width) ** 2))


def gauss(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * torch.exp(-b[1] * x) + peak(b[2], b[3], b[4], x) + peak(b[5], b[6], b[7], x)


def danwood(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * x ** b[1]


def kirby2(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)


def cubic_ratio(b: Tensor, x: Tensor) -> Tensor:  # Hahn1 and Thurber
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def nelson(b: Tensor, x: Tensor) -> Tensor:
    return b[0] - b[1] * x[0] * torch.exp(-b[2] * x[1])


def mgh17(b: Tensor, x: Tensor) -> Tensor:
    return b[0] + b[1] * torch.exp(-x * b[3]) + b[2] * torch.exp(-x * b[4])


def roszman1(b: Tensor, x: Tensor) -> Tensor:
    return b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / pi


def wave(cosine: Tensor, sine: Tensor, period: Tensor | float, x: Tensor) -> Tensor:
    angle = 2 * pi * x / period
    return cosine * torch.cos(angle) + sine * torch.sin(angle)


def enso(b: Tensor, x: Tensor) -> Tensor:
    return b[0] + wave(b[1], b[2], 12.0, x) + wave(b[4], b[5], b[3], x) + wave(b[7], b[8], b[6], x)


def mgh09(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def mgh10(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * torch.exp(b[1] / (x + b[2]))


def rat42(b: Tensor, x: Tensor) -> Tensor:
    return b[0] / (1 + torch.exp(b[1] - b[2] * x))


def rat43(b: Tensor, x: Tensor) -> Tensor:
    return b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3])


def eckerle4(b: Tensor, x: Tensor) -> Tensor:
    return b[0] / b[1] * torch.exp(-(((x - b[2]) / b[1]) ** 2) / 2)


def bennett5(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (b[1] + x) ** (-1 / b[2])


MODELS: dict[str, Model] = {
    "Misra1a": misra1a, "Misra1b": misra1b, "Misra1c": misra1c, "Misra1d": misra1d, "Chwirut1": chwirut,
    "Chwirut2": chwirut, "Lanczos1": lanczos, "Lanczos2": lanczos, "Lanczos3": lanczos, "Gauss1": gauss,
    "Gauss2": gauss, "Gauss3": gauss, "DanWood": danwood, "Kirby2": kirby2, "Hahn1": cubic_ratio, "Nelson": nelson,
    "MGH17": mgh17, "Roszman1": roszman1, "ENSO": enso, "MGH09": mgh09, "Thurber": cubic_ratio, "BoxBOD": misra1a,
    "Rat42": rat42, "MGH10": mgh10, "Eckerle4": eckerle4, "Rat43": rat43, "Bennett5": bennett5,
}  # fmt: skip


# The equivalent parameters that are compared.


def peaks_in_order(b: Tensor) -> Tensor:
    """Widths positive, and peaks from left to right."""
    widths = torch.isin(torch.arange(8), torch.tensor([4, 7]))
    return slots_sorted(torch.where(widths, b.abs(), b), ((3, 2, 4), (6, 5, 7)))


def waves_in_order(b: Tensor) -> Tensor:
    """Periods positive, the longer one first: a negative period changes the sign of the sine."""
    b = b.clone()
    for period, sine in ((3, 5), (6, 8)):
        b[sine] *= b[period].sign()
        b[period] = b[period].abs()
    return slots_sorted(b, ((3, 4, 5), (6, 7, 8)))


def width_positive(b: Tensor) -> Tensor:
    return torch.cat((b[:2] * b[1].sign(), b[2:]))


CANONICAL: dict[Model, Function] = {
    lanczos: partial(slots_sorted, slots=((1, 0), (3, 2), (5, 4))),
    gauss: peaks_in_order,
    mgh17: partial(slots_sorted, slots=((3, 1), (4, 2))),
    enso: waves_in_order,
    eckerle4: width_positive,
}


@cache
def tables() -> dict[str, dict[str, Any]]:
    """What the file holds: name of the data set -> its columns and certified values."""
    read: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("nist.json").read_text(encoding="utf-8"))
    return read


def residuals_of(model: Model, x: Tensor, y: Tensor) -> Function:
    return lambda b: model(b, x.to(b)) - y.to(b)


def fits() -> list[Fit]:
    """54 problems: each data set from both starts; names end in the start's number."""
    made = []
    for name, model in MODELS.items():
        table = tables()[name]
        x, y = (torch.tensor(table[key], dtype=torch.float64) for key in "xy")
        residuals = residuals_of(model, x, y.log() if model is nelson else y)
        certified = Certified(
            data(*table["certified"]),
            data(*table["deviations"]),
            table["sum_of_squares"],
            CANONICAL.get(model, torch.clone),
        )
        made += [
            Fit(f"{name}-{number}", residuals, data(*start), certified=certified)
            for number, start in enumerate(table["starts"], 1)
        ]
    return made


def moved_fits() -> list[Fit]:
    """The data sets from other starts than NIST's, near the second one: to validate what was tuned on those."""
    return [moved(fit, seed, 0.1) for seed, fit in enumerate(fits()) if fit.name.endswith("-2")]

"""Every least-squares problem: where `least_squares` is developed and measured."""

from __future__ import annotations

from problems import bundle, curve_fits, far_fits, more_fits, nist
from problems.fit import Fit

__all__ = ["Fit", "bounded", "certified", "far", "unconstrained", "validation"]


def certified() -> list[Fit]:
    """NIST's, from both starts."""
    return nist.fits()


def unconstrained() -> list[Fit]:
    """Those without bounds whose solution nobody has certified."""
    return [*more_fits.fits(), *bundle.fits()]


def bounded() -> list[Fit]:
    """Those with bounds."""
    return [*more_fits.boxed_fits(), *curve_fits.fits()]


def validation() -> list[Fit]:
    """Other starts, not to be tuned on."""
    return [*nist.moved_fits(), *more_fits.moved_fits()]


def far() -> list[Fit]:
    """Moré, Garbow & Hillstrom's and other families from far starts, not to be tuned on."""
    return [*far_fits.far_more(), *far_fits.far_fits()]

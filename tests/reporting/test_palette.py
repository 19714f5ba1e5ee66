"""The colours can be told apart and read, by the colour-blind too, on light and on dark ground."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from descend.reporting.palette import DARK, LIGHT, Theme, style

# Machado, Oliveira & Fernandes 2009, severity 1, for linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return the ratio of WCAG 2.2."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    return TO_OKLAB @ np.cbrt(TO_CONES @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_series_differ(theme: Theme, vision: str) -> None:
    seen = [oklab(VISION[vision] @ linear(colour)) for colour in theme.series]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrasts(theme: Theme) -> None:
    assert all(contrast(colour, theme.surface) > 3 for colour in theme.series)
    for ground in (theme.surface, theme.raised):
        for text in (theme.ink, theme.muted, theme.accent, theme.good, theme.bad):
            assert contrast(text, ground) > 4.5


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_styles_repeat_late() -> None:
    assert len({style(index) for index in range(224)}) == 224
    first = [style(index) for index in range(8)]
    assert len({look.colour for look in first}) == 8
    assert {look.dash for look in first} == {"solid"}

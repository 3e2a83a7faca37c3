"""pointcanon: make the 3D point-cloud network you already have work at every orientation.

>>> import pointcanon as pc
>>> model = pc.Canonicalized(predictor, pc.canonicalizers.Optimized())  # doctest: +SKIP
>>> labels = model.predict(points).labels  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pointcanon import (
    canonicalizers,
    coordinates,
    energies,
    losses,
    neighbors,
    predictors,
    priors,
    rotations,
    testing,
)
from pointcanon.errors import (
    CheckpointError,
    DataError,
    InputError,
    PointcanonError,
    UsageError,
)
from pointcanon.frames import Frames
from pointcanon.model import Canonicalized, Prediction, load

if TYPE_CHECKING:
    from pointcanon import datasets as datasets
    from pointcanon import eval as eval
    from pointcanon import train as train

__all__ = [
    "Canonicalized",
    "CheckpointError",
    "DataError",
    "Frames",
    "InputError",
    "PointcanonError",
    "Prediction",
    "UsageError",
    "canonicalizers",
    "coordinates",
    "energies",
    "load",
    "losses",
    "neighbors",
    "predictors",
    "priors",
    "rotations",
    "testing",
]

_UPPER_FLOORS = ("datasets", "train", "eval")
"""Subpackages that are imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name in _UPPER_FLOORS:
        return import_module(f"pointcanon.{name}")
    raise AttributeError(f"module 'pointcanon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_UPPER_FLOORS})

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
    interop,
    losses,
    neighbors,
    outliers,
    predictors,
    priors,
    readers,
    rotations,
    testing,
)
from pointcanon.errors import (
    CheckpointError,
    DataError,
    ExportError,
    InputError,
    PointcanonError,
    UsageError,
)
from pointcanon.export import export
from pointcanon.frames import Frames
from pointcanon.model import Canonicalized, Prediction, load

if TYPE_CHECKING:
    from pointcanon import datasets as datasets
    from pointcanon import eval as eval
    from pointcanon import train as train
    from pointcanon.eval.audit import audit as audit
    from pointcanon.train.adapt import adapt as adapt

__all__ = [
    "Canonicalized",
    "CheckpointError",
    "DataError",
    "ExportError",
    "Frames",
    "InputError",
    "PointcanonError",
    "Prediction",
    "UsageError",
    "canonicalizers",
    "coordinates",
    "energies",
    "export",
    "interop",
    "load",
    "losses",
    "neighbors",
    "outliers",
    "predictors",
    "priors",
    "readers",
    "rotations",
    "testing",
]

_UPPER_FLOORS = ("datasets", "train", "eval")
"""Subpackages that are imported when they are first used."""

_FROM_UPPER_FLOORS = {"adapt": "pointcanon.train.adapt", "audit": "pointcanon.eval.audit"}
"""Functions that are imported when they are first used, and where they live."""


def __getattr__(name: str) -> Any:
    if name in _UPPER_FLOORS:
        return import_module(f"pointcanon.{name}")
    if name in _FROM_UPPER_FLOORS:
        return getattr(import_module(_FROM_UPPER_FLOORS[name]), name)
    raise AttributeError(f"module 'pointcanon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_UPPER_FLOORS, *_FROM_UPPER_FLOORS})

"""pointcanon: make the 3D point-cloud network you already have work at every orientation.

>>> import pointcanon as pc
>>> model = pc.Canonicalized(predictor, pc.canonicalizers.Optimized())  # doctest: +SKIP
>>> labels = model.predict(points).labels  # doctest: +SKIP
"""

from __future__ import annotations

from pointcanon import (
    canonicalizers,
    coordinates,
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
    "load",
    "losses",
    "neighbors",
    "predictors",
    "priors",
    "rotations",
    "testing",
]

"""Weights that others published: the layout is recognised, and only tensors are read.

A :class:`~pointcanon.predictors.public.layout.Layout` says how a public state dictionary maps onto
one of the networks here, and what that repository trained on. There is a file a repository; a
further layout is a value in one of them and a line in :data:`LAYOUTS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pointcanon.errors import CheckpointError
from pointcanon.predictors.base import PartPredictor, Predictor
from pointcanon.predictors.public import antao97 as antao97
from pointcanon.predictors.public import fxia22 as fxia22
from pointcanon.predictors.public import learning3d as learning3d
from pointcanon.predictors.public import yanx27 as yanx27
from pointcanon.predictors.public.layout import Layout, read_weights

__all__ = ["LAYOUTS", "load_public"]

LAYOUTS: tuple[Layout, ...] = (
    learning3d.POINTNET,
    yanx27.POINTNET,
    yanx27.POINTNET_PARTS,
    yanx27.POINTNET2_SSG,
    yanx27.POINTNET2_MSG,
    yanx27.POINTNET2_PARTS_SSG,
    yanx27.POINTNET2_PARTS_MSG,
    fxia22.POINTNET,
    fxia22.POINTNET_PARTS,
    antao97.DGCNN_CLASSIFIER,
    antao97.DGCNN_PARTS,
)
"""Tried in this order."""


def load_public(path: str | Path, **untold: Any) -> Predictor | PartPredictor:
    """The network of a public checkpoint, in eval mode.

    Args:
        path: Of a PyTorch or safetensors file.
        **untold: Hyper-parameters that weights do not tell, such as ``k`` of DGCNN, where they
            differ from the repository's defaults.

    Raises:
        CheckpointError: If the file cannot be read safely, fits no known layout, or contradicts
            ``untold``.
    """
    file = read_weights(path)
    reasons = []
    for layout in LAYOUTS:
        try:
            return layout.load(file, **untold)
        except CheckpointError as error:
            reasons.append(f"{layout.name}: {error}")
    raise CheckpointError(
        f"{path} fits none of the known layouts; convert it to one of them, or build its network "
        "with its own code and hand it to predictors.wrap. Tried: " + " | ".join(reasons)
    )

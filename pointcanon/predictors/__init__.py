"""Networks from clouds to logits, one a file: ``create`` by name, ``load`` with weights.

A new one is a file with a :class:`Predictor` and a line in :data:`PREDICTORS`; weights that others
published for it are a layout in :mod:`pointcanon.predictors.public`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pointcanon import checkpoint
from pointcanon.errors import CheckpointError, UsageError
from pointcanon.predictors.base import Predictor
from pointcanon.predictors.dgcnn import DGCNN
from pointcanon.predictors.pointnet import PointNet
from pointcanon.predictors.public import load_public

__all__ = ["DGCNN", "PREDICTORS", "PointNet", "Predictor", "create", "load"]

PREDICTORS: dict[str, type[Predictor]] = {
    "pointnet": PointNet,
    "dgcnn": DGCNN,
}
"""By the names that recipes use."""

checkpoint.register(*PREDICTORS.values())


def create(name: str, **hyperparameters: Any) -> Predictor:
    """A freshly initialised network: ``create("pointnet", num_classes=40)``.

    Raises:
        UsageError: If there is no such network, or it does not take these hyper-parameters.
    """
    if name not in PREDICTORS:
        raise UsageError(f"unknown predictor {name!r}; choose one of: {', '.join(PREDICTORS)}")
    try:
        return PREDICTORS[name](**hyperparameters)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UsageError(f"predictor {name!r}: {error}") from error


def load(path: str | Path) -> nn.Module:
    """A trained network, in eval mode: one saved by pointcanon, or a public checkpoint.

    Only tensors are read and no code in the file is run. The network carries what is known of its
    training: ``coordinate_frame``, ``classes`` and ``normalisation``.

    Raises:
        CheckpointError: If the file is missing, damaged, needs code to be read, holds a
            canonicalized model, or fits no known layout (the layouts tried are listed).
    """
    card = checkpoint.read_card(path) if checkpoint.is_safetensors(path) else None
    if card is None:
        return load_public(path)
    if card.kind != "predictor":
        raise CheckpointError(f"{path} holds a {card.kind} model; load it with pointcanon.load")
    network, card = checkpoint.load(path)
    for name in ("coordinate_frame", "classes", "normalisation"):
        setattr(network, name, getattr(card, name))
    return network

"""Networks from clouds to logits, one a file: ``create`` by name, ``load`` with weights.

A new one is a file with a :class:`Predictor` or a :class:`PartPredictor` and a line in
:data:`PREDICTORS`; weights that others published for it are a layout in
:mod:`pointcanon.predictors.public`. A network made elsewhere goes through :func:`wrap`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pointcanon import checkpoint
from pointcanon.errors import CheckpointError, UsageError
from pointcanon.predictors.base import TRAINED_ON, PartPredictor, Predictor
from pointcanon.predictors.dgcnn import DGCNN, DGCNNParts
from pointcanon.predictors.pointnet import PointNet, PointNetParts
from pointcanon.predictors.pointnet2 import PointNet2, PointNet2Parts
from pointcanon.predictors.public import load_public
from pointcanon.predictors.wrap import WrappedParts, WrappedPredictor, wrap

__all__ = [
    "DGCNN",
    "PREDICTORS",
    "DGCNNParts",
    "PartPredictor",
    "PointNet",
    "PointNet2",
    "PointNet2Parts",
    "PointNetParts",
    "Predictor",
    "create",
    "load",
    "wrap",
]

PREDICTORS: dict[str, type[Predictor] | type[PartPredictor]] = {
    "pointnet": PointNet,
    "pointnet-parts": PointNetParts,
    "pointnet2": PointNet2,
    "pointnet2-parts": PointNet2Parts,
    "dgcnn": DGCNN,
    "dgcnn-parts": DGCNNParts,
}
"""By the names that recipes use."""

checkpoint.register(*PREDICTORS.values(), WrappedPredictor, WrappedParts)


def create(name: str, **hyperparameters: Any) -> Predictor | PartPredictor:
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


def load(path: str | Path, **untold: Any) -> nn.Module:
    """A trained network, in eval mode: one saved by pointcanon, or a public checkpoint.

    Only tensors are read and no code in the file is run. Hyper-parameters follow from the shapes of
    the weights, every one of which must fit. The network carries what is known of its training:
    ``coordinate_frame``, ``classes``, ``parts`` and ``normalisation``.

    Args:
        path: The file.
        **untold: Hyper-parameters that public weights do not tell, where they differ from the
            repository's defaults: ``load("model.cls.2048.t7", k=40)``.

    Raises:
        CheckpointError: If the file is missing, damaged, needs code to be read, holds a
            canonicalized model, or fits no known layout (the layouts tried are listed).
        UsageError: If hyper-parameters are given for a file that tells them.
    """
    card = checkpoint.read_card(path) if checkpoint.is_safetensors(path) else None
    if card is None:
        return load_public(path, **untold)
    if card.kind != "predictor":
        what = "canonicalized model" if card.kind == "canonicalized" else card.kind
        raise CheckpointError(f"{path} holds a {what}; load it with {checkpoint.KINDS[card.kind]}")
    if untold:
        raise UsageError(f"{path} says its own hyper-parameters; leave out {', '.join(untold)}")
    network, card = checkpoint.load(path)
    for name in TRAINED_ON:
        setattr(network, name, getattr(card, name))
    return network

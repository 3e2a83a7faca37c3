"""Weights that others published: the layout is recognised, and only tensors are read.

A :class:`Layout` says how a public state dictionary maps onto one of the networks here. A further
one is a value of that class and a line in :data:`LAYOUTS`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from pointcanon import checkpoint
from pointcanon.errors import CheckpointError
from pointcanon.predictors.base import Predictor
from pointcanon.predictors.pointnet import PointNet

__all__ = ["LAYOUTS", "MODELNET40", "Layout", "load_public", "read_weights"]

_MODELNET40 = (
    "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain desk door dresser "
    "flower_pot glass_box guitar keyboard lamp laptop mantel monitor night_stand person piano "
    "plant radio range_hood sink sofa stairs stool table tent toilet tv_stand vase wardrobe "
    "xbox"
)
MODELNET40 = tuple(_MODELNET40.split())
"""Classes of ModelNet40 in the order of every public checkpoint."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts nest the weights."""

LIGHTNING_KEY = b"pytorch-lightning_version"
"""In every training state that Lightning writes."""


@dataclass(frozen=True)
class Layout:
    """One published arrangement of weights.

    Attributes:
        name: The network and where it comes from, for messages.
        modules: Names of our modules, and of the same modules there.
        build: A fresh network of the sizes found in a public state dictionary, in which kernels
            of size one are already matrices. It may raise KeyError and IndexError.
        coordinate_frame: Of the clouds those networks were trained on.
        normalisation: Of those clouds.
    """

    name: str
    modules: Mapping[str, str]
    build: Callable[[Mapping[str, Tensor]], Predictor]
    coordinate_frame: str
    normalisation: str

    def load(self, state: Mapping[str, Tensor]) -> Predictor:
        """A network with these weights, in eval mode.

        Raises:
            CheckpointError: Naming the first keys that do not fit.
        """
        state = {key: _as_matrix(value) for key, value in state.items()}
        try:
            network = self.build(state)
        except KeyError as error:
            found = ", ".join(sorted(state)[:3])
            raise CheckpointError(f"missing {error.args[0]} among {found}, ...") from error
        except IndexError as error:
            raise CheckpointError("a weight has too few dimensions") from error
        ours = network.state_dict()
        theirs = {self._public_name(name): name for name in ours}
        checkpoint.check_fit({key: ours[name] for key, name in theirs.items()}, state, self.name)
        network.load_state_dict({name: state[key] for key, name in theirs.items()})
        network.coordinate_frame, network.normalisation = self.coordinate_frame, self.normalisation
        if network.num_classes == len(MODELNET40):
            network.classes = MODELNET40
        return network.eval()

    def _public_name(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{self.modules[module]}.{leaf}"


def _as_matrix(value: Tensor) -> Tensor:
    """The matrix ``(D, C)`` in a convolution kernel ``(D, C, 1)`` or ``(D, C, 1, 1)``."""
    pointwise = value.ndim > 2 and value.shape[2:].numel() == 1
    return value.flatten(1) if pointwise else value


def _learning3d_pointnet(state: Mapping[str, Tensor]) -> Predictor:
    *widths, embedding = (state[f"feature_model.conv{i}.weight"].shape[0] for i in range(1, 6))
    # dropout as published; it plays no part in the weights
    num_classes = state["linear3.weight"].shape[0]
    return PointNet(num_classes, widths=widths, embedding=embedding, dropout=0.7)


LEARNING3D_POINTNET = Layout(
    name="PointNet of vinits5/learning3d",
    modules={
        **{f"shared.{i}.linear": f"feature_model.conv{i + 1}" for i in range(4)},
        **{f"shared.{i}.norm": f"feature_model.bn{i + 1}" for i in range(4)},
        "pool.linear": "feature_model.conv5",
        "pool.norm": "feature_model.bn5",
        "head.0.linear": "linear1",
        "head.0.norm": "bn1",
        "head.2.linear": "linear2",
        "head.2.norm": "bn2",
        "head.4": "linear3",
    },
    build=_learning3d_pointnet,
    coordinate_frame="y-up-mirrored",
    normalisation="unit-ball",
)

LAYOUTS = (LEARNING3D_POINTNET,)
"""Tried in this order."""


def load_public(path: str | Path) -> Predictor:
    """The network of a public checkpoint, in eval mode.

    Raises:
        CheckpointError: If the file cannot be read safely, or fits no known layout.
    """
    state = read_weights(path)
    reasons = []
    for layout in LAYOUTS:
        try:
            return layout.load(state)
        except CheckpointError as error:
            reasons.append(f"{layout.name}: {error}")
    raise CheckpointError(
        f"{path} fits none of the known layouts; convert it to one of them. "
        "Tried: " + " | ".join(reasons)
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors by name of a PyTorch or safetensors file, without wrappers; runs no code.

    Raises:
        CheckpointError: If the file is missing, damaged, needs code to be read, or holds no
            state dictionary.
    """
    content = checkpoint.load_state(path) if checkpoint.is_safetensors(path) else _unpickle(path)
    while isinstance(content, Mapping) and not _is_state(content):
        nested = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    if not isinstance(content, Mapping) or not _is_state(content):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else content
        raise CheckpointError(
            f"{path} holds no state dictionary (found {type(content).__name__}: {found}); "
            "save the weights with torch.save(network.state_dict(), path)"
        )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _is_state(content: Mapping[object, object]) -> bool:
    return bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _is_training_state(path: str | Path) -> bool:
    """Whether Lightning wrote the file to go on from, found without unpickling anything."""
    try:
        with ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(LIGHTNING_KEY in archive.read(name) for name in pickles)
    except (OSError, BadZipFile):
        return False


def _unpickle(path: str | Path) -> object:
    if _is_training_state(path):
        raise CheckpointError(
            f"{path} is a training state, to go on from; use best.safetensors beside it"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error)
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reason:
            raise CheckpointError(
                f"{path} holds Python objects beside tensors, and reading those could run code; "
                "where it was made, save the weights alone: "
                "torch.save(network.state_dict(), path)"
            ) from error
        summary = reason.splitlines()[0] if reason else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as weights: it is damaged, incomplete or no PyTorch file "
            f"({summary[:120]}); copy or download it again"
        ) from error

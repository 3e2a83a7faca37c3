"""How a public state dictionary maps onto a network here, and how its tensors are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from pointcanon import checkpoint
from pointcanon.errors import CheckpointError
from pointcanon.predictors.base import TRAINED_ON, PartPredictor, Predictor

__all__ = ["Layout", "Origin", "Weights", "numbered", "read_weights", "width"]

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts nest the weights."""

LIGHTNING_KEY = b"pytorch-lightning_version"
"""In every training state that Lightning writes."""

COUNTER = "num_batches_tracked"
"""Of every normalisation; files from before torch 0.4.1 lack it, and nothing depends on it."""


class Weights(NamedTuple):
    """The tensors of a file by name, and the key they were nested under, if any."""

    tensors: Mapping[str, Tensor]
    wrapper: str | None


@dataclass(frozen=True)
class Origin:
    """What a network was trained on: the fields are those of a network."""

    coordinate_frame: str
    normalisation: str
    classes: tuple[str, ...] | None
    parts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """One published arrangement of weights.

    Attributes:
        name: The network and where it comes from, for messages.
        modules: Names of our modules, and of the same modules there. What a network lacks is left
            aside.
        build: A fresh network of the sizes found in a public state dictionary, in which kernels
            of size one are already matrices. It may raise KeyError and IndexError.
        origins: What the repository trained on, by the number of logits: a network of another
            number was trained on data that the repository does not tell of.
        wrapper: The key that its files nest weights under, where that tells them from another
            layout of the same names.
        twins: Modules there that are one and the same, so that their weights appear twice: names of
            those to leave aside, and of their twins.
        convert: From the public name of a weight and its value to ours, of the same shape.
    """

    name: str
    modules: Mapping[str, str]
    build: Callable[[Mapping[str, Tensor]], Predictor | PartPredictor]
    origins: Mapping[int, Origin]
    wrapper: str | None = None
    twins: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[str, Tensor], Tensor] = lambda name, value: value

    def load(self, file: Weights, **untold: Any) -> Predictor | PartPredictor:
        """A network with these weights, in eval mode.

        Raises:
            CheckpointError: Naming the first keys that do not fit.
        """
        if self.wrapper not in (None, file.wrapper):
            raise CheckpointError(f"its files nest the weights under {self.wrapper!r}")
        state = self._without_twins({key: _as_matrix(value) for key, value in file.tensors.items()})
        try:
            with checkpoint.Allowance(state.values()):
                network = self.build(state)
                if untold:
                    network = type(network)(**{**network.hyperparameters, **untold})
        except KeyError as error:
            found = ", ".join(sorted(file.tensors)[:3])
            raise CheckpointError(f"missing {error.args[0]} among {found}, ...") from error
        except IndexError as error:
            raise CheckpointError("a weight has too few dimensions") from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(str(error)) from error
        ours = network.state_dict()
        theirs = {self._public_name(name): name for name in ours}
        for key, name in theirs.items():
            if key.endswith(COUNTER) and key.removesuffix(COUNTER) + "running_mean" in state:
                state.setdefault(key, torch.zeros_like(ours[name]))
        checkpoint.check_fit({key: ours[name] for key, name in theirs.items()}, state, self.name)
        network.load_state_dict(
            {name: self.convert(key, state[key]) for key, name in theirs.items()}
        )
        self._describe(network)
        return network.eval()

    def _public_name(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{self.modules[module]}.{leaf}"

    def _without_twins(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = dict(state)
        for copy, twin in self.twins.items():
            for key in [key for key in kept if key.rpartition(".")[0] == copy]:
                other = f"{twin}.{key.rpartition('.')[2]}"
                value = kept.pop(key)
                if other in kept and not torch.equal(kept[other], value):
                    raise CheckpointError(f"{key} and {other} should be the same, but differ")
                kept.setdefault(other, value)
        return kept

    def _describe(self, network: Predictor | PartPredictor) -> None:
        outputs = network.num_parts if isinstance(network, PartPredictor) else network.num_classes
        origin = self.origins.get(outputs)
        if origin is not None:
            for name in TRAINED_ON:
                setattr(network, name, getattr(origin, name))


def numbered(ours: str, theirs: str, count: int, shift: int = 1) -> dict[str, str]:
    """``{"a.0": "b1", "a.1": "b2"}`` for ``numbered("a.{}", "b{}", 2)``."""
    return {ours.format(i): theirs.format(i + shift) for i in range(count)}


def width(state: Mapping[str, Tensor], module: str, dimension: int = 0) -> int:
    """Of the weight of a module: its outputs, or (``dimension`` 1) its inputs."""
    return state[f"{module}.weight"].shape[dimension]


def _as_matrix(value: Tensor) -> Tensor:
    """The matrix ``(D, C)`` in a convolution kernel ``(D, C, 1)`` or ``(D, C, 1, 1)``."""
    pointwise = value.ndim > 2 and value.shape[2:].numel() == 1
    return value.flatten(1) if pointwise else value


# files --------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> Weights:
    """The tensors by name of a PyTorch or safetensors file, without wrappers; runs no code.

    Raises:
        CheckpointError: If the file is missing, damaged, needs code to be read, or holds no
            state dictionary.
    """
    content = checkpoint.load_state(path) if checkpoint.is_safetensors(path) else _unpickle(path)
    wrapper = None
    while isinstance(content, Mapping) and not _is_state(content):
        nested = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        wrapper, content = wrapper or nested, content[nested]
    if not isinstance(content, Mapping) or not _is_state(content):
        keys = list(content)[:6] if isinstance(content, Mapping) else []
        found = ", ".join(key[:40] for key in keys if isinstance(key, str))
        raise CheckpointError(
            f"{path} holds no state dictionary (found {type(content).__name__}: {found}); "
            "save the weights with torch.save(network.state_dict(), path)"
        )
    partial = [key for key, value in content.items() if not checkpoint.is_whole(value)]
    if partial:
        raise CheckpointError(f"{path}: {partial[0]} is no plain tensor; save dense weights")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return Weights({key.removeprefix(prefix): value for key, value in content.items()}, wrapper)


def _is_state(content: Mapping[object, object]) -> bool:
    return bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _is_training_state(path: str | Path) -> bool:
    """Whether Lightning wrote the file to go on from, found without unpickling anything."""
    pickles = [name for name in checkpoint.check_archive(path) if name.endswith("/data.pkl")]
    try:
        with ZipFile(path) as archive:
            return any(LIGHTNING_KEY in archive.read(name) for name in pickles)
    except Exception:  # no archive, or a damaged one: torch says so
        return False


def _unpickle(path: str | Path) -> object:
    if _is_training_state(path):
        raise CheckpointError(
            f"{path} is a training state, to go on from; use best.safetensors beside it"
        )
    try:
        with _numbers_allowed():
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


def _numbers_allowed() -> AbstractContextManager[object]:
    """Lets NumPy's numbers be read: training scripts save accuracies beside the weights.

    What is allowed makes numbers of bytes and nothing else.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        return nullcontext()  # cannot allow by name: such files are refused
    scalar: Any = np.float64(0).__reduce__()[0]
    return torch.serialization.safe_globals(
        [
            (scalar, "numpy.core.multiarray.scalar"),
            (scalar, "numpy._core.multiarray.scalar"),
            (np.dtype, "numpy.dtype"),
            *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
        ]
    )

"""Checkpoints: weights in safetensors with a JSON card in the header. Nothing in them is executed.

How a module is rebuilt:

1. A rebuildable class has a property ``hyperparameters -> dict[str, object]``: the keyword
   arguments its constructor needs. Values are JSON (None, bool, int, float, str, lists, tuples,
   dicts with str keys) or **further rebuildable modules**, so nesting needs nothing special:
   ``Canonicalized.hyperparameters`` is
   ``{"predictor": self.predictor, "canonicalizer": self.canonicalizer}``. Tuples come back as
   lists.
2. The class is made known by name, once, where its package lists it::

       CANONICALIZERS = {"pca": PCA, "vector-neuron": VectorNeuron}
       checkpoint.register(*CANONICALIZERS.values())

   ``register`` also serves as a class decorator, for networks of users' own.

:func:`save` then records ``{"class": "PCA", "hyperparameters": {"poses": 24}}``, and :func:`load`
looks the class up by name, constructs it and fills in the weights strictly. Files name classes of
this table only; they cannot name modules to import or code to run. The card has a checksum of the
weights, so that a file with a bit gone wrong is refused rather than believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pointcanon.coordinates import COORDINATE_FRAMES
from pointcanon.errors import CheckpointError
from pointcanon.files import atomic_write

__all__ = [
    "Allowance",
    "Card",
    "build",
    "check_archive",
    "check_fit",
    "describe",
    "is_safetensors",
    "is_whole",
    "load",
    "load_state",
    "read_card",
    "register",
    "save",
]

FORMAT_VERSION = 3  # since 2 the card has the checksum, since 3 the canonicalizer's own classes
KINDS = {
    "predictor": "pointcanon.predictors.load",
    "canonicalizer": "pointcanon.canonicalizers.load",
    "canonicalized": "pointcanon.load",
}
"""What a file may hold, and what loads it."""

CARD_KEY = "pointcanon.card"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a weight may be stored as."""

_CLASSES: dict[str, type[nn.Module]] = {}
_SPEC_KEYS = {"class", "hyperparameters"}
_Class = TypeVar("_Class", bound=type[nn.Module])


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about itself.

    Attributes:
        kind: ``"predictor"``, ``"canonicalizer"`` or ``"canonicalized"``, which is both.
        coordinate_frame: Name of the frame it was trained in (:mod:`pointcanon.coordinates`).
        classes: Names of the output classes, in order; of a part network, of the categories.
        parts: Names of the parts, in order, of a part network.
        canonicalizer_classes: Of a canonicalized model whose canonicalizer tells classes apart
            too: their names, in order, where they are known to be other ones.
        normalisation: What was done to each cloud, such as ``"unit-ball"``.
        training_command: The command line that trained it.
        metrics: Figures by name.
        architecture: What :func:`describe` says of the module; :func:`save` fills it in.
        sha256: Of the bytes of the tensors, in the order of their names; :func:`save` fills it in.
        pointcanon_version: Version that wrote the file; :func:`save` fills it in.
        format_version: Of this format.
    """

    kind: str
    coordinate_frame: str | None = None
    classes: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    canonicalizer_classes: tuple[str, ...] | None = None
    normalisation: str | None = None
    training_command: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    pointcanon_version: str | None = None
    format_version: int = FORMAT_VERSION


def register(*classes: _Class) -> _Class:
    """Make classes known to :func:`load` by their names. Returns the last: usable as a decorator.

    Raises:
        CheckpointError: If another class has the name, or there is no ``hyperparameters``.
    """
    for cls in classes:
        name = cls.__name__
        if not isinstance(getattr(cls, "hyperparameters", None), property):
            raise CheckpointError(f"{name} needs a property hyperparameters to be registered")
        known = _CLASSES.get(name)
        if known is not None and known.__module__ != cls.__module__:
            raise CheckpointError(
                f"{known.__module__} already registered a class {name}; "
                f"give the one of {cls.__module__} another name"
            )
        _CLASSES[name] = cls
    return classes[-1]


def describe(module: nn.Module) -> dict[str, Any]:
    """The class name and hyper-parameters of a module, nested modules included, as JSON values.

    Raises:
        CheckpointError: If a class is not registered or a value is not JSON.
    """
    name = type(module).__name__
    if _CLASSES.get(name) is not type(module):
        raise CheckpointError(
            f"{name} is not registered, so a file could not be loaded again; "
            "decorate the class with pointcanon.checkpoint.register"
        )
    return {"class": name, "hyperparameters": _to_json(module.hyperparameters, name)}


def _to_json(value: object, where: str) -> Any:
    if isinstance(value, nn.Module):
        return describe(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and value - value == 0:
        return value
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"hyper-parameter {where} = {value!r} cannot be written as JSON")


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """A module, freshly initialised, from what :func:`describe` said of it.

    Raises:
        CheckpointError: If a class is unknown or refuses the hyper-parameters.
    """
    if set(architecture) != _SPEC_KEYS or not isinstance(architecture["hyperparameters"], Mapping):
        raise CheckpointError(f"not the description of an architecture: {architecture!r}")
    name = architecture["class"]
    if not isinstance(name, str) or name not in _CLASSES:
        known = ", ".join(sorted(_CLASSES)) or "none"
        raise CheckpointError(
            f"unknown architecture {name!r} (known: {known}); update pointcanon, "
            "or import the module that registers it"
        )
    arguments = {key: _from_json(item) for key, item in architecture["hyperparameters"].items()}
    try:
        return _CLASSES[name](**arguments)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(
            f"{name} refuses the hyper-parameters {arguments}: {error}"
        ) from error


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == _SPEC_KEYS:
            return build(value)
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def save(path: str | Path, module: nn.Module, card: Card, dtype: torch.dtype | None = None) -> None:
    """Write the weights of ``module`` and its card, atomically: the old file or the new, whole.

    Args:
        path: Conventionally ends in ``.safetensors``; missing folders are made.
        module: Rebuildable (see the top of this module).
        card: Its architecture, checksum and versions are filled in here.
        dtype: Floating-point weights are rounded to, such as float16 for half the size; the network
            that is loaded computes in float32 all the same. None writes them as they are.

    Raises:
        CheckpointError: If the module cannot be described, or a field of the card is not valid.
        DataError: If the file cannot be written.
    """
    # clones, because safetensors refuses tensors that share memory
    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True)
        for name, value in module.state_dict().items()
    }
    card = replace(
        card,
        architecture=describe(module),
        sha256=_checksum(state),
        pointcanon_version=version("pointcanon"),
        format_version=FORMAT_VERSION,
    )
    _check_card(card, path)
    metadata = {"format": "pt", CARD_KEY: json.dumps(asdict(card), allow_nan=False)}
    atomic_write(path, to_bytes(state, metadata=metadata), durable=True)


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(state):
        digest.update(state[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_safetensors(path: str | Path) -> bool:
    """Whether the file begins as a safetensors file does: eight bytes of length, then a brace.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise _unreadable(path, error) from error


def read_card(path: str | Path) -> Card | None:
    """The card of a checkpoint, or None for a safetensors file that pointcanon did not write.

    Raises:
        CheckpointError: If the file is missing, damaged or no safetensors file, or its card is
            not valid or of a newer format.
    """
    text = _open(path)[1].get(CARD_KEY)
    return None if text is None else _parse_card(text, path)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: As for :func:`read_card`.
    """
    return _open(path, tensors=True)[0]


def load(path: str | Path) -> tuple[nn.Module, Card]:
    """The module saved in ``path``, in eval mode, and its card.

    Raises:
        CheckpointError: If the file cannot be read or was not written by :func:`save`, or its
            weights are not those its card has the checksum of, or do not fit its architecture.
    """
    state, metadata = _open(path, tensors=True)
    if CARD_KEY not in metadata:
        raise CheckpointError(
            f"{path} has no pointcanon card; for a public checkpoint use predictors.load"
        )
    card = _parse_card(metadata[CARD_KEY], path)
    if card.sha256 not in (None, _checksum(state)):
        raise CheckpointError(
            f"{path} is damaged: its weights do not have the checksum that its card says; "
            "copy or download it again"
        )
    try:
        with Allowance(state.values()):
            module = build(card.architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if any(value.dtype == torch.float64 for value in state.values()):
        module.double()  # nothing is rounded on the way
    check_fit(module.state_dict(), state, f"{path}, {card.architecture['class']}")
    module.load_state_dict(state)
    return module.eval(), card


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], names: str) -> None:
    """Refuse weights that are not exactly those expected: keys, shapes, finite values.

    Args:
        expected: The state dictionary to be replaced.
        state: Tensors by name.
        names: The file and the architecture, as the error shall name them.

    Raises:
        CheckpointError: Naming the first keys that do not fit.
    """
    misfits = [
        *(
            f"{key} holds {state[key].dtype}"
            for key, value in expected.items()
            if key in state and not _same_kind(value, state[key])
        ),
        *(f"missing {key}" for key in expected if key not in state),
        *(f"unexpected {key}" for key in state if key not in expected),
        *(
            f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ),
    ]
    if misfits:
        raise CheckpointError(f"{names}: the weights do not fit: {_first(misfits)}")
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(f"{names}: NaN or infinite weights in {_first(broken)}")


def _same_kind(expected: Tensor, found: Tensor) -> bool:
    if expected.is_floating_point():
        return found.dtype in FLOATS
    return not (found.is_floating_point() or found.is_complex() or found.is_quantized)


class Allowance(TorchDispatchMode):
    """Refuses, while it is entered, to make networks much larger than the weights there are.

    What a file declares of its network may be more than any memory has.

    Args:
        weights: All those there are.

    Raises:
        CheckpointError: By whatever makes a tensor too many.
    """

    SPARE, LEAST = 1 << 24, 1 << 10
    """Numbers that are allowed in any case, and that the smallest tensor counts for."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._left = self.SPARE + 2 * sum(weight.numel() for weight in weights)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shape = args[0] if args else None
        if isinstance(shape, list | tuple) and all(isinstance(size, int) for size in shape):
            self._left -= max(self.LEAST, math.prod(shape))
            if self._left < 0:
                raise CheckpointError("the network described is far larger than its weights")
        return function(*args, **(kwargs or {}))


def is_whole(value: Tensor) -> bool:
    """Whether each number of a tensor is there: none is shared by stride, left out or elsewhere."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def check_archive(path: str | Path) -> list[str]:
    """Refuse a file of ``torch.save`` that would unpack to more than it is itself.

    PyTorch does not compress. Files from before 1.6, which are no archives, pass.

    Returns:
        The names of what it holds.

    Raises:
        CheckpointError: If it is compressed, damaged or cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != b"PK\3\4":
                return []
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile has many ways to stumble
        raise _unreadable(path, error) from error
    size, stored = sum(entry.file_size for entry in entries), Path(path).stat().st_size
    if size > stored:
        raise CheckpointError(
            f"{path} has {stored:,} bytes and would unpack to {size:,}, which no file of "
            "torch.save does; save the weights again where it was made"
        )
    return [entry.filename for entry in entries]


def _first(items: Iterable[str], count: int = 4) -> str:
    items = list(items)
    rest = len(items) - count
    return "; ".join(items[:count]) + (f"; and {rest} more" if rest > 0 else "")


def _open(path: str | Path, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not is_safetensors(path):
        raise CheckpointError(
            f"{path} is not a safetensors file; a public network is loaded with predictors.load"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else ()
            state = {name: file.get_tensor(name) for name in names}
            return state, file.metadata() or {}
    except Exception as error:  # of the library, or of a dtype that torch has no tensors for
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"there is no file {path}; check the path")
    if isinstance(error, IsADirectoryError):
        return CheckpointError(f"{path} is a folder; name the checkpoint file in it")
    return CheckpointError(
        f"{path} cannot be read ({error}); it is damaged or incomplete: copy or download it again"
    )


def _parse_card(text: str, path: str | Path) -> Card:
    try:
        values = json.loads(text)
        found = values["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged card: {error!r}") from error
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of checkpoint format {found}, this pointcanon reads up to "
            f"{FORMAT_VERSION}; update pointcanon"
        )
    unknown = set(values) - {entry.name for entry in fields(Card)}
    if unknown or "kind" not in values:
        raise CheckpointError(f"{path} has a damaged card: its fields are {sorted(values)}")
    for names in ("classes", "parts", "canonicalizer_classes"):
        if isinstance(values.get(names), list):
            values[names] = tuple(values[names])
    card = Card(**values)
    _check_card(card, path)
    return card


def _are_names(value: object) -> bool:
    return value is None or (
        isinstance(value, tuple) and all(isinstance(v, str) and v.isprintable() for v in value)
    )


def _check_card(card: Card, path: str | Path) -> None:
    optional_text = (str, type(None))
    valid = {
        "kind": card.kind in KINDS,
        "coordinate_frame": card.coordinate_frame in (None, *COORDINATE_FRAMES),
        "classes": _are_names(card.classes),
        "parts": _are_names(card.parts),
        "canonicalizer_classes": _are_names(card.canonicalizer_classes),
        "normalisation": isinstance(card.normalisation, optional_text),
        "training_command": isinstance(card.training_command, optional_text),
        "metrics": isinstance(card.metrics, Mapping)
        and all(
            isinstance(figure, int | float) and figure - figure == 0
            for figure in card.metrics.values()
        ),
        "architecture": isinstance(card.architecture, Mapping),
        "sha256": isinstance(card.sha256, optional_text),
        "pointcanon_version": isinstance(card.pointcanon_version, optional_text),
    }
    for name, good in valid.items():
        if not good:
            raise CheckpointError(f"{path}: the card's {name} is {getattr(card, name)!r}")

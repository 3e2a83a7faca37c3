"""Programs that run without pointcanon: ONNX, and ``torch.export`` archives.

One trace serves both. It leaves the numbers of clouds and points open, and while it is taken the
library offers the forms of :mod:`pointcanon.portable`. No file gets its name before what it holds,
read back, has answered as the model does.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.checkpoint import CARD_KEY, Card
from pointcanon.errors import ExportError, UsageError
from pointcanon.files import atomic_write
from pointcanon.model import Canonicalized
from pointcanon.predictors.base import TRAINED_ON, PartPredictor
from pointcanon.rotations import random_rotations

__all__ = ["TOLERANCE", "export", "require_format"]

OPSET = 18
"""Of ONNX: the one that torch writes without converting."""

TOLERANCE = 1e-3
"""Largest difference from the model's answers, as a fraction of the largest entry or of 1."""

SIZES = ((2, 1024), (3, 600), (1, 257))
"""Clouds and points of the batches on which a program must answer as the model does."""

NUDGE, DRAWS = 1e-6, 8
"""Where a relative change of the points by so little changes the model's own answer, as where two
poses weigh the same, rounding decides. Such clouds prove nothing; others are drawn, so often."""

Values = dict[str, Tensor]
"""Tensors by name: the inputs of a program, or its outputs."""

Program = Callable[[Values], Values]


def export(model: nn.Module, path: str | Path) -> dict[str, float]:
    """Write a model as a program that takes any number of clouds, each of as many points.

    Inputs are ``points (B, N, 3)`` and, for a model that needs them, ``normals (B, N, 3)`` and
    ``category (B,)`` int64. Outputs are ``logits`` and, of a :class:`pointcanon.Canonicalized`,
    its frames: ``rotations (B, K, 3, 3)``, canonical to input, ``weights (B, K)``,
    ``centre (B, 3)``, ``degenerate (B,)`` bool and, where they have one, ``scale (B,)``. Clouds of
    several sizes go in one size at a time: there is no mask. A ``.pt2`` file returns them by
    name::

        torch.export.load("robust.pt2").module()(points=points)["logits"]
        onnxruntime.InferenceSession("robust.onnx").run(["logits"], {"points": points.numpy()})

    The model's card without metrics (:class:`pointcanon.checkpoint.Card`: classes, coordinate
    frame, normalisation, version) travels as JSON under ``pointcanon.card``, in the custom metadata
    of ONNX and in the extra files of ``.pt2``. A program has no checks of clouds, finds neighbours
    by all N x N distances, holds all posed clouds at once, and wants coordinates whose squares are
    in the range of its type.

    Args:
        model: A ``Canonicalized``, or a predictor; left as it is. Weights in float64 make a
            program for float64.
        path: Ends in ``.onnx`` or ``.pt2``.

    Returns:
        By output, how far the program differs from the model on the clouds compared: random ones
        and the same turned, at several sizes; as a fraction of the largest entry or of 1. Clouds
        whose answer by the model itself hangs on rounding are replaced by others.

    Raises:
        ExportError: If the model has no portable form, the program answers otherwise, or packages
            are missing. Nothing is written then.
        UsageError: On another ending.
        DataError: If the file cannot be written.
    """
    write = _FORMATS[require_format(path).suffix]
    name = _name(model)
    if not hasattr(torch.compiler, "is_exporting"):
        raise ExportError(f"exporting needs torch 2.7 or later, this is {torch.__version__}")
    served = _Served(model)
    example = next(_batches(served, *SIZES[0], torch.Generator().manual_seed(0)))
    with torch.no_grad(), _quiet():
        outputs = tuple(served(**example))
        try:
            content, program = write(_trace(served, example), outputs, _card(model))
        except ImportError as error:
            raise ExportError(f"{error}: pip install 'pointcanon[export]'") from error
        except Exception as error:  # torch has many, of no common kind
            raise ExportError(f"{name} has no portable form: {_first_line(error)}") from error
        found = _differences(name, program, served)
    atomic_write(path, content)
    return found


def require_format(path: str | Path) -> Path:
    """The path of a program that is to be written, once its ending is known.

    Raises:
        UsageError: If it is another than ``.onnx`` or ``.pt2``.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise UsageError(f"{path} does not end in {' or '.join(_FORMATS)}, which is the format")
    return path


class _Served(nn.Module):
    """A copy of a model as it is served: tensors in and out by name, in evaluation, on a CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        predictor = getattr(model, "predictor", model)
        canonicalizer = getattr(model, "canonicalizer", None)
        self.normals = any(getattr(half, "normals", False) for half in (predictor, canonicalizer))
        self.categories = predictor.num_categories if isinstance(predictor, PartPredictor) else 0

    @property
    def dtype(self) -> torch.dtype:
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    def forward(
        self, points: Tensor, normals: Tensor | None = None, category: Tensor | None = None
    ) -> Values:
        if not isinstance(self.model, Canonicalized):
            extra = {"normals": normals, "category": category}
            given = {name: value for name, value in extra.items() if value is not None}
            return {"logits": self.model(points, **given)}
        frames = self.model.canonicalizer(points, None, normals)
        answers = {
            "logits": self.model.predict_in(frames, points, None, normals, category),
            "rotations": frames.rotations,
            "weights": frames.weights,
            "centre": frames.centre,
            "degenerate": frames.degenerate,
        }
        return answers if frames.scale is None else {**answers, "scale": frames.scale}


def _trace(served: _Served, batch: Values) -> torch.export.ExportedProgram:
    size, count = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = {name: {0: size} if name == "category" else {0: size, 1: count} for name in batch}
    return torch.export.export(served, (), batch, dynamic_shapes=shapes, strict=False)


def _to_pt2(
    traced: torch.export.ExportedProgram, outputs: tuple[str, ...], card: str
) -> tuple[bytes, Program]:
    file = io.BytesIO()
    torch.export.save(traced, file, extra_files={CARD_KEY: card})
    program = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda inputs: program(**inputs)


def _to_onnx(
    traced: torch.export.ExportedProgram, outputs: tuple[str, ...], card: str
) -> tuple[bytes, Program]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_module(package)
    from onnxruntime import InferenceSession

    made = torch.onnx.export(
        traced, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
    )
    assert made is not None
    made.model.metadata_props[CARD_KEY] = card
    points = made.model.graph.inputs[0].shape
    assert points is not None
    made.rename_axes({str(points[0]): "clouds", str(points[1]): "points"})
    content = made.model_proto.SerializeToString()
    session = InferenceSession(content, providers=["CPUExecutionProvider"])

    def program(inputs: Values) -> Values:
        arrays = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(outputs, map(torch.from_numpy, arrays), strict=True))

    return content, program


_FORMATS = {".onnx": _to_onnx, ".pt2": _to_pt2}
"""Endings, and what makes the content of a file, which it also runs."""


def _card(model: nn.Module) -> str:
    """The card of a checkpoint as JSON, with what a program's user needs of it."""
    known: dict[str, Any] = {name: getattr(model, name, None) for name in TRAINED_ON}
    frame = known.pop("coordinate_frame")
    card = Card(
        kind="canonicalized" if isinstance(model, Canonicalized) else "predictor",
        coordinate_frame=None if frame is None else str(frame),
        pointcanon_version=version("pointcanon"),
        **known,
    )
    return json.dumps(asdict(card))


def _batches(
    served: _Served, size: int, count: int, generator: torch.Generator
) -> Iterator[Values]:
    """Random clouds, and the same in other poses.

    Points on the faces of two boxes, with the normals there: principal axes, neighbours and flat
    surfaces are all well determined, as far as they can be for random clouds.
    """
    points, normals = _boxes(size, count, generator)
    rotations = random_rotations(size, generator=generator)
    for turn in (torch.eye(3).expand(size, 3, 3), rotations):
        batch = {"points": (points @ turn.mT).to(served.dtype)}
        if served.normals:
            batch["normals"] = (normals @ turn.mT).to(served.dtype)
        if served.categories:
            batch["category"] = torch.arange(size) % served.categories
        yield batch


def _boxes(size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on two boxes each, in the unit ball, and their normals, ``(B, N, 3)``."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    axis = nn.functional.one_hot((uniform(size, count) * 3).long(), 3).float()
    normals = axis * torch.where(uniform(size, count, 1) < 0.5, -1.0, 1.0)
    face = torch.where(axis > 0, normals, 2 * uniform(size, count, 3) - 1)
    first = uniform(size, count, 1) < 0.7
    extent = torch.where(first, 0.3 + uniform(size, 1, 3), 0.1 + 0.3 * uniform(size, 1, 3))
    place = torch.where(first, torch.zeros(3), 1 + uniform(size, 1, 3))
    return clouds.normalise(face * extent + place), normals


def _differences(name: str, program: Program, served: _Served) -> dict[str, float]:
    """The largest difference of each output, on batches that rounding decides nowhere.

    Raises:
        ExportError: If one is too large, or the program fails.
    """
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for size, count in SIZES:
        for draw in range(1, DRAWS + 1):
            batches = list(_batches(served, size, count, generator))
            found = [_compared(name, program, served, batch, draw == DRAWS) for batch in batches]
            agreed = [differences for differences in found if differences is not None]
            if len(agreed) == len(batches):
                break
        for differences in agreed:
            worst = {key: max(worst.get(key, 0.0), value) for key, value in differences.items()}
    return worst


def _compared(
    name: str, program: Program, served: _Served, batch: Values, last: bool
) -> dict[str, float] | None:
    """The differences on a batch; None where one is too large, but where rounding decides.

    Raises:
        ExportError: If one is too large elsewhere, or for the last time, or the program fails.
    """
    shape, expected = tuple(batch["points"].shape), served(**batch)
    try:
        found = program(batch)
    except Exception as error:  # whatever a runtime may raise
        raise ExportError(
            f"the program of {name} fails on points {shape}: {_first_line(error)}"
        ) from error
    apart = {key: _apart(found[key], value) for key, value in expected.items()}
    wrong = torch.stack([~(each <= TOLERANCE) for each in apart.values()]).any(dim=0)
    if bool(wrong.any()):
        if not last and bool(_wavers(served, batch, expected)[wrong].all()):
            return None
        key, most = next((key, each) for key, each in apart.items() if not each.max() <= TOLERANCE)
        raise ExportError(
            f"the program of {name} answers otherwise than the model: {key} of points {shape} "
            f"differ by {float(most.max()):.2g}, more than {TOLERANCE:g}; nothing is written"
        )
    return {key: float(each.max()) for key, each in apart.items()}


def _wavers(served: _Served, batch: Values, answer: Values) -> Tensor:
    """Of which clouds the model itself answers otherwise once they are nudged, ``(B,)`` bool."""
    generator, points = torch.Generator().manual_seed(0), batch["points"]
    wavers = torch.zeros(len(points), dtype=torch.bool)
    for _ in range(4):
        noise = torch.randn(points.shape, generator=generator).to(points)
        nudged = served(**{**batch, "points": points * (1 + NUDGE * noise)})
        for key, expected in answer.items():
            wavers |= ~(_apart(nudged[key], expected) <= TOLERANCE)
    return wavers


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of each cloud, ``(B,)``, as :data:`TOLERANCE` has it."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.full((len(expected),), torch.inf, dtype=torch.float64)
    found, expected = found.double(), expected.double()
    apart = (found - expected).abs().reshape(len(expected), -1).amax(dim=1)
    return apart / expected.abs().max().clamp_min(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of their own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _name(model: nn.Module) -> str:
    if not isinstance(model, Canonicalized):
        return type(model).__name__
    return f"{type(model.predictor).__name__} behind {type(model.canonicalizer).__name__}"


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)

"""Pictures of parts, as found and in truth: a PNG, and a page to turn and zoom them in."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.datasets import UNLABELLED
from pointcanon.errors import InputError
from pointcanon.eval.pictures import as_seen, draw, of_many_classes, turned_cloud
from pointcanon.eval.protocols import Protocol, pose_rotations
from pointcanon.eval.protocols import protocol as protocol_named
from pointcanon.eval.viewer import page
from pointcanon.files import atomic_write
from pointcanon.model import Canonicalized

if TYPE_CHECKING:
    from pointcanon.datasets import PartDataset

__all__ = ["PartPicture", "part_gallery", "part_page", "part_png"]

PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a90a", "#7a5195"),
    *("#8c564b", "#17becf"),
)
"""Of classes of few parts; the hues of Okabe and Ito (2008), which the colour-blind tell apart."""

OF_ANOTHER_CLASS, UNKNOWN = "#222222", "#d0d4d8"
RIGHT, WRONG = "#d3d7db", "#d62728"

ROWS = ("as received\n(truth)", "canonical\n(truth)", "canonical\n(found)", "errors")

MOST_POINTS = 20_000
"""Of a cloud on the page, so that it turns smoothly."""


class PartPicture(NamedTuple):
    """A cloud of N points and what was said of it.

    Attributes:
        title: Of the picture.
        received: ``(N, 3)``.
        canonical: ``(N, 3)``, in canonical pose.
        truth: ``(N,)`` int64 parts, or ``UNLABELLED``.
        found: ``(N,)`` int64 parts.
        own: The parts of the cloud's class.
        notes: How well the predictor alone does, if it is not alone, and how well the model does.
    """

    title: str
    received: Tensor
    canonical: Tensor
    truth: Tensor
    found: Tensor
    own: range
    notes: tuple[str, str]


def part_gallery(
    model: Canonicalized,
    dataset: PartDataset,
    protocol: Protocol | str,
    folder: str | Path,
    *,
    seed: int = 0,
    count: int = 8,
    restricted: bool = True,
    max_points: int | None = None,
) -> None:
    """Write ``parts.png`` and ``parts.html`` of test clouds, of as many classes as there can be.

    Each cloud is shown as received and in canonical pose, both coloured by the truth; with the
    parts that were found; and with the points that were given a wrong part.

    Args:
        model: Its predictor labels parts.
        dataset: Where the clouds come from.
        protocol: Its test pose turns the clouds as :func:`~pointcanon.eval.evaluate.evaluate` does.
        folder: Of both files; made where it is missing.
        seed: Of the test rotations.
        count: Clouds; fewer where the data set is smaller.
        restricted: As for :func:`~pointcanon.eval.evaluate.evaluate`.
        max_points: As for :func:`~pointcanon.eval.evaluate.evaluate`.

    Raises:
        DataError: If a file cannot be written.
        InputError: If ``count`` < 1.
        UsageError: On an unknown protocol.
    """
    pose = protocol_named(protocol).test
    turns = pose_rotations(pose, len(dataset), dataset.coordinate_frame.up_axis, seed=seed)
    pictures = [
        _picture(model, dataset, index, turns[index], restricted, max_points)
        for index in of_many_classes(dataset, count)
    ]
    frame = dataset.coordinate_frame
    part_png(pictures, Path(folder) / "parts.png", coordinate_frame=frame)
    where = f"{dataset.name} {getattr(dataset, 'split', '')}".rstrip()
    behind = type(model.canonicalizer).__name__
    title = f"{where}, pose {pose}: {type(model.predictor).__name__} behind {behind}"
    part_page(pictures, dataset.parts, Path(folder) / "parts.html", title, coordinate_frame=frame)


def _picture(
    model: Canonicalized,
    dataset: PartDataset,
    index: int,
    turn: Tensor,
    restricted: bool,
    max_points: int | None,
) -> PartPicture:
    from pointcanon.eval.metrics import predicted_parts, shape_iou

    item: Any = dataset[index]  # of a part data set, so it has parts
    points, normals = turned_cloud(item, turn, model)
    category, truth = torch.tensor([item["label"]]), item["parts"][None]
    ranges = dataset.part_ranges

    def ask(asked: Canonicalized) -> tuple[Tensor, Tensor, str]:
        answer = asked.predict(
            points, None, normals, category.to(points.device), max_points=max_points
        )
        scores = answer.probabilities.cpu()
        parts = predicted_parts(scores, category, ranges, restricted=restricted)
        if len(ranges) > 1:
            note = f"mIoU {100 * shape_iou(parts, truth, category, ranges).item():.0f} %"
        else:
            right = (parts == truth)[truth != UNLABELLED].double().mean().item()
            note = f"{100 * right:.0f} % of points"
        return parts[0], answer.rotation, note

    found, rotation, note = ask(model)
    bare = isinstance(model.canonicalizer, Identity)
    alone = "" if bare else f"alone {ask(Canonicalized(model.predictor, Identity()))[2]}"
    return PartPicture(
        title=dataset.classes[item["label"]],
        received=points[0].cpu(),
        canonical=(points @ rotation.to(points))[0].cpu(),
        truth=truth[0],
        found=found,
        own=ranges[item["label"]],
        notes=(alone, note),
    )


def part_png(
    pictures: Sequence[PartPicture],
    path: str | Path,
    *,
    coordinate_frame: str | CoordinateFrame = "z-up",
) -> None:
    """A PNG with a column for each cloud, a row for each of :data:`ROWS`, seen from one eye.

    Raises:
        InputError: If there are no clouds, or one cannot be drawn.
        DataError: If the file cannot be written.
    """
    if not pictures:
        raise InputError("0 clouds to draw; give at least one")
    # not pyplot: a figure of its own has no global state, and needs no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 * len(pictures) + 0.4, 8.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ROWS), len(pictures), squeeze=False)
    for column, picture in zip(panels.T, pictures, strict=True):
        received, canonical = (
            as_seen(cloud, coordinate_frame) for cloud in (picture.received, picture.canonical)
        )
        size = max(float(cloud[:, :2].abs().max()) for cloud in (received, canonical)) or 1.0
        truth, found = (
            _rgb([colour_of(int(part), picture.own) for part in parts])
            for parts in (picture.truth, picture.found)
        )
        errors = _rgb([RIGHT, WRONG])[_wrong(picture).long().numpy()]
        draw(column[0], received / size, truth)
        for panel, colours in zip(column[1:], (truth, found, errors), strict=True):
            draw(panel, canonical / size, colours)
        column[0].set_title(picture.title, fontsize=9)
        column[0].set_xlabel(picture.notes[0], fontsize=8)
        column[2].set_xlabel(picture.notes[1], fontsize=8)
        share = float(_wrong(picture).double().mean())
        column[3].set_xlabel(f"{100 * share:.0f} % wrong", fontsize=8)
    for panel, name in zip(panels[:, 0], ROWS, strict=True):
        panel.set_ylabel(name, fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic_write(path, image.getvalue())


def part_page(
    pictures: Sequence[PartPicture],
    parts: Sequence[str],
    path: str | Path,
    title: str,
    *,
    coordinate_frame: str | CoordinateFrame = "z-up",
) -> None:
    """A page that needs nothing but a browser: the pictures of :func:`part_png`, to be turned.

    Args:
        pictures: At least one.
        parts: Names of all parts.
        path: Of the HTML file.
        title: Of the page.
        coordinate_frame: Frame of all clouds, which says where up is.

    Raises:
        DataError: If the file cannot be written.
    """
    clouds = [_on_page(picture, coordinate_frame) for picture in pictures]
    atomic_write(path, page(title, {"parts": list(parts), "clouds": clouds}))


def _on_page(picture: PartPicture, frame: str | CoordinateFrame) -> dict[str, Any]:
    step = -(-len(picture.truth) // MOST_POINTS)
    clouds = [
        convert(cloud[::step].double(), frame, "z-up")
        for cloud in (picture.received, picture.canonical)
    ]
    clouds = [cloud - (cloud.amin(dim=0) + cloud.amax(dim=0)) / 2 for cloud in clouds]
    size = max(float(cloud.norm(dim=1).max()) for cloud in clouds) or 1.0
    return {
        "title": picture.title,
        "notes": list(picture.notes),
        "first": picture.own.start,
        "colours": [colour_of(part, picture.own) for part in picture.own],
        "received": _packed(clouds[0] / size * 32767),
        "canonical": _packed(clouds[1] / size * 32767),
        "truth": _packed(picture.truth[::step]),
        "found": _packed(picture.found[::step]),
    }


def _packed(values: Tensor) -> str:
    """As base64 of little-endian int16."""
    return base64.b64encode(values.round().numpy().astype("<i2").tobytes()).decode()


def colour_of(part: int, own: range) -> str:
    """The colour of a part, as ``#rrggbb``; of many parts, neighbours have near colours."""
    if part == UNLABELLED:
        return UNKNOWN
    if part not in own:
        return OF_ANOTHER_CLASS
    if len(own) <= len(PALETTE):
        return PALETTE[part - own.start]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["turbo"]((part - own.start) / (len(own) - 1)))


def _rgb(colours: Sequence[str]) -> np.ndarray:
    """``(N, 3)`` in [0, 1]."""
    return np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255


def _wrong(picture: PartPicture) -> Tensor:
    return (picture.truth != UNLABELLED) & (picture.truth != picture.found)

"""Pictures of clouds, as received and in canonical pose."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.errors import InputError
from pointcanon.eval.protocols import Protocol, pose_rotations
from pointcanon.eval.protocols import protocol as protocol_named
from pointcanon.files import atomic_write
from pointcanon.model import Canonicalized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pointcanon.datasets import CloudDataset, CloudItem

__all__ = ["canonical_gallery", "gallery"]

AZIMUTH, ELEVATION = -55.0, 22.0
"""Degrees: where the eye is, about the up axis and above the ground."""


def gallery(
    points_before: Sequence[Tensor],
    points_after: Sequence[Tensor],
    titles: Sequence[str],
    path: str | Path,
    *,
    coordinate_frame: str | CoordinateFrame = "z-up",
    notes: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """A PNG with a column for each cloud: as received above, in canonical pose below.

    All panels are seen from one eye, up is up, near points are darker and larger. Both panels of a
    column have the same scale, the largest that fits.

    Args:
        points_before: Clouds ``(N, 3)``.
        points_after: The same clouds in canonical pose.
        titles: Of the columns; may have several lines.
        path: Of the PNG; missing folders are made.
        coordinate_frame: Frame of all clouds, which says where up is.
        notes: Texts below the panels of the upper and of the lower row.

    Raises:
        InputError: If there are no clouds, their numbers differ, or a cloud cannot be drawn.
        DataError: If the file cannot be written.
    """
    columns = len(titles)
    if not columns or not len(points_before) == len(points_after) == columns:
        raise InputError(
            f"{len(points_before)} clouds before, {len(points_after)} after and {columns} titles; "
            "give as many of each, at least one"
        )
    rows = [
        [as_seen(cloud, coordinate_frame) for cloud in row] for row in (points_before, points_after)
    ]

    # not pyplot: a figure of its own has no global state, and needs no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 * columns + 0.4, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, columns, squeeze=False)
    for column, title in enumerate(titles):
        size = max(float(row[column][:, :2].abs().max()) for row in rows) or 1.0
        for row, panel in zip(rows, panels[:, column], strict=True):
            draw(panel, row[column] / size)
        panels[0, column].set_title(title, fontsize=9)
    for panel, name in zip(panels[:, 0], ("as received", "canonical"), strict=True):
        panel.set_ylabel(name, fontsize=10)
    for row_of_panels, texts in zip(panels, notes or (), strict=False):
        for panel, text in zip(row_of_panels, texts, strict=True):
            panel.set_xlabel(text, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic_write(path, image.getvalue())


def canonical_gallery(
    model: Canonicalized,
    dataset: CloudDataset,
    protocol: Protocol | str,
    path: str | Path,
    *,
    seed: int = 0,
    count: int = 8,
) -> None:
    """A :func:`gallery` of test clouds in the pose of a protocol, of as many classes as it can.

    Below each cloud stands what the predictor alone says of it, and what the model says.

    Args:
        model: Its predictor is a classifier.
        dataset: Where the clouds come from.
        protocol: Its test pose turns the clouds as :func:`~pointcanon.eval.evaluate.evaluate` does.
        path: Of the PNG.
        seed: Of the test rotations.
        count: Clouds; fewer where the data set is smaller.

    Raises:
        DataError: If the file cannot be written.
        InputError: If ``count`` < 1.
        UsageError: On an unknown protocol.
    """
    pose = protocol_named(protocol).test
    chosen = of_many_classes(dataset, count)
    turns = pose_rotations(pose, len(dataset), dataset.coordinate_frame.up_axis, seed=seed)
    clouds = [turned_cloud(dataset[i], turns[i], model) for i in chosen]
    answers = [model.predict(points, normals=normals) for points, normals in clouds]
    alone = Canonicalized(model.predictor, Identity())
    verdicts = [int(answer.labels) for answer in answers]
    before = [int(alone.predict(points, normals=normals).labels) for points, normals in clouds]
    received = [points for points, _ in clouds]
    canonical = [
        points @ answer.rotation.to(points)
        for points, answer in zip(received, answers, strict=True)
    ]
    labels = [int(dataset.labels[i]) for i in chosen]
    gallery(
        [points[0].cpu() for points in received],
        [points[0].cpu() for points in canonical],
        [dataset.classes[label] for label in labels],
        path,
        coordinate_frame=dataset.coordinate_frame,
        notes=(
            _verdicts(before, labels, dataset.classes),
            _verdicts(verdicts, labels, dataset.classes),
        ),
    )


def turned_cloud(item: CloudItem, turn: Tensor, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Points of a cloud, and normals where it has them, turned, as a batch of one for a model."""
    like = next(model.parameters(), item["points"])
    points, normals = item["points"], item.get("normals")
    turned = None if normals is None else (normals @ turn.mT)[None].to(like)
    return (points @ turn.mT)[None].to(like), turned


def of_many_classes(dataset: CloudDataset, count: int) -> list[int]:
    """The first cloud of ``count`` classes spread over all; then further clouds, spread too."""
    if count < 1:
        raise InputError(f"count is {count}; choose at least 1 cloud")
    firsts = np.sort(np.unique(dataset.labels, return_index=True)[1])
    if count <= len(firsts):
        by_class = sorted(firsts.tolist(), key=lambda i: int(dataset.labels[i]))
        return [by_class[i * len(by_class) // count] for i in range(count)]
    rest = np.setdiff1d(np.arange(len(dataset)), firsts)
    more = min(count - len(firsts), len(rest))
    return [*firsts.tolist(), *(int(rest[i * len(rest) // more]) for i in range(more))]


def _verdicts(predicted: list[int], labels: list[int], classes: Sequence[str]) -> list[str]:
    return [
        f"{'✓' if guess == label else '✗'} {classes[guess]}"
        for guess, label in zip(predicted, labels, strict=True)
    ]


def as_seen(cloud: Tensor, frame: str | CoordinateFrame) -> Tensor:
    """A cloud about the middle of its box: right, up and towards the eye, float64, on the CPU."""
    if cloud.ndim != 2 or cloud.shape[-1] != 3 or not len(cloud):
        raise InputError(f"a cloud to draw has shape {tuple(cloud.shape)}, expected (N, 3), N >= 1")
    if not bool(cloud.isfinite().all()):
        raise InputError("a cloud to draw has NaN or infinite points; remove them")
    seen = convert(cloud.detach().cpu().double(), frame, "z-up") @ _eye().mT
    return seen - (seen.amin(dim=0) + seen.amax(dim=0)) / 2


def draw(panel: Axes, seen: Tensor, colours: np.ndarray | None = None) -> None:
    """A cloud within -1 and 1 across and up, far points first.

    Colours ``(N, 3)`` in [0, 1] fade with the distance; without any, near points are darker.
    """
    order = seen[:, 2].argsort()
    right, up, towards = seen[order].unbind(dim=1)
    depth = float(towards.abs().max()) or 1.0
    near = ((towards / depth + 1) / 2).numpy()
    shades: dict[str, Any] = {
        "c": near,
        "cmap": "viridis_r",
        "vmin": -0.15,  # the palest yellow does not show on white
        "vmax": 1.0,
    }
    if colours is not None:
        shades = {"c": 1 - (1 - colours[order.numpy()]) * (0.55 + 0.45 * near[:, None])}
    density = min(1.0, (1024 / len(seen)) ** 0.5)
    sizes = (1.5 + 5 * near) * density
    panel.scatter(right.numpy(), up.numpy(), s=sizes, linewidths=0, **shades)
    panel.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _eye() -> Tensor:
    """``(3, 3)``: rows point right, up and towards the eye, in coordinates with z up."""
    azimuth, elevation = math.radians(AZIMUTH), math.radians(ELEVATION)
    towards = torch.tensor(
        [
            math.cos(elevation) * math.cos(azimuth),
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        ],
        dtype=torch.float64,
    )
    right = torch.tensor([-math.sin(azimuth), math.cos(azimuth), 0.0], dtype=torch.float64)
    return torch.stack((right, torch.linalg.cross(towards, right), towards))

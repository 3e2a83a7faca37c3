"""Pictures of clouds, as received and in canonical pose, with the classes found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.errors import InputError
from pointcanon.eval import style
from pointcanon.eval.protocols import Protocol, pose_rotations
from pointcanon.eval.protocols import protocol as protocol_named
from pointcanon.model import Canonicalized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pointcanon.datasets import CloudDataset, CloudItem

__all__ = ["ClassPicture", "Verdict", "canonical_gallery", "class_pictures", "gallery"]

AZIMUTH, ELEVATION = -55.0, 22.0
"""Degrees: where the eye is, about the up axis and above the ground."""


COLOURS = "colour: height of the point in the data's own pose, low is dark"

POSES = ["as received", "canonical"]
"""Of the rows of a gallery."""


class Verdict(NamedTuple):
    """What a network says of a cloud, and whether that is right."""

    said: str
    right: bool

    def __str__(self) -> str:
        return f"{'✓' if self.right else '✗'} {self.said}"

    @property
    def colour(self) -> str:
        return style.RIGHT if self.right else style.WRONG


class ClassPicture(NamedTuple):
    """A cloud of N points and what was said of it.

    Attributes:
        title: Of the picture.
        received: ``(N, 3)``.
        canonical: ``(N, 3)``, in canonical pose.
        height: ``(N,)`` in [0, 1], of the points in the pose that the data come in.
        verdicts: Of the predictor alone and of the model; None where nothing is said.
    """

    title: str
    received: Tensor
    canonical: Tensor
    height: Tensor
    verdicts: tuple[Verdict, Verdict] | None = None


def gallery(
    pictures: Sequence[ClassPicture],
    path: str | Path,
    *,
    coordinate_frame: str | CoordinateFrame = "z-up",
    speakers: tuple[str, str] | None = None,
) -> None:
    """A picture with a column for each cloud: as received above, in canonical pose below.

    All panels are seen from one eye, up is up, near points are darker and larger. The colour of a
    point is its height in the data's own pose, so that it can be followed. Both panels of a column
    have the same scale, the largest that fits.

    Args:
        pictures: At least one.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``; missing folders are made.
        coordinate_frame: Frame of all clouds, which says where up is.
        speakers: Whose verdicts stand below the upper and the lower row.

    Raises:
        InputError: If there are no clouds, or one cannot be drawn.
        DataError: If the file cannot be written.
    """
    if not pictures:
        raise InputError("0 clouds to draw; give at least one")
    rows = POSES
    if speakers is not None:
        rows = [f"{pose}:\n{speaker}" for pose, speaker in zip(POSES, speakers, strict=True)]
    figure, panels = gallery_panels(rows, len(pictures))
    for column, picture in zip(panels.T, pictures, strict=True):
        seen = as_seen_alike((picture.received, picture.canonical), coordinate_frame)
        for panel, cloud in zip(column, seen, strict=True):
            draw(panel, cloud, of_height(picture.height))
        column[0].set_title(picture.title, fontsize=style.TITLE)
        for panel, verdict in zip(column, picture.verdicts or (), strict=False):
            panel.set_xlabel(str(verdict), fontsize=style.LABEL, color=verdict.colour)
    figure.supxlabel(COLOURS, fontsize=style.NOTE, color=style.GREY)
    style.write(figure, path)


def canonical_gallery(
    model: Canonicalized,
    dataset: CloudDataset,
    protocol: Protocol | str,
    path: str | Path,
    *,
    seed: int = 0,
    count: int = 8,
) -> None:
    """The :func:`gallery` of :func:`class_pictures`, which says what may be raised."""
    gallery(
        class_pictures(model, dataset, protocol, seed=seed, count=count),
        path,
        coordinate_frame=dataset.coordinate_frame,
        speakers=speakers(model),
    )


def class_pictures(
    model: Canonicalized,
    dataset: CloudDataset,
    protocol: Protocol | str,
    *,
    seed: int = 0,
    count: int = 8,
) -> list[ClassPicture]:
    """Test clouds in the pose of a protocol, of as many classes as there can be, and their classes.

    Args:
        model: Its predictor is a classifier.
        dataset: Where the clouds come from.
        protocol: Its test pose turns the clouds as :func:`~pointcanon.eval.evaluate.evaluate` does.
        seed: Of the test rotations.
        count: Clouds; fewer where the data set is smaller.

    Raises:
        InputError: If ``count`` < 1.
        UsageError: On an unknown protocol.
    """
    pose = protocol_named(protocol).test
    frame = dataset.coordinate_frame
    turns = pose_rotations(pose, len(dataset), frame.up_axis, seed=seed)
    alone = Canonicalized(model.predictor, Identity())

    def picture(index: int) -> ClassPicture:
        item = dataset[index]
        points, normals = turned_cloud(item, turns[index], model)
        answer = model.predict(points, normals=normals)
        said = (alone.predict(points, normals=normals).labels, answer.labels)
        first, second = (
            Verdict(dataset.classes[int(label)], int(label) == item["label"]) for label in said
        )
        return ClassPicture(
            title=dataset.classes[item["label"]],
            received=points[0].cpu(),
            canonical=(points @ answer.rotation.to(points))[0].cpu(),
            height=heights(item["points"], frame),
            verdicts=(first, second),
        )

    return [picture(index) for index in of_many_classes(dataset, count)]


def heights(cloud: Tensor, frame: str | CoordinateFrame) -> Tensor:
    """``(N,)`` float64, 0 at the lowest point and 1 at the highest."""
    up = convert(cloud.detach().cpu().double(), frame, "z-up")[:, 2]
    return (up - up.min()) / (up.max() - up.min()).clamp(min=1e-12)


def of_height(height: Tensor) -> np.ndarray:
    """Colours ``(N, 3)`` in [0, 1]."""
    from matplotlib import colormaps

    name, low, high = style.HEIGHTS
    return colormaps[name](low + (high - low) * height.numpy())[:, :3]


def speakers(model: Canonicalized) -> tuple[str, str]:
    """Names of the predictor alone and of the model."""
    predictor = type(model.predictor).__name__
    if isinstance(model.canonicalizer, Identity):
        return predictor, predictor
    return f"{predictor} alone", f"behind {type(model.canonicalizer).__name__}"


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


def gallery_panels(rows: Sequence[str], columns: int) -> tuple[Figure, Any]:
    """A figure, and its panels ``(rows, columns)``, each named at its left."""
    height = (style.PANEL + 0.22) * len(rows) + 0.45
    figure = style.new_figure(style.PANEL * columns + 0.4, height)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for panel, name in zip(panels[:, 0], rows, strict=True):
        panel.set_ylabel(name, fontsize=style.LABEL)
    return figure, panels


def as_seen_alike(clouds: Sequence[Tensor], frame: str | CoordinateFrame) -> list[Tensor]:
    """As :func:`as_seen`, all at the largest scale at which each is within -1 and 1."""
    seen = [as_seen(cloud, frame) for cloud in clouds]
    size = max(float(cloud[:, :2].abs().max()) for cloud in seen) or 1.0
    return [cloud / size for cloud in seen]


def as_seen(cloud: Tensor, frame: str | CoordinateFrame) -> Tensor:
    """A cloud about the middle of its box: right, up and towards the eye, float64, on the CPU."""
    if cloud.ndim != 2 or cloud.shape[-1] != 3 or not len(cloud):
        raise InputError(f"a cloud to draw has shape {tuple(cloud.shape)}, expected (N, 3), N >= 1")
    if not bool(cloud.isfinite().all()):
        raise InputError("a cloud to draw has NaN or infinite points; remove them")
    seen = convert(cloud.detach().cpu().double(), frame, "z-up") @ _eye().mT
    return seen - (seen.amin(dim=0) + seen.amax(dim=0)) / 2


def draw(panel: Axes, seen: Tensor, colours: np.ndarray) -> None:
    """A cloud within -1 and 1 across and up, far points first, in colours ``(N, 3)`` in [0, 1] that
    fade with the distance."""
    order = seen[:, 2].argsort()
    right, up, towards = seen[order].unbind(dim=1)
    depth = float(towards.abs().max()) or 1.0
    near = ((towards / depth + 1) / 2).numpy()
    faded = 1 - (1 - colours[order.numpy()]) * (0.55 + 0.45 * near[:, None])
    sizes = (0.7 + 2.4 * near) * min(1.0, (1024 / len(seen)) ** 0.5)
    panel.scatter(right.numpy(), up.numpy(), s=sizes, linewidths=0, c=faded)
    style.bare_panel(panel, 1.05)


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

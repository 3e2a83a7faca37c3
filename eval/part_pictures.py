"""Pictures of parts, as found and in truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import UNLABELLED
from pointcanon.errors import InputError
from pointcanon.eval import style
from pointcanon.eval.pictures import (
    as_seen_alike,
    draw,
    gallery_panels,
    of_many_classes,
    turned_cloud,
)
from pointcanon.eval.protocols import Protocol, pose_rotations
from pointcanon.eval.protocols import protocol as protocol_named
from pointcanon.eval.sweep import part_scores
from pointcanon.model import Canonicalized

if TYPE_CHECKING:
    from pointcanon.datasets import PartDataset

__all__ = ["PartPicture", "part_gallery", "part_pictures"]

OF_ANOTHER_CLASS, UNKNOWN = "#222222", style.UNMARKED

ROWS = ("as received:\ntruth", "canonical:\ntruth", "canonical:\nfound", "canonical:\nerrors")


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

    @property
    def wrong(self) -> Tensor:
        """``(N,)`` bool, of the points whose part is known."""
        return (self.truth != UNLABELLED) & (self.truth != self.found)


def part_pictures(
    model: Canonicalized,
    dataset: PartDataset,
    protocol: Protocol | str,
    *,
    seed: int = 0,
    count: int = 8,
    restricted: bool = True,
    max_points: int | None = None,
) -> list[PartPicture]:
    """Test clouds in the pose of a protocol, of as many classes as there can be, and their parts.

    Args:
        model: Its predictor labels parts.
        dataset: Where the clouds come from.
        protocol: Its test pose turns the clouds as :func:`~pointcanon.eval.evaluate.evaluate` does.
        seed: Of the test rotations.
        count: Clouds; fewer where the data set is smaller.
        restricted: As for :func:`~pointcanon.eval.evaluate.evaluate`.
        max_points: As for :func:`~pointcanon.eval.evaluate.evaluate`.

    Raises:
        InputError: If ``count`` < 1.
        UsageError: On an unknown protocol.
    """
    pose = protocol_named(protocol).test
    turns = pose_rotations(pose, len(dataset), dataset.coordinate_frame.up_axis, seed=seed)
    return [
        _picture(model, dataset, index, turns[index], restricted, max_points)
        for index in of_many_classes(dataset, count)
    ]


def _picture(
    model: Canonicalized,
    dataset: PartDataset,
    index: int,
    turn: Tensor,
    restricted: bool,
    max_points: int | None,
) -> PartPicture:
    from pointcanon.eval.metrics import predicted_parts

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
        share = f"{100 * part_scores(parts, truth, category, ranges).item():.0f} %"
        note = f"mIoU {share}" if len(ranges) > 1 else f"{share} of points"
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


def part_gallery(
    pictures: Sequence[PartPicture],
    path: str | Path,
    *,
    coordinate_frame: str | CoordinateFrame = "z-up",
) -> None:
    """A picture with a column for each cloud, a row for each of :data:`ROWS`, seen from one eye.

    Raises:
        InputError: If there are no clouds, or one cannot be drawn.
        DataError: If the file cannot be written.
    """
    if not pictures:
        raise InputError("0 clouds to draw; give at least one")
    figure, panels = gallery_panels(ROWS, len(pictures))
    for column, picture in zip(panels.T, pictures, strict=True):
        received, canonical = as_seen_alike((picture.received, picture.canonical), coordinate_frame)
        truth, found = (
            _rgb([colour_of(int(part), picture.own) for part in parts])
            for parts in (picture.truth, picture.found)
        )
        errors = _rgb([style.UNMARKED, style.WRONG])[picture.wrong.long().numpy()]
        draw(column[0], received, truth)
        for panel, colours in zip(column[1:], (truth, found, errors), strict=True):
            draw(panel, canonical, colours)
        column[0].set_title(picture.title, fontsize=style.TITLE)
        share = float(picture.wrong.double().mean())
        notes = (picture.notes[0], "", picture.notes[1], f"{100 * share:.0f} % wrong")
        for panel, note in zip(column, notes, strict=True):
            panel.set_xlabel(note, fontsize=style.NOTE)
    style.write(figure, path)


def colour_of(part: int, own: range) -> str:
    """The colour of a part, as ``#rrggbb``; of many parts, neighbours have near colours."""
    if part == UNLABELLED:
        return UNKNOWN
    if part not in own:
        return OF_ANOTHER_CLASS
    if len(own) <= len(style.PALETTE):
        return style.PALETTE[part - own.start]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["turbo"]((part - own.start) / (len(own) - 1)))


def _rgb(colours: Sequence[str]) -> np.ndarray:
    """``(N, 3)`` in [0, 1]."""
    return np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255

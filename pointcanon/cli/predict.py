"""``pointcanon predict``: labels, confidence and pose of clouds in files, as JSON lines."""

from __future__ import annotations

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointcanon.cli.options import Parser, add_vote
from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from pointcanon.cli.clouds import Item
    from pointcanon.cli.places import Places
    from pointcanon.model import Canonicalized, Prediction

__all__ = ["run"]

DESCRIPTION = """\
Labels, confidence and pose of the clouds in files and folders, a JSON line each: file, index (in a
file of many), label, confidence, top5, rotation (3 x 3, canonical to file), the same as
quaternion_wxyz, centre, scale, frame_weight (of that rotation, among those the canonicalizer
weighs), frame_confidence (how sure it is, where the canonicalizer says so), degenerate, points (how
many the network saw). A cloud x of the file has the canonical pose (x - centre) / scale @ rotation.
Of a cloud that is mirrored there, by a canonicalizer for reflections, the line has mirrored in
place of quaternion_wxyz.

A network that labels points labels all of them. In place of label and top5 a line then has category
and parts: of each part that was found its label and how many points have it; confidence is the mean
over the points. --labels puts the label of every point into the line, in the order of the points;
--out writes them to files, with the names that the clouds have in their folders: .npy as .npy (N,),
.npz and .h5 as .npz, everything else, with the points, as .ply.

A file that cannot be read, or that the network has no answer for, has a line with file, index and
error, and the exit status is then 1.
Under torchrun the files are shared out, and each process writes its own FILE.
"""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="pointcanon predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from pointcanon.cli import streaming
    from pointcanon.cli.clouds import looks_at_normals

    streaming.add_options(parser)
    add_vote(parser)
    parser.add_argument("--json", type=Path, help="write the lines here, not on standard output")
    parts = parser.add_argument_group("networks that label points")
    parts.add_argument(
        "--category",
        help="of all objects; by default, for networks that are told, the innermost folder that is "
        "named after one",
    )
    parts.add_argument("--labels", action="store_true", help="put those of the points in the lines")
    parts.add_argument("--out", type=Path, help="folder for files of the labels of the points")
    options = parser.parse_intermixed_args(argv)  # options may stand between files

    share = streaming.Share.from_environment()
    lines = streaming.Lines(options.json, options.resume, share)
    model = streaming.model_of(options, share)
    answer = _Parts(model, options) if model.segments else _Classes(model, options)
    return streaming.stream(
        model,
        options,
        lines,
        share,
        answer,
        normals=looks_at_normals(model),
        num_points=None if model.segments else streaming.points_seen(options, model),
        whole=model.segments and options.out is not None,
    )


class _Classes:
    """Answers with the class of each cloud."""

    def __init__(self, model: Canonicalized, options: argparse.Namespace) -> None:
        for name in ("category", "labels", "out"):
            if getattr(options, name):
                raise UsageError(
                    f"--{name} is for networks that label points: leave it out, "
                    f"{options.checkpoint} labels clouds"
                )
        self._model, self._frame = model, options.coordinate_frame

    def __call__(
        self, items: list[Item], points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> list[dict[str, Any]]:
        found = self._model.predict(points, mask, normals)
        top = found.probabilities.topk(min(5, found.probabilities.shape[1]), dim=1)
        return [
            {
                **item.record,
                "label": self._name(int(found.labels[row])),
                "confidence": float(found.confidence[row]),
                "top5": [
                    {"label": self._name(int(label)), "probability": float(probability)}
                    for probability, label in zip(top.values[row], top.indices[row], strict=True)
                ],
                **_pose(item, row, found, self._model, self._frame),
                "points": len(points[row]) if mask is None else int(mask[row].sum()),
            }
            for row, item in enumerate(items)
        ]

    def _name(self, label: int) -> str | int:
        names = self._model.classes
        return label if names is None else names[label]


class _Parts:
    """Answers with the part of each point."""

    def __init__(self, model: Canonicalized, options: argparse.Namespace) -> None:
        from pointcanon.classes import part_ranges
        from pointcanon.cli.places import Places
        from pointcanon.cli.streaming import points_seen
        from pointcanon.predictors import PartPredictor

        if options.drop_outliers:
            raise UsageError(
                "--drop_outliers is for networks that label clouds: leave it out, "
                f"{options.checkpoint} labels every point"
            )
        network = model.predictor
        assert isinstance(network, PartPredictor)
        self._model, self._options = model, options
        self._max_points = points_seen(options, model)
        numbers = range(network.num_categories)
        self._categories = _Categories(
            list(model.classes or map(str, numbers)), options, needed=len(numbers) > 0
        )
        self._names = list(model.parts or map(str, range(network.num_parts)))
        self._ranges = part_ranges(self._categories.names, self._names)
        self._places: Places | None = None
        if options.out is not None:
            self._places = Places(options.out, options.paths)

    def __call__(
        self, items: list[Item], points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> list[dict[str, Any]]:
        import torch

        categories = [self._categories.of(item.file) for item in items]
        told = None
        if self._categories.needed:
            told = torch.tensor(categories, device=points.device)
        found = self._model.predict(points, mask, normals, told, max_points=self._max_points)
        records = []
        for row, (item, category) in enumerate(zip(items, categories, strict=True)):
            own = range(len(self._names)) if category is None else self._ranges[category]
            count = len(points[row]) if mask is None else int(mask[row].sum())
            # padding comes last; an object has the parts of its category only
            probabilities = found.probabilities[row, :count, own.start : own.stop].cpu()
            confidence, labels = probabilities.max(dim=1)
            labels = labels + own.start
            records.append(
                {
                    **item.record,
                    "category": None if category is None else self._categories.names[category],
                    "parts": {
                        self._names[label]: {"label": label, "points": int(number)}
                        for label, number in enumerate(labels.bincount())
                        if number > 0
                    },
                    "confidence": float(confidence.mean()),
                    **({"labels": labels.tolist()} if self._options.labels else {}),
                    **({} if self._places is None else {"output": self._write(item, labels)}),
                    **_pose(item, row, found, self._model, self._options.coordinate_frame),
                    "points": count,
                }
            )
        return records

    def _write(self, item: Item, labels: Tensor) -> str:
        from pointcanon.cli.places import write

        assert self._places is not None
        assert item.whole is not None
        place, values = self._places.of(item), labels.numpy()
        columns = dict(zip("xyz", item.whole.points.T, strict=True))
        colours = dict(zip(("red", "green", "blue"), _colours(values).T, strict=True))
        write(place, {"labels": values}, {**columns, **colours, "label": values.astype(np.int32)})
        return str(place)


@dataclass(frozen=True)
class _Categories:
    """Which object is which.

    Raises:
        UsageError: If the category that was given is none, or one that is needed cannot be told.
    """

    names: list[str]
    options: argparse.Namespace
    needed: bool

    def __post_init__(self) -> None:
        from pointcanon import readers

        known = ", ".join(self.names) or "it says none"
        if self.options.category not in (None, *self.names):
            raise UsageError(
                f"--category {self.options.category!r} is none of the network's: {known}"
            )
        if not self.needed:
            return
        untold = (file for file in readers.find(self.options.paths) if self.of(file) is None)
        first = next(untold, None)
        if first is not None:
            raise UsageError(
                f"the network is told the category of the object, and that of {first} is not "
                f"known: give --category, or put it in a folder named after one of: {known}"
            )

    def of(self, file: str) -> int | None:
        from pointcanon.cli.clouds import folder_names

        if self.options.category is not None:
            return self.names.index(self.options.category)
        folders = folder_names(file, self.options.paths) if self.needed else []
        return next((self.names.index(name) for name in folders if name in self.names), None)


def _pose(
    item: Item, row: int, found: Prediction, model: Canonicalized, frame: str | None
) -> dict[str, Any]:
    from pointcanon.cli.streaming import Poses, pose_record

    poses = Poses(*(getattr(found, name) for name in Poses._fields))
    return pose_record(item, poses, row, model, frame)


def _colours(labels: np.ndarray) -> np.ndarray:
    """``(N, 3)`` uint8: hues a golden angle apart, so that neighbouring labels look different."""
    hues = np.arange(labels.max() + 1) * 0.381966 % 1
    table = np.array([colorsys.hsv_to_rgb(hue, 0.65, 0.9) for hue in hues])
    return (255 * table[labels]).round().astype(np.uint8)

"""The clouds in files, made ready for a network: what the commands that take files read them by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pointcanon import readers
from pointcanon.cli import printable
from pointcanon.coordinates import convert
from pointcanon.errors import CheckpointError, DataError, InputError, UsageError
from pointcanon.outliers import inliers

__all__ = [
    "Item",
    "Preparation",
    "conversion",
    "folder_names",
    "in_unit_ball",
    "loaded",
    "looks_at_normals",
    "progress",
]


@dataclass(frozen=True)
class Item:
    """A cloud on its way through the model, or what is wrong with it.

    Attributes:
        file: As it was named or found.
        index: Of the cloud in a file of many.
        weight: Its part of the file, for the progress bar.
        error: Why there is no cloud; everything below is then None.
        points: ``(N, 3)`` float64, drawn, normalised and in the frame of the checkpoint.
        normals: ``(N, 3)`` float64, if the model looks at normals.
        centre: ``(3,)`` float64, what was subtracted, in the file's frame.
        scale: What it was divided by.
        whole: The cloud as the file has it, if that was asked for.
    """

    file: str
    index: int | None
    weight: float
    error: str | None = None
    points: np.ndarray | None = None
    normals: np.ndarray | None = None
    centre: np.ndarray | None = None
    scale: float = 1.0
    whole: readers.Cloud | None = None

    @property
    def name(self) -> str:
        return self.file if self.index is None else f"{self.file}[{self.index}]"

    @property
    def record(self) -> dict[str, Any]:
        """How its line begins."""
        return {"file": self.file, "index": self.index}


@dataclass(frozen=True)
class Preparation:
    """From the cloud of a file to what a model takes.

    Attributes:
        num_points: Points that are drawn of a larger cloud; None takes all.
        unit_ball: Whether to centre and to divide by the largest norm.
        frames: The coordinate frames of the files and of the model, or None if they are one.
        normals: Whether the model looks at normals.
        samples: Points drawn on the surface of a mesh.
        whole: Whether the cloud is needed afterwards.
        drop_outliers: Whether points that belong to no surface are left out before all else.
    """

    num_points: int | None
    unit_ball: bool
    frames: tuple[str, str] | None
    normals: bool
    samples: int = 2048
    whole: bool = False
    drop_outliers: bool = False

    def __call__(self, item: Item, cloud: readers.Cloud) -> Item:
        if self.normals and cloud.normals is None:
            raise DataError(f"{item.name} has no normals, which the network looks at")
        points, seen = cloud.points.astype(np.float64), cloud.normals if self.normals else None
        with np.errstate(over="ignore", invalid="ignore"):
            reach = np.float32(np.abs(points).sum())  # which bounds their mean and differences
        if not np.isfinite(reach):
            raise DataError(f"{item.name} has coordinates beyond the range of float32")
        if self.drop_outliers:
            kept = inliers(torch.from_numpy(points)[None])[0].numpy()
            points, seen = points[kept], None if seen is None else seen[kept]
        centre = points.mean(axis=0)
        scale = np.linalg.norm(points - centre, axis=1).max() if self.unit_ball else 1.0
        scale = float(scale) or 1.0
        if self.unit_ball:
            points = (points - centre) / scale
        rows = _drawn(len(points), self.num_points)
        return replace(
            item,
            points=self._turned(points[rows]),
            normals=None if seen is None else self._turned(seen[rows]),
            centre=centre,
            scale=scale,
            whole=cloud if self.whole else None,
        )

    def _turned(self, vectors: np.ndarray) -> np.ndarray:
        """Points or normals in the frame of the model."""
        vectors = vectors.astype(np.float64)
        if self.frames is None:
            return vectors
        return convert(torch.from_numpy(vectors), *self.frames).numpy()


def _drawn(count: int, num_points: int | None) -> np.ndarray:
    """Rows of a cloud, all or a draw that knows only their number: a cloud that was turned is
    thinned to the same points."""
    from pointcanon.datasets.sampling import drawn_rows

    if num_points is None or count <= num_points:
        return np.arange(count)
    return drawn_rows(count, num_points, "")


class _Files(IterableDataset[Item]):
    """The clouds of files one after another, dealt out over the loader's processes by files."""

    def __init__(
        self, files: list[str], done: dict[str, set[int | None]], prepare: Preparation
    ) -> None:
        self.files, self.prepare = files, prepare
        self.done = {file: done[file] for file in files if file in done}

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for file in self.files[first::step]:
            yield from self._clouds(file)

    def _clouds(self, file: str) -> Iterator[Item]:
        try:
            clouds = readers.CloudFile(file, samples=self.prepare.samples)
        except DataError as error:
            yield Item(file, None, 1.0, error=str(error))
            return
        for index in range(len(clouds)):
            item = Item(file, index if clouds.stacked else None, 1 / len(clouds))
            if item.index in self.done.get(file, ()):
                continue
            try:
                yield self.prepare(item, clouds[index])
            except DataError as error:
                yield replace(item, error=str(error))


def loaded(
    files: list[str],
    prepare: Preparation,
    *,
    num_workers: int,
    prefetch: int = 32,
    done: dict[str, set[int | None]] | None = None,
) -> DataLoader[Item]:
    """The clouds of files, in a stream: each as a model takes it, or with what is wrong with it.

    Args:
        files: Their names.
        prepare: What is done to each cloud.
        num_workers: Processes that read; 0 reads here.
        prefetch: Clouds that each of them may be ahead.
        done: Clouds that are left out, by file.
    """
    num_workers = min(num_workers, len(files))
    return DataLoader(
        _Files(files, done or {}, prepare),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the loader draws a seed: not from the user's stream
    )


def _as_it_is(item: Any) -> Any:
    return item


def looks_at_normals(model: nn.Module) -> bool:
    """Whether any part of a model, the canonicalizer or the predictor, needs normals."""
    return any(getattr(part, "normals", None) is True for part in model.modules())


def in_unit_ball(network: object) -> bool:
    """Whether a network was trained on clouds that were centred and divided by their largest norm.

    Raises:
        CheckpointError: If it was trained on clouds normalised in a way that is not known here.
    """
    normalisation = getattr(network, "normalisation", None)
    if normalisation not in (None, "unit-ball"):
        raise CheckpointError(
            f"the network was trained on clouds normalised by {normalisation!r}; "
            "known here: unit-ball"
        )
    return normalisation is not None


def conversion(files: str | None, model: str | None) -> tuple[str, str] | None:
    """From the coordinate frame of files to that of a model; None where there is nothing to do.

    Raises:
        UsageError: If a frame is unknown, or the model does not say its own.
    """
    if files is None:
        return None
    if model is None:
        raise UsageError(
            "the checkpoint does not say its coordinate frame, so nothing can be converted to it; "
            "leave out --coordinate_frame"
        )
    try:
        convert(torch.eye(3), files, model)
    except InputError as error:
        raise UsageError(f"--coordinate_frame: {error}") from error
    return None if files == model else (files, model)


def folder_names(file: str, paths: list[str]) -> list[str]:
    """The folders that a file lies in, innermost first, up to the one that was named.

    Args:
        file: As :func:`pointcanon.readers.find` has it.
        paths: The files and folders that were named. Of a file that was named itself, the two
            innermost.
    """
    for path in paths:
        if os.path.isdir(path) and Path(file).is_relative_to(path):
            below = Path(file).relative_to(path).parent.parts
            return [*reversed(below), Path(path).absolute().name]
    return [folder.name for folder in Path(file).absolute().parents[:2]]


@contextmanager
def progress(files: int, show: bool) -> Iterator[Callable[[float, list[str]], None]]:
    """Takes how many files are through and what was wrong; a bar where a person looks on."""
    if not (show and sys.stderr.isatty()):

        def report(_: float, errors: list[str]) -> None:
            for error in errors:
                print(f"pointcanon: {printable(error)}", file=sys.stderr)

        yield report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), "files", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=files)

        def advance(weight: float, errors: list[str]) -> None:
            bar.advance(task, weight)
            for error in errors:
                line = f"pointcanon: {printable(error)}"
                bar.console.print(line, markup=False, soft_wrap=True)

        yield advance

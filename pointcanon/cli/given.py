"""The clouds that ``adapt`` and ``audit`` work on: files as they lie, or a registered data set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pointcanon.cli import printable
from pointcanon.errors import DataError, UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pointcanon.cli.clouds import Item
    from pointcanon.datasets import CloudDataset

__all__ = ["FileClouds", "add_clouds", "open_clouds"]


def add_clouds(parser: ArgumentParser) -> None:
    """The options that say which clouds."""
    from jsonargparse.typing import PositiveInt

    from pointcanon.cli.options import DataOptions

    parser.add_argument(
        "files",
        type=str,
        nargs="*",
        help="files of clouds or meshes, and folders of them; or leave it out and choose a data "
        "set with --data.*. A file that cannot be read is reported, and the rest go on",
    )
    parser.add_argument(
        "--num_points",
        type=PositiveInt | Literal["all"],
        default=1024,
        help="points of each of the files' clouds that the networks see, or all",
    )
    parser.add_argument(
        "--coordinate_frame",
        type=str | None,
        default=None,
        help="the frame of the files (z-up, y-up or y-up-mirrored), if it is not the network's; "
        "z-up where neither is known",
    )
    parser.add_argument(
        "--labels",
        type=Literal["folders", "none"] | None,
        default=None,
        help="folders: the class of a file is the name of a folder it lies in, of a network that "
        "does not say its classes the folder below the one that was named, in alphabetical order; "
        "none: not known. By default folders, if the network says its classes and the folders are "
        "named so. The category, for networks that label points and are told",
    )
    parser.add_class_arguments(DataOptions, "data")


def open_clouds(
    options: Namespace,
    network: Callable[..., Any],
    *others: nn.Module | None,
    num_workers: int = 0,
    limit: int | None = None,
) -> CloudDataset | FileClouds:
    """The clouds that the options of :func:`add_clouds` name, as the network takes them.

    Args:
        options: What was said.
        network: Says how clouds are normalised, in which frame, and what classes are called.
        *others: Further modules that look at the clouds.
        num_workers: Processes that read files; 0 reads here.
        limit: Read this many files, drawn from all of them: the same ones every time.

    Raises:
        CheckpointError: If the network was trained on clouds normalised in a way that is not known.
        DataError: If there is nothing that can be read.
        UsageError: On options that contradict each other or cannot be met.
    """
    from pointcanon.cli.options import DataOptions

    data = DataOptions(**options.data.as_dict())
    if not options.files:
        if options.labels or options.coordinate_frame:
            raise UsageError(
                "--labels and --coordinate_frame are for files: name some, or give --data.root"
            )
        return data.open()
    if data.root is not None:
        raise UsageError(f"name files or --data.root, not both: {options.files[0]}, {data.root}")
    return _read(options, network, others, num_workers, limit)


@dataclass(frozen=True)
class FileClouds:
    """Clouds that were read from files, as a data set: 12 bytes a point, 24 with normals.

    Attributes:
        name: What was named.
        coordinate_frame: Which way is up, if it is known.
        classes: Names of the classes, if any are known.
        labels: ``(M,)`` int64; zeros where they are not known.
        labelled: Whether they are.
    """

    name: str
    coordinate_frame: str | None
    classes: list[str]
    labels: np.ndarray
    labelled: bool
    clouds: list[dict[str, Tensor]]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.clouds[index], "label": int(self.labels[index])}

    def source(self, index: int) -> str:
        """The file, and the place in it, that a cloud comes from."""
        return self.sources[index]


def _read(
    options: Namespace,
    network: Callable[..., Any],
    others: tuple[nn.Module | None, ...],
    num_workers: int,
    limit: int | None,
) -> FileClouds:
    from pointcanon import readers
    from pointcanon.cli.clouds import (
        Preparation,
        conversion,
        in_unit_ball,
        loaded,
        looks_at_normals,
        progress,
    )
    from pointcanon.datasets.sampling import drawn_rows

    own = getattr(network, "coordinate_frame", None)
    seeing = [part for part in (network, *others) if isinstance(part, nn.Module)]
    prepare = Preparation(
        None if options.num_points == "all" else options.num_points,
        in_unit_ball(network),
        None if own is None else conversion(options.coordinate_frame, own),
        any(map(looks_at_normals, seeing)),
    )
    files = list(readers.find(options.files))
    classes, label_of = _labels(files, options, getattr(network, "classes", None))
    if limit is not None and limit < len(files):
        files = [files[place] for place in sorted(drawn_rows(len(files), limit, ""))]
    items: list[Item] = []
    failed = 0
    with progress(len(files), True) as advance:
        for item in loaded(files, prepare, num_workers=num_workers):
            advance(item.weight, [] if item.error is None else [item.error])
            if item.error is None:
                items.append(item)
            else:
                failed += 1
    only = len(options.files) == 1
    name = printable(options.files[0]) if only else f"{len(options.files)} paths"
    if not items:
        raise DataError(f"{name}: none of the {len(files):,} files can be read")
    if failed:
        print(
            f"pointcanon: {failed:,} left out, going on with {len(items):,} clouds", file=sys.stderr
        )
    return FileClouds(
        name=name,
        coordinate_frame=own or options.coordinate_frame,
        classes=classes,
        labels=np.array([label_of.get(item.file, 0) for item in items], np.int64),
        labelled=bool(label_of),
        clouds=[_tensors(item) for item in items],
        sources=[item.name for item in items],
    )


def _tensors(item: Item) -> dict[str, Tensor]:
    arrays = {"points": item.points, "normals": item.normals}
    return {
        name: torch.from_numpy(array).float() for name, array in arrays.items() if array is not None
    }


def _labels(
    files: list[str], options: Namespace, known: tuple[str, ...] | None
) -> tuple[list[str], dict[str, int]]:
    """Names of the classes, and the label of each file; nothing where labels are not known."""
    from pointcanon.cli.clouds import folder_names

    classes = list(known or ())
    if options.labels == "none" or (options.labels is None and not classes):
        return classes, {}
    folders = {file: [*map(printable, folder_names(file, options.files))] for file in files}
    if classes:
        found = {
            file: next((name for name in names if name in classes), None)
            for file, names in folders.items()
        }
    else:
        found = {file: names[-2] if len(names) > 1 else None for file, names in folders.items()}
        classes = sorted({name for name in found.values() if name is not None})
    untold = [file for file, name in found.items() if name is None]
    if options.labels is None and len(untold) == len(files):
        return classes, {}
    if untold:
        names = f": {', '.join(classes)}" if known else ""
        raise UsageError(
            f"{untold[0]} lies in no folder named after a class{names}; rename or move it, or "
            "give --labels none"
        )
    return classes, {file: classes.index(name) for file, name in found.items() if name is not None}

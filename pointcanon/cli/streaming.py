"""What ``predict`` and ``canonicalize`` share: files go in as a stream, JSON lines come out.

Any number of files takes the memory of a few batches. Every cloud has one line in the output, and
a cloud that cannot be used has one that says why. Lines are appended whole, a batch at a time, so a
run that was interrupted goes on where it stopped.

Under ``torchrun`` the files are dealt out over the processes, and each writes its own shard.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import roma
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pointcanon import readers
from pointcanon.cli.options import Parser, open_checkpoint, pick_device
from pointcanon.coordinates import convert
from pointcanon.errors import CheckpointError, DataError, InputError, UsageError
from pointcanon.files import require_writable
from pointcanon.model import Canonicalized
from pointcanon.rotations import svd_project

__all__ = [
    "Item",
    "Lines",
    "Share",
    "add_options",
    "open_model",
    "pose_record",
    "stream",
]

POINTS_AT_ONCE = 1 << 20
"""Padded points of a batch: large clouds go in smaller batches."""


def add_options(parser: Parser) -> None:
    """The options that both commands have."""
    parser.add_argument("checkpoint", help="a canonicalized model, or a predictor: ours or public")
    parser.add_argument("paths", nargs="+", help="files of clouds or meshes, and folders of them")
    parser.add_argument(
        "--num_points",
        type=_number_or_all,
        default=1024,
        help="points of each cloud that the networks see, or all; the default, 1024, is what most "
        "are trained on",
    )
    parser.add_argument(
        "--coordinate_frame",
        help="the frame of the files (z-up, y-up or y-up-mirrored), if it is not the checkpoint's",
    )
    parser.add_argument("--batch_size", type=_positive, default=32, help="clouds at once")
    parser.add_argument("--num_workers", type=_natural, default=0, help="processes that read files")
    parser.add_argument("--device", help="such as cpu or cuda; cuda where there is one")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the output of an interrupted run"
    )


def _positive(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def open_model(checkpoint: str, device: str | None, share: Share) -> Canonicalized:
    """What the checkpoint holds, on the device; a predictor alone is put behind no canonicalizer.

    Raises:
        CheckpointError: If it cannot be read, or was trained on clouds normalised in a way that
            is not known here.
        UsageError: If there is no such device.
    """
    from pointcanon.canonicalizers import Identity

    model = open_checkpoint(checkpoint)
    if not isinstance(model, Canonicalized):
        model = Canonicalized(model, Identity())
    if model.normalisation not in (None, "unit-ball"):
        raise CheckpointError(
            f"{checkpoint} was trained on clouds normalised by {model.normalisation!r}; "
            "known here: unit-ball"
        )
    if device is None:
        device = f"cuda:{share.local_rank}" if torch.cuda.is_available() else "cpu"
    return model.eval().to(pick_device(device))


# ------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Share:
    """Which part of the files is this process's: every ``world``-th from the ``rank``-th."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Share:
        """As ``torchrun`` says, or all of it.

        Raises:
            UsageError: If it says what cannot be.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local = (os.environ.get(name, "") for name in names)
        if not rank and not world:
            return cls()
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UsageError(
                f"RANK is {rank!r} and WORLD_SIZE {world!r}; start with torchrun, or unset both"
            )
        return cls(int(rank), int(world), int(local) if local.isdecimal() else 0)

    @contextmanager
    def together(self) -> Iterator[Callable[[bool], bool]]:
        """Tells, once all processes have asked, whether any of them failed.

        torchrun ends all processes as soon as one reports a failure, so none does before the
        others have done their work.
        """
        if self.world == 1 or "MASTER_ADDR" not in os.environ:
            yield lambda failed: failed
            return
        from torch import distributed

        # the shares may take very different times
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        try:
            yield _any_failed
        finally:
            distributed.destroy_process_group()


def _any_failed(failed: bool) -> bool:
    from torch import distributed

    total = torch.tensor(int(failed))
    distributed.all_reduce(total)
    return bool(total > 0)


# --------------------------------------------------------------------------------------- output


class Lines:
    """JSON lines on standard output or in a file, which an interrupted run leaves usable.

    Args:
        path: None for standard output. Of several processes each writes a shard beside it,
            ``name.0-of-2.jsonl``.
        resume: Go on with what is there.
        share: Of this process.

    Attributes:
        done: Of each file in the output so far, by any process, the indices of its clouds; None
            among them means the whole file.
        failed: Number of lines that report an error.

    Raises:
        UsageError: If the file cannot be written, holds earlier output that is not to be resumed,
            or several processes would share standard output.
    """

    def __init__(self, path: Path | None, resume: bool, share: Share) -> None:
        if path is None and (share.world > 1 or resume):
            reason = "--resume" if resume else "several processes"
            raise UsageError(f"{reason}: name the output with --json FILE")
        self.done: dict[str, set[int | None]] = {}
        self.failed = 0
        self._path = None if path is None else require_writable(_shard(path, share))
        if path is None or self._path is None or (path.exists() and not path.is_file()):
            return
        # nobody else writes the output of another number of processes, nor of this one
        own = [self._path]
        if share.rank == 0:
            own += [file for file in _shards(path) if not file.match(f"*-of-{share.world}.*")]
        for file in own:
            if resume:
                _cut_torn_line(file)
            elif file.exists():
                raise UsageError(
                    f"{file} exists: go on with it (--resume), remove it, or name another --json"
                )
        for file in _shards(path) if resume else ():
            self._recall(file)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write a line each, and have them on disk before anything else is done."""
        if not records:
            return
        self.failed += sum("error" in record for record in records)
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if self._path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def _recall(self, file: Path) -> None:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    return  # another process is writing it
                try:
                    record = json.loads(line)
                    self.done.setdefault(record["file"], set()).add(record["index"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{file}, line {number} is not of this command's output: it cannot be "
                        "resumed; name another --json"
                    ) from error
                self.failed += "error" in record


def _shard(path: Path, share: Share) -> Path:
    if share.world == 1:
        return path
    return path.with_name(f"{path.stem}.{share.rank}-of-{share.world}{path.suffix}")


def _shards(path: Path) -> list[Path]:
    """The output there is, of one process or of any number."""
    found = sorted(path.parent.glob(f"{escape(path.stem)}.*-of-*{path.suffix}"))
    return [*([path] if path.exists() else []), *found]


def _cut_torn_line(file: Path) -> None:
    """Remove the last line of a file if its end was never written."""
    if not file.exists():
        return
    with file.open("r+b") as held:
        end = held.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and b"\n" not in tail:
            start = max(0, end - 65536)
            held.seek(start)
            tail, end = held.read(end - start), start
        held.truncate(end + tail.rfind(b"\n") + 1)


# ---------------------------------------------------------------------------------------- input


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
        whole: Whether the cloud is needed afterwards.
    """

    num_points: int | None
    unit_ball: bool
    frames: tuple[str, str] | None
    normals: bool
    whole: bool

    def __call__(self, item: Item, cloud: readers.Cloud) -> Item:
        if self.normals and cloud.normals is None:
            raise DataError(f"{item.name} has no normals, which the network looks at")
        points = cloud.points.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            centre = points.mean(axis=0)
            scale = np.linalg.norm(points - centre, axis=1).max() if self.unit_ball else 1.0
        if not np.isfinite(np.float32(np.abs(points).max())) or not np.isfinite(scale):
            raise DataError(f"{item.name} has coordinates beyond the range of float32")
        scale = float(scale) or 1.0
        if self.unit_ball:
            points = (points - centre) / scale
        rows = _drawn(len(points), self.num_points)
        normals = None
        if self.normals and cloud.normals is not None:
            normals = self._turned(cloud.normals[rows])
        normals = (
            self._turned(cloud.normals[rows])
            if self.normals and cloud.normals is not None
            else None
        )
        return replace(
            item,
            points=self._turned(points[rows]),
            normals=normals,
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


class Files(IterableDataset[Item]):
    """The clouds of files one after another, dealt out over the loader's processes by files.

    Args:
        files: Their names.
        done: Clouds that are left out, by file.
        prepare: What is done to each.
    """

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
            clouds = readers.CloudFile(file, samples=max(2048, self.prepare.num_points or 0))
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


def stream(
    model: Canonicalized,
    options: argparse.Namespace,
    lines: Lines,
    share: Share,
    answer: Callable[[list[Item], Tensor, Tensor | None, Tensor | None], list[dict[str, Any]]],
    *,
    normals: bool,
    whole: bool = False,
) -> None:
    """Put the files of this process through ``answer``, batch by batch, and its records out.

    Args:
        model: Says how clouds are normalised, and in which frame and dtype it takes them.
        options: Those of :func:`add_options`.
        lines: Takes the records.
        share: Of this process.
        answer: Records of clouds, given points ``(B, N, 3)``, mask ``(B, N)`` or None and normals
            or None on the device of the model.
        normals: Whether the clouds need normals.
        whole: Whether ``answer`` needs the clouds as the files have them.

    Raises:
        DataError: If a folder holds nothing that can be read, or the output cannot be written.
        UsageError: If the coordinate frame is unknown, or the checkpoint does not say its own.
    """
    prepare = Preparation(
        options.num_points,
        model.normalisation == "unit-ball",
        _frames(options.coordinate_frame, model.coordinate_frame),
        normals,
        whole,
    )
    files = list(readers.find(options.paths))[share.rank :: share.world]
    files = [file for file in files if None not in lines.done.get(file, ())]
    loader: DataLoader[Item] = DataLoader(
        Files(files, lines.done, prepare),
        batch_size=None,
        num_workers=min(options.num_workers, len(files)),
        prefetch_factor=options.batch_size if options.num_workers and files else None,
        collate_fn=_as_it_is,
    )
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.no_grad(), _progress(len(files), share.rank == 0) as advance:
        for lot in _lots(loader, options.batch_size):
            good = [item for item in lot if item.error is None]
            bad = [item for item in lot if item.error is not None]
            records = answer(good, *_padded(good, weight)) if good else []
            lines.append(records + [{**item.record, "error": item.error} for item in bad])
            advance(sum(item.weight for item in lot), [str(item.error) for item in bad])


def _frames(files: str | None, model: str | None) -> tuple[str, str] | None:
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


def _as_it_is(item: Any) -> Any:
    return item


def _lots(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Up to ``size`` clouds at once, fewer where they are large."""
    lot: list[Item] = []
    longest = 0
    for item in items:
        count = 0 if item.points is None else len(item.points)
        longest = max(longest, count)
        if lot and (len(lot) == size or longest * (len(lot) + 1) > POINTS_AT_ONCE):
            yield lot
            lot, longest = [], count
        lot.append(item)
    if lot:
        yield lot


def _padded(items: list[Item], like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from pointcanon.interop import pad

    def padded(clouds: list[np.ndarray | None]) -> tuple[Tensor, Tensor | None]:
        return pad([torch.as_tensor(cloud).to(like) for cloud in clouds])

    points, mask = padded([item.points for item in items])
    if items[0].normals is None:
        return points, mask, None
    return points, mask, padded([item.normals for item in items])[0]


@contextmanager
def _progress(files: int, show: bool) -> Iterator[Callable[[float, list[str]], None]]:
    """Takes how many files are through and what was wrong; a bar where a person looks on."""
    if not (show and sys.stderr.isatty()):

        def report(_: float, errors: list[str]) -> None:
            for error in errors:
                print(f"pointcanon: {error}", file=sys.stderr)

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
                bar.console.print(f"pointcanon: {error}", markup=False, soft_wrap=True)

        yield advance


def pose_record(
    item: Item, rotation: Tensor, model: Canonicalized, frame: str | None
) -> dict[str, Any]:
    """Where a cloud is: ``x_canonical = (x - centre) / scale @ rotation``, for rows x of the file.

    Args:
        item: The cloud.
        rotation: ``(3, 3)``, as the model found it, in its own coordinate frame.
        model: Says its frame.
        frame: That of the file; None for the model's. The canonical pose is expressed in it too,
            so the rotation is proper even where one frame is mirrored.

    Returns:
        ``centre``, ``scale``, ``rotation`` and ``quaternion_wxyz`` with w >= 0.
    """
    turn = svd_project(rotation.detach().cpu().double())  # its inverse is to be exact in float64
    if frame is not None and model.coordinate_frame is not None:
        back = (model.coordinate_frame, frame)
        turn = convert(convert(turn, *back).mT, *back).mT
    quaternion = roma.rotmat_to_unitquat(turn)[[3, 0, 1, 2]]
    quaternion = torch.where(quaternion[0] < 0, -quaternion, quaternion)
    assert item.centre is not None
    return {
        "centre": item.centre.tolist(),
        "scale": item.scale,
        "rotation": turn.tolist(),
        "quaternion_wxyz": quaternion.tolist(),
    }

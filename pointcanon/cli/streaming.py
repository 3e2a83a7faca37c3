"""What ``predict`` and ``canonicalize`` share: files go in as a stream, JSON lines come out.

Any number of files takes the memory of a few batches. Every cloud has one line in the output, and
a cloud that cannot be used, or that a network has no answer for, has one that says why. Lines are
appended whole, a batch at a time, so a run that was interrupted goes on where it stopped.

Under ``torchrun`` the files are dealt out over the processes, and each writes its own shard.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from glob import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import roma
import torch
from torch import Tensor

from pointcanon import readers
from pointcanon.cli.clouds import Item, Preparation, conversion, in_unit_ball, loaded, progress
from pointcanon.cli.options import Parser, add_canonicalizer, open_model, pick_device
from pointcanon.coordinates import convert
from pointcanon.errors import DataError, InputError, NotFiniteError, UsageError
from pointcanon.files import require_writable
from pointcanon.model import Canonicalized
from pointcanon.rotations import svd_project

__all__ = [
    "Item",
    "Lines",
    "Poses",
    "Share",
    "add_options",
    "model_of",
    "points_seen",
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
        help="points of each cloud that the networks see, or all; by default what most are trained "
        "on, 1024, or 2048 by those that label points",
    )
    add_canonicalizer(parser, "in front of the predictor, in the place of the checkpoint's own")
    parser.add_argument(
        "--coordinate_frame",
        help="the frame of the files (z-up, y-up or y-up-mirrored), if it is not the checkpoint's",
    )
    parser.add_argument(
        "--drop_outliers",
        action="store_true",
        help="leave out points whose neighbours are far away, before anything looks at the cloud",
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


def _number_or_all(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else _positive(text)


def points_seen(options: argparse.Namespace, model: Canonicalized) -> int | None:
    """How many points of a cloud the networks see at once; None for all."""
    if options.num_points is None:
        return 2048 if model.segments else 1024
    return None if options.num_points == "all" else options.num_points


def model_of(options: argparse.Namespace, share: Share) -> Canonicalized:
    """The model that the options name, in eval mode, on the device.

    Raises:
        CheckpointError: As for :func:`open_model`, or if it was trained on clouds normalised in a
            way that is not known here.
        UsageError: As for :func:`open_model`, or if there is no such device.
    """
    model = open_model(
        options.checkpoint,
        options.canonicalizer,
        options.canonicalizer_options,
        vars(options).get("vote"),  # only where something is predicted
    )
    in_unit_ball(model)
    return model.to(pick_device(options.device, share.local_rank))


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
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    return  # another process is writing it
                try:
                    record = json.loads(line)
                    self.done.setdefault(record["file"], set()).add(record["index"])
                except (ValueError, KeyError, TypeError, RecursionError) as error:
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


# -------------------------------------------------------------------------------------- streaming


Answer: TypeAlias = Callable[
    [list[Item], Tensor, Tensor | None, Tensor | None], list[dict[str, Any]]
]
"""From clouds, their points ``(B, N, 3)``, mask ``(B, N)`` or None and normals or None, on the
device of the model, to a record of each."""


def stream(
    model: Canonicalized,
    options: argparse.Namespace,
    lines: Lines,
    share: Share,
    answer: Answer,
    *,
    normals: bool,
    num_points: int | None,
    whole: bool = False,
) -> int:
    """Put the files of this process through ``answer``, batch by batch, and its records out.

    Args:
        model: Says how clouds are normalised, and in which frame and dtype it takes them.
        options: Those of :func:`add_options`.
        lines: Takes the records.
        share: Of this process.
        answer: What is said of a batch; InputError, if one of its clouds has no answer.
        normals: Whether the clouds need normals.
        num_points: Points that are drawn of larger clouds; None gives ``answer`` all.
        whole: Whether ``answer`` needs the clouds as the files have them.

    Returns:
        The exit status: 1 if any process has a line that reports an error.

    Raises:
        DataError: If a folder holds nothing that can be read, or the output cannot be written.
        UsageError: If the coordinate frame is unknown, or the checkpoint does not say its own.
    """
    with share.together() as any_failed:
        prepare = Preparation(
            num_points,
            in_unit_ball(model),
            conversion(options.coordinate_frame, model.coordinate_frame),
            normals,
            samples=max(2048, points_seen(options, model) or 0),
            whole=whole,
            drop_outliers=options.drop_outliers,
        )
        files = list(readers.find(options.paths))[share.rank :: share.world]
        files = [file for file in files if None not in lines.done.get(file, ())]
        items = loaded(
            files,
            prepare,
            num_workers=options.num_workers,
            prefetch=options.batch_size,
            done=lines.done,
        )
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        with torch.no_grad(), progress(len(files), share.rank == 0) as advance:
            for lot in _lots(items, options.batch_size):
                good = [item for item in lot if item.error is None]
                bad = [item for item in lot if item.error is not None]
                records = _answered(good, answer, weight) if good else []
                records += [{**item.record, "error": item.error} for item in bad]
                lines.append(records)
                errors = [record["error"] for record in records if "error" in record]
                advance(sum(item.weight for item in lot), errors)
        return int(any_failed(lines.failed > 0))


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


def _answered(items: list[Item], answer: Answer, like: Tensor) -> list[dict[str, Any]]:
    """Records of clouds, or of one that a network has no answer for with the reason."""
    try:
        return answer(items, *_padded(items, like))
    except InputError as error:
        if len(items) > 1:  # the others go on without it
            return [record for item in items for record in _answered([item], answer, like)]
        reason = str(error)
        if isinstance(error, NotFiniteError):
            reason = f"the network answers NaN or infinity: {error.remedy}"
        return [{**items[0].record, "error": f"{items[0].name}: {reason}"}]


def _padded(items: list[Item], like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from pointcanon.interop import pad

    def padded(clouds: list[np.ndarray | None]) -> tuple[Tensor, Tensor | None]:
        return pad([torch.as_tensor(cloud).to(like) for cloud in clouds])

    points, mask = padded([item.points for item in items])
    if items[0].normals is None:
        return points, mask, None
    return points, mask, padded([item.normals for item in items])[0]


class Poses(NamedTuple):
    """The poses of B clouds, as a model found them: fields as those of ``Prediction``."""

    rotation: Tensor
    scale: Tensor | None
    degenerate: Tensor
    frame_weight: Tensor
    frame_confidence: Tensor | None


def pose_record(
    item: Item, poses: Poses, row: int, model: Canonicalized, frame: str | None
) -> dict[str, Any]:
    """Where a cloud is: ``x_canonical = (x - centre) / scale @ rotation``, for rows x of the file.

    Args:
        item: The cloud.
        poses: Of the batch that it is in, in the model's coordinate frame.
        row: Its place there.
        model: Says its frame.
        frame: That of the file; None for the model's. The canonical pose is expressed in it too,
            so the rotation is proper even where one frame is mirrored.

    Returns:
        ``centre``, ``scale``, ``rotation``, ``quaternion_wxyz`` with w >= 0, ``frame_weight``,
        ``frame_confidence`` where something says it, ``degenerate``. Of a cloud that is mirrored in
        its canonical pose (``ForGroup`` with O(2) or O(3)) det of the rotation is -1, which no
        quaternion says: there is ``mirrored`` in place of it.
    """
    found = poses.rotation[row].detach().cpu().double()
    mirrored = bool(found.det() < 0)
    hand = -1.0 if mirrored else 1.0
    turn = hand * svd_project(hand * found)  # its inverse is to be exact in float64
    if frame is not None and model.coordinate_frame is not None:
        back = (model.coordinate_frame, frame)
        turn = convert(convert(turn, *back).mT, *back).mT
    confidence = poses.frame_confidence
    assert item.centre is not None
    return {
        "centre": item.centre.tolist(),
        "scale": item.scale * (1.0 if poses.scale is None else float(poses.scale[row])),
        "rotation": turn.tolist(),
        **({"mirrored": True} if mirrored else {"quaternion_wxyz": _quaternion(turn)}),
        "frame_weight": float(poses.frame_weight[row]),
        **({} if confidence is None else {"frame_confidence": float(confidence[row])}),
        "degenerate": bool(poses.degenerate[row]),
    }


def _quaternion(rotation: Tensor) -> list[float]:
    """Of two that say the same the one with w >= 0, w first."""
    quaternion = roma.rotmat_to_unitquat(rotation)[[3, 0, 1, 2]]
    values: list[float] = torch.where(quaternion[0] < 0, -quaternion, quaternion).tolist()
    return values

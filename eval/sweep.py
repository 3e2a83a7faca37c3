"""A network asked about some clouds at every angle, and which way it finds to be up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.datasets import UNLABELLED, CloudDataset, PartDataset
from pointcanon.errors import InputError
from pointcanon.eval.audit import ANGLES
from pointcanon.eval.evaluate import (
    check_fit,
    chosen_clouds,
    evaluating,
    in_batches,
    naming_clouds,
    require_finite,
    shown,
    turned,
)
from pointcanon.eval.protocols import Pose, Protocol, pose_rotations
from pointcanon.eval.protocols import protocol as protocol_named
from pointcanon.model import Canonicalized
from pointcanon.rotations import about_axis

__all__ = ["Sweep", "Swept", "part_scores", "sweep", "wilson"]


@dataclass(frozen=True)
class Swept:
    """What a network does with n clouds; scores are shares of 1.

    Attributes:
        name: Of the network, or of what stands in front of it.
        by_angle: ``(A, n)`` float64, the score of each cloud at each of the angles.
        score: ``(n,)`` float64, in the pose of the protocol.
        up: ``(n, 3)`` float64 unit vectors: where the up axis of the data comes to lie in the
            canonical pose then, z-up. Where the canonicalizer is right that is (0, 0, 1).
    """

    name: str
    by_angle: Tensor
    score: Tensor
    up: Tensor


@dataclass(frozen=True)
class Sweep:
    """All that :func:`sweep` found.

    Attributes:
        measure: What a score is, and so its mean: ``overall_accuracy``, ``instance_miou``, or, of
            parts of a single class, ``point_accuracy``.
        angles: Degrees, about an axis drawn for each cloud.
        pose: Of the protocol.
        clouds: Indices of the clouds, drawn by the seed.
        total: Clouds that they were drawn from.
        seed: Of clouds and rotations.
        networks: The predictor alone, unless it is; then the model.
    """

    measure: str
    angles: tuple[int, ...]
    pose: Pose
    clouds: tuple[int, ...]
    total: int
    seed: int
    networks: tuple[Swept, ...]


def sweep(
    model: Canonicalized,
    dataset: CloudDataset,
    protocol: Protocol | str,
    *,
    clouds: int = 200,
    angles: Sequence[int] = ANGLES,
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    restricted: bool = True,
    max_points: int | None = None,
    progress: bool = False,
) -> Sweep:
    """Ask a model and its predictor alone about some clouds, turned further and further.

    Each cloud is turned by every angle about one random axis, and once as the protocol says. All
    that is random follows from the seed.

    Args:
        model: Its predictor is a classifier or labels parts.
        dataset: Clouds with their classes and, for a part network, their parts.
        protocol: Its test pose is the one in which up axes are looked for.
        clouds: Drawn from the data set; all, where it has no more.
        angles: Degrees.
        seed: Also of the rotations of the pose, as :func:`~pointcanon.eval.evaluate.evaluate` has
            them.
        batch_size: Clouds at once.
        device: Where to compute; by default where the model is.
        num_workers: Processes that read the data; 0 reads here.
        limit: Draw from so many clouds, as for :func:`~pointcanon.eval.evaluate.evaluate`.
        restricted: As for :func:`~pointcanon.eval.evaluate.evaluate`.
        max_points: As for :func:`~pointcanon.eval.evaluate.evaluate`.
        progress: Show a bar on standard error, where that is a terminal.

    Raises:
        CheckpointError: If the model was trained in another coordinate frame or on other classes.
        DataError: If the data set is empty.
        InputError: If ``clouds`` < 1, or the model answers NaN or infinity.
        UsageError: On an unknown protocol.
    """
    if clouds < 1:
        raise InputError(f"clouds is {clouds}; choose at least 1")
    pose = protocol_named(protocol).test
    check_fit(model, dataset)
    among = chosen_clouds(dataset, limit)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(among), generator=generator)[:clouds].sort().values
    chosen = [among[place] for place in drawn.tolist()]
    turns = torch.cat(
        (
            _about_random_axes(len(dataset), angles, generator),
            pose_rotations(
                pose, len(dataset), dataset.coordinate_frame.up_axis, seed=seed, dtype=torch.float64
            )[None],
        )
    )
    loader = in_batches(dataset, chosen, batch_size, num_workers)
    predictor = type(model.predictor).__name__
    asked = {predictor: model}
    if not isinstance(model.canonicalizer, Identity):
        asked = {
            f"{predictor} alone": Canonicalized(model.predictor, Identity()),
            f"behind {type(model.canonicalizer).__name__}": model,
        }
    measure = "overall_accuracy"
    if model.segments:
        measure = _part_measure(cast(PartDataset, dataset).part_ranges)
    with evaluating(model, device) as like, shown(loader, progress) as batches:
        walked = _walk(list(asked.values()), batches, turns, like, dataset, restricted, max_points)
    return Sweep(
        measure=measure,
        angles=tuple(angles),
        pose=pose,
        clouds=tuple(chosen),
        total=len(among),
        seed=seed,
        networks=tuple(
            Swept(name, score[:-1], score[-1], _up(rotation, turns[-1, chosen], dataset))
            for name, (score, rotation) in zip(asked, walked, strict=True)
        ),
    )


def wilson(share: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ends of the 95 % score interval of a mean of ``count`` values in [0, 1] (Wilson, 1927).

    Exact enough for shares of yes and no also near 0 and 1; of values in between, whose variance is
    less, it is somewhat too wide.
    """
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = (share * (1 - share) / count + (z / (2 * count)) ** 2).clamp(min=0).sqrt()
    reach = z * spread / (1 + z**2 / count)
    return (middle - reach).clamp(min=0), (middle + reach).clamp(max=1)


def part_scores(
    found: Tensor,
    truth: Tensor,
    category: Tensor,
    ranges: Sequence[range],
    mask: Tensor | None = None,
) -> Tensor:
    """``(B,)`` float64: the mIoU of each cloud or, where there is one class, the points right.

    Args:
        found: ``(B, N)`` int64 parts.
        truth: ``(B, N)`` int64 parts, or ``UNLABELLED``.
        category: ``(B,)`` int64.
        ranges: For each category its parts.
        mask: ``(B, N)`` bool, True = a real point.
    """
    from pointcanon.eval.metrics import shape_iou

    if _part_measure(ranges) == "instance_miou":
        return shape_iou(found, truth, category, ranges, mask)
    counted = truth != UNLABELLED
    counted = counted if mask is None else counted & mask
    right = (counted & (found == truth)).double().sum(dim=1)
    return right / counted.sum(dim=1).clamp(min=1)


def _part_measure(ranges: Sequence[range]) -> str:
    return "instance_miou" if len(ranges) > 1 else "point_accuracy"


def _about_random_axes(count: int, angles: Sequence[int], generator: torch.Generator) -> Tensor:
    """``(A, count, 3, 3)`` float64, one axis for each cloud."""
    axes = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    radians = [torch.tensor(math.radians(angle), dtype=torch.float64) for angle in angles]
    return torch.stack([about_axis(axes, angle.expand(count)) for angle in radians])


def _walk(
    networks: list[Canonicalized],
    batches: Iterable[dict[str, Tensor]],
    turns: Tensor,
    like: Tensor,
    dataset: CloudDataset,
    restricted: bool,
    max_points: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """Of each network, scores ``(P, n)`` and frames ``(n, 3, 3)`` of the last pose, float64."""
    scores: list[list[Tensor]] = [[] for _ in networks]
    frames: list[list[Tensor]] = [[] for _ in networks]
    for batch in batches:
        clouds = [turned(batch, turn, like) for turn in turns[:, batch["index"]]]
        for network, score, frame in zip(networks, scores, frames, strict=True):
            with naming_clouds(batch):
                answers = [_asked(network, cloud, max_points) for cloud in clouds]
            outputs, rotations = zip(*answers, strict=True)
            score.append(
                torch.stack([_score(said.cpu(), batch, dataset, restricted) for said in outputs])
            )
            frame.append(rotations[-1].double().cpu())
    return [
        (torch.cat(score, dim=1), torch.cat(frame))
        for score, frame in zip(scores, frames, strict=True)
    ]


def _asked(
    network: Canonicalized, cloud: dict[str, Tensor], max_points: int | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and the rotation ``(B, 3, 3)`` that they were found in."""
    given = cloud["points"], cloud.get("mask"), cloud.get("normals")
    category = cloud["label"] if network.segments else None
    frames = network.canonicalizer(*given)
    answer = network.answer(frames, *given, category, max_points=max_points)
    return answer.outputs, frames.select(answer.frame[:, None]).rotations[:, 0]


def _score(
    outputs: Tensor, batch: dict[str, Tensor], dataset: CloudDataset, restricted: bool
) -> Tensor:
    """``(B,)`` float64."""
    from pointcanon.eval.metrics import predicted_parts

    require_finite(outputs, batch)
    if outputs.ndim == 2:
        return (outputs.argmax(dim=-1) == batch["label"]).double()
    ranges = cast(PartDataset, dataset).part_ranges
    found = predicted_parts(outputs, batch["label"], ranges, restricted=restricted)
    return part_scores(found, batch["parts"], batch["label"], ranges, batch.get("mask"))


def _up(rotation: Tensor, turn: Tensor, dataset: CloudDataset) -> Tensor:
    """Where up comes to lie in the canonical pose, z-up."""
    frame: CoordinateFrame = dataset.coordinate_frame
    return convert((rotation.mT @ turn @ frame.up_axis), frame, "z-up")

"""Accuracy under rotation: every figure of a report from one walk through the data.

A classifier is scored by its accuracy, a part network by its mIoU; the rest is the same.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch import distributed as processes
from torch.utils.data import DataLoader

from pointcanon.canonicalizers import Canonicalizer, Identity
from pointcanon.coordinates import coordinate_frame
from pointcanon.datasets import CloudDataset, PartDataset
from pointcanon.datasets.collate import collate
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.errors import CheckpointError, DataError, InputError, NotFiniteError
from pointcanon.eval import protocols
from pointcanon.eval.protocols import Protocol
from pointcanon.eval.scores import ClassScores, PartScores, Scores, Tally, Trials, tally_for
from pointcanon.model import Canonicalized
from pointcanon.predictors.base import PartPredictor
from pointcanon.rotations import geodesic_angle

__all__ = [
    "AGAIN_SEED",
    "Angles",
    "ClassScores",
    "Evaluation",
    "FrameQuality",
    "Invariance",
    "PartScores",
    "Scores",
    "Timing",
    "Trials",
    "check_fit",
    "chosen_clouds",
    "evaluate",
    "evaluating",
    "in_batches",
    "naming_clouds",
    "now",
    "require_finite",
    "shown",
    "turned",
]

AGAIN_SEED = 2_024_003
"""Seed of the further rotations under which predictions and frames are compared with themselves."""

UPRIGHT_DEGREES = 10.0
"""An up axis found within this angle counts as right, as in the orientation literature."""


@dataclass(frozen=True)
class Angles:
    """Quantiles of angles in degrees (linear interpolation between clouds)."""

    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class Invariance:
    """How far answers depend on the rotation.

    Attributes:
        prediction_flip_rate: Share of clouds whose predicted class, or of points whose predicted
            part, changes when the cloud, turned by the first seed, is turned again by an
            independent rotation of the same pose.
        rotation_error_deg: Angle between the frame found then and the first frame turned along,
            over the clouds that determine a frame; None if no cloud does.
    """

    prediction_flip_rate: float
    rotation_error_deg: Angles | None


@dataclass(frozen=True)
class FrameQuality:
    """The heaviest frame of each cloud, pooled over the seeds.

    Attributes:
        count: Frames of each cloud.
        passes: Times the predictor runs for a cloud, on average: in how many frames it is asked.
        median_error_deg: Of the angle between the frame and the rotation applied: the distance to
            the data's own pose, which says something where the data are aligned.
        up_within_10_deg: Share of clouds whose up axis is found within 10 degrees.
        degenerate: Share of clouds that do not determine a frame.
        recognised: Share of clouds whose class the canonicalizer itself tells
            (``Frames.class_logits``); None where it knows none, or others than the data set's.
    """

    count: int
    passes: float
    median_error_deg: float
    up_within_10_deg: float
    degenerate: float
    recognised: float | None = None


@dataclass(frozen=True)
class Timing:
    """Forward time in milliseconds for one cloud: median over batches of time / batch.

    Attributes:
        canonicalizer_ms: Finding the frames.
        predictor_ms: Posing, predicting in every frame, voting.
        device: Where it ran.
        threads: Of the CPU.
        batch_size: Clouds at once, of the largest batch.
    """

    canonicalizer_ms: float
    predictor_ms: float
    device: str
    threads: int
    batch_size: int

    @property
    def total_ms(self) -> float:
        return self.canonicalizer_ms + self.predictor_ms


@dataclass(frozen=True)
class Evaluation:
    """All that :func:`evaluate` found.

    Attributes:
        dataset: Name of the data set.
        split: Of it, where it says so.
        coordinate_frame: Frame of the clouds.
        n: Clouds evaluated.
        num_points: Points of each cloud; None where they differ.
        restricted: Whether parts were chosen among those of the cloud's class only; None for a
            classifier.
        protocol: Train and test poses.
        seeds: Of the test rotations; empty where the protocol turns nothing.
        predictor: Class of the network.
        canonicalizer: Class of what finds the frames.
        trials: Scores with the canonicalizer.
        bare: Scores of the predictor alone; None where the canonicalizer is ``Identity``.
        invariance: None where the protocol turns nothing.
        frames: What frames were found.
        timing: What it took.
        versions: Of the software.
    """

    dataset: str
    split: str | None
    coordinate_frame: str
    n: int
    num_points: int | None
    restricted: bool | None
    protocol: Protocol
    seeds: tuple[int, ...]
    predictor: str
    canonicalizer: str
    trials: Trials
    bare: Trials | None
    invariance: Invariance | None
    frames: FrameQuality
    timing: Timing
    versions: dict[str, str]

    def aligned_tax(self, figure: str | None = None) -> float | None:
        """What the canonicalizer costs on data as they come: bare predictor minus canonicalized.

        Args:
            figure: Of the scores; by default their first. None where there is no canonicalizer.
        """
        if self.bare is None:
            return None
        figure = figure or self.trials.aligned.FIGURES[0]
        return float(getattr(self.bare.aligned, figure) - getattr(self.trials.aligned, figure))


def evaluate(
    model: nn.Module,
    dataset: CloudDataset,
    protocol: Protocol | str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 32,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    restricted: bool = True,
    max_points: int | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Measure a network on data as they come and under the rotations of a protocol.

    Every cloud is read once, and posed as it comes, once for each seed, and once more to see
    whether the answer stays. The predictor alone is measured beside the canonicalized model.
    Nothing is random but what the seeds say.

    Args:
        model: A :class:`Canonicalized`; or a :class:`~pointcanon.predictors.PartPredictor`; or any
            classifier from clouds ``(B, N, 3)`` to logits ``(B, C)``. It is moved to ``device`` and
            left in the mode it was in.
        dataset: Clouds with their classes and, for a part network, their parts.
        protocol: Such as ``"z/SO3"``; only the test pose does anything here.
        seeds: Of the test rotations.
        batch_size: Clouds at once.
        device: Where to compute; by default where the model is.
        num_workers: Processes that read the data; 0 reads here.
        limit: Use this many clouds, drawn from all over the data set, each turned as it is in the
            whole.
        restricted: A part network chooses among the parts of the cloud's class, which it is told,
            rather than among all.
        max_points: Of a part network at once; see :meth:`Canonicalized.predict_in`.
        distributed: Divide the batches among the processes of ``torch.distributed``: all of them
            call this, and all are answered the whole. The figures are those of one process.
        progress: Show a bar on standard error, where that is a terminal.

    Raises:
        CheckpointError: If the model was trained in another coordinate frame or on other classes,
            or needs parts or normals that the data set does not give.
        DataError: If the data set is empty.
        InputError: On an argument that cannot be met, or a model that answers NaN or infinity.
        UsageError: On an unknown protocol.
    """
    protocol = protocols.protocol(protocol)
    seeds = _checked_seeds(seeds) if protocol.test != "I" else ()
    chosen = chosen_clouds(dataset, limit)
    check_fit(model, dataset)
    if not isinstance(model, Canonicalized):
        model = Canonicalized(model, Identity())
    if max_points is not None and not model.segments:
        raise InputError("max_points is for part networks: leave it out for a classifier")

    def tally(poses: int) -> Tally:
        return tally_for(dataset, poses, parts=model.segments, restricted=restricted)

    turns = _turns(protocol, dataset, seeds)
    loader = in_batches(dataset, chosen, batch_size, num_workers, distributed=distributed)
    with evaluating(model, device) as like, shown(loader, progress) as dealt:
        walk = _walk(model, dealt, turns, like, tally, max_points)
    if distributed:
        walk = _of_all_processes(walk)
    found = walk.frames
    return Evaluation(
        dataset=dataset.name,
        split=getattr(dataset, "split", None),
        coordinate_frame=str(dataset.coordinate_frame),
        n=len(chosen),
        num_points=min(walk.sizes) if len(walk.sizes) == 1 else None,
        restricted=restricted if model.segments else None,
        protocol=protocol,
        seeds=tuple(seeds),
        predictor=type(model.predictor).__name__,
        canonicalizer=type(model.canonicalizer).__name__,
        trials=walk.tally.trials(len(seeds)),
        bare=walk.bare.trials(len(seeds)) if walk.bare else None,
        invariance=_invariance(walk, turns[:, chosen]) if seeds else None,
        frames=_frame_quality(
            found,
            turns[:, chosen],
            dataset.coordinate_frame.up_axis,
            _recognised(model.canonicalizer, found, dataset, chosen),
        ),
        timing=_timing(found, like.device, max(map(len, loader.batch_sampler))),  # type: ignore[arg-type]
        versions=_versions(),
    )


def check_fit(model: nn.Module, dataset: CloudDataset) -> None:
    """Refuse a model that was trained in another coordinate frame, on other classes, or on parts or
    normals where there are none.

    What a model does not say of itself is not checked.

    Raises:
        CheckpointError: Naming both and the remedy.
    """
    predictor = model.predictor if isinstance(model, Canonicalized) else model
    names, theirs = getattr(model, "classes", None), list(dataset.classes)
    if names is not None and list(names) != theirs:
        if len(names) != len(theirs):
            difference = f"{len(names)} classes, {dataset.name} has {len(theirs)}"
        else:
            place = next(i for i, name in enumerate(names) if name != theirs[i])
            difference = f"{names[place]!r} as class {place}, {dataset.name} has {theirs[place]!r}"
        raise CheckpointError(f"the model was trained with {difference}: use it with its own data")
    if isinstance(predictor, PartPredictor):
        _check_parts(predictor, dataset)
    else:
        _check_count("outputs", getattr(predictor, "num_classes", None), dataset, "classes", theirs)
    trained, found = getattr(model, "coordinate_frame", None), dataset.coordinate_frame
    if trained is not None and coordinate_frame(trained) != found:
        raise CheckpointError(
            f"the model was trained on {trained} clouds, {dataset.name} is given in {found}: "
            f"convert the data with --data.coordinate_frame {trained}"
        )
    for part in model.modules():
        if getattr(part, "normals", None) is True and getattr(dataset, "normals", None) is False:
            raise CheckpointError(
                f"{type(part).__name__} looks at normals, and {dataset.name} is read without: "
                "give --data.normals true"
            )


def _check_parts(predictor: PartPredictor, dataset: CloudDataset) -> None:
    if not isinstance(dataset, PartDataset):
        raise CheckpointError(
            f"the model labels parts, and {dataset.name} has none: use it with its own data"
        )
    _check_count("outputs", predictor.num_parts, dataset, "parts", dataset.parts)
    if predictor.num_categories:
        _check_count("categories", predictor.num_categories, dataset, "classes", dataset.classes)


def _check_count(
    what: str, count: int | None, dataset: CloudDataset, of: str, theirs: Sequence[str]
) -> None:
    if count is not None and count != len(theirs):
        raise CheckpointError(
            f"the model has {count} {what}, {dataset.name} has {len(theirs)} {of}: "
            "use it with its own data"
        )


def chosen_clouds(dataset: CloudDataset, limit: int | None) -> list[int]:
    """Indices of ``limit`` clouds drawn from all over the data set; of all, where it is None.

    They are in order, and a function of the two numbers alone. Every so-many-th cloud would do
    only where classes do not come in turn.

    Raises:
        DataError: If the data set is empty.
        InputError: If ``limit`` < 1.
    """
    size = len(dataset)
    if size == 0:
        raise DataError(f"{dataset.name} holds no clouds to evaluate; choose another split")
    if limit is None or limit >= size:
        return list(range(size))
    if limit < 1:
        raise InputError(f"limit is {limit}; choose at least 1 cloud")
    return sorted(drawn_rows(size, limit, "").tolist())


def in_batches(
    dataset: CloudDataset,
    chosen: list[int],
    batch_size: int,
    num_workers: int,
    *,
    distributed: bool = False,
) -> DataLoader[dict[str, Tensor]]:
    """Reads clouds of a data set, in order; of several processes, the batches of this one.

    Raises:
        InputError: On a number out of range.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; choose at least 1")
    if num_workers < 0:
        raise InputError(f"num_workers is {num_workers}; choose 0, which reads here, or more")
    batches = _dealt(chosen, batch_size) if distributed else _cut(chosen, batch_size)
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # the loader draws a seed: not from the user's stream
    )


class _Found(NamedTuple):
    """The frames of n clouds in P poses, of one batch or of all, and what it took.

    ``rotation (P, n, 3, 3)`` float64, ``degenerate (P, n)``, ``passes (P, n)``, in how many of so
    many frames the predictor was asked, ``opinions (P, n)``, the class that the canonicalizer
    itself would choose of so many, 0 where it knows none, and by batch and pose the seconds per
    cloud of the two halves of the model.
    """

    rotation: Tensor
    degenerate: Tensor
    passes: Tensor
    opinions: Tensor
    frames: int
    classes: int
    seconds: list[tuple[float, float]]


class _Walk(NamedTuple):
    """What a walk through the data brings home: ``bare`` is None without a canonicalizer, ``clouds
    (n,)`` says which the frames are of, ``sizes`` what numbers of points they have.
    """

    tally: Tally
    bare: Tally | None
    frames: _Found
    clouds: Tensor
    sizes: set[int]


def _cut(chosen: list[int], size: int) -> list[list[int]]:
    return [chosen[first : first + size] for first in range(0, len(chosen), size)]


def _dealt(chosen: list[int], batch_size: int) -> list[list[int]]:
    """The batches of this process, smaller than asked where that leaves one for each."""
    rank, world = processes.get_rank(), processes.get_world_size()
    if len(chosen) < world:
        raise InputError(
            f"{len(chosen)} clouds cannot be divided among {world} processes: start fewer"
        )
    return _cut(chosen, min(batch_size, len(chosen) // world))[rank::world]


def _of_all_processes(walk: _Walk) -> _Walk:
    """What all processes brought home, the clouds in order."""
    walks: list[Any] = [None] * processes.get_world_size()
    processes.all_gather_object(walks, walk)
    first, *others = cast(list[_Walk], walks)
    for other in others:
        first.tally.join(other.tally)
        if first.bare is not None and other.bare is not None:
            first.bare.join(other.bare)
    numbers, order = torch.cat([walk.clouds for walk in walks]).sort()
    found = _joined([walk.frames for walk in walks], partial(torch.cat, dim=1))
    found = found._replace(
        rotation=found.rotation[:, order],
        degenerate=found.degenerate[:, order],
        passes=found.passes[:, order],
        opinions=found.opinions[:, order],
    )
    return _Walk(first.tally, first.bare, found, numbers, set().union(*(w.sizes for w in walks)))


def _walk(
    model: Canonicalized,
    batches: Iterable[dict[str, Tensor]],
    turns: Tensor,
    like: Tensor,
    tally: Callable[[int], Tally],
    max_points: int | None,
) -> _Walk:
    alone = Canonicalized(model.predictor, Identity())
    compare = not isinstance(model.canonicalizer, Identity)
    # the last pass asks whether the model agrees with itself: no matter to the predictor alone
    compared = max(1, len(turns) - 1)
    counted, bare = tally(len(turns)), tally(compared)
    found: list[_Found] = []
    numbers: list[Tensor] = []
    sizes: set[int] = set()
    for batch in batches:
        clouds = [turned(batch, turn, like) for turn in turns[:, batch["index"]]]
        asked = [_ask(model, cloud, batch, counted.outputs, max_points) for cloud in clouds]
        answers, frames = zip(*asked, strict=True)
        counted.update(answers, batch)
        found.append(_joined(frames, torch.stack))
        if compare:
            asked = [
                _ask(alone, cloud, batch, counted.outputs, max_points)
                for cloud in clouds[:compared]
            ]
            bare.update([answer for answer, _ in asked], batch)
        numbers.append(batch["index"])
        real = batch.get("mask", torch.ones(batch["points"].shape[:2]))
        sizes |= set(real.sum(dim=1).long().tolist())
    return _Walk(
        counted,
        bare if compare else None,
        _joined(found, partial(torch.cat, dim=1)),
        torch.cat(numbers),
        sizes,
    )


def _checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds is {list(seeds)}; give at least one, each from 0 up and only once")
    return tuple(seeds)


def _turns(protocol: Protocol, dataset: CloudDataset, seeds: Sequence[int]) -> Tensor:
    """``(P, n, 3, 3)`` float64: none, one for each seed, and the first of them turned again."""
    count, up = len(dataset), dataset.coordinate_frame.up_axis

    def draw(seed: int) -> Tensor:
        return protocols.pose_rotations(protocol.test, count, up, seed=seed, dtype=torch.float64)

    aligned = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
    if not seeds:
        return aligned[None]
    turned = [draw(seed) for seed in seeds]
    return torch.stack([aligned, *turned, draw(AGAIN_SEED) @ turned[0]])


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str | None) -> Iterator[Tensor]:
    """The model in eval mode, on the device, without gradients; yields a tensor of its kind."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if device is not None:
        model.to(device)
    try:
        with torch.no_grad():
            default = torch.zeros((), device=device)
            yield next((p for p in model.parameters() if p.is_floating_point()), default)
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def shown(loader: DataLoader[Any], progress: bool) -> Iterator[Iterable[dict[str, Tensor]]]:
    """The batches, with a bar where a person looks on."""
    if not (progress and sys.stderr.isatty()):
        yield loader
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield bar.track(loader, description="evaluating")


def turned(batch: dict[str, Tensor], turn: Tensor, like: Tensor) -> dict[str, Tensor]:
    """A batch turned on the CPU, so as to be the same on every device, where it is then put."""

    def put(key: str, value: Tensor) -> Tensor:
        if key in ("points", "normals"):
            return (value @ turn.mT.to(value)).to(like)
        return value.to(like.device)

    return {key: put(key, value) for key, value in batch.items()}


def _ask(
    model: Canonicalized,
    cloud: dict[str, Tensor],
    batch: dict[str, Tensor],
    outputs: int,
    max_points: int | None,
) -> tuple[Tensor, _Found]:
    """What the model says of a batch in one pose, on the CPU, and the frames it says it in."""
    points = cloud["points"]
    geometry = points, cloud.get("mask"), cloud.get("normals")
    category = cloud["label"] if model.segments else None
    started = now(points.device)
    frames = model.canonicalizer(*geometry)
    posed = now(points.device)
    with naming_clouds(batch):
        answer, _, passes = model.answer(frames, *geometry, category, max_points=max_points)
    done = now(points.device)
    expected = (*points.shape[: 2 if model.segments else 1], outputs)
    if answer.shape != expected:
        raise CheckpointError(
            f"the model answers {tuple(answer.shape)} for {len(points)} clouds of {outputs} "
            f"{'parts' if model.segments else 'classes'}: evaluate it on its own data"
        )
    answer = answer.cpu()
    require_finite(answer, batch)
    seconds = (posed - started) / len(points), (done - posed) / len(points)
    rotation = frames.best().rotations[:, 0].double().cpu()
    logits = frames.class_logits
    logits = points.new_zeros(len(points), 0) if logits is None else logits
    classes = logits.shape[1]
    opinions = logits.argmax(dim=1) if classes else torch.zeros_like(cloud["label"])
    given = frames.degenerate.cpu(), passes.cpu(), opinions.cpu()
    return answer, _Found(rotation, *given, frames.count, classes, [seconds])


@contextmanager
def naming_clouds(batch: dict[str, Tensor]) -> Iterator[None]:
    """An error about a cloud of the batch tells its place in the data set."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(int(batch["index"][error.cloud]), error.remedy) from error


def require_finite(answer: Tensor, batch: dict[str, Tensor]) -> None:
    """Refuse NaN and infinity in what was answered for clouds ``(B, C)`` or points ``(B, N, P)``.

    Raises:
        NotFiniteError: Naming the first cloud, by its place in the data set.
    """
    broken = ~answer.isfinite().all(dim=-1)
    if broken.ndim == 2:
        broken = (broken & batch.get("mask", torch.tensor(True))).any(dim=1)
    if bool(broken.any()):
        raise NotFiniteError(int(batch["index"][broken][0]), "check the weights")


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _joined(found: Sequence[_Found], join: Callable[[list[Tensor]], Tensor]) -> _Found:
    return _Found(
        join([frames.rotation for frames in found]),
        join([frames.degenerate for frames in found]),
        join([frames.passes for frames in found]),
        join([frames.opinions for frames in found]),
        found[0].frames,
        found[0].classes,
        [seconds for frames in found for seconds in frames.seconds],
    )


def _invariance(walk: _Walk, applied: Tensor) -> Invariance:
    """From the first seed's pass and the last one, in which those clouds are turned again."""
    found = walk.frames
    again = applied[-1] @ applied[1].mT
    error = geodesic_angle(again @ found.rotation[1], found.rotation[-1]).rad2deg()
    error = error[~(found.degenerate[1] | found.degenerate[-1])]
    angles = None
    if len(error):
        quantiles = error.quantile(torch.tensor([0.5, 0.99, 1.0], dtype=error.dtype))
        angles = Angles(*quantiles.tolist())
    return Invariance(walk.tally.flips(), angles)


def _judged(poses: int) -> slice:
    """Those of the seeds among all poses, or the only one."""
    return slice(1, -1) if poses > 1 else slice(None)


def _recognised(
    canonicalizer: Canonicalizer, found: _Found, dataset: CloudDataset, chosen: Sequence[int]
) -> float | None:
    """Share of clouds whose class the canonicalizer itself tells, if these are its classes."""
    names = canonicalizer.class_names
    if found.classes != len(dataset.classes) or list(names or dataset.classes) != dataset.classes:
        return None
    labels = torch.as_tensor(dataset.labels)[chosen]
    return (found.opinions[_judged(len(found.opinions))] == labels).double().mean().item()


def _frame_quality(
    found: _Found, applied: Tensor, up: Tensor, recognised: float | None
) -> FrameQuality:
    """Over the seeds' poses, or the only one."""
    poses = _judged(len(applied))
    rotation, applied = found.rotation[poses], applied[poses]
    error = geodesic_angle(rotation, applied).rad2deg()
    # vectors of unit length: the half-angle form is accurate near zero, where arccos is not
    apart = (rotation @ up - applied @ up).norm(dim=-1)
    tilt = 2 * (apart / 2).clamp(max=1).asin().rad2deg()
    return FrameQuality(
        count=found.frames,
        passes=found.passes[poses].double().mean().item(),
        median_error_deg=error.median().item(),
        up_within_10_deg=(tilt <= UPRIGHT_DEGREES).double().mean().item(),
        degenerate=found.degenerate[poses].double().mean().item(),
        recognised=recognised,
    )


def _timing(found: _Found, device: torch.device, batch_size: int) -> Timing:
    canonicalizer, predictor = (1e3 * median(column) for column in zip(*found.seconds, strict=True))
    return Timing(canonicalizer, predictor, str(device), torch.get_num_threads(), batch_size)


def _versions() -> dict[str, str]:
    packages = ("pointcanon", "torch", "torchmetrics", "numpy", "roma")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}

"""Accuracy under rotation: every figure of a report from one walk through the data."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pointcanon.canonicalizers import Identity
from pointcanon.coordinates import coordinate_frame
from pointcanon.datasets import CloudDataset
from pointcanon.errors import CheckpointError, DataError, InputError
from pointcanon.eval import protocols
from pointcanon.eval.protocols import Protocol
from pointcanon.model import Canonicalized
from pointcanon.rotations import geodesic_angle

__all__ = [
    "AGAIN_SEED",
    "Angles",
    "Evaluation",
    "FrameQuality",
    "Invariance",
    "Scores",
    "Timing",
    "Trials",
    "check_fit",
    "chosen_clouds",
    "evaluate",
]

AGAIN_SEED = 2_024_003
"""Seed of the further rotations under which predictions and frames are compared with themselves."""

UPRIGHT_DEGREES = 10.0
"""An up axis found within this angle counts as right, as in the orientation literature."""


@dataclass(frozen=True)
class Scores:
    """Accuracy in one pass over the data, as shares of 1.

    Attributes:
        overall_accuracy: Over clouds.
        mean_class_accuracy: Mean over the classes that have clouds.
        per_class: By class name; None for a class without clouds.
    """

    overall_accuracy: float
    mean_class_accuracy: float
    per_class: dict[str, float | None]


@dataclass(frozen=True)
class Trials:
    """What a network scores.

    Attributes:
        aligned: On the data as they come.
        turned: One for each seed; empty where the protocol turns nothing.
    """

    aligned: Scores
    turned: tuple[Scores, ...]

    @property
    def mean(self) -> Scores:
        """Mean over the seeds, or the aligned scores where nothing is turned."""
        trials = self.turned or (self.aligned,)

        def over_seeds(name: str) -> float | None:
            shares = [trial.per_class[name] for trial in trials]
            known = [share for share in shares if share is not None]
            return fmean(known) if known else None

        return Scores(
            fmean(trial.overall_accuracy for trial in trials),
            fmean(trial.mean_class_accuracy for trial in trials),
            {name: over_seeds(name) for name in self.aligned.per_class},
        )

    def deviation(self, figure: str) -> float | None:
        """Sample standard deviation over the seeds of a figure of :class:`Scores`, if several."""
        values = [getattr(trial, figure) for trial in self.turned]
        return stdev(values) if len(values) > 1 else None


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
        prediction_flip_rate: Share of clouds whose predicted class changes when the cloud,
            turned by the first seed, is turned again by an independent rotation of the same pose.
        rotation_error_deg: Angle between the frame found then and the first frame turned along,
            over the clouds that determine a frame; None if no cloud does.
    """

    prediction_flip_rate: float
    rotation_error_deg: Angles | None


@dataclass(frozen=True)
class FrameQuality:
    """The heaviest frame of each cloud, pooled over the seeds.

    Attributes:
        count: Frames of each cloud; as many times the predictor runs.
        median_error_deg: Of the angle between the frame and the rotation applied: the distance to
            the data's own pose, which says something where the data are aligned.
        up_within_10_deg: Share of clouds whose up axis is found within 10 degrees.
        degenerate: Share of clouds that do not determine a frame.
    """

    count: int
    median_error_deg: float
    up_within_10_deg: float
    degenerate: float


@dataclass(frozen=True)
class Timing:
    """Forward time in milliseconds for one cloud: median over batches of time / batch.

    Attributes:
        canonicalizer_ms: Finding the frames.
        predictor_ms: Posing, predicting in every frame, voting.
        device: Where it ran.
        threads: Of the CPU.
        batch_size: Clouds at once.
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
        num_points: Points of each cloud.
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
    num_points: int
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

    def aligned_tax(self, figure: str = "overall_accuracy") -> float | None:
        """What the canonicalizer costs on data as they come: bare predictor minus canonicalized.

        None where there is no canonicalizer.
        """
        if self.bare is None:
            return None
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
    progress: bool = False,
) -> Evaluation:
    """Measure a classifier on data as they come and under the rotations of a protocol.

    Every cloud is read once, and posed as it comes, once for each seed, and once more to see
    whether the answer stays. The predictor alone is measured beside the canonicalized model.
    Nothing is random but what the seeds say.

    Args:
        model: A :class:`Canonicalized`, or any classifier from clouds ``(B, N, 3)`` to logits
            ``(B, C)``. It is moved to ``device`` and left in the mode it was in.
        dataset: Clouds of one size with their classes.
        protocol: Such as ``"z/SO3"``; only the test pose does anything here.
        seeds: Of the test rotations.
        batch_size: Clouds at once.
        device: Where to compute; by default where the model is.
        num_workers: Processes that read the data; 0 reads here.
        limit: Use this many clouds, spread evenly over the data set, each turned as it is in the
            whole.
        progress: Show a bar on standard error, where that is a terminal.

    Raises:
        CheckpointError: If the model was trained in another coordinate frame or on other classes.
        DataError: If the data set is empty.
        InputError: On an argument that cannot be met, or a model that answers NaN or infinity.
        UsageError: On an unknown protocol.
    """
    protocol = protocols.protocol(protocol)
    seeds = _checked_seeds(seeds) if protocol.test != "I" else ()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; choose at least 1")
    if num_workers < 0:
        raise InputError(f"num_workers is {num_workers}; choose 0, which reads here, or more")
    chosen = chosen_clouds(dataset, limit)
    check_fit(model, dataset)
    if not isinstance(model, Canonicalized):
        model = Canonicalized(model, Identity())
    classes = list(dataset.classes)

    turns = _turns(protocol, dataset, seeds)
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, chosen),  # type: ignore[arg-type]
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # the loader draws a seed: not from the user's stream
    )
    with _evaluating(model, device) as like, _shown(loader, progress) as batches:
        walk = _walk(model, batches, turns, like, len(classes))
    found, label = walk.model, walk.label
    return Evaluation(
        dataset=dataset.name,
        split=getattr(dataset, "split", None),
        coordinate_frame=str(dataset.coordinate_frame),
        n=len(chosen),
        num_points=walk.num_points,
        protocol=protocol,
        seeds=tuple(seeds),
        predictor=type(model.predictor).__name__,
        canonicalizer=type(model.canonicalizer).__name__,
        trials=_trials(found, label, classes, len(seeds)),
        bare=_trials(walk.bare, label, classes, len(seeds)) if walk.bare else None,
        invariance=_invariance(found, turns[:, chosen]) if seeds else None,
        frames=_frame_quality(found, turns[:, chosen], dataset.coordinate_frame.up_axis),
        timing=_timing(found, like.device, batch_size),
        versions=_versions(),
    )


def check_fit(model: nn.Module, dataset: CloudDataset) -> None:
    """Refuse a model that was trained in another coordinate frame, or on other classes.

    What a model does not say of itself is not checked.

    Raises:
        CheckpointError: Naming both and the remedy.
    """
    names, theirs = getattr(model, "classes", None), list(dataset.classes)
    if names is not None and list(names) != theirs:
        if len(names) != len(theirs):
            difference = f"{len(names)} classes, {dataset.name} has {len(theirs)}"
        else:
            place = next(i for i, name in enumerate(names) if name != theirs[i])
            difference = f"{names[place]!r} as class {place}, {dataset.name} has {theirs[place]!r}"
        raise CheckpointError(f"the model was trained with {difference}: use it with its own data")
    outputs = getattr(model, "num_classes", None)
    if outputs is not None and outputs != len(theirs):
        raise CheckpointError(
            f"the model has {outputs} outputs, {dataset.name} has {len(theirs)} classes: "
            "use it with its own data"
        )
    trained, found = getattr(model, "coordinate_frame", None), dataset.coordinate_frame
    if trained is not None and coordinate_frame(trained) != found:
        raise CheckpointError(
            f"the model was trained on {trained} clouds, {dataset.name} is given in {found}: "
            f"convert the data with --data.coordinate_frame {trained}"
        )


def chosen_clouds(dataset: CloudDataset, limit: int | None) -> list[int]:
    """Indices of ``limit`` clouds spread evenly over the data set; of all, where it is None.

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
    return [i * size // limit for i in range(limit)]


class _Answers(NamedTuple):
    """What a model says of n clouds in P poses: one batch, or all.

    ``predicted (P, n)``, ``rotation (P, n, 3, 3)`` float64, ``degenerate (P, n)``, the number of
    frames, and by batch and pose the seconds per cloud of the two halves of the model.
    """

    predicted: Tensor
    rotation: Tensor
    degenerate: Tensor
    frames: int
    seconds: list[tuple[float, float]]


class _Walk(NamedTuple):
    """What a walk through the data brings home; ``bare`` is None without a canonicalizer."""

    model: _Answers
    bare: _Answers | None
    label: Tensor
    num_points: int


def _walk(
    model: Canonicalized,
    batches: Iterable[dict[str, Tensor]],
    turns: Tensor,
    like: Tensor,
    outputs: int,
) -> _Walk:
    alone = Canonicalized(model.predictor, Identity())
    compare = not isinstance(model.canonicalizer, Identity)
    # the last pass asks whether the model agrees with itself: no matter to the predictor alone
    compared = max(1, len(turns) - 1)
    found, bare, labels = [], [], []
    num_points = 0
    for batch in batches:
        clouds = [_turned(batch, turn, like) for turn in turns[:, batch["index"]]]
        found.append(_over_poses([_ask(model, cloud, batch, outputs) for cloud in clouds]))
        if compare:
            clouds = clouds[:compared]
            bare.append(_over_poses([_ask(alone, cloud, batch, outputs) for cloud in clouds]))
        labels.append(batch["label"])
        num_points = batch["points"].shape[1]
    return _Walk(
        _over_clouds(found), _over_clouds(bare) if compare else None, torch.cat(labels), num_points
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
def _evaluating(model: nn.Module, device: torch.device | str | None) -> Iterator[Tensor]:
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
def _shown(loader: DataLoader[Any], progress: bool) -> Iterator[Iterable[dict[str, Tensor]]]:
    """The batches, with a bar where a person looks on."""
    if not (progress and sys.stderr.isatty()):
        yield loader
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield bar.track(loader, description="evaluating")


def _turned(batch: dict[str, Tensor], turn: Tensor, like: Tensor) -> dict[str, Tensor]:
    """The points (and normals) of a batch, turned on the CPU: the same clouds on every device."""
    return {
        key: (batch[key] @ turn.mT.to(batch[key])).to(like)
        for key in ("points", "normals")
        if key in batch
    }


def _ask(
    model: Canonicalized, cloud: dict[str, Tensor], batch: dict[str, Tensor], outputs: int
) -> _Answers:
    points, normals = cloud["points"], cloud.get("normals")
    started = _now(points.device)
    frames = model.canonicalizer(points, None, normals)
    posed = _now(points.device)
    logits = model.predict_in(frames, points, None, normals)
    done = _now(points.device)
    if logits.ndim != 2 or logits.shape[1] != outputs:
        raise CheckpointError(
            f"the model answers {tuple(logits.shape)} for {len(points)} clouds of {outputs} "
            "classes: evaluate it on its own data"
        )
    broken = ~logits.isfinite().all(dim=1).cpu()
    if bool(broken.any()):
        place = int(batch["index"][broken][0])
        raise InputError(f"the model answers NaN or infinity for cloud {place}; check its weights")
    return _Answers(
        logits.argmax(dim=1).cpu(),
        frames.best().rotations[:, 0].double().cpu(),
        frames.degenerate.cpu(),
        frames.count,
        [((posed - started) / len(points), (done - posed) / len(points))],
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _over_poses(answers: list[_Answers]) -> _Answers:
    return _joined(answers, torch.stack)


def _over_clouds(answers: list[_Answers]) -> _Answers:
    return _joined(answers, partial(torch.cat, dim=1))


def _joined(answers: list[_Answers], join: Callable[[list[Tensor]], Tensor]) -> _Answers:
    return _Answers(
        join([answer.predicted for answer in answers]),
        join([answer.rotation for answer in answers]),
        join([answer.degenerate for answer in answers]),
        answers[0].frames,
        [seconds for answer in answers for seconds in answer.seconds],
    )


def _trials(found: _Answers, label: Tensor, classes: Sequence[str], seeds: int) -> Trials:
    scores = [_scores(row, label, classes) for row in found.predicted[: 1 + seeds]]
    return Trials(scores[0], tuple(scores[1:]))


def _scores(predicted: Tensor, label: Tensor, classes: Sequence[str]) -> Scores:
    from torchmetrics.functional.classification import multiclass_accuracy

    overall = multiclass_accuracy(predicted, label, len(classes), average="micro")
    by_class = multiclass_accuracy(predicted, label, len(classes), average="none")
    present = label.bincount(minlength=len(classes)) > 0
    return Scores(
        overall.item(),
        # not average="macro": that counts a class without clouds, once predicted, as a zero
        by_class[present].mean().item(),
        {
            name: share if here else None
            for name, share, here in zip(classes, by_class.tolist(), present.tolist(), strict=True)
        },
    )


def _invariance(found: _Answers, applied: Tensor) -> Invariance:
    """From the first seed's pass and the last one, in which those clouds are turned again."""
    flips = found.predicted[1] != found.predicted[-1]
    again = applied[-1] @ applied[1].mT
    error = geodesic_angle(again @ found.rotation[1], found.rotation[-1]).rad2deg()
    error = error[~(found.degenerate[1] | found.degenerate[-1])]
    angles = None
    if len(error):
        quantiles = error.quantile(torch.tensor([0.5, 0.99, 1.0], dtype=error.dtype))
        angles = Angles(*quantiles.tolist())
    return Invariance(flips.double().mean().item(), angles)


def _frame_quality(found: _Answers, applied: Tensor, up: Tensor) -> FrameQuality:
    """Over the seeds' passes, or the only one."""
    passes = slice(1, -1) if len(applied) > 1 else slice(None)
    rotation, applied = found.rotation[passes], applied[passes]
    error = geodesic_angle(rotation, applied).rad2deg()
    # vectors of unit length: the half-angle form is accurate near zero, where arccos is not
    apart = (rotation @ up - applied @ up).norm(dim=-1)
    tilt = 2 * (apart / 2).clamp(max=1).asin().rad2deg()
    return FrameQuality(
        count=found.frames,
        median_error_deg=error.median().item(),
        up_within_10_deg=(tilt <= UPRIGHT_DEGREES).double().mean().item(),
        degenerate=found.degenerate[passes].double().mean().item(),
    )


def _timing(found: _Answers, device: torch.device, batch_size: int) -> Timing:
    canonicalizer, predictor = (1e3 * median(column) for column in zip(*found.seconds, strict=True))
    return Timing(canonicalizer, predictor, str(device), torch.get_num_threads(), batch_size)


def _versions() -> dict[str, str]:
    packages = ("pointcanon", "torch", "torchmetrics", "numpy", "roma")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}

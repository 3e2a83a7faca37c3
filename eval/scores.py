"""What a network scores: figures of one pass over the data, gathered batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from pointcanon.datasets import CloudDataset, PartDataset

__all__ = ["ClassScores", "PartScores", "Scores", "Tally", "Trials", "tally_for"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures of one pass over the data, as shares of 1.

    Attributes:
        per_class: By class name; None for a class without clouds.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ()
    """Names of the figures, the first of them the one to be known by."""

    per_class: dict[str, float | None]

    @property
    def figures(self) -> dict[str, float]:
        """All but those by class."""
        return {name: getattr(self, name) for name in self.FIGURES}

    def to_dict(self) -> dict[str, Any]:
        return {**self.figures, "per_class": asdict(self)["per_class"]}


@dataclass(frozen=True, kw_only=True)
class ClassScores(Scores):
    """Accuracy of a classifier.

    Attributes:
        overall_accuracy: Over clouds.
        mean_class_accuracy: Mean over the classes that have clouds.
        per_class: Accuracy by class name; None for a class without clouds.
    """

    FIGURES = ("overall_accuracy", "mean_class_accuracy")

    overall_accuracy: float
    mean_class_accuracy: float


@dataclass(frozen=True, kw_only=True)
class PartScores(Scores):
    """Part segmentation, as in :mod:`pointcanon.eval.metrics`.

    Attributes:
        instance_miou: Mean over clouds of the mean IoU over the parts of the class.
        class_miou: Mean over the classes that have clouds of the mean over their clouds.
        point_accuracy: Over labelled points.
        label_miou: Mean over parts of the IoU of all points of the data set.
        per_class: Mean IoU of the clouds of a class, by name; None for one without clouds.
    """

    FIGURES = ("instance_miou", "class_miou", "point_accuracy", "label_miou")

    instance_miou: float
    class_miou: float
    point_accuracy: float
    label_miou: float


_Scores = TypeVar("_Scores", bound=Scores)


@dataclass(frozen=True)
class Trials(Generic[_Scores]):
    """What a network scores.

    Attributes:
        aligned: On the data as they come.
        turned: One for each seed; empty where the protocol turns nothing.
    """

    aligned: _Scores
    turned: tuple[_Scores, ...]

    @property
    def mean(self) -> _Scores:
        """Mean over the seeds, or the aligned scores where nothing is turned."""
        trials = self.turned or (self.aligned,)

        def over_seeds(name: str) -> float | None:
            shares = [trial.per_class[name] for trial in trials]
            known = [share for share in shares if share is not None]
            return fmean(known) if known else None

        figures = {
            figure: fmean(getattr(trial, figure) for trial in trials)
            for figure in self.aligned.FIGURES
        }
        per_class = {name: over_seeds(name) for name in self.aligned.per_class}
        return type(self.aligned)(**figures, per_class=per_class)

    def deviation(self, figure: str) -> float | None:
        """Sample standard deviation over the seeds of a figure of the scores, if several."""
        values = [getattr(trial, figure) for trial in self.turned]
        return stdev(values) if len(values) > 1 else None


class Tally(ABC):
    """What the answers of a network to clouds in P poses add up to.

    Nothing depends on how the clouds are batched. The first pose is the data's own; the last, where
    there is more than one, is the second turned again.
    """

    outputs: int
    """Channels that an answer must have."""

    @abstractmethod
    def update(self, answers: Sequence[Tensor], batch: dict[str, Tensor]) -> None:
        """Count the answers to a batch, one for each pose, on the CPU."""

    @abstractmethod
    def join(self, other: Any) -> None:
        """Take in what another of the same kind counted, of other clouds."""

    @abstractmethod
    def scores(self, pose: int) -> Scores:
        """Of all that was counted in a pose."""

    @abstractmethod
    def flips(self) -> float:
        """Share of the decisions that differ between the second and the last pose."""

    def trials(self, seeds: int) -> Trials:
        """The first pose, and the ``seeds`` after it."""
        return Trials(self.scores(0), tuple(self.scores(1 + seed) for seed in range(seeds)))


def tally_for(dataset: CloudDataset, poses: int, *, parts: bool, restricted: bool) -> Tally:
    """An empty tally.

    Args:
        dataset: Where the clouds come from; with parts, a :class:`~pointcanon.datasets.PartDataset`
        poses: How many there will be.
        parts: Whether points are labelled rather than clouds.
        restricted: Choose the parts of a cloud among those of its class only.
    """
    if parts:
        assert isinstance(dataset, PartDataset)
        return _PartTally(dataset, poses, restricted)
    return _ClassTally(dataset)


class _ClassTally(Tally):
    def __init__(self, dataset: CloudDataset) -> None:
        self.classes = list(dataset.classes)
        self.outputs = len(self.classes)
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, answers: Sequence[Tensor], batch: dict[str, Tensor]) -> None:
        self._predicted.append(torch.stack([answer.argmax(dim=1) for answer in answers]))
        self._labels.append(batch["label"])

    def join(self, other: _ClassTally) -> None:
        self._predicted += other._predicted
        self._labels += other._labels

    def scores(self, pose: int) -> ClassScores:
        from torchmetrics.functional.classification import multiclass_accuracy

        predicted, label = torch.cat(self._predicted, dim=1)[pose], torch.cat(self._labels)
        count = max(self.outputs, 2)  # torchmetrics knows no single class
        overall = multiclass_accuracy(predicted, label, count, average="micro")
        by_class = multiclass_accuracy(predicted, label, count, average="none")[: self.outputs]
        present = label.bincount(minlength=self.outputs) > 0
        known = zip(self.classes, by_class.tolist(), present.tolist(), strict=True)
        return ClassScores(
            overall_accuracy=overall.item(),
            # not average="macro": that counts a class without clouds, once predicted, as a zero
            mean_class_accuracy=by_class[present].mean().item(),
            per_class={name: share if here else None for name, share, here in known},
        )

    def flips(self) -> float:
        predicted = torch.cat(self._predicted, dim=1)
        return (predicted[1] != predicted[-1]).double().mean().item()


class _PartTally(Tally):
    def __init__(self, dataset: PartDataset, poses: int, restricted: bool) -> None:
        from torchmetrics import Metric, MetricCollection

        from pointcanon.eval.metrics import (
            CategoryIoU,
            ClassIoU,
            InstanceIoU,
            LabelIoU,
            PointAccuracy,
        )

        self.classes = list(dataset.classes)
        self.outputs = len(dataset.parts)
        self._ranges, self._restricted = dataset.part_ranges, restricted
        figures: dict[str, Callable[..., Metric]] = {
            "instance_miou": InstanceIoU,
            "class_miou": ClassIoU,
            "point_accuracy": PointAccuracy,
            "label_miou": LabelIoU,
            "per_class": CategoryIoU,
        }
        # what other processes count is joined where it is asked for, not behind our back
        options = {"restricted": restricted, "sync_on_compute": False}
        self._metrics = [
            MetricCollection({name: of(self._ranges, **options) for name, of in figures.items()})
            for _ in range(poses)
        ]
        self._flipped = self._points = 0

    def update(self, answers: Sequence[Tensor], batch: dict[str, Tensor]) -> None:
        from pointcanon.eval.metrics import predicted_parts

        category, mask = batch["label"], batch.get("mask")
        for metrics, answer in zip(self._metrics, answers, strict=True):
            metrics.update(answer, batch["parts"], category, mask)
        if len(answers) > 1:
            once, again = (
                predicted_parts(answers[pose], category, self._ranges, restricted=self._restricted)
                for pose in (1, -1)
            )
            real = torch.ones_like(once, dtype=torch.bool) if mask is None else mask
            self._flipped += int((real & (once != again)).sum())
            self._points += int(real.sum())

    def join(self, other: _PartTally) -> None:
        for metrics, theirs in zip(self._metrics, other._metrics, strict=True):
            found = dict(theirs.items())
            for name, metric in metrics.items():
                for state, total in metric.metric_state.items():  # sums, all of them
                    setattr(metric, state, total + getattr(found[name], state))
        self._flipped += other._flipped
        self._points += other._points

    def scores(self, pose: int) -> PartScores:
        found = self._metrics[pose].compute()
        by_class = found.pop("per_class").view(-1).tolist()  # torchmetrics squeezes a single one
        return PartScores(
            **{name: figure.item() for name, figure in found.items()},
            per_class={
                name: None if share != share else share
                for name, share in zip(self.classes, by_class, strict=True)
            },
        )

    def flips(self) -> float:
        return self._flipped / self._points

"""Part segmentation scores as the literature computes them, exact however the data are batched.

The IoU of a shape is the mean over the parts *of its category*, where a part that is absent from
both prediction and truth counts as 1 (Yi et al., 2016; Qi et al., 2017). Metrics hold sums, so
neither the size of the last batch nor the number of processes matters. They are all updated alike,
so that they can share a ``torchmetrics.MetricCollection``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pointcanon.datasets import UNLABELLED
from pointcanon.errors import InputError

__all__ = [
    "CategoryIoU",
    "ClassIoU",
    "InstanceIoU",
    "LabelIoU",
    "PartMetric",
    "PointAccuracy",
    "predicted_parts",
    "shape_iou",
]


def predicted_parts(
    scores: Tensor, category: Tensor, part_ranges: Sequence[range], *, restricted: bool = True
) -> Tensor:
    """The part with the largest score, of each point.

    Args:
        scores: ``(B, N, P)`` logits or votes.
        category: ``(B,)`` int64.
        part_ranges: For each category its parts.
        restricted: Choose among the parts of the category (vector neurons, LC, PointNet++, PaRot)
            or among all (dgcnn.pytorch, equiadapt, openpoints).

    Returns:
        ``(B, N)`` int64.
    """
    if restricted:
        own = _membership(part_ranges, scores.shape[-1], scores.device)[category]
        scores = scores if scores.is_floating_point() else scores.double()  # votes may be counts
        scores = scores.masked_fill(~own[:, None], -torch.inf)
    return scores.argmax(dim=-1)


def shape_iou(
    predicted: Tensor,
    parts: Tensor,
    category: Tensor,
    part_ranges: Sequence[range],
    mask: Tensor | None = None,
) -> Tensor:
    """The IoU of each shape over the parts of its category; one absent from both counts as 1.

    Args:
        predicted: ``(B, N)`` int64; parts of other categories are allowed, and wrong.
        parts: ``(B, N)`` int64, the truth; points that are ``UNLABELLED`` are left out.
        category: ``(B,)`` int64.
        part_ranges: For each category its parts.
        mask: ``(B, N)`` bool, True = a real point; others are left out.

    Returns:
        ``(B,)`` float64.
    """
    count = max(own.stop for own in part_ranges)
    overlap, union = _overlap_and_union(predicted, parts, _counted(parts, mask), count)
    iou = torch.where(union > 0, overlap / union.clamp_min(1), 1.0)
    own = _membership(part_ranges, count, parts.device)[category]
    return (iou * own).sum(dim=1) / own.sum(dim=1)


def _membership(part_ranges: Sequence[range], count: int, device: torch.device) -> Tensor:
    """``(categories, count)`` bool: whether a category has a part."""
    part = torch.arange(count, device=device)
    first = torch.tensor([own.start for own in part_ranges], device=device)[:, None]
    after = torch.tensor([own.stop for own in part_ranges], device=device)[:, None]
    return (first <= part) & (part < after)


def _counted(parts: Tensor, mask: Tensor | None) -> Tensor:
    labelled = parts != UNLABELLED
    return labelled if mask is None else labelled & mask


def _overlap_and_union(
    predicted: Tensor, parts: Tensor, counted: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Points of each shape and part ``(B, count)`` float64: in both, and in either."""
    row = torch.arange(len(parts), device=parts.device)[:, None] * count

    def tally(part: Tensor, of: Tensor) -> Tensor:
        found = (row + part)[of & (part < count)]
        return found.bincount(minlength=len(parts) * count).view(-1, count).double()

    overlap = tally(parts, counted & (predicted == parts))
    return overlap, tally(parts, counted) + tally(predicted, counted) - overlap


class PartMetric(Metric):
    """Base of the metrics here: what is checked, and which part a point is given.

    Args:
        part_ranges: For each category its parts, as a
            :class:`~pointcanon.datasets.PartDataset` says.
        restricted: See :func:`predicted_parts`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self, part_ranges: Sequence[range], *, restricted: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.part_ranges = tuple(part_ranges)
        self.restricted = restricted

    def update(
        self, scores: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None = None
    ) -> None:
        """Count a batch.

        Args:
            scores: ``(B, N, P)`` of each part at each point.
            parts: ``(B, N)`` int64, the truth; ``UNLABELLED`` points are left out.
            category: ``(B,)`` int64.
            mask: ``(B, N)`` bool, True = a real point; others are left out.

        Raises:
            InputError: On shapes that do not belong together, a category or part that there is
                not, a part of another category, a shape without a labelled point, NaN scores.
        """
        self._check(scores, parts, category, mask)
        predicted = predicted_parts(scores, category, self.part_ranges, restricted=self.restricted)
        self._count(predicted, parts, category, mask)

    @abstractmethod
    def _count(
        self, predicted: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None
    ) -> None:
        """Take in what checked shapes were predicted to be."""

    def _check(self, scores: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None) -> None:
        known = max(own.stop for own in self.part_ranges)
        if scores.ndim != 3 or scores.shape[:2] != parts.shape or scores.shape[2] < known:
            raise InputError(
                f"scores has shape {tuple(scores.shape)}, expected that of parts, "
                f"{tuple(parts.shape)}, and one score for each of {known} parts"
            )
        if category.shape != parts.shape[:1]:
            raise InputError(f"category has shape {tuple(category.shape)}, expected one a shape")
        if mask is not None and (mask.shape != parts.shape or mask.dtype != torch.bool):
            raise InputError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool of "
                f"shape {tuple(parts.shape)}"
            )
        unknown = (category < 0) | (category >= len(self.part_ranges))
        if bool(unknown.any()):
            cloud = int(unknown.nonzero()[0])
            raise InputError(
                f"shape {cloud} is of category {int(category[cloud])}, outside the "
                f"{len(self.part_ranges)} there are"
            )
        counted = _counted(parts, mask)
        own = _membership(self.part_ranges, known, parts.device)[category]
        inside = own.gather(1, parts.clamp(0, known - 1)) & (parts >= 0) & (parts < known)
        if bool((counted & ~inside).any()):
            cloud, point = (int(i) for i in (counted & ~inside).nonzero()[0])
            has = self.part_ranges[int(category[cloud])]
            raise InputError(
                f"point {point} of shape {cloud} is labelled {int(parts[cloud, point])}, which is "
                f"no part of category {int(category[cloud])} ({has.start} … {has.stop - 1})"
            )
        if not bool(counted.any(dim=1).all()):
            cloud = int((~counted.any(dim=1)).nonzero()[0])
            raise InputError(f"shape {cloud} has no labelled point: nothing to score")
        broken = counted & scores.isnan().any(dim=2)
        if bool(broken.any()):
            cloud, point = (int(i) for i in broken.nonzero()[0])
            raise InputError(f"scores[{cloud}, {point}] holds NaN; check the model's weights")


class CategoryIoU(PartMetric):
    """Mean IoU of the shapes of each category, ``(categories,)``; NaN for one without shapes."""

    def __init__(
        self, part_ranges: Sequence[range], *, restricted: bool = True, **options: Any
    ) -> None:
        super().__init__(part_ranges, restricted=restricted, **options)
        zeros = torch.zeros(len(self.part_ranges), dtype=torch.float64)
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("shapes", zeros.clone(), dist_reduce_fx="sum")
        self.total: Tensor
        self.shapes: Tensor

    def _count(
        self, predicted: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None
    ) -> None:
        iou = shape_iou(predicted, parts, category, self.part_ranges, mask)
        self.total = self.total.index_add(0, category, iou.to(self.total))
        self.shapes = self.shapes.index_add(0, category, torch.ones_like(iou).to(self.shapes))

    def compute(self) -> Tensor:
        return self.total / self.shapes


class InstanceIoU(CategoryIoU):
    """Mean IoU over shapes: the instance average."""

    def compute(self) -> Tensor:
        return self.total.sum() / self.shapes.sum()


class ClassIoU(CategoryIoU):
    """Mean over the categories that have shapes of the mean over their shapes: the class
    average."""

    def compute(self) -> Tensor:
        return super().compute().nanmean()


class PointAccuracy(PartMetric):
    """Share of the labelled points that are given their part."""

    def __init__(
        self, part_ranges: Sequence[range], *, restricted: bool = True, **options: Any
    ) -> None:
        super().__init__(part_ranges, restricted=restricted, **options)
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("points", torch.tensor(0), dist_reduce_fx="sum")
        self.right: Tensor
        self.points: Tensor

    def _count(
        self, predicted: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None
    ) -> None:
        counted = _counted(parts, mask)
        self.right = self.right + (counted & (predicted == parts)).sum()
        self.points = self.points + counted.sum()

    def compute(self) -> Tensor:
        return self.right.double() / self.points


class LabelIoU(PartMetric):
    """Mean over parts of the IoU of all points of the data set, as where there is one category.

    Parts that no point of the data set has are left out.
    """

    def __init__(
        self, part_ranges: Sequence[range], *, restricted: bool = True, **options: Any
    ) -> None:
        super().__init__(part_ranges, restricted=restricted, **options)
        zeros = torch.zeros(max(own.stop for own in self.part_ranges), dtype=torch.float64)
        self.add_state("overlap", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("union", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("truth", zeros.clone(), dist_reduce_fx="sum")
        self.overlap: Tensor
        self.union: Tensor
        self.truth: Tensor

    def _count(
        self, predicted: Tensor, parts: Tensor, category: Tensor, mask: Tensor | None
    ) -> None:
        counted = _counted(parts, mask)
        overlap, union = _overlap_and_union(predicted, parts, counted, len(self.truth))
        self.overlap = self.overlap + overlap.sum(dim=0)
        self.union = self.union + union.sum(dim=0)
        self.truth = self.truth + parts[counted].bincount(minlength=len(self.truth))

    def compute(self) -> Tensor:
        present = self.truth > 0
        return (self.overlap / self.union)[present].mean()

"""Part segmentation metrics: cases by hand, a slow reference, batches, processes, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from pointcanon.datasets import UNLABELLED
from pointcanon.datasets.shapenet_part_layouts import PART_RANGES
from pointcanon.errors import InputError
from pointcanon.eval.metrics import (
    CategoryIoU,
    ClassIoU,
    InstanceIoU,
    LabelIoU,
    PartMetric,
    PointAccuracy,
    predicted_parts,
    shape_iou,
)

TWO = (range(4), range(4, 6))
NAMES = ("InstanceIoU", "ClassIoU", "PointAccuracy")


def scores_for(predicted: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(predicted, count).float()


def value(metric: PartMetric, *batch: Tensor) -> Tensor:
    metric.update(*batch)
    return metric.compute()


# ---------------------------------------------------------------------------------------- by hand


def test_a_part_absent_from_both_counts_as_one() -> None:
    """The four-part example: 1/2, 2/3, 1 (right) and 1 (absent)."""
    truth = torch.tensor([[0, 0, 1, 1, 2]])
    predicted = torch.tensor([[0, 1, 1, 1, 2]])
    found = shape_iou(predicted, truth, torch.tensor([0]), TWO)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx((1 / 2 + 2 / 3 + 1 + 1) / 4)


def test_a_part_only_predicted_counts_as_zero() -> None:
    truth, predicted = torch.tensor([[4, 4, 4, 4]]), torch.tensor([[4, 4, 4, 5]])
    assert shape_iou(predicted, truth, torch.tensor([1]), TWO).item() == pytest.approx(3 / 8)


def test_instance_and_class_average_differ() -> None:
    """Three shapes of one category, all right, and one of the other, half of it right."""
    truth = torch.tensor([[0, 1, 2, 3]] * 3 + [[4, 4, 5, 5]])
    predicted = truth.clone()
    predicted[3] = torch.tensor([4, 4, 4, 4])
    batch = (scores_for(predicted, 6), truth, torch.tensor([0, 0, 0, 1]))
    assert value(InstanceIoU(TWO), *batch).item() == pytest.approx((3 + 1 / 4) / 4)
    assert value(ClassIoU(TWO), *batch).item() == pytest.approx((1 + 1 / 4) / 2)
    assert value(CategoryIoU(TWO), *batch).tolist() == pytest.approx([1, 1 / 4])
    assert value(PointAccuracy(TWO), *batch).item() == pytest.approx(14 / 16)


def test_a_category_without_shapes_is_left_out() -> None:
    truth = torch.tensor([[0, 1]])
    batch = (scores_for(truth, 6), truth, torch.tensor([0]))
    assert value(ClassIoU(TWO), *batch).item() == 1
    per_category = value(CategoryIoU(TWO), *batch)
    assert per_category[0] == 1
    assert per_category[1].isnan()


def test_prediction_restricted_to_the_category_or_not() -> None:
    """The best part is of another category, the best of its own is right."""
    scores = torch.tensor([[[9.0, 0, 0, 0, 5, 1], [9, 0, 0, 0, 1, 5]]])
    truth, category = torch.tensor([[4, 5]]), torch.tensor([1])
    assert predicted_parts(scores, category, TWO).tolist() == [[4, 5]]
    assert predicted_parts(scores, category, TWO, restricted=False).tolist() == [[0, 0]]
    assert value(InstanceIoU(TWO), scores, truth, category) == 1
    assert value(InstanceIoU(TWO, restricted=False), scores, truth, category) == 0


def test_label_iou_leaves_out_what_nobody_has_and_counts_false_alarms_in_the_union() -> None:
    one = (range(4),)
    truth = torch.tensor([[0, 0, 1], [1, 1, UNLABELLED]])
    predicted = torch.tensor([[0, 3, 1], [1, 0, 2]])  # 3 is had by no point of the truth
    batch = (scores_for(predicted, 4), truth, torch.zeros(2, dtype=torch.long))
    assert value(LabelIoU(one), *batch).item() == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert value(PointAccuracy(one), *batch).item() == pytest.approx(3 / 5)


# ----------------------------------------------------------------------------- a slow reference


def random_batch(
    shapes: int, seed: int = 0, points: int = 60
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    category = torch.randint(16, (shapes,), generator=generator)
    truth = torch.empty(shapes, points, dtype=torch.long)
    for i, c in enumerate(category.tolist()):
        # few points, so that parts are often absent
        own = torch.tensor(list(PART_RANGES[c]))
        truth[i] = own[torch.randint(1 + i % len(own), (points,), generator=generator)]
    scores = torch.randn(shapes, points, 50, generator=generator)
    scores += 3 * torch.nn.functional.one_hot(truth, 50)
    mask = torch.rand(shapes, points, generator=generator) < 0.8
    mask[:, 0] = True
    truth[torch.rand(shapes, points, generator=generator) < 0.1] = UNLABELLED
    truth[:, 0] = torch.tensor([PART_RANGES[c].start for c in category.tolist()])
    return scores, truth, category, mask


def slowly(
    scores: Tensor, truth: Tensor, category: Tensor, mask: Tensor, restricted: bool
) -> tuple[float, float, float]:
    """Instance and class mIoU and accuracy, with sets and plain Python."""
    score, label = scores.tolist(), truth.tolist()
    by_category: dict[int, list[float]] = {}
    right = counted = 0
    for i, c in enumerate(category.tolist()):
        points = [j for j in range(truth.shape[1]) if mask[i, j] and label[i][j] >= 0]
        allowed = PART_RANGES[c] if restricted else range(50)
        answer = {j: max(allowed, key=score[i][j].__getitem__) for j in points}
        ious = []
        for part in PART_RANGES[c]:
            said = {j for j in points if answer[j] == part}
            true = {j for j in points if label[i][j] == part}
            ious.append(len(said & true) / len(said | true) if said | true else 1.0)
        by_category.setdefault(c, []).append(math.fsum(ious) / len(ious))
        right += sum(answer[j] == label[i][j] for j in points)
        counted += len(points)
    shapes = [iou for ious in by_category.values() for iou in ious]
    means = [math.fsum(ious) / len(ious) for ious in by_category.values()]
    return math.fsum(shapes) / len(shapes), math.fsum(means) / len(means), right / counted


def metrics(restricted: bool) -> MetricCollection:
    kinds = (InstanceIoU, ClassIoU, PointAccuracy)
    return MetricCollection([kind(PART_RANGES, restricted=restricted) for kind in kinds])


@pytest.mark.parametrize("restricted", [True, False])
def test_as_the_slow_reference_in_uneven_batches(restricted: bool) -> None:
    batch = random_batch(45)
    expected = slowly(*batch, restricted)
    assert 0.2 < expected[0] < 0.95
    together = metrics(restricted)
    for start, end in ((0, 16), (16, 32), (32, 45)):
        together.update(*(tensor[start:end] for tensor in batch))
    found = together.compute()
    assert [found[name].item() for name in NAMES] == pytest.approx(expected, rel=1e-12)


def test_padding_and_the_order_of_points_change_nothing() -> None:
    scores, truth, category, mask = random_batch(8)
    first = shape_iou(
        predicted_parts(scores, category, PART_RANGES), truth, category, PART_RANGES, mask
    )
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    again = shape_iou(
        predicted_parts(scores[:, order], category, PART_RANGES),
        truth[:, order],
        category,
        PART_RANGES,
        mask[:, order],
    )
    assert torch.equal(first, again)
    scores[~mask], truth[~mask] = torch.nan, 49
    metric = CategoryIoU(PART_RANGES)
    metric.update(scores, truth, category, mask)
    assert metric.total.sum().item() == pytest.approx(first.sum().item(), rel=1e-12)


def _a_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    batch = random_batch(13)
    share = slice(0, 9) if rank == 0 else slice(9, 13)
    together = metrics(restricted=True)
    for start in range(share.start, share.stop, 4):  # 4, 4, 1 and 4: uneven in every way
        together.update(*(tensor[start : min(start + 4, share.stop)] for tensor in batch))
    torch.save({k: v.item() for k, v in together.compute().items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_a_process, (str(tmp_path),), nprocs=2)
    expected = slowly(*random_batch(13), restricted=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [found[name] for name in NAMES] == pytest.approx(expected, rel=1e-12)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t, c: (s, t.fill_(4), c), r"point 0 of shape 0 is labelled 4.*category 0"),
        (lambda s, t, c: (s, t.fill_(-2), c), r"labelled -2"),
        (lambda s, t, c: (s, t.fill_(77), c), r"labelled 77"),
        (lambda s, t, c: (s, t, c.fill_(2)), r"category 2, outside the 2"),
        (lambda s, t, c: (s, t, c[:0]), r"category has shape \(0,\)"),
        (lambda s, t, c: (s[:, 1:], t, c), r"scores has shape \(1, 2, 6\).*\(1, 3\)"),
        (lambda s, t, c: (s[..., :5], t, c), r"each of 6 parts"),
        (lambda s, t, c: (s, t.fill_(UNLABELLED), c), r"shape 0 has no labelled point"),
        (lambda s, t, c: (s / 0, t, c), r"scores\[0, 0\] holds NaN"),
        (lambda s, t, c: (s, t, c, torch.ones(1, 2).bool()), r"mask has shape \(1, 2\)"),
    ],
)
def test_bad_input_is_one_clear_error(change, words: str) -> None:  # type: ignore[no-untyped-def]
    batch = change(torch.zeros(1, 3, 6), torch.zeros(1, 3).long(), torch.tensor([0]))
    with pytest.raises(InputError, match=words):
        InstanceIoU(TWO).update(*batch)

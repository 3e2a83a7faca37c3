"""Every metric of part segmentation on whatever networks and data sets may hand it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, EFFORTS
from torch import Tensor

from pointcanon.datasets import UNLABELLED
from pointcanon.errors import InputError
from pointcanon.eval import metrics
from pointcanon.eval.metrics import PartMetric
from pointcanon.eval.scores import Tally, tally_for

NUMBERS = st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, 1e30])
RANGES = (range(2), range(2, 3), range(3, 7))
METRICS = [
    cls
    for _, cls in inspect.getmembers(metrics, inspect.isclass)
    if issubclass(cls, PartMetric) and not inspect.isabstract(cls)
]


def truth(batch: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Parts ``(batch, count)``, some of them without a label, and categories ``(batch,)``."""
    generator = torch.Generator().manual_seed(seed)
    category = torch.randint(len(RANGES), (batch,), generator=generator)
    low = torch.tensor([own.start for own in RANGES])[category][:, None]
    size = torch.tensor([len(own) for own in RANGES])[category][:, None]
    parts = low + (torch.rand(batch, count, generator=generator) * size).long()
    hidden = torch.rand(batch, count, generator=generator) < 0.2
    hidden[:, 0] = False
    return torch.where(hidden, UNLABELLED, parts), category


@EFFORTS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("restricted", [True, False])
def test_scores(metric: type[PartMetric], restricted: bool, effort: object) -> None:
    @effort
    @given(
        st.integers(1, 6),
        st.integers(1, 9),
        st.integers(0, 1 << 16),
        st.sampled_from(DTYPES),
        st.sampled_from([1.0, 0.0, 1e30, torch.inf]),
    )
    def holds(batch: int, count: int, seed: int, dtype: torch.dtype, size: float) -> None:
        parts, category = truth(batch, count, seed)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 7, count, generator=generator)
        logits = (logits.sign() if size == torch.inf else logits).mul(size).to(dtype).nan_to_num()
        together = metric(RANGES, restricted=restricted)
        together.update(logits.mT, parts, category)
        found = together.compute().double()
        known = found[~found.isnan()]
        assert len(known)
        assert ((known >= 0) & (known <= 1)).all()
        # one by one, in another order, and with a batch of none between them
        apart = metric(RANGES, restricted=restricted)
        for cloud in reversed(range(batch)):
            one = slice(cloud, cloud + 1)
            apart.update(logits.mT[one], parts[one], category[one])
            apart.update(logits.mT[:0], parts[:0], category[:0])
        torch.testing.assert_close(apart.compute().double(), found, equal_nan=True)
        perfect = metric(RANGES, restricted=restricted)
        perfect.update(torch.nn.functional.one_hot(parts.clamp_min(0), 7), parts, category)
        best = perfect.compute()
        assert (best[~best.isnan()] == 1).all()

    holds()


@EFFORTS
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_padded_does_not_count(metric: type[PartMetric], effort: object) -> None:
    @effort
    @given(
        st.integers(1, 5), st.integers(1, 9), st.integers(0, 7), st.integers(0, 1 << 16), NUMBERS
    )
    def holds(batch: int, count: int, more: int, seed: int, number: float) -> None:
        parts, category = truth(batch, count, seed)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, count, 7, generator=generator)
        expected = metric(RANGES)
        expected.update(scores, parts, category)
        # the same points among others, which hold anything
        place = torch.rand(batch, count + more, generator=generator).argsort(dim=1)[:, :count]
        mask = torch.zeros(batch, count + more, dtype=torch.bool).scatter(1, place, True)
        wide = torch.full((batch, count + more, 7), number)
        wide = wide.scatter(1, place[..., None].expand(-1, -1, 7), scores)
        labels = torch.randint(-3, 99, mask.shape, generator=generator).scatter(1, place, parts)
        found = metric(RANGES)
        found.update(wide, labels, category, mask)
        torch.testing.assert_close(found.compute(), expected.compute(), equal_nan=True)

    holds()


def by_hand(predicted: list[int], labels: list[int], classes: int) -> list[float | None]:
    """Accuracy of each class, None where there is no cloud of it."""
    of = [
        [p == own for p, y in zip(predicted, labels, strict=True) if y == own]
        for own in range(classes)
    ]
    return [sum(right) / len(right) if right else None for right in of]


@EFFORTS
def test_what_classes_add_up_to(effort: object) -> None:
    @effort
    @given(
        st.integers(1, 40),
        st.integers(1, 6),
        st.integers(1, 4),
        st.integers(1, 9),
        st.integers(0, 1 << 16),
        st.sampled_from(DTYPES),
    )
    def holds(
        clouds: int, classes: int, poses: int, batch: int, seed: int, dtype: torch.dtype
    ) -> None:
        dataset = SimpleNamespace(classes=[f"class {i}" for i in range(classes)])
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (clouds,), generator=generator)
        answers = torch.randn(poses, clouds, classes, generator=generator).to(dtype)

        def counted(order: list[int]) -> Tally:
            tally = tally_for(dataset, poses, parts=False, restricted=True)
            for first in range(0, len(order), batch):
                rows = torch.tensor(order[first : first + batch])
                tally.update(list(answers[:, rows]), {"label": labels[rows]})
            return tally

        whole = counted(list(range(clouds)))
        joined = counted(list(range(0, clouds, 2)))
        if clouds > 1:
            joined.join(counted(list(range(1, clouds, 2))[::-1]))
        for pose in range(poses):
            predicted = answers[pose].argmax(dim=1).tolist()
            expected = by_hand(predicted, labels.tolist(), classes)
            for tally in (whole, joined):
                scores = tally.scores(pose)
                assert list(scores.per_class.values()) == pytest.approx(expected)
                known = [share for share in expected if share is not None]
                assert scores.mean_class_accuracy == pytest.approx(sum(known) / len(known))
                right = sum(p == y for p, y in zip(predicted, labels.tolist(), strict=True))
                assert scores.overall_accuracy == pytest.approx(right / clouds)
        if poses > 1:
            flips = answers[1].argmax(dim=1) != answers[-1].argmax(dim=1)
            assert whole.flips() == joined.flips() == pytest.approx(flips.double().mean().item())

    holds()


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_no_score(metric: type[PartMetric]) -> None:
    parts, category = truth(2, 5, 0)
    logits = torch.zeros(2, 5, 7)
    logits[1, 0, 3] = torch.nan
    with pytest.raises(InputError, match=r"scores\[1, 0\] holds NaN"):
        metric(RANGES).update(logits, parts, category)

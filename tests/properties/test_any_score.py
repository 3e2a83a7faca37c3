"""Every metric of part segmentation on whatever networks and data sets may hand it."""

from __future__ import annotations

import inspect

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


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_no_score(metric: type[PartMetric]) -> None:
    parts, category = truth(2, 5, 0)
    logits = torch.zeros(2, 5, 7)
    logits[1, 0, 3] = torch.nan
    with pytest.raises(InputError, match=r"scores\[1, 0\] holds NaN"):
        metric(RANGES).update(logits, parts, category)

"""Clouds as hostile as users' data: strategies of Hypothesis, and how a drawn cloud is built."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from pointcanon import testing

__all__ = ["DTYPES", "EFFORTS", "SHAPES", "Spec", "powers", "specs"]

# examples build networks and clouds: how long that takes says nothing about them
_LENIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
EFFORTS = pytest.mark.parametrize(
    "effort",
    [
        pytest.param(settings(_LENIENT, max_examples=5, derandomize=True), id="fast"),
        pytest.param(settings(_LENIENT, max_examples=300), id="slow", marks=pytest.mark.slow),
    ],
)
"""How hard a property is tried: a few examples, always the same, or, with ``-m slow``, many new
ones. A test takes it as ``effort`` and decorates its property with it."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    "generic",
    "surface",
    "point",
    "two places",
    "line",
    "plane",
    "square",
    "cube",
    "needle",
    "pairs",
    "constant rows",
)
LAYOUTS = ("contiguous", "channels first", "every other", "expanded", "read backwards")
MASKS = (None, "all", "one point", "half", "ragged")


@dataclass(frozen=True)
class Spec:
    """What a batch of clouds is to be; :meth:`build` makes it, always the same.

    Plain fields, so that a failing example prints as one line that can be pasted into a test.
    """

    shape: str = "generic"
    batch: int = 2
    count: int = 32
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    offset: float = 0.0
    layout: str = "contiguous"
    mask: str | None = None
    seed: int = 0

    def build(self) -> tuple[Tensor, Tensor | None]:
        """Clouds ``(batch, count, 3)`` and a mask or None, which hides NaN where it can."""
        generator = torch.Generator().manual_seed(self.seed)
        points = _shaped(self.shape, self.batch, self.count, generator)
        # the scale is that of the largest coordinate, so that no dtype is left behind
        points = points / points.abs().amax().clamp_min(1e-300) if points.numel() else points
        least, most = torch.finfo(self.dtype).tiny, torch.finfo(self.dtype).max / 4
        offset = min(self.offset, most / 4)
        scale = min(max(self.scale, least), most)
        points = (points * scale + offset).to(self.dtype)
        mask = _mask(self.mask, self.batch, self.count, generator)
        if mask is not None and self.layout != "expanded":  # whose rows share their memory
            points = torch.where(mask[..., None], points, torch.nan)
        return _laid_out(points, self.layout), mask


def _shaped(shape: str, batch: int, count: int, generator: torch.Generator) -> Tensor:
    double = {"dtype": torch.float64}
    draw = torch.randn(batch, count, 3, generator=generator, **double)
    along = draw[..., :1]
    one, two = torch.randn(2, batch, 1, 3, generator=generator, **double)
    row = torch.arange(count)
    angle = row * (torch.pi / 2)
    signs = torch.stack([(row >> bit & 1) * 2.0 - 1 for bit in range(3)], dim=-1).double()
    ring = torch.stack((angle.cos(), angle.sin(), 0 * angle), dim=-1).double()
    made = {
        "generic": lambda: testing.generic_clouds(batch, count, generator, torch.float64),
        "surface": lambda: testing.surface_clouds(batch, count, generator, torch.float64),
        "point": lambda: one.expand(batch, count, 3),
        "two places": lambda: torch.where((row % 2 == 0)[:, None], one, two),
        "line": lambda: along * one + two,
        "plane": lambda: draw[..., :1] * one + draw[..., 1:2] * two,
        "square": lambda: ring.expand(batch, count, 3),
        "cube": lambda: signs.expand(batch, count, 3),
        "needle": lambda: along * one + 1e-7 * draw,
        "pairs": lambda: draw.repeat_interleave(2, dim=1)[:, :count],
        "constant rows": lambda: along.expand(batch, count, 3),
    }
    return made[shape]()


def _mask(kind: str | None, batch: int, count: int, generator: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    draw = torch.rand(batch, count, generator=generator)
    first = draw == draw.amax(dim=1, keepdim=True) if batch else draw > 2
    kept = {"all": draw >= 0, "one point": first, "half": draw > 0.5, "ragged": draw > draw[:, :1]}
    return kept[kind] | first


def _laid_out(points: Tensor, layout: str) -> Tensor:
    if layout == "channels first":
        return points.mT.contiguous().mT
    if layout == "every other":
        return points.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "expanded" and len(points):
        return points[:1].expand_as(points)
    if layout == "read backwards":
        return points.flip(1).as_strided(points.shape, points.stride()).flip(1)
    return points


def powers(least: int = -30, most: int = 30) -> st.SearchStrategy[float]:
    """Powers of ten."""
    return st.integers(least, most).map(lambda power: 10.0**power)


def specs(**fixed: object) -> st.SearchStrategy[Spec]:
    """Any batch of clouds; keywords fix fields."""
    free = {
        "shape": st.sampled_from(SHAPES),
        "batch": st.sampled_from([1, 2, 3, 0]),
        "count": st.sampled_from([32, 1, 2, 3, 4, 8, 21, 64]),
        "dtype": st.sampled_from(DTYPES),
        "scale": st.one_of(st.just(1.0), powers()),
        "offset": st.sampled_from([0.0, 1.0, 1e6]),
        "layout": st.sampled_from(LAYOUTS),
        "mask": st.sampled_from(MASKS),
        "seed": st.integers(0, 1 << 16),
    }
    return st.builds(Spec, **{**free, **{k: st.just(v) for k, v in fixed.items()}})

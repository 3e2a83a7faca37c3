"""Steerable layers: networks whose features are spherical tensors that turn with the input.

Features of degrees 0 to L are ``((L + 1)^2, C, ...)``: components first, with rows l^2 to (l + 1)^2
those of degree l; then C channels; then clouds and points, in any number of dimensions. Under a
rotation the rows of degree l mix by its Wigner matrix, in the real basis of e3nn, where the rows of
degree 1 are x, y, z. A layer treats all rows of one degree alike and couples degrees by
Clebsch-Gordan coefficients, so it commutes with rotations (Thomas et al. 2018, arXiv 1802.08219).

Components come first and points last so that every layer is a few products of a small matrix with
long contiguous rows. e3nn is asked for the coefficients when a layer is built, and not after: the
layers are plain torch, which deep-copies, pickles, compiles and exports.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointcanon.errors import InputError
from pointcanon.layers.constants import KeepsConstants
from pointcanon.layers.shared_batch import SharesBatch

__all__ = [
    "Dropout",
    "Gate",
    "Interaction",
    "Linear",
    "Norm",
    "SolidHarmonics",
    "TensorProduct",
    "bernstein",
    "coupling",
    "invert",
    "mean",
    "mix",
]

NORM_SOFTENING = 1e-2
"""Added to mean squares before division, so that short vectors, whose direction is mostly rounding,
are not brought to full size."""


@cache
def coupling(degree: int) -> Tensor:
    r"""Clebsch-Gordan coefficients of all degrees up to ``degree``, ``(D, D, D)`` float64.

    D is ``(degree + 1)^2``. The block of degrees l1, l2 and l3 is e3nn's Wigner 3j symbol times
    :math:`\sqrt{2 l_3 + 1}`: independent components of unit variance couple to such components.
    """
    from e3nn import o3  # slow to import, and only needed here

    size = (degree + 1) ** 2
    # what is cached outlives a surrounding inference mode or meta device
    with torch.inference_mode(False), torch.device("cpu"):
        coefficients = torch.zeros(size, size, size, dtype=torch.float64)
        for l1, l2, l3 in product(range(degree + 1), repeat=3):
            if abs(l1 - l2) <= l3 <= l1 + l2:
                symbol = o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
                coefficients[_rows(l1), _rows(l2), _rows(l3)] = symbol * math.sqrt(2 * l3 + 1)
    return coefficients


def invert(features: Tensor) -> Tensor:
    """What harmonics of points x become for -x: odd degrees change their sign."""
    degree = math.isqrt(features.shape[0]) - 1
    parity = [(-1.0) ** ell for ell in range(degree + 1) for _ in range(2 * ell + 1)]
    return features * features.new_tensor(parity).view(-1, *(1,) * (features.ndim - 1))


def bernstein(x: Tensor, count: int) -> Tensor:
    """The ``count`` Bernstein polynomials of degree ``count - 1``, ``(count, ...)``.

    For x in [0, 1] they are smooth bumps that sum to one.
    """
    last = count - 1
    return torch.stack([math.comb(last, i) * x**i * (1 - x) ** (last - i) for i in range(count)])


class _Coupled(KeepsConstants):
    """Holds the coefficients."""

    coupling: Tensor

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.register_buffer("coupling", coupling(degree), persistent=False)


class SolidHarmonics(_Coupled):
    """Harmonic polynomials of vectors: ``(3, ...)`` to ``((L + 1)^2, ...)``.

    Degree l is |v|^l times the real spherical harmonics of v / |v|, in e3nn's "component"
    normalisation (mean square 1 over the unit sphere). Polynomials, so smooth at zero too.

    Args:
        degree: L, at least 1.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        first = math.sqrt(3) * vectors
        degrees = [torch.ones_like(vectors[:1]), first]
        coupling = self.coupling.to(vectors)
        for ell in range(1, self.degree):
            block = coupling[_rows(ell), _rows(1), _rows(ell + 1)]
            raised = _couple(block, degrees[-1], first)
            degrees.append(raised / math.sqrt(3 * (ell + 1) / (2 * ell + 3)))
        return torch.cat(degrees)


class Linear(nn.Module):
    """Mixes channels, each degree by its own matrix; only degree 0 has a bias.

    ``((L + 1)^2, C_in, ...)`` to ``((L + 1)^2, C_out, ...)``.
    """

    def __init__(self, degree: int, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.degree = degree
        scale = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(scale * torch.randn(degree + 1, out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = [mix(weight, rows) for weight, rows in zip(self.weight, _by_degree(x), strict=True)]
        if self.bias is not None:
            mixed[0] = mixed[0] + _beside(self.bias, x)
        return torch.cat(mixed)


class Norm(nn.Module):
    """Root mean square of each degree brought to one, over its components and channels.

    Works point by point: no statistics of the batch, the same in training and evaluation.
    :data:`NORM_SOFTENING` is added to the mean square.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [
                rows * torch.rsqrt(rows.square().mean(dim=(0, 1), keepdim=True) + NORM_SOFTENING)
                for rows in _by_degree(x)
            ]
        )


class TensorProduct(_Coupled):
    """Learned sums of all the ways in which two features couple, channel by channel.

    Two features of degrees up to L and C channels give one of degrees up to M and C channels. Each
    pair of degrees l1, l2 couples to every degree from |l1 - l2| to l1 + l2; all that arrives at a
    degree is mixed by one matrix (e3nn's ``"uuu"`` product followed by its linear layer).

    Args:
        degree: L.
        channels: C.
        out_degree: M <= L.
    """

    def __init__(self, degree: int, channels: int, out_degree: int) -> None:
        super().__init__(degree)
        self.out_degree = out_degree
        paths = [0] * (out_degree + 1)
        for l1, l2 in product(range(degree + 1), repeat=2):
            for l3 in self._reached(l1, l2):
                paths[l3] += 1
        self.weights = nn.ParameterList(
            torch.randn(channels, count * channels) / math.sqrt(count * channels) for count in paths
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        arrived: list[list[Tensor]] = [[] for _ in self.weights]
        coupling = self.coupling.to(first)
        for l1, l2 in product(range(self.degree + 1), repeat=2):
            reached = self._reached(l1, l2)
            if not reached:
                continue
            rows = slice(reached[0] ** 2, reached[-1] * (reached[-1] + 2) + 1)
            block = coupling[_rows(l1), _rows(l2), rows]
            coupled = _couple(block, first[_rows(l1)], second[_rows(l2)])
            for l3, part in zip(
                reached, coupled.split([2 * l3 + 1 for l3 in reached]), strict=True
            ):
                arrived[l3].append(part)
        return torch.cat(
            [
                mix(weight, torch.cat(parts, dim=1))
                for weight, parts in zip(self.weights, arrived, strict=True)
            ]
        )

    def _reached(self, l1: int, l2: int) -> range:
        return range(abs(l1 - l2), min(l1 + l2, self.out_degree) + 1)


class Gate(nn.Module):
    """SiLU of degree 0; each channel of a higher degree is scaled by a number in (0, 1).

    The gates are sigmoids of learned sums of the channels of degree 0.

    Args:
        degree: L.
        channels: C.
    """

    def __init__(self, degree: int, channels: int) -> None:
        super().__init__()
        self.degree = degree
        self.gates = nn.Linear(channels, degree * channels)

    def forward(self, x: Tensor) -> Tensor:
        scalars, *higher = _by_degree(x)
        sums = self.gates.weight @ scalars[0].flatten(1) + self.gates.bias[:, None]
        gates = torch.sigmoid(sums).view(self.degree, *x.shape[1:])
        gated = [rows * gate for rows, gate in zip(higher, gates, strict=True)]
        return torch.cat((functional.silu(scalars), *gated))


class Dropout(SharesBatch, nn.Module):
    """Dropout of whole tensors ``(D, C, B, ...)``: a channel's whole degree goes, or nothing of it.

    In training a tensor is zeroed with probability p and the others are scaled by 1 / (1 - p).

    Raises:
        InputError: If p is outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"dropout probability p is {p}; choose 0 <= p < 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        whole = [self.dropped(torch.ones_like(rows[:1]), self.p, dim=2) for rows in _by_degree(x)]
        return torch.cat([rows * kept for rows, kept in zip(_by_degree(x), whole, strict=True)])


class Interaction(nn.Module):
    """A residual layer: every point couples two learned views of itself and of its cloud.

    Args:
        degree: L of the input.
        channels: C.
        out_degree: M <= L, the highest degree that is kept; the default is L.
        dropout: Probability of dropping a whole tensor of what is added.
    """

    def __init__(
        self, degree: int, channels: int, out_degree: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        out_degree = degree if out_degree is None else out_degree
        self.kept = (out_degree + 1) ** 2
        self.norm = Norm()
        self.of_point = Linear(degree, channels, 2 * channels)
        self.of_cloud = Linear(degree, channels, 2 * channels, bias=False)
        self.product = TensorProduct(degree, channels, out_degree)
        self.gate = Gate(out_degree, channels)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``((L + 1)^2, C, B, N)`` to ``((M + 1)^2, C, B, N)``; ``mask (B, N)``, True = real."""
        seen = self.norm(x)
        views = self.of_point(seen) + self.of_cloud(mean(seen, mask))
        coupled = self.product(*views.chunk(2, dim=1))
        return x[: self.kept] + self.dropout(self.gate(coupled))


def mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the real points, ``(..., B, N)`` to ``(..., B, 1)``; ``mask (B, N)`` bool."""
    if mask is None:
        return x.mean(dim=-1, keepdim=True)
    kept = torch.where(mask, x, x.new_zeros(()))
    return kept.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1)


def mix(weight: Tensor, x: Tensor) -> Tensor:
    """Channels mixed alike in every row: ``(D, C_in, ...)`` to ``(D, C_out, ...)``."""
    # a broadcast product would be folded into one, at the price of a transposed copy
    mixed = torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2))
    return mixed.view(x.shape[0], len(weight), *x.shape[2:])


def _rows(degree: int) -> slice:
    return slice(degree**2, (degree + 1) ** 2)


def _by_degree(x: Tensor) -> tuple[Tensor, ...]:
    return x.split([2 * ell + 1 for ell in range(math.isqrt(x.shape[0]))])


def _couple(block: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``(I, ...)`` and ``(J, ...)`` by coefficients ``(I, J, K)`` to ``(K, ...)``, one product."""
    outer = (first[:, None] * second[None]).flatten(0, 1).flatten(1)
    return (block.flatten(0, 1).mT @ outer).view(block.shape[-1], *first.shape[1:])


def _beside(bias: Tensor, x: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (x.ndim - 2))

"""Convolution over a finite group of rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcanon.errors import InputError
from pointcanon.layers.constants import KeepsConstants
from pointcanon.portable import exporting

__all__ = ["GroupConv"]


FEW = 4
"""Up to so many orbits a kernel costs more to turn than that saves."""


class GroupConv(KeepsConstants):
    """Each element g of a group sees the features of all elements ``g h``, in the order of h.

    Let x(g) be features of a cloud in the pose ``R g``. ``y(g) = W [x(g h)]_h + b`` is a function
    of the pose ``R g`` alone, the same for all of them: where R is replaced by ``R q``, which
    permutes the poses, the answers are permuted alike (Cohen & Welling 2016, arXiv 1602.07576).

    Many orbits at once are computed in the Fourier domain of the group (Diaconis & Rockmore 1990),
    where the features of an irreducible representation meet their own alone: of the 24 turns of the
    cube, 64 products instead of 24^2.

    Args:
        group: ``(G, 3, 3)``, closed under the product.
        inputs: Features of each element.
        outputs: Of each element.

    Raises:
        InputError: If the matrices are not a group.
    """

    index: Tensor
    basis: Tensor
    entries: Tensor

    def __init__(self, group: Tensor, inputs: int, outputs: int) -> None:
        super().__init__()
        index = _product_table(group)
        basis, entries, self.kinds = _irreducible(index.cpu())
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("entries", entries, persistent=False)
        self.linear = nn.Linear(len(group) * inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., G, C)`` to ``(..., G, outputs)``."""
        if exporting() or features.shape[:-2].numel() <= FEW:
            answer: Tensor = self.linear(features[..., self.index, :].flatten(-2))
            return answer
        basis = self.basis.to(features)
        parts = (basis.mT @ features).split([copies * size for copies, size in self.kinds], dim=-2)
        weights = self.linear.weight.unflatten(1, (-1, features.shape[-1])).transpose(0, 1)
        # W_ij = sum_h D_ij(h) W_h, for every entry of every representation
        turned = (self.entries.to(features) @ weights.flatten(1)).unflatten(1, weights.shape[1:])
        kernels = turned.split([size**2 for _, size in self.kinds])
        answers = []
        for (_, size), part, kernel in zip(self.kinds, parts, kernels, strict=True):
            # y_i = sum_j W_ij x_j in every copy
            matrix = kernel.unflatten(0, (size, size)).transpose(1, 2).flatten(2).flatten(0, 1)
            rows = part.reshape(-1, size * part.shape[-1])
            answers.append(nn.functional.linear(rows, matrix).reshape(*part.shape[:-1], -1))
        return basis @ torch.cat(answers, dim=-2) + self.linear.bias


def _product_table(group: Tensor) -> Tensor:
    """``(G, G)``, the index of ``g h`` at row g and column h."""
    products = group[:, None] @ group
    distance = (products[:, :, None] - group).abs().amax(dim=(-1, -2))
    nearest, index = distance.min(dim=-1)
    if nearest.max() > 1e-4:
        raise InputError(f"these {len(group)} matrices are no group: products lead out of them")
    return index


def _irreducible(table: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The functions on a group, on which h acts as ``x(g) -> x(g h)``, taken apart.

    Returns:
        An orthonormal basis ``(G, G)``, column after column those of every copy of one irreducible
        representation, then of the next. The entries of their matrices ``(sum d^2, G)``, row by
        row, for every h: the same in all copies. And how many copies there are of each, of which
        dimension d.
    """
    count = len(table)
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(count, count, generator=generator, dtype=torch.float64)
    # mixtures of the shifts x(g) -> x(h g) commute with those above: the eigenspaces of a symmetric
    # one are irreducible, but for a coincidence that this draw is not
    mixture = torch.empty_like(draw)
    mixture[torch.arange(count).expand(count, count), table] = draw[0, :, None].expand(-1, count)
    values, vectors = torch.linalg.eigh(mixture + mixture.mT)
    starts = (values.diff() > 1e-6).nonzero()[:, 0] + 1
    kinds: list[tuple[Tensor, list[Tensor]]] = []  # the matrices of each, and its copies
    for space in vectors.tensor_split(starts, dim=1):
        matrices = torch.einsum("gi,ghj->hij", space, space[table])
        size = space.shape[1]
        for known, copies in kinds:
            if known.shape == matrices.shape:
                # what intertwines two representations is a rotation to a factor, or nothing
                between = torch.einsum("hij,jk,hlk->il", known, draw[:size, :size], matrices)
                if between.norm() > 1e-6:
                    copies.append(space @ between.mT * (size**0.5 / between.norm()))
                    break
        else:
            kinds.append((matrices, [space]))
    basis = torch.cat([copy for _, copies in kinds for copy in copies], dim=1)
    entries = torch.cat([matrices.flatten(1).mT for matrices, _ in kinds])
    return basis, entries, [(len(copies), matrices.shape[1]) for matrices, copies in kinds]

"""Convolution over a finite group of rotations."""

from __future__ import annotations

from torch import Tensor, nn

from pointcanon.errors import InputError

__all__ = ["GroupConv"]


class GroupConv(nn.Module):
    """Each element g of a group sees the features of all elements ``g h``, in the order of h.

    Let x(g) be features of a cloud in the pose ``R g``. ``y(g) = W [x(g h)]_h + b`` is a function
    of the pose ``R g`` alone, the same for all of them: where R is replaced by ``R q``, which
    permutes the poses, the answers are permuted alike (Cohen & Welling 2016, arXiv 1602.07576).

    Args:
        group: ``(G, 3, 3)``, closed under the product.
        inputs: Features of each element.
        outputs: Of each element.

    Raises:
        InputError: If the matrices are not a group.
    """

    index: Tensor

    def __init__(self, group: Tensor, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("index", _product_table(group), persistent=False)
        self.linear = nn.Linear(len(group) * inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., G, C)`` to ``(..., G, outputs)``."""
        answer: Tensor = self.linear(features[..., self.index, :].flatten(-2))
        return answer


def _product_table(group: Tensor) -> Tensor:
    """``(G, G)``, the index of ``g h`` at row g and column h."""
    products = group[:, None] @ group
    distance = (products[:, :, None] - group).abs().amax(dim=(-1, -2))
    nearest, index = distance.min(dim=-1)
    if nearest.max() > 1e-4:
        raise InputError(f"these {len(group)} matrices are no group: products lead out of them")
    return index

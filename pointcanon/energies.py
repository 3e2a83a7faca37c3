"""How little a frozen network thinks a cloud is like those it was trained on: energies of outputs.

An energy is a module from outputs ``(M, C)`` to one number each ``(M,)``; low means familiar. A new
one is a class here; a function of a network's outputs in any other module will do as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointcanon import checkpoint
from pointcanon.errors import InputError

__all__ = ["Entropy", "FeatureDistance", "FreeEnergy", "MaxLogit"]


class FreeEnergy(nn.Module):
    """``-T logsumexp(logits / T)`` (Liu et al. 2020, arXiv 2010.03759).

    Args:
        temperature: T > 0; towards 0 this is :class:`MaxLogit`.

    Raises:
        InputError: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; choose a positive number")
        self.temperature = temperature

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"temperature": self.temperature}

    def forward(self, logits: Tensor) -> Tensor:
        """``(M, C)`` to ``(M,)``."""
        return -self.temperature * (logits / self.temperature).logsumexp(dim=-1)


class Entropy(nn.Module):
    """Entropy of the predicted probabilities, in nats; does not depend on the size of the logits
    common to all classes, which the other energies of logits do."""

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {}

    def forward(self, logits: Tensor) -> Tensor:
        """``(M, C)`` to ``(M,)``."""
        log_probabilities = logits.log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


class MaxLogit(nn.Module):
    """Minus the largest logit (Hendrycks et al. 2022, arXiv 1911.11132)."""

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {}

    def forward(self, logits: Tensor) -> Tensor:
        """``(M, C)`` to ``(M,)``."""
        return -logits.amax(dim=-1)


class FeatureDistance(nn.Module):
    """Distance to the training features: the smallest over the classes of the mean distance to the
    class's k nearest (after Sun et al. 2022, arXiv 2204.06507, who do not part the classes).

    The features are outputs of the very network that is searched with: logits, or those of a
    network cut before its last layer. Make one with :meth:`fit`; the constructor alone gives room
    for features that a checkpoint fills.

    Args:
        width: D, of a feature.
        sizes: How many features there are of each class.
        k: Neighbours that count, at most the smallest size.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(self, width: int, sizes: Sequence[int], k: int = 1) -> None:
        super().__init__()
        if width < 1 or not sizes:
            raise InputError(f"width is {width}, sizes {tuple(sizes)}; there is nothing to be near")
        if not 1 <= k <= min(sizes):
            raise InputError(
                f"k is {k}, and the smallest class has {min(sizes)} features; "
                f"choose k from 1 to {min(sizes)}, or leave the class out"
            )
        self.width, self.sizes, self.k = width, tuple(sizes), k
        self.register_buffer("features", torch.zeros(sum(sizes), width))

    features: Tensor

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"width": self.width, "sizes": self.sizes, "k": self.k}

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, k: int = 1) -> FeatureDistance:
        """The energy of these training features.

        Args:
            features: ``(n, D)`` outputs of the network on training clouds.
            labels: ``(n,)`` integers; classes without a feature do not count.
            k: Neighbours that count.

        Raises:
            InputError: If shapes do not fit, or a class has fewer than k features.
        """
        if features.ndim != 2 or len(features) == 0 or labels.shape != features.shape[:1]:
            raise InputError(
                f"features has shape {tuple(features.shape)}, labels {tuple(labels.shape)}; "
                "pass (n, D) and (n,) with n >= 1"
            )
        sizes = labels.unique(return_counts=True)[1]  # in the order of the labels
        energy = cls(features.shape[1], sizes.tolist(), k).to(features)
        energy.features.copy_(features.detach()[labels.argsort(stable=True)])
        return energy

    def forward(self, features: Tensor) -> Tensor:
        """``(M, D)`` to ``(M,)``.

        Raises:
            InputError: If the features are of another width than those fitted.
        """
        if features.shape[-1] != self.width:
            raise InputError(
                f"features has shape {tuple(features.shape)}, but those fitted are (n, "
                f"{self.width}); fit the energy on outputs of the same network"
            )
        distances = torch.cdist(features, self.features)
        nearest = [
            distance.topk(self.k, dim=1, largest=False).values.mean(dim=1)
            for distance in distances.split(self.sizes, dim=1)
        ]
        return torch.stack(nearest, dim=1).amin(dim=1)


checkpoint.register(FreeEnergy, Entropy, MaxLogit, FeatureDistance)

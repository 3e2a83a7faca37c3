"""What the predictors built here share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.errors import InputError

__all__ = ["Predictor", "check_sizes"]


def check_sizes(dropout: float, **sizes: int) -> None:
    """Refuse hyper-parameters that no network can have.

    Args:
        dropout: A probability.
        **sizes: Numbers of channels, classes or neighbours, by name.

    Raises:
        InputError: Naming the first.
    """
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}; choose at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; choose a probability from 0 to below 1")


class Predictor(nn.Module, ABC):
    """Base of the networks shipped here; any other module from clouds to outputs will also do.

    A subclass implements :meth:`predict` for clouds that are checked and whose padded points lie
    at the origin, and the property :attr:`hyperparameters`.
    """

    num_classes: int
    coordinate_frame: str | None = None
    """Frame of the clouds it was trained on, where known (:mod:`pointcanon.coordinates`)."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the logits, where known."""
    normalisation: str | None = None
    """What was done to each cloud in training, where known, such as ``"unit-ball"``."""

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Tensor:
        """Logits of each cloud.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point. Padding never changes a result, nor the
                batch statistics in training.
            normals: ``(B, N, 3)``, accepted from callers that have them; networks that look at
                positions only leave them aside.

        Returns:
            ``(B, num_classes)``.

        Raises:
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf.
        """
        clouds.check_cloud(points, mask, normals=normals)
        if mask is not None:
            points = torch.where(mask[..., None], points, points.new_zeros(()))
        return self.predict(points, mask)

    @abstractmethod
    def predict(self, points: Tensor, mask: Tensor | None) -> Tensor:
        """Logits ``(B, num_classes)`` of checked clouds ``(B, N, 3)``."""

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, object]:
        """Keyword arguments that construct this network again (:mod:`pointcanon.checkpoint`)."""

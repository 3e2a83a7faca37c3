"""What the predictors built here share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.errors import InputError

__all__ = ["Network", "PartPredictor", "Predictor", "check_sizes"]


def check_sizes(dropout: float, *, num_categories: int = 0, **sizes: int) -> None:
    """Refuse hyper-parameters that no network can have.

    Args:
        dropout: A probability.
        num_categories: Of a category one-hot; 0 for a network without it.
        **sizes: Numbers of channels, classes or neighbours, by name.

    Raises:
        InputError: Naming the first.
    """
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}; choose at least 1")
    if num_categories < 0:
        raise InputError(f"num_categories is {num_categories}; choose at least 0")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; choose a probability from 0 to below 1")


class Network(nn.Module, ABC):
    """What classifiers and part networks share: their hyper-parameters and what they were fed."""

    normals: bool = False
    """Whether it looks at normals beside positions."""
    coordinate_frame: str | None = None
    """Frame of the clouds it was trained on, where known (:mod:`pointcanon.coordinates`)."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the logits, or of the categories of a part network in
    the order of the one-hot, where known."""
    normalisation: str | None = None
    """What was done to each cloud in training, where known, such as ``"unit-ball"``."""

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, object]:
        """Keyword arguments that construct this network again (:mod:`pointcanon.checkpoint`)."""

    def _clean(
        self, points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Checked points and normals, zero in padded rows; normals that nobody looks at are None.

        Raises:
            InputError: As :func:`pointcanon.clouds.check_cloud`, or if normals are missing.
        """
        clouds.check_cloud(points, mask, normals=normals)
        if self.normals and normals is None:
            raise InputError(
                f"this {type(self).__name__} was built with normals: give normals, "
                f"{tuple(points.shape)}, or build it with normals=False"
            )
        zero = points.new_zeros(())
        if mask is not None:
            points = torch.where(mask[..., None], points, zero)
        if normals is None or not self.normals:
            return points, None
        return points, normals if mask is None else torch.where(mask[..., None], normals, zero)


class Predictor(Network):
    """Base of the networks shipped here; any other module from clouds to outputs will also do.

    A subclass implements :meth:`predict` for clouds that are checked and whose padded points lie
    at the origin, and the property :attr:`hyperparameters`.
    """

    num_classes: int

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Tensor:
        """Logits of each cloud.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point. Padding never changes a result, nor the
                batch statistics in training.
            normals: ``(B, N, 3)``. Networks that look at positions only leave them aside.

        Returns:
            ``(B, num_classes)``.

        Raises:
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf, or
                normals that are missing.
        """
        points, normals = self._clean(points, mask, normals)
        return self.predict(points, mask, normals)

    @abstractmethod
    def predict(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Tensor:
        """Logits ``(B, num_classes)`` of checked clouds ``(B, N, 3)``; ``normals`` is None unless
        :attr:`normals`."""


class PartPredictor(Network):
    """Base of the networks that label the points of an object: part segmentation.

    A subclass implements :meth:`predict` and the property :attr:`hyperparameters`. The category of
    the object, which the benchmark gives away, goes in as a one-hot vector where the network was
    built for it (``num_categories`` > 0).
    """

    num_parts: int
    num_categories: int
    """Length of the category one-hot; 0 where the network does not take the category."""

    def forward(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
        category: Tensor | None = None,
    ) -> Tensor:
        """Logits of each point, in the order of the points.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point. Padding never changes the logits of real
                points, nor the batch statistics in training; its own logits mean nothing.
            normals: ``(B, N, 3)``. Networks that look at positions only leave them aside.
            category: ``(B,)`` integers in ``[0, num_categories)``.

        Returns:
            ``(B, N, num_parts)``.

        Raises:
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf, normals
                that are missing, a category that is missing or out of range.
        """
        points, normals = self._clean(points, mask, normals)
        return self.predict(points, mask, normals, self._one_hot(points, category))

    def _one_hot(self, points: Tensor, category: Tensor | None) -> Tensor | None:
        if self.num_categories == 0:
            return None
        batch = len(points)
        if category is None:
            raise InputError(
                f"this network was trained with the category of the object: give category, "
                f"({batch},) integers in [0, {self.num_categories})"
            )
        if category.shape != (batch,) or category.is_floating_point():
            raise InputError(
                f"category has shape {tuple(category.shape)} and dtype {category.dtype}, "
                f"expected ({batch},) integers"
            )
        known = torch.arange(self.num_categories, device=category.device)
        one_hot = category[:, None] == known
        if not torch.compiler.is_compiling() and not bool(one_hot.any(dim=1).all()):
            raise InputError(
                f"category must lie in [0, {self.num_categories}), got {category.tolist()}"
            )
        return one_hot.to(points)

    @abstractmethod
    def predict(
        self,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
    ) -> Tensor:
        """Logits ``(B, N, num_parts)`` of checked clouds; ``category`` is one-hot ``(B, C)``,
        ``normals`` is None unless :attr:`normals`."""

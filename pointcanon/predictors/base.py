"""What the predictors built here share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.errors import InputError, NotFiniteError

__all__ = ["TRAINED_ON", "Network", "PartPredictor", "Predictor", "check_sizes"]

TRAINED_ON = ("coordinate_frame", "classes", "parts", "normalisation")
"""What a network says of the data it was trained on, None where it is not known: its attributes of
these names, which its card has too."""


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
    parts: tuple[str, ...] | None = None
    """Names of the parts in the order of the logits, of a part network, where known."""
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

    def _finite(self, logits: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits ``(B, ...)`` or, where a mask is given, ``(B, N, ...)``.

        Raises:
            NotFiniteError: In evaluation, if one of them is not finite.
        """
        if self.training or torch.compiler.is_compiling():
            return logits
        finite = torch.isfinite(logits)
        if mask is not None:
            finite = finite | ~mask[..., None]
        if not bool(finite.all()):
            cloud = int((~finite.flatten(1).all(dim=1)).nonzero()[0])
            raise NotFiniteError(
                cloud,
                f"its coordinates reach {float(points[cloud].abs().max()):.3g}; normalise clouds "
                f"as in training, compute in a wider dtype than {logits.dtype}, check the weights",
            )
        return logits


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
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf,
                normals that are missing, or in evaluation a cloud too large for its dtype.
        """
        points, normals = self._clean(points, mask, normals)
        if points.shape[0] == 0:  # from which no batch statistics can be learned either
            return points.new_zeros(0, self.num_classes)
        return self._finite(self.predict(points, mask, normals), points)

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
                that are missing, a category that is missing or out of range, or in evaluation a
                cloud too large for its dtype.
        """
        points, normals = self._clean(points, mask, normals)
        one_hot = self._one_hot(points, category)
        if points.shape[0] == 0:  # from which no batch statistics can be learned either
            return points.new_zeros(0, points.shape[1], self.num_parts)
        return self._finite(self.predict(points, mask, normals, one_hot), points, mask)

    def check_category(self, category: Tensor | None, batch: int) -> None:
        """Refuse what are no categories of ``batch`` clouds, where the network is told them.

        Raises:
            InputError: If they are missing, no tensor ``(batch,)`` of integers, or out of range.
        """
        if self.num_categories == 0:
            return
        expected = f"({batch},) integers in [0, {self.num_categories})"
        if category is None:
            raise InputError(
                f"this network was trained with the category of the object: give category, "
                f"{expected}"
            )
        if not isinstance(category, Tensor):
            raise InputError(f"category is a {type(category).__name__}; pass a tensor {expected}")
        if category.shape != (batch,) or category.is_floating_point():
            raise InputError(
                f"category has shape {tuple(category.shape)} and dtype {category.dtype}, "
                f"expected ({batch},) integers"
            )
        if torch.compiler.is_compiling():
            return
        if not bool(((category >= 0) & (category < self.num_categories)).all()):
            raise InputError(
                f"category must lie in [0, {self.num_categories}), got {category.tolist()}"
            )

    def _one_hot(self, points: Tensor, category: Tensor | None) -> Tensor | None:
        self.check_category(category, points.shape[0])
        if category is None or self.num_categories == 0:
            return None
        known = torch.arange(self.num_categories, device=category.device)
        return (category[:, None] == known).to(points)

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

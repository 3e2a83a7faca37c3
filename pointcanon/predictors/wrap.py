"""Networks that were not made for this library, behind the same calls as those that were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pointcanon.errors import InputError
from pointcanon.neighbors import farthest_point_sample, knn
from pointcanon.predictors.base import PartPredictor, Predictor, check_sizes

__all__ = ["WrappedParts", "WrappedPredictor", "wrap"]

Layout = Literal["BNC", "BCN"]


def wrap(
    module: nn.Module,
    *,
    layout: Layout = "BNC",
    channels: Literal[3, 6] = 3,
    outputs: int | str | None = None,
    num_classes: int | None = None,
    num_parts: int | None = None,
    num_categories: int = 0,
    num_points: int | None = None,
) -> WrappedPredictor | WrappedParts:
    """Any network of clouds as a :class:`Predictor`, or as a :class:`PartPredictor`.

    Its weights, mode and device stay its own. What it was trained on can be said by setting
    ``coordinate_frame``, ``classes`` and ``normalisation`` of the result. To save it, make the
    class of ``module`` known to :func:`pointcanon.checkpoint.register`.

    Args:
        module: Takes one tensor of clouds and, with ``num_categories``, the category as a one-hot
            ``(B, num_categories)`` after it.
        layout: What it takes: ``"BNC"`` for ``(B, N, channels)``, ``"BCN"`` for
            ``(B, channels, N)``.
        channels: 3 for positions, 6 for positions and normals.
        outputs: Where the logits are, if it returns several things: the index in a tuple or the key
            in a mapping.
        num_classes: Number of logits of a classifier.
        num_parts: Number of logits of a point, for part segmentation, as ``(B, N, num_parts)`` or
            ``(B, num_parts, N)``. Exactly one of this and ``num_classes`` is given.
        num_categories: Length of the category one-hot that it takes; 0 for none.
        num_points: The number of points it insists on. A larger cloud is thinned by farthest-point
            sampling, in a smaller one points are repeated; logits of a point that was left out are
            those of the nearest. None for networks that take any number: padded clouds are then
            passed without their padding, those of one size together.

    Raises:
        InputError: On arguments that contradict each other; by the result, on bad clouds, and where
            the module fails or returns something else than was said.
    """
    if (num_classes is None) == (num_parts is None):
        raise InputError(
            "say what it predicts: num_classes for a classifier, or num_parts for part segmentation"
        )
    convention: dict[str, Any] = {
        "layout": layout,
        "channels": channels,
        "outputs": outputs,
        "num_points": num_points,
    }
    if num_parts is not None:
        return WrappedParts(module, num_parts, num_categories=num_categories, **convention)
    assert num_classes is not None
    if num_categories:
        raise InputError("num_categories is for part segmentation: give num_parts, or leave it out")
    return WrappedPredictor(module, num_classes, **convention)


@dataclass(frozen=True)
class Convention:
    """How a module is called and answers, as :func:`wrap` has it."""

    layout: Layout = "BNC"
    channels: int = 3
    outputs: int | str | None = None
    num_points: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise InputError(f"layout is {self.layout!r}; choose 'BNC' or 'BCN'")
        if self.channels not in (3, 6):
            raise InputError(f"channels is {self.channels}; choose 3, or 6 with normals")
        if self.num_points is not None:
            check_sizes(0, num_points=self.num_points)

    def call(self, module: nn.Module, cloud: Tensor, *extra: Tensor) -> Tensor:
        """What the module answers to clouds ``(B, N, channels)`` without padding."""
        name = type(module).__name__
        given = cloud if self.layout == "BNC" else cloud.mT.contiguous()
        try:
            answer = module(given, *extra)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in (given, *extra))
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"the wrapped {name} fails on input of shape {shapes}: {reason}; check layout "
                f"({self.layout!r}), channels ({self.channels}), num_categories and num_points"
            ) from error
        if self.outputs is not None:
            try:
                answer = answer[self.outputs]
            except (KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"the wrapped {name} returns {_shown(answer)}, which has no "
                    f"{self.outputs!r}; check outputs"
                ) from error
        if not isinstance(answer, Tensor):
            raise InputError(
                f"the wrapped {name} returns {_shown(answer)}; say with outputs where the logits "
                "are"
            )
        return answer

    def packs(self, points: Tensor, mask: Tensor | None, training: bool) -> Iterator[Pack]:
        """The clouds in lots that the module can take."""
        clouds, count = points.shape[:2]
        everything = torch.arange(clouds, device=points.device)
        if self.num_points is not None and (mask is not None or count != self.num_points):
            yield Pack(everything, farthest_point_sample(points, self.num_points, mask))
        elif mask is None:
            yield Pack(everything, torch.arange(count, device=points.device).expand(clouds, -1))
        else:
            sizes = mask.sum(dim=1)
            distinct = sizes.unique().tolist()
            if training and len(distinct) > 1:
                raise InputError(
                    f"a wrapped network knows no mask, and clouds of {distinct} points cannot be "
                    "in one batch of training: sample one number of points, or give num_points"
                )
            for size in distinct:
                chosen = (sizes == size).nonzero()[:, 0]
                yield Pack(chosen, mask[chosen].nonzero()[:, 1].unflatten(0, (-1, size)))


class Pack(NamedTuple):
    """Some clouds ``(b,)`` of a batch, and which of their points ``(b, n)``."""

    clouds: Tensor
    points: Tensor

    def take(self, values: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(b, n, C)``."""
        index = self.points[..., None].expand(-1, -1, values.shape[-1])
        return values[self.clouds].gather(1, index)


def _shown(answer: object) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor {tuple(answer.shape)}"
    if isinstance(answer, Mapping):
        items = ", ".join(f"{key!r}: {_shown(value)}" for key, value in answer.items())
        return f"a {type(answer).__name__} ({items})"
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return f"a {type(answer).__name__} ({', '.join(map(_shown, answer))})"
    return f"a {type(answer).__name__}"


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise InputError(f"module is a {type(module).__name__}; pass a torch.nn.Module")


class WrappedPredictor(Predictor):
    """What :func:`wrap` makes of a classifier, which takes the same arguments."""

    def __init__(self, module: nn.Module, num_classes: int, **convention: Any) -> None:
        super().__init__()
        _check_module(module)
        check_sizes(0, num_classes=num_classes)
        self.module, self.num_classes = module, num_classes
        self.convention = Convention(**convention)
        self.normals = self.convention.channels == 6

    @property
    def hyperparameters(self) -> dict[str, object]:
        sizes = {"num_classes": self.num_classes}
        return {"module": self.module, **sizes, **asdict(self.convention)}

    def predict(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Tensor:
        inputs = points if normals is None else torch.cat((points, normals), dim=-1)
        packs = list(self.convention.packs(points, mask, self.training))
        answers = [self._logits(pack.take(inputs)) for pack in packs]
        return torch.cat(answers)[torch.cat([pack.clouds for pack in packs]).argsort()]

    def _logits(self, cloud: Tensor) -> Tensor:
        logits = self.convention.call(self.module, cloud)
        expected = (len(cloud), self.num_classes)
        if logits.shape != expected:
            raise InputError(
                f"the wrapped {type(self.module).__name__} returns {_shown(logits)}, expected "
                f"{expected}; check outputs and num_classes"
            )
        return logits


class WrappedParts(PartPredictor):
    """What :func:`wrap` makes of a part network, which takes the same arguments."""

    def __init__(
        self, module: nn.Module, num_parts: int, *, num_categories: int = 0, **convention: Any
    ) -> None:
        super().__init__()
        _check_module(module)
        check_sizes(0, num_parts=num_parts, num_categories=num_categories)
        self.module, self.num_parts, self.num_categories = module, num_parts, num_categories
        self.convention = Convention(**convention)
        self.normals = self.convention.channels == 6

    @property
    def hyperparameters(self) -> dict[str, object]:
        sizes = {"num_parts": self.num_parts, "num_categories": self.num_categories}
        return {"module": self.module, **sizes, **asdict(self.convention)}

    def predict(
        self,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
    ) -> Tensor:
        inputs = points if normals is None else torch.cat((points, normals), dim=-1)
        packs = list(self.convention.packs(points, mask, self.training))
        answers = []
        for pack in packs:
            extra = () if category is None else (category[pack.clouds],)
            logits = self._logits(pack.take(inputs), *extra)
            # the point itself wherever it was passed on
            nearest = knn(pack.take(points), 1, queries=points[pack.clouds])
            answers.append(logits.gather(1, nearest.expand(-1, -1, self.num_parts)))
        return torch.cat(answers)[torch.cat([pack.clouds for pack in packs]).argsort()]

    def _logits(self, cloud: Tensor, *extra: Tensor) -> Tensor:
        logits = self.convention.call(self.module, cloud, *extra)
        expected = (*cloud.shape[:2], self.num_parts)
        if logits.shape == expected:
            return logits
        if logits.shape == (expected[0], expected[2], expected[1]):
            return logits.mT
        raise InputError(
            f"the wrapped {type(self.module).__name__} returns {_shown(logits)}, expected "
            f"{expected} or {(expected[0], expected[2], expected[1])}; check outputs and num_parts"
        )

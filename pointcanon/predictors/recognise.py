"""Networks whose kind is told by what they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pointcanon.coordinates import CoordinateFrame
from pointcanon.errors import InputError
from pointcanon.predictors.base import TRAINED_ON, PartPredictor, Predictor
from pointcanon.predictors.wrap import Convention, wrap

__all__ = ["recognise"]


def recognise(network: Callable[..., Any], cloud: Tensor) -> Predictor | PartPredictor:
    """A network as the predictor that its answer to a cloud shows it to be.

    Logits ``(B, C)`` make it a classifier, ``(B, N, P)`` or ``(B, P, N)`` a part network. A network
    that takes anything but clouds ``(B, N, 3)``, or answers more than logits, is to be passed
    through :func:`wrap` first.

    Args:
        network: A predictor, which comes back as it is; any other module; or a function from clouds
            to a tensor or an array.
        cloud: ``(N, 3)``, one that it can be asked about; it is, once, in evaluation mode.

    Raises:
        InputError: If it cannot be called, fails, or answers something else.
    """
    if isinstance(network, Predictor | PartPredictor):
        return network
    if not callable(network) or isinstance(network, type):
        raise InputError(
            f"the network is a {type(network).__name__}: pass a torch.nn.Module, or a function "
            "from clouds (B, N, 3) to logits"
        )
    module = network if isinstance(network, nn.Module) else _Function(network)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            answer = Convention().call(module, cloud[None].to(_like(module)))
    except InputError as error:
        raise InputError(f"{error}, and pass it through pointcanon.predictors.wrap") from error
    except Exception as error:  # whatever the user's own code may raise
        reason = next(iter(str(error).splitlines()), "no message")
        raise InputError(
            f"the network fails on a cloud (1, {len(cloud)}, 3): {type(error).__name__}: {reason}"
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training
    size, shape = len(cloud), tuple(answer.shape)
    if len(shape) == 2 and shape[0] == 1:
        return _described(wrap(module, num_classes=shape[1]), module)
    if len(shape) == 3 and shape[0] == 1 and size in shape[1:]:
        return _described(wrap(module, num_parts=shape[2 if shape[1] == size else 1]), module)
    raise InputError(
        f"the network answers {shape} to one cloud (1, {size}, 3): expected logits (1, C) of a "
        f"classifier, or (1, {size}, P) of a part network; pointcanon.predictors.wrap adapts others"
    )


def _like(module: nn.Module) -> Tensor:
    """A tensor of the kind that the module computes with."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))


def _described(
    predictor: Predictor | PartPredictor, module: nn.Module
) -> Predictor | PartPredictor:
    """The predictor, with what the module says of its training."""
    for name in TRAINED_ON:
        value = getattr(module, name, None)
        if _describes(value):  # and is no count or layer that happens to have the name
            setattr(predictor, name, value)
    predictor.training = module.training
    return predictor


def _describes(value: object) -> bool:
    names = value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(name, str | CoordinateFrame) for name in names)


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, points: Tensor) -> Any:
        answer = self.function(points)
        return torch.as_tensor(answer) if hasattr(answer, "__array__") else answer

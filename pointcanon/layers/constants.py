"""Constants of a module, which keep their digits whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["KeepsConstants"]

_Module = TypeVar("_Module", bound=nn.Module)


class KeepsConstants(nn.Module):
    """Moves buffers that no checkpoint holds to another device, but never rounds them.

    ``.half()`` and ``.bfloat16()`` would make rotations of a group that are none any more, and so
    would ``.float().double()`` in their last digits. Each is used in the dtype of the clouds.
    """

    def _apply(self: _Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Module:
        constants = {
            name: buffer
            for name, buffer in self._buffers.items()
            if name in self._non_persistent_buffers_set
            and buffer is not None
            and buffer.is_floating_point()
        }
        for name in constants:
            self._buffers[name] = None
        moved = super()._apply(fn, recurse)
        for name, constant in constants.items():
            device = fn(constant.new_empty(0, dtype=torch.float32)).device
            self._buffers[name] = _on(device, constant)
        return moved


def _on(device: torch.device, constant: Tensor) -> Tensor:
    if device.type == "mps":  # which knows no float64
        constant = constant.float()
    if constant.is_meta and device.type != "meta":
        return torch.empty_like(constant, device=device)
    return constant.to(device)

"""A batch shared by processes: each does with its part what one would do with the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Dropout", "SharesBatch", "mean", "synchronise", "total"]


class SharesBatch:
    """A mixin of modules that, in training, take account of the clouds of all processes.

    The processes of ``torch.distributed`` have equally many clouds each and the same random state.

    Attributes:
        across_processes: Whether there are others; see :func:`synchronise`.
    """

    across_processes = False

    def drawn(self, draw: Callable[[int], Tensor], clouds: int, dim: int = 0) -> Tensor:
        """What ``draw(count)`` gives to this process's ``clouds``, which lie along ``dim``.

        It is asked for the clouds of all processes, so that what a cloud gets does not depend on
        how many processes there are.
        """
        if not self.across_processes:
            return draw(clouds)
        processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        return draw(processes * clouds).narrow(dim, rank * clouds, clouds)

    def dropped(self, values: Tensor, p: float, dim: int = 0) -> Tensor:
        """``functional.dropout`` in training, of ``values`` whose clouds lie along ``dim``."""
        if not self.across_processes or p == 0:
            return functional.dropout(values, p)

        def draw(clouds: int) -> Tensor:
            shape = (*values.shape[:dim], clouds, *values.shape[dim + 1 :])
            return values.new_empty(shape).bernoulli_(1 - p)

        return values * (self.drawn(draw, values.shape[dim], dim) / (1 - p))

    def gathered(self, value: Tensor) -> tuple[Tensor, int]:
        """A number of each process, ``(processes,)``, and the place of this one among them."""
        if not self.across_processes:
            return value[None], 0
        every = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, value)
        return torch.stack(every), torch.distributed.get_rank()


class Dropout(SharesBatch, nn.Dropout):
    """``nn.Dropout`` of ``(B, ...)``."""

    def forward(self, input: Tensor) -> Tensor:
        return self.dropped(input, self.p) if self.training else input


class _Sum(torch.autograd.Function):
    """Over all processes; so is the gradient, as the sum serves each of them."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())


def total(values: Tensor) -> Tensor:
    """The sum over all processes, each of which asks for it; differentiable."""
    return cast(Tensor, _Sum.apply(values))


def mean(values: Tensor) -> Tensor:
    """The mean over all processes, each of which asks for it, or of the only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    return total(values) / torch.distributed.get_world_size()


def synchronise(network: nn.Module, across_processes: bool = True) -> None:
    """Let a network learn from the batch of all processes of ``torch.distributed`` as from one.

    For training in which every process runs the network equally often, on equally many clouds and
    from the same random state. The statistics of batch norm are those of all (padding stays out of
    them, as it would not with ``nn.SyncBatchNorm``), and random draws those of one process. Modules
    that are not of this library are left as they are.
    """
    for module in network.modules():
        if isinstance(module, SharesBatch):
            module.across_processes = across_processes

"""One canonicalizer from several trainings of it: the mean of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import InputError

__all__ = ["average"]


def average(canonicalizers: Sequence[Canonicalizer]) -> Canonicalizer:
    """A canonicalizer whose weights are the mean of those given; the rest is as the first has it.

    Trainings one of which began where the other ended, or that began alike, lie in one basin, and
    their mean is often better than either (Izmailov et al. 2018, arXiv 1803.05407): it keeps what
    a network knew before it was trained on (Wortsman et al. 2022, arXiv 2109.01903), at the cost of
    one. The mean of trainings that have nothing in common is worth nothing. To give one a larger
    share, name it more than once.

    Args:
        canonicalizers: At least one; left as they are.

    Raises:
        InputError: If there is none, or they are not of one kind and size, or mean different poses
            or classes.
    """
    if not canonicalizers:
        raise InputError("canonicalizers is empty; give at least one")
    first, *others = canonicalizers
    states = [each.state_dict() for each in canonicalizers]
    shapes = [{name: weight.shape for name, weight in state.items()} for state in states]
    for other, shape in zip(others, shapes[1:], strict=True):
        if type(other) is not type(first) or shape != shapes[0]:
            raise InputError(
                f"weights of {type(first).__name__} and {type(other).__name__} have no mean, as "
                "they are not of one kind and size: take a Union"
            )
        for name in ("coordinate_frame", "class_names"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if None not in (ours, theirs) and list(ours) != list(theirs):
                raise InputError(
                    f"weights that differ in their {name}, {ours} and {theirs}, have no mean"
                )
    mean = first.with_options()
    mean.load_state_dict(
        {
            name: torch.stack([state[name].to(weight) for state in states]).mean(dim=0)
            if weight.is_floating_point()
            else weight
            for name, weight in states[0].items()
        }
    )
    return mean

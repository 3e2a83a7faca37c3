"""Confusion of canonical poses: where the up axes of objects come to lie on the sphere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.eval import style
from pointcanon.eval.curve import sample
from pointcanon.eval.evaluate import UPRIGHT_DEGREES
from pointcanon.eval.protocols import POSES
from pointcanon.eval.sweep import Sweep, Swept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

__all__ = ["describe_poses", "equal_area", "poses_figure"]

RINGS = (30, 60)
"""Degrees from the middle of a disc, whose rim is at 90."""


def equal_area(directions: Tensor) -> Tensor:
    """Lambert's azimuthal projection of each half of the sphere onto a disc of radius 1.

    Equal areas stay equal, so uniform directions look uniform. Both halves are seen from above, so
    that a direction that crosses the equator leaves one disc where it enters the other.

    Args:
        directions: ``(..., 3)`` unit vectors, z-up.

    Returns:
        ``(..., 2)``; the third coordinate's sign says on which of the two discs.

    Raises:
        InputError: If the shape is not ``(..., 3)``.
    """
    if directions.shape[-1:] != (3,):
        raise InputError(f"directions has shape {tuple(directions.shape)}, expected (..., 3)")
    flat, height = directions[..., :2], directions[..., 2:].abs()
    # |flat|^2 = (1 - h) (1 + h), and the radius is to be sqrt(1 - h): nothing vanishes at the pole
    return flat / (1 + height).sqrt()


def poses_figure(found: Sweep) -> Figure:
    """A row for each network: the half of the sphere around up, and the one around down."""
    rows = len(found.networks)
    figure = style.new_figure(4.6, 2.5 * rows + 0.9)
    panels = figure.subplots(rows, 2, squeeze=False)
    whole = found.measure == "overall_accuracy"
    for network, pair in zip(found.networks, panels, strict=True):
        marks = [
            _draw(panel, network, half, whole) for panel, half in zip(pair, (1, -1), strict=True)
        ]
        pair[0].set_ylabel(network.name, fontsize=style.TITLE)
    for panel, title in zip(panels[0], ("upper", "lower"), strict=True):
        panel.set_title(f"{title} hemisphere", fontsize=style.TITLE)
    if whole:
        figure.legend(
            handles=_legend(),
            loc="outside upper center",
            ncols=2,
            frameon=False,
            fontsize=style.LABEL,
        )
    else:
        bar = figure.colorbar(marks[0], ax=panels, location="top", shrink=0.6, aspect=30, pad=0.02)
        bar.set_label(_OF_A_CLOUD[found.measure], fontsize=style.LABEL)
        bar.ax.tick_params(labelsize=style.LABEL)
    poses = "as received" if rows == 1 else "as received above, in canonical pose below"
    note = (
        f"where the up axes of {sample(found)}, {POSES[found.pose]}, lie\n"
        f"{poses}; equal-area projection, seen from above"
    )
    figure.supxlabel(note, fontsize=style.NOTE, color=style.GREY)
    return figure


def describe_poses(found: Sweep) -> str:
    """The figure in words, for those who do not see it."""
    told = []
    for network in found.networks:
        tilt = _tilt(network.up)
        near = f"within {UPRIGHT_DEGREES:.0f} degrees of"
        shares = [
            f"{_percent(tilt <= UPRIGHT_DEGREES)} {near} up",
            f"{_percent(tilt <= 90)} in the upper hemisphere",
            f"{_percent(tilt >= 180 - UPRIGHT_DEGREES)} {near} down",
        ]
        told.append(f"{network.name}, {', '.join(shares)}")
    poses = " and ".join(("as received", "in canonical pose")[: len(told)])
    return f"Where the up axes of {sample(found)} lie {poses}: {'; '.join(told)}."


def _draw(panel: Axes, network: Swept, half: int, whole: bool) -> PathCollection:
    """One half of the sphere; what is worst is drawn last."""
    style.bare_panel(panel, 1.12)
    _graticule(panel, half)
    here = (network.up[:, 2] >= 0) == (half > 0)
    at, score = equal_area(network.up[here]), network.score[here]
    tilt = _tilt(network.up)
    near = tilt <= UPRIGHT_DEGREES if half > 0 else tilt >= 180 - UPRIGHT_DEGREES
    panel.set_xlabel(
        f"{_percent(here)} of clouds\n"
        f"{_percent(near)} within {UPRIGHT_DEGREES:.0f}° of {'up' if half > 0 else 'down'}",
        fontsize=style.LABEL,
    )
    if not whole:
        order = score.argsort(descending=True)
        across, upwards = at[order].unbind(dim=1)
        return panel.scatter(across, upwards, c=100 * score[order], **_SHADES)
    right = score == 1
    marks = panel.scatter(*at[right].mT, **_LOOKS[True])
    panel.scatter(*at[~right].mT, **_LOOKS[False])
    return marks


_LOOKS: dict[bool, dict[str, Any]] = {
    True: {"c": style.RIGHT, "s": 9, "marker": "o", "linewidths": 0, "alpha": 0.6},
    False: {"c": style.WRONG, "s": 12, "marker": "x", "linewidths": 0.9, "alpha": 0.9},
}


_SHADES: dict[str, Any] = {
    "cmap": "cividis",
    "vmin": 0,
    "vmax": 100,
    "s": 11,
    "linewidths": 0.3,
    "edgecolors": style.GREY,  # the palest does not show on white
}
_OF_A_CLOUD = {
    "instance_miou": "mIoU of the cloud (%)",
    "point_accuracy": "points of the cloud labelled right (%)",
}


def _legend() -> list[PathCollection]:
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    return [
        panel.scatter([], [], label=f"class labelled {'right' if right else 'wrong'}", **look)
        for right, look in _LOOKS.items()
    ]


def _graticule(panel: Axes, half: int) -> None:
    from matplotlib.patches import Circle

    for degrees in (*RINGS, 90):
        radius = math.sqrt(1 - math.cos(math.radians(degrees)))
        rim = degrees == 90
        colour, width = (style.GREY, 0.8) if rim else (style.RULE, 0.6)
        panel.add_patch(
            Circle((0, 0), radius, fill=False, edgecolor=colour, linewidth=width, zorder=0)
        )
        panel.text(
            radius * math.cos(math.pi / 4),
            radius * math.sin(math.pi / 4),
            f"{degrees if half > 0 else 180 - degrees}°",
            fontsize=style.NOTE - 1,
            color=style.GREY,
            ha="left" if rim else "center",
            va="bottom" if rim else "center",
            bbox=None
            if rim
            else {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0},
            zorder=0.5,
        )
    panel.plot(0, 0, marker="+", markersize=6, color=style.RULE, markeredgewidth=0.6, zorder=0)


def _tilt(up: Tensor) -> Tensor:
    """Degrees from up, in [0, 180]."""
    return torch.atan2(up[:, :2].norm(dim=1), up[:, 2]).rad2deg()


def _percent(which: Tensor) -> str:
    return f"{100 * which.double().mean().item():.0f} %"

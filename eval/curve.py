"""The robustness curve: a score against the angle of rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pointcanon.eval import style
from pointcanon.eval.sweep import Sweep, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "curve_figure", "describe_curve", "draw_curve", "sample"]

MEASURES = {
    "overall_accuracy": "overall accuracy",
    "instance_miou": "instance mIoU",
    "point_accuracy": "points labelled right",
}
"""What a sweep measures, in words."""


def draw_curve(
    panel: Axes,
    angles: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    clouds: int,
    ylabel: str,
) -> None:
    """A line for each network in the order given, the last of several being the canonicalized one.

    Args:
        panel: Where to draw.
        angles: Degrees.
        shares: By the name of the network, a share of 1 at each angle.
        clouds: That these are means over; they make the 95 % band.
        ylabel: What the shares are of, in words.
    """
    looks = [(style.ALONE, "--", "s", "white"), (style.CANONICALIZED, "-", "o", None)]
    for (name, values), (colour, line, marker, face) in zip(
        shares.items(), looks[: len(shares)], strict=True
    ):
        low, high = wilson(torch.tensor(values), clouds)
        panel.fill_between(angles, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(
            angles,
            [100 * value for value in values],
            color=colour,
            linestyle=line,
            linewidth=1.4,
            marker=marker,
            markersize=3.5,
            markerfacecolor=face or colour,
            label=name,
            clip_on=False,
            zorder=3,
        )
    style.with_axes(
        panel,
        xlabel="rotation angle about a random axis (degrees)",
        ylabel=ylabel,
        xlim=(0, 180),
        xticks=range(0, 181, 30),
        ylim=(0, 100),
        yticks=range(0, 101, 20),
    )
    panel.legend(
        frameon=False,
        fontsize=style.LABEL,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        borderaxespad=0.2,
        handlelength=2.6,
    )


def curve_figure(found: Sweep) -> Figure:
    """The curve of a sweep, with the clouds and rotations that it is made of."""
    figure = style.new_figure(4.2, 3.1)
    shares = {network.name: _means(network.by_angle) for network in found.networks}
    ylabel = f"{MEASURES[found.measure]} (%)"
    draw_curve(figure.subplots(), found.angles, shares, len(found.clouds), ylabel)
    note = f"{sample(found)}, each about an axis of its own;\nbands: 95 % intervals over clouds"
    figure.supxlabel(note, fontsize=style.NOTE, color=style.GREY)
    return figure


def sample(found: Sweep) -> str:
    """Which clouds a sweep is about, in words."""
    count = len(found.clouds)
    of = "all" if count == found.total else f"{count:,} of"
    return f"{of} {found.total:,} clouds (seed {found.seed})"


def describe_curve(found: Sweep) -> str:
    """The curve in words, for those who do not see it."""
    told = []
    for network in found.networks:
        means = _means(network.by_angle)
        least, most = min(means), max(means)
        told.append(
            f"{network.name}, {100 * means[0]:.1f} % at {found.angles[0]} degrees, and between "
            f"{100 * least:.1f} and {100 * most:.1f} % over all angles"
        )
    return (
        f"{MEASURES[found.measure].capitalize()} of {sample(found)} against the angle of "
        f"rotation, {found.angles[0]} to {found.angles[-1]} degrees: {'; '.join(told)}."
    )


def _means(by_angle: torch.Tensor) -> list[float]:
    return by_angle.mean(dim=1).tolist()

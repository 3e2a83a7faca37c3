"""Pictures of an audit: scores against the angle of rotation, and the clouds that change most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pointcanon.datasets.given import GivenClouds
from pointcanon.errors import InputError
from pointcanon.eval import style
from pointcanon.eval.audit import ANGLES, Audit, Robustness
from pointcanon.eval.curve import draw_curve
from pointcanon.eval.pictures import as_seen_alike, draw, gallery_panels, heights, of_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve", "worst_gallery"]


def curve(audit: Audit, path: str | Path | None = None) -> Figure:
    """Accuracy, or agreement where there are no labels, against the angle of rotation.

    Args:
        audit: What is drawn.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
    """
    figure = style.new_figure(4.2, 3.0)
    networks = [network for network in (audit.alone, audit.canonicalized) if network is not None]
    shares = {network.name: network.score_by_angle for network in networks}
    what = "accuracy" if audit.labelled else "agreement with upright"
    of = "points" if audit.segments else "clouds"
    draw_curve(figure.subplots(), ANGLES, shares, audit.n, f"{what} (% of {of})")
    note = (
        f"{audit.n:,} clouds (seed {audit.seeds[0]}), each about an axis of its own;\n"
        "bands: 95 % intervals over clouds"
    )
    figure.supxlabel(note, fontsize=style.NOTE, color=style.GREY)
    _write(figure, path)
    return figure


def worst_gallery(
    network: Robustness, given: GivenClouds, path: str | Path | None = None
) -> Figure:
    """The worst clouds of a network, as they come above, in the rotation that changes most below.

    Args:
        network: Of the audit of these clouds.
        given: All clouds of the audit.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
        InputError: If no cloud changes its answer.
    """
    worst = network.worst
    if not worst:
        raise InputError(f"{network.name} never changes its answer: there is nothing to draw")
    figure, panels = gallery_panels(("as it comes", "turned"), len(worst))
    for column, cloud in zip(panels.T, worst, strict=True):
        points = given[cloud.index]["points"].double()
        turned = points @ torch.tensor(cloud.rotation, dtype=torch.float64).mT
        colours = of_height(heights(points, given.coordinate_frame))
        seen = as_seen_alike((points, turned), given.coordinate_frame)
        for panel, pose in zip(column, seen, strict=True):
            draw(panel, pose, colours)
        column[0].set_title(f"cloud {cloud.index}", fontsize=style.TITLE)
        column[0].set_xlabel(cloud.upright or "", fontsize=style.LABEL)
        column[1].set_xlabel(
            f"{cloud.turned or ''}\nstays for {100 * cloud.agreement:.0f} %".lstrip(),
            fontsize=style.LABEL,
        )
    _write(figure, path)
    return figure


def _write(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        style.write(figure, path)

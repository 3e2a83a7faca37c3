"""Pictures of an audit: the scores against the angle of rotation, and the clouds that change most.

The figures are none of pyplot's, so they need no display; a notebook shows them as they are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pointcanon.datasets.given import GivenClouds
from pointcanon.errors import InputError
from pointcanon.eval.audit import ANGLES, Audit, Robustness
from pointcanon.eval.pictures import as_seen, draw
from pointcanon.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve", "worst_gallery"]

ALONE, CANONICALIZED = "#d55e00", "#0072b2"
"""Of Okabe and Ito (2008), which the colour-blind tell apart."""


def curve(audit: Audit, path: str | Path | None = None) -> Figure:
    """Accuracy, or agreement where there are no labels, against the angle of rotation.

    Args:
        audit: What is drawn.
        path: Of a PNG; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
    """
    figure = _figure(6.0, 3.6)
    panel = figure.subplots()
    for network, colour in ((audit.alone, ALONE), (audit.canonicalized, CANONICALIZED)):
        if network is not None:
            percent = [100 * share for share in network.score_by_angle]
            panel.plot(ANGLES, percent, color=colour, marker="o", markersize=3, label=network.name)
    what = "accuracy" if audit.labelled else "agreement with upright"
    panel.set(
        xlabel="angle of rotation about a random axis, degrees",
        ylabel=f"{what}, % of {'points' if audit.segments else 'clouds'}",
        xlim=(0, 180),
        xticks=ANGLES[::2],
        ylim=(0, 102),
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower left")
    _write(figure, path)
    return figure


def worst_gallery(
    network: Robustness, given: GivenClouds, path: str | Path | None = None
) -> Figure:
    """The worst clouds of a network, as they come above, in the rotation that changes most below.

    Args:
        network: Of the audit of these clouds.
        given: All clouds of the audit.
        path: Of a PNG; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
        InputError: If no cloud changes its answer.
    """
    worst = network.worst
    if not worst:
        raise InputError(f"{network.name} never changes its answer: there is nothing to draw")
    figure = _figure(1.8 * len(worst) + 0.4, 4.5)
    panels = figure.subplots(2, len(worst), squeeze=False)
    for column, cloud in enumerate(worst):
        points = given[cloud.index]["points"].double()
        turned = points @ torch.tensor(cloud.rotation, dtype=torch.float64).mT
        for panel, pose in zip(panels[:, column], (points, turned), strict=True):
            seen = as_seen(pose, given.coordinate_frame)
            draw(panel, seen / (float(seen[:, :2].abs().max()) or 1.0))
        panels[0, column].set_title(f"cloud {cloud.index}", fontsize=9)
        panels[0, column].set_xlabel(cloud.upright or "", fontsize=8)
        panels[1, column].set_xlabel(
            f"{cloud.turned or ''}\nstays for {100 * cloud.agreement:.0f} %".lstrip(), fontsize=8
        )
    for panel, name in zip(panels[:, 0], ("as it comes", "turned"), strict=True):
        panel.set_ylabel(name, fontsize=10)
    _write(figure, path)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: str | Path | None) -> None:
    if path is None:
        return
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic_write(path, image.getvalue())

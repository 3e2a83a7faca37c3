"""How pictures look: colours, sizes and files, the same for all of them.

Figures are none of pyplot's: they have no global state and need no display, and a notebook shows
them as they are. Colours are those of Okabe and Ito (2008), which the colour-blind tell apart, and
none carries a meaning alone: a line style, a marker or a word says the same.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcanon.errors import InputError
from pointcanon.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ALONE",
    "CANONICALIZED",
    "GREY",
    "HEIGHTS",
    "LABEL",
    "NOTE",
    "PALETTE",
    "PANEL",
    "RIGHT",
    "RULE",
    "TITLE",
    "UNMARKED",
    "WRONG",
    "bare_panel",
    "new_figure",
    "svg",
    "with_axes",
    "write",
]

RIGHT, WRONG = "#0072b2", "#d55e00"
ALONE, CANONICALIZED = WRONG, RIGHT
UNMARKED = "#d3d7db"
"""Of points about which there is nothing to say."""

GREY, RULE = "#57606a", "#d0d4d8"
"""Of text that stands back, and of lines that do."""

PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a90a", "#7a5195"),
    *("#8c564b", "#17becf"),
)
"""Of a few classes or parts."""

HEIGHTS = ("viridis", 0.0, 0.9)
"""The colour map of heights, and the stretch of it that shows on white."""

TITLE, LABEL, NOTE = 9.0, 8.0, 7.0
"""Sizes of text in points; figures are made as wide as they are to be printed."""

PANEL = 1.2
"""Inches across a cloud in a gallery."""

DOTS_PER_INCH = 220
FORMATS = ("png", "pdf", "svg")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def with_axes(panel: Axes, **properties: Any) -> None:
    """Axes with labels, ticks and faint rules behind the data."""
    panel.set(**properties)
    panel.xaxis.label.set_fontsize(LABEL)
    panel.yaxis.label.set_fontsize(LABEL)
    panel.tick_params(labelsize=LABEL, color=RULE)
    panel.grid(color=RULE, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)


def bare_panel(panel: Axes, reach: float) -> None:
    """A square of ``reach`` to all sides, without axes."""
    panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def write(figure: Figure, path: str | Path) -> None:
    """Write a figure as its suffix says, ``.png``, ``.pdf`` or ``.svg``; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
        InputError: On another suffix.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{path} is no name for a picture: end it in .png, .pdf or .svg")
    atomic_write(path, _saved(figure, suffix))


def svg(figure: Figure) -> bytes:
    """A figure as SVG, letters as outlines, so that it looks the same everywhere."""
    return _saved(figure, "svg")


def _saved(figure: Figure, suffix: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of classes are no formulas
    undated = {} if suffix == "png" else {"CreationDate" if suffix == "pdf" else "Date": None}
    image = io.BytesIO()
    # the same figure is the same file
    with rc_context({"svg.hashsalt": "pointcanon", "svg.fonttype": "path"}):
        figure.savefig(image, format=suffix, metadata=undated)
    return image.getvalue()

"""Pictures of corruption: accuracy against severity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcanon.eval import style
from pointcanon.eval.corruptions import CorruptionReport, accuracy
from pointcanon.eval.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["corruption_curves"]

_COLUMNS = 6
_MARKED: dict[str, Any] = {"linewidth": 1.4, "markersize": 3.0, "zorder": 3}
_FAINT: dict[str, Any] = {"linewidth": 1.0}


def corruption_curves(report: CorruptionReport, path: str | Path | None = None) -> Figure:
    """A small panel for each corruption: accuracy against severity, with and without canonicalizer.

    Severity 0 are the clean clouds. A grey line is the predictor alone on clouds that are corrupted
    but not turned, what a canonicalizer without fault would keep; a dotted one is the share of
    clouds whose up axis is found within 10 degrees.

    Args:
        report: What is drawn.
        path: Ends in ``.png``, ``.pdf`` or ``.svg``; missing folders are made.

    Raises:
        DataError: If the file cannot be written.
        InputError: On a path that ends in something else.
    """
    columns = min(_COLUMNS, len(report.curves))
    rows = -(-len(report.curves) // columns)
    figure = style.new_figure(max(4.2, 1.25 * columns + 0.5), 1.2 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, (name, curve) in zip(panels, report.curves.items(), strict=False):
        _draw(panel, (0, *report.severities), (report.clean, *curve))
        style.with_axes(
            panel, xlim=(0, 5), xticks=range(6), ylim=(0, 100), yticks=range(0, 101, 25)
        )
        panel.set_title(name, fontsize=style.TITLE)
        panel.tick_params(labelsize=style.NOTE)
    for panel in panels[len(report.curves) :]:
        panel.set_axis_off()
    figure.supxlabel("severity", fontsize=style.LABEL)
    figure.supylabel("clouds (%)", fontsize=style.LABEL)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=style.LABEL
    )
    if path is not None:
        style.write(figure, path)
    return figure


def _draw(panel: Axes, severities: tuple[int, ...], found: tuple[Evaluation, ...]) -> None:
    def line(shares: list[float], label: str, **look: Any) -> None:
        percent = [100 * share for share in shares]
        panel.plot(severities, percent, label=label, clip_on=False, **look)

    clean, bare = found[0], [each.bare or each.trials for each in found]
    name, turned = clean.predictor, clean.protocol.test != "I"
    pose = f", {clean.protocol.test}" if turned else ""
    if turned:
        line([each.aligned.overall_accuracy for each in bare], name, color=style.GREY, **_FAINT)
    alone = {"color": style.ALONE, "linestyle": "--", "marker": "s", "markerfacecolor": "white"}
    line([accuracy(each) for each in bare], f"{name}{pose}", **alone, **_MARKED)
    if clean.bare is not None:
        behind = {"color": style.CANONICALIZED, "marker": "o"}
        accuracies = [accuracy(each.trials) for each in found]
        line(accuracies, f"behind {clean.canonicalizer}{pose}", **behind, **_MARKED)
        up = {"color": style.CANONICALIZED, "linestyle": ":", **_FAINT}
        line([each.frames.up_within_10_deg for each in found], "up axis within 10°", **up)

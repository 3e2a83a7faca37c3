"""An evaluation as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pointcanon.eval.evaluate import Evaluation
from pointcanon.eval.protocols import POSES
from pointcanon.eval.scores import Scores, Trials
from pointcanon.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Grid", "by_class", "findings", "render", "scores", "to_json", "write_json"]

HEADINGS = {
    "overall_accuracy": "overall",
    "mean_class_accuracy": "mean class",
    "instance_miou": "instance mIoU",
    "class_miou": "class mIoU",
    "point_accuracy": "points",
    "label_miou": "label mIoU",
}
"""Of the columns of a table."""

NAMES = HEADINGS | {"overall_accuracy": "overall accuracy", "point_accuracy": "point accuracy"}
"""In a sentence."""


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The object that ``pointcanon eval --json`` writes: plain values, never NaN.

    Scores, rates and the tax are shares of 1, angles degrees, times milliseconds. What was not
    measured is None: the figures of ``invariance`` where the protocol turns nothing, deviations of
    a single seed, ``bare`` and ``aligned_tax`` where there is no canonicalizer; so is
    ``restricted`` for a classifier, and ``num_points`` where clouds differ.
    """
    bare, invariance, timing = evaluation.bare, evaluation.invariance, evaluation.timing
    angles = invariance.rotation_error_deg if invariance else None
    return {
        "dataset": evaluation.dataset,
        "split": evaluation.split,
        "n": evaluation.n,
        "num_points": evaluation.num_points,
        "restricted": evaluation.restricted,
        "coordinate_frame": evaluation.coordinate_frame,
        "protocol": str(evaluation.protocol),
        "seeds": list(evaluation.seeds),
        "predictor": evaluation.predictor,
        "canonicalizer": evaluation.canonicalizer,
        **_trials(evaluation.trials, evaluation.seeds),
        "aligned_tax": {figure: evaluation.aligned_tax(figure) for figure in bare.aligned.FIGURES}
        if bare
        else None,
        "bare": _trials(bare, evaluation.seeds) if bare else None,
        "invariance": {
            "prediction_flip_rate": invariance.prediction_flip_rate if invariance else None,
            "rotation_error_deg": asdict(angles)
            if angles
            else dict.fromkeys(("p50", "p99", "max")),
        },
        "frames": asdict(evaluation.frames),
        "timing": {**asdict(timing), "total_ms": timing.total_ms},
        "versions": evaluation.versions,
    }


def _trials(trials: Trials, seeds: tuple[int, ...]) -> dict[str, Any]:
    return {
        "metrics": trials.mean.to_dict(),
        "metrics_sd": {figure: trials.deviation(figure) for figure in trials.aligned.FIGURES},
        "per_seed": [
            {"seed": seed, **scores.figures}
            for seed, scores in zip(seeds, trials.turned, strict=True)
        ],
        "aligned": trials.aligned.to_dict(),
    }


def write_json(evaluation: Evaluation, path: str | Path) -> None:
    """Write :func:`to_json` to ``path``, atomically: the old file or the new, whole.

    Raises:
        DataError: If the file cannot be written.
    """
    atomic_write(path, json.dumps(to_json(evaluation), indent=2, allow_nan=False) + "\n")


class Grid(NamedTuple):
    """A table before it is set.

    Attributes:
        title: Above it.
        note: Below it.
        corner: Of the column of names.
        headings: Of the other columns, each a group, which some of them share, and a name.
        rows: A name, and a text for each column.
    """

    title: str
    note: str
    corner: str
    headings: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]


def scores(evaluation: Evaluation) -> Grid:
    """What the network scores, alone and behind its canonicalizer, by pose."""
    trials, bare, figures = evaluation.trials, evaluation.bare, _shown(evaluation)
    pose, seeds = evaluation.protocol.test, evaluation.seeds
    size = (
        "different size" if evaluation.num_points is None else f"{evaluation.num_points:,} points"
    )
    note = f"protocol {evaluation.protocol}"
    if seeds:
        named = "seed" if len(seeds) == 1 else "seeds"
        note += f" ({pose}: {POSES[pose]}), {named} {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        note += ", mean ± s.d."
    if evaluation.restricted is not None and len(trials.aligned.per_class) > 1:
        among = "parts of the class" if evaluation.restricted else "all parts"
        note += f"; chosen among {among}"
    if bare is None:
        rows = [(evaluation.predictor, _row(trials, figures))]
    else:
        rows = [
            (f"{evaluation.predictor} alone", _row(bare, figures)),
            (f"behind {evaluation.canonicalizer}", _row(trials, figures)),
        ]
    return Grid(
        title=f"{where(evaluation)}, {evaluation.n:,} clouds of {size}",
        note=note,
        corner="accuracy %" if evaluation.restricted is None else "parts %",
        headings=[(pose, HEADINGS[figure]) for pose in _poses(evaluation) for figure in figures],
        rows=rows,
    )


def by_class(evaluation: Evaluation) -> Grid:
    """The score of each class that has clouds."""
    both = [("alone", evaluation.bare), ("", evaluation.trials)]
    columns = [
        ((whose, pose), scores.per_class)
        for whose, trials in both
        if trials is not None
        for pose, scores in zip(_poses(evaluation), (trials.aligned, trials.mean), strict=False)
    ]
    if evaluation.bare is not None:
        columns = [
            ((whose or f"behind {evaluation.canonicalizer}", pose), shares)
            for (whose, pose), shares in columns
        ]
    return Grid(
        title=("accuracy" if evaluation.restricted is None else "mIoU") + " % by class",
        note="",
        corner="class",
        headings=[heading for heading, _ in columns],
        rows=[
            (name, [_percent(shares[name] or 0.0) for _, shares in columns])
            for name, share in evaluation.trials.aligned.per_class.items()
            if share is not None
        ],
    )


def where(evaluation: Evaluation) -> str:
    """Data set and split."""
    return f"{evaluation.dataset} {evaluation.split or ''}".rstrip()


def render(evaluation: Evaluation, console: Console) -> None:
    """Print an evaluation for a person: percentages, with and without canonicalization."""
    from rich.markup import escape

    console.print(_set(scores(evaluation), last_bold=evaluation.bare is not None))
    if evaluation.restricted is not None and len(evaluation.trials.aligned.per_class) > 1:
        console.print(_set(by_class(evaluation)))
    for name, text in findings(evaluation):
        console.print(f"{name:<18} {escape(text)}", soft_wrap=True, highlight=False)


def _set(grid: Grid, *, last_bold: bool = False) -> Table:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(grid.title), caption=escape(grid.note) or None, title_justify="left")
    table.add_column(grid.corner)
    above = [""] + [group for group, _ in grid.headings]
    for before, (group, name) in zip(above, grid.headings, strict=False):
        table.add_column(f"{'' if group == before else group}\n{name}", justify="right")
    for place, (name, cells) in enumerate(grid.rows, 1):
        bold = last_bold and place == len(grid.rows)
        table.add_row(name, *cells, style="bold" if bold else None)
    return table


def _poses(evaluation: Evaluation) -> list[str]:
    pose = evaluation.protocol.test
    return [POSES["I"]] + [f"under {pose}"] * bool(evaluation.seeds)


def _shown(evaluation: Evaluation) -> tuple[str, ...]:
    """The two figures that the data set is known by."""
    scores = evaluation.trials.aligned
    one_class = evaluation.restricted is not None and len(scores.per_class) == 1
    return ("point_accuracy", "label_miou") if one_class else scores.FIGURES[:2]


def _row(trials: Trials, figures: tuple[str, ...]) -> list[str]:
    cells = [_percent(getattr(trials.aligned, figure)) for figure in figures]
    if trials.turned:
        cells += [
            _with_deviation(getattr(trials.mean, figure), trials.deviation(figure))
            for figure in figures
        ]
    return cells


def findings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Name and text of each line below the table."""
    frames, timing = evaluation.frames, evaluation.timing
    canonicalized = evaluation.bare is not None
    lines = []
    figure = _shown(evaluation)[0]
    tax = evaluation.aligned_tax(figure)
    if tax is not None:
        lines.append(
            ("aligned tax", f"{100 * tax:+.1f} points of {NAMES[figure]} lost as they come")
        )
    if evaluation.invariance is not None:
        rate = evaluation.invariance.prediction_flip_rate
        of_points = "" if evaluation.restricted is None else "of points, "
        text = f"{100 * rate:.2f} % {of_points}when a cloud is turned again"
        lines.append(("prediction flips", text))
        angles = evaluation.invariance.rotation_error_deg
        if canonicalized and angles is not None:
            text = f"p50 {angles.p50:.2g}°, p99 {angles.p99:.2g}°, max {angles.max:.2g}°"
            lines.append(("equivariance error", text))
    if canonicalized:
        text = (
            f"{frames.median_error_deg:.1f}° (median) from the data's own, "
            f"up within 10° for {_percent(frames.up_within_10_deg)} %"
        )
        lines.append(("pose", text))
        lines.append(("degenerate clouds", f"{100 * frames.degenerate:.2f} %"))
    if frames.recognised is not None:
        lines.append(
            ("canonicalizer alone", f"tells {_percent(frames.recognised)} % of the classes")
        )
    parts = f"{timing.canonicalizer_ms:.2f} canonicalizer + {timing.predictor_ms:.2f} predictor"
    passes = "1 pass" if frames.passes == 1 else f"{frames.passes:.3g} passes"
    threads = "1 thread" if timing.threads == 1 else f"{timing.threads} threads"
    where = timing.device + (f", {threads}" if timing.device == "cpu" else "")
    lines.append(
        (
            "time per cloud",
            f"{timing.total_ms:.2f} ms ({parts}, {passes}; {where}, batch {timing.batch_size})",
        )
    )
    if evaluation.restricted is None:
        lines.append(("weakest classes", _weakest(evaluation.trials.mean)))
    return lines


def _weakest(scores: Scores, count: int = 5) -> str:
    known = [(share, name) for name, share in scores.per_class.items() if share is not None]
    return ", ".join(f"{name} {_percent(share)}" for share, name in sorted(known)[:count])


def _with_deviation(mean: float, deviation: float | None) -> str:
    return _percent(mean) if deviation is None else f"{_percent(mean)} ± {100 * deviation:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"

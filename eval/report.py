"""An evaluation as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcanon.eval.evaluate import Evaluation
from pointcanon.eval.protocols import POSES
from pointcanon.eval.scores import Scores, Trials
from pointcanon.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["render", "to_json", "write_json"]

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


def render(evaluation: Evaluation, console: Console) -> None:
    """Print an evaluation for a person: percentages, with and without canonicalization."""
    from rich.markup import escape
    from rich.table import Table

    trials, bare, figures = evaluation.trials, evaluation.bare, _shown(evaluation)
    pose, seeds = evaluation.protocol.test, evaluation.seeds
    where = f"{evaluation.dataset} {evaluation.split or ''}".rstrip()
    size = (
        "different size" if evaluation.num_points is None else f"{evaluation.num_points:,} points"
    )
    caption = f"protocol {evaluation.protocol}"
    if seeds:
        caption += f" ({pose}: {POSES[pose]}), seeds {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        caption += ", mean ± s.d."
    if evaluation.restricted is not None and len(trials.aligned.per_class) > 1:
        among = "parts of the class" if evaluation.restricted else "all parts"
        caption += f"; chosen among {among}"
    table = Table(
        title=escape(f"{where}, {evaluation.n:,} clouds of {size}"),
        caption=escape(caption),
        title_justify="left",
    )
    poses = [POSES["I"]] + [f"under {pose}"] * bool(seeds)
    table.add_column("accuracy %" if evaluation.restricted is None else "parts %")
    for heading in poses:
        for place, figure in enumerate(figures):
            above = "" if place else heading
            table.add_column(f"{above}\n{HEADINGS[figure]}", justify="right")
    if bare is not None:
        table.add_row(f"{evaluation.predictor} alone", *_row(bare, figures))
        table.add_row(f"behind {evaluation.canonicalizer}", *_row(trials, figures), style="bold")
    else:
        table.add_row(evaluation.predictor, *_row(trials, figures))
    console.print(table)
    if evaluation.restricted is not None and len(trials.aligned.per_class) > 1:
        console.print(_by_class(evaluation, poses))
    for name, text in _findings(evaluation):
        console.print(f"{name:<18} {escape(text)}", soft_wrap=True, highlight=False)


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


def _by_class(evaluation: Evaluation, poses: list[str]) -> Table:
    """The mean IoU of each class that has clouds."""
    from rich.table import Table

    both = [("alone, ", evaluation.bare), ("", evaluation.trials)]
    columns = [
        (whose + pose, scores.per_class)
        for whose, trials in both
        if trials is not None
        for pose, scores in zip(poses, (trials.aligned, trials.mean), strict=False)
    ]
    table = Table(title="mIoU % by class", title_justify="left")
    table.add_column("class")
    for heading, _ in columns:
        table.add_column(heading.replace(", ", ",\n"), justify="right")
    for name, share in evaluation.trials.aligned.per_class.items():
        if share is not None:
            table.add_row(name, *(_percent(shares[name] or 0.0) for _, shares in columns))
    return table


def _findings(evaluation: Evaluation) -> list[tuple[str, str]]:
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
    parts = f"{timing.canonicalizer_ms:.2f} canonicalizer + {timing.predictor_ms:.2f} predictor"
    passes = "1 pass" if frames.count == 1 else f"{frames.count} passes"
    where = timing.device + (f", {timing.threads} threads" if timing.device == "cpu" else "")
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

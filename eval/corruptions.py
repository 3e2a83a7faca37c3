"""Accuracy and pose on corrupted clouds, by corruption and severity, as table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pointcanon.datasets import CloudDataset
from pointcanon.datasets.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from pointcanon.errors import InputError, UsageError
from pointcanon.eval.evaluate import Evaluation
from pointcanon.eval.report import to_json as evaluation_to_json
from pointcanon.eval.scores import Trials
from pointcanon.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "CorruptedFiles",
    "CorruptionReport",
    "accuracy",
    "corrupted_sets",
    "corruption_names",
    "evaluate_corruptions",
    "render",
    "to_json",
    "write_json",
]


@runtime_checkable
class CorruptedFiles(CloudDataset, Protocol):
    """A data set that has its clouds corrupted in files, such as ModelNet40-C.

    Attributes:
        corruptions: Their names.
    """

    corruptions: tuple[str, ...]

    def corrupted(self, name: str, severity: int) -> CloudDataset:
        """The same clouds, corrupted."""
        ...


@dataclass(frozen=True)
class CorruptionReport:
    """All that :func:`evaluate_corruptions` found.

    Attributes:
        clean: On the clouds as they are.
        curves: By corruption, one evaluation for each of the severities.
        severities: Ascending.
        seed: Of the corruptions; None where they come from files.
    """

    clean: Evaluation
    curves: dict[str, tuple[Evaluation, ...]]
    severities: tuple[int, ...]
    seed: int | None

    def error(
        self, name: str | None = None, *, bare: bool = False, aligned: bool = False
    ) -> float | None:
        """Share of clouds that are misclassified, meant over the severities.

        Args:
            name: Of a corruption; None for the mean over all, which is ModelNet40-C's figure.
            bare: Of the predictor alone, None where there is no canonicalizer, rather than of the
                model.
            aligned: In the pose the clouds come in, rather than in the test pose.
        """
        if name is None:
            errors = [self.error(each, bare=bare, aligned=aligned) for each in self.curves]
            return None if None in errors else fmean(error for error in errors if error is not None)
        trials = [found.bare if bare else found.trials for found in self.curves[name]]
        known = [1 - accuracy(each, aligned) for each in trials if each is not None]
        return fmean(known) if known else None

    def up(self, name: str | None = None) -> float:
        """Share of clouds whose up axis is found within 10 degrees, meant as :meth:`error` is."""
        if name is None:
            return fmean(self.up(each) for each in self.curves)
        return fmean(found.frames.up_within_10_deg for found in self.curves[name])


def accuracy(trials: Trials, aligned: bool = False) -> float:
    """Overall accuracy in the test pose, meant over the seeds, or as the clouds come."""
    return float((trials.aligned if aligned else trials.mean).overall_accuracy)


def corruption_names(text: str, dataset: CloudDataset) -> tuple[str, ...]:
    """Corruptions as they are written on a command line: ``all``, or some, separated by commas.

    Raises:
        UsageError: If one is not known, or named twice.
    """
    known = dataset.corruptions if isinstance(dataset, CorruptedFiles) else tuple(CORRUPTIONS)
    if text == "all":
        return known
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known or names.count(name) > 1:
            fault = "names" if name in known else "unknown corruption"
            twice = " twice" if name in known else ""
            raise UsageError(
                f"--corruptions: {fault} {name!r}{twice}; give 'all', or some of: "
                f"{', '.join(known)}"
            )
    return names


def evaluate_corruptions(
    measure: Callable[[CloudDataset], Evaluation],
    dataset: CloudDataset,
    names: Sequence[str] | None = None,
    *,
    clean: Evaluation | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> CorruptionReport:
    """Measure a classifier on clouds as they are, and on each corruption at each severity.

    A cloud is corrupted first and turned afterwards, so that it is the same corrupted cloud in
    every pose. The corruptions are those of :mod:`pointcanon.datasets.corruptions`, generated; of a
    data set that has its own in files (:class:`CorruptedFiles`), those.

    Args:
        measure: Evaluates a model on a data set, such as
            ``partial(evaluate, model, protocol="I/SO3", limit=500)``.
        dataset: The clouds.
        names: Of the corruptions; None for all.
        clean: What is measured on ``dataset`` itself, if it has been.
        severities: Some of 1 to 5.
        seed: Of the corruptions that are generated.

    Raises:
        InputError: On no severities or unknown ones, a part network, or clouds with normals.
        UsageError: On an unknown corruption.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        raise InputError(f"severities is {list(severities)}; choose some of: 1, 2, 3, 4, 5")
    names = corruption_names("all" if names is None else ",".join(names), dataset)
    ordered = tuple(sorted(set(severities)))
    sets = corrupted_sets(dataset, names, ordered, seed)
    clean = clean or measure(dataset)
    if clean.restricted is not None:
        raise InputError("corruptions are for classifiers: a corrupted point has no part")
    curves = {name: tuple(measure(each) for each in several) for name, several in sets.items()}
    return CorruptionReport(
        clean, curves, ordered, None if isinstance(dataset, CorruptedFiles) else seed
    )


def corrupted_sets(
    dataset: CloudDataset,
    names: Sequence[str],
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> dict[str, list[CloudDataset]]:
    """Of each corruption the data set at each severity.

    A file that is missing is found out here, rather than after an hour of measuring.

    Raises:
        DataError: If there is one.
    """

    def damaged(name: str, severity: int) -> CloudDataset:
        if isinstance(dataset, CorruptedFiles):
            return dataset.corrupted(name, severity)
        return Corrupted(dataset, name, severity, seed)

    return {name: [damaged(name, severity) for severity in severities] for name in names}


def to_json(report: CorruptionReport) -> dict[str, Any]:
    """What ``pointcanon eval --corruptions --json`` writes: that of ``eval`` for the clean clouds,
    and under ``corruptions`` the rest, in shares of 1.

    ``error`` is the share misclassified in the test pose, ``bare_error`` that of the predictor
    alone and ``bare_aligned_error`` that on clouds as they come, None where there is no
    canonicalizer; all, and ``up_within_10_deg``, are means.
    """
    return {
        **evaluation_to_json(report.clean),
        "corruptions": {
            "seed": report.seed,
            **_means(report, None),
            "by_name": {
                name: {
                    **_means(report, name),
                    "by_severity": [
                        _at(severity, found)
                        for severity, found in zip(report.severities, curve, strict=True)
                    ],
                }
                for name, curve in report.curves.items()
            },
        },
    }


def _means(report: CorruptionReport, name: str | None) -> dict[str, float | None]:
    return {
        "error": report.error(name),
        "bare_error": report.error(name, bare=True),
        "bare_aligned_error": report.error(name, bare=True, aligned=True),
        "up_within_10_deg": report.up(name),
    }


def _at(severity: int, found: Evaluation) -> dict[str, Any]:
    def scores(trials: Trials) -> dict[str, Any]:
        return {
            "metrics": trials.mean.figures,
            "metrics_sd": {name: trials.deviation(name) for name in trials.aligned.FIGURES},
            "aligned": trials.aligned.figures,
        }

    return {
        "severity": severity,
        "num_points": found.num_points,
        **scores(found.trials),
        "bare": scores(found.bare) if found.bare else None,
        "prediction_flip_rate": found.invariance.prediction_flip_rate if found.invariance else None,
        "frames": asdict(found.frames),
    }


def write_json(report: CorruptionReport, path: str | Path) -> None:
    """Write :func:`to_json` to ``path``, atomically.

    Raises:
        DataError: If the file cannot be written.
    """
    atomic_write(path, json.dumps(to_json(report), indent=2, allow_nan=False) + "\n")


def render(report: CorruptionReport, console: Console) -> None:
    """Print a report for a person: percentages by corruption and severity, and their means."""
    from rich.markup import escape
    from rich.table import Table

    clean, canonicalized = report.clean, report.clean.bare is not None
    pose = "as they come" if clean.protocol.test == "I" else f"under {clean.protocol.test}"
    origin = "from files" if report.seed is None else f"generated with seed {report.seed}"
    table = Table(
        title=f"corrupted clouds {pose}, overall accuracy %",
        caption=escape(f"protocol {clean.protocol}; corruptions {origin}"),
        title_justify="left",
    )
    table.add_column("corruption")
    table.add_column("")
    for heading in ("clean", *map(str, report.severities), "mean"):
        table.add_column(heading, justify="right")
    for name, curve in report.curves.items():
        several = (clean, *curve)
        if canonicalized:
            alone = [accuracy(each.bare) for each in several if each.bare is not None]
            table.add_row(name, f"{clean.predictor} alone", *_cells(alone))
        model = [accuracy(each.trials) for each in several]
        who = f"behind {clean.canonicalizer}" if canonicalized else clean.predictor
        style = "bold" if canonicalized else ""
        table.add_row("" if canonicalized else name, who, *_cells(model), style=style)
        if canonicalized:
            up = [each.frames.up_within_10_deg for each in several]
            table.add_row("", "up within 10°", *_cells(up), end_section=True)
    console.print(table)
    error, bare = report.error(), report.error(bare=True)
    upright = report.error(bare=True, aligned=True)
    alone_too = ""
    if bare is not None and upright is not None:
        alone_too = (
            f", {clean.predictor} alone {100 * bare:.1f} %, as they come {100 * upright:.1f} %"
        )
    up_too = f", up within 10° for {100 * report.up():.1f} %" if canonicalized else ""
    console.print(
        f"{'mean error':<18} {100 * (error or 0.0):.1f} %{alone_too}{up_too}",
        soft_wrap=True,
        highlight=False,
    )


def _cells(shares: Sequence[float]) -> list[str]:
    """Of the clean clouds, of each severity, and the mean over severities."""
    return [f"{100 * share:.1f}" for share in (*shares, fmean(shares[1:]))]

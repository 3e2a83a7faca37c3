"""How far a network can be trusted under rotation: any network, on any clouds, labelled or not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pointcanon import clouds as cloud
from pointcanon.canonicalizers import Canonicalizer, Identity
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import UNLABELLED
from pointcanon.datasets.given import GivenClouds
from pointcanon.errors import InputError
from pointcanon.eval.evaluate import (
    check_fit,
    chosen_clouds,
    evaluating,
    in_batches,
    naming_clouds,
    now,
    require_finite,
    shown,
)
from pointcanon.eval.metrics import predicted_parts
from pointcanon.eval.protocols import pose_rotations
from pointcanon.model import Canonicalized, Vote, vote_before
from pointcanon.predictors import PartPredictor, Predictor
from pointcanon.predictors.recognise import recognise
from pointcanon.rotations import about_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["ANGLES", "Audit", "Robustness", "WorstCloud", "audit", "meet"]

ANGLES = tuple(range(0, 181, 15))
"""Degrees at which the curve of an audit is drawn."""

POSES = {"I": "as they come", "z": "about up", "SO3": "any rotation"}


@dataclass(frozen=True)
class WorstCloud:
    """A cloud about which a network changes its mind.

    Attributes:
        index: Among the clouds that were handed over.
        source: The file it comes from, where the data set says.
        agreement: Share of the answers under any rotation that are those to the cloud as it comes.
        rotation: 3 x 3, the one drawn that changes most.
        upright: What the network says of the cloud as it comes; None of a part network.
        turned: What it says under that rotation.
    """

    index: int
    source: str | None
    agreement: float
    rotation: tuple[tuple[float, ...], ...]
    upright: str | None
    turned: str | None


@dataclass(frozen=True)
class Robustness:
    """A network under rotation; shares of 1, of clouds or, for a part network, of points.

    Attributes:
        name: Of the network, or of what stands in front of it.
        score: By pose (I, z, SO3), the share that is right; without labels, that is what the
            network alone says of the cloud as it comes.
        agreement: By pose, the share that is what this network itself says of the cloud as it
            comes.
        score_by_angle: At each of :data:`ANGLES`, about random axes.
        agreement_by_angle: Likewise.
        worst: Clouds with the least agreement under any rotation, if any is below 1.
        milliseconds: Of a cloud, the median over batches of time / batch.
        passes: Times the predictor runs for a cloud, on average.
    """

    name: str
    score: dict[str, float]
    agreement: dict[str, float]
    score_by_angle: tuple[float, ...]
    agreement_by_angle: tuple[float, ...]
    worst: tuple[WorstCloud, ...]
    milliseconds: float
    passes: float


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found; ``print`` shows it as a table.

    Attributes:
        dataset: Name of the data set, where it has one.
        n: Clouds.
        labelled: Whether scores are accuracies; else they are agreement with what the network alone
            says of the clouds as they come.
        segments: Whether points are labelled rather than clouds.
        coordinate_frame: Of the clouds, which says which way is up.
        seeds: Of the rotations.
        device: Where it ran.
        alone: The network.
        canonicalized: The network behind its canonicalizer, if there is one.
    """

    dataset: str
    n: int
    labelled: bool
    segments: bool
    coordinate_frame: str
    seeds: tuple[int, ...]
    device: str
    alone: Robustness
    canonicalized: Robustness | None

    @property
    def judged(self) -> Robustness:
        """What the audit is about: the canonicalized network, if there is a canonicalizer."""
        return self.canonicalized or self.alone

    @property
    def agreement(self) -> float:
        """Of what is judged, with itself, under any rotation."""
        return self.judged.agreement["SO3"]

    @property
    def flips(self) -> float:
        """Share of the answers that a rotation changes."""
        return 1 - self.agreement

    @property
    def tax(self) -> float | None:
        """What the canonicalizer costs on clouds as they come; None where there is none."""
        if self.canonicalized is None:
            return None
        return self.alone.score["I"] - self.canonicalized.score["I"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {"agreement": self.agreement, "flips": self.flips, "tax": self.tax}
        return {**asdict(self), **figures, "angles": list(ANGLES)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console) -> None:
        """Print the table for a person."""
        from rich.markup import escape
        from rich.table import Table

        of, what = ("points" if self.segments else "clouds"), "accuracy"
        if not self.labelled:
            what = "agreement with the network's own upright answers"
        table = Table(
            title=escape(f"{self.dataset}, {self.n:,} clouds: {what}, % of {of}"),
            caption=escape(
                f"{self.coordinate_frame}; rotations of the seeds "
                f"{self.seeds[0]} to {self.seeds[-1]}; milliseconds a cloud on {self.device}"
            ),
            title_justify="left",
        )
        table.add_column("", no_wrap=True)
        for heading in (*POSES.values(), "flips", "ms", "passes"):
            table.add_column(heading, justify="right")
        for network in (self.alone, self.canonicalized):
            if network is not None:
                table.add_row(
                    escape(network.name),
                    *(f"{100 * network.score[pose]:.1f}" for pose in POSES),
                    f"{100 * (1 - network.agreement['SO3']):.2f} %",
                    f"{network.milliseconds:.2f}",
                    f"{network.passes:.3g}",
                    style="bold" if network is self.canonicalized else None,
                )
        console.print(table)
        if self.tax is not None:
            console.print(f"aligned tax {100 * self.tax:+.1f} points", highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        self.render(Console(file=text, width=110))
        return text.getvalue().rstrip()

    def plot(self, path: str | Path | None = None) -> Figure:
        """The curve of the scores against the angle of rotation, written to ``path`` if given.

        Raises:
            DataError: If the file cannot be written.
        """
        from pointcanon.eval.audit_pictures import curve

        return curve(self, path)


def audit(
    network: Callable[..., Any],
    clouds: Any,
    labels: Any = None,
    *,
    parts: Any = None,
    canonicalizer: Canonicalizer | None = None,
    rotations: int = 8,
    coordinate_frame: str | CoordinateFrame | None = None,
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    worst: int = 8,
    progress: bool = False,
) -> Audit:
    """Ask a network about clouds as they come and turned, and see whether it says the same.

    Each cloud is turned about its centroid: ``rotations`` times about the up axis, as often by any
    rotation, and once by each of :data:`ANGLES` about a random axis. Everything random follows from
    the seed.

    Args:
        network: A :class:`Canonicalized`, which is compared with its predictor alone; or anything
            that :func:`pointcanon.predictors.recognise` takes. It is moved to ``device`` and left
            in the mode it was in.
        clouds: As :class:`~pointcanon.datasets.given.GivenClouds` takes them.
        labels: ``(M,)`` integers, the classes; for part networks the categories. None takes those
            that the clouds bring along, if any.
        parts: For part networks, the part of each point, likewise.
        canonicalizer: To put in front of the network, for comparison.
        rotations: Of each cloud and each kind.
        coordinate_frame: Which says where up is; None takes that of the clouds, else of the
            network, else z-up.
        seed: Rotations are those that ``eval`` draws for the seeds from this one on.
        batch_size: Clouds at once.
        device: Where to compute; by default where the network is.
        num_workers: Processes that read the data; 0 reads here.
        limit: Use this many clouds, drawn from all of them.
        worst: Clouds to name.
        progress: Show a bar on standard error, where that is a terminal.

    Raises:
        CheckpointError: If the network was trained in another coordinate frame or on other classes.
        InputError: On clouds or arguments that cannot be used, or a network that fails or answers
            NaN or infinity.
    """
    for name, value, least in (("rotations", rotations, 1), ("seed", seed, 0), ("worst", worst, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; choose at least {least}")
    vote: Vote | None = None
    if isinstance(network, Canonicalized):
        vote = network.vote
        if canonicalizer is not None:
            vote = vote_before(network.predictor, canonicalizer, vote)
        canonicalizer = canonicalizer or network.canonicalizer
    told = network.predictor if isinstance(network, Canonicalized) else network
    predictor, given = meet(told, clouds, labels, parts=parts, coordinate_frame=coordinate_frame)
    model = Canonicalized(predictor, canonicalizer or Identity(), vote)
    chosen = chosen_clouds(given, limit)
    seeds = range(seed, seed + rotations)
    turns = _turns(given, seeds)
    loader = in_batches(given, chosen, batch_size, num_workers)
    with evaluating(model, device) as like, shown(loader, progress) as batches:
        walks = _walk(model, batches, turns, given, like)

    def robustness(name: str, walk: _Walk) -> Robustness:
        return _robustness(name, walk, turns[:, chosen], seeds, chosen, given, worst)

    name = type(told).__name__ if isinstance(told, nn.Module) else _name(told)
    front = walks[1] if len(walks) > 1 else None
    return Audit(
        dataset=given.name,
        n=len(chosen),
        labelled=given.segmented if model.segments else given.labelled,
        segments=model.segments,
        coordinate_frame=str(given.coordinate_frame),
        seeds=tuple(seeds),
        device=str(like.device),
        alone=robustness(f"{name} alone", walks[0]),
        canonicalized=robustness(f"behind {type(canonicalizer).__name__}", front)
        if front
        else None,
    )


def meet(
    network: Callable[..., Any],
    clouds: Any,
    labels: Any = None,
    *,
    parts: Any = None,
    coordinate_frame: str | CoordinateFrame | None = None,
) -> tuple[Predictor | PartPredictor, GivenClouds]:
    """A network as a predictor, and clouds that it can be asked about, each told what it lacks.

    Raises:
        CheckpointError: If the network was trained in another coordinate frame or on other classes.
        InputError: If the network or the first cloud cannot be used, or the network needs what the
            clouds do not bring along.
    """
    own = getattr(clouds, "coordinate_frame", None)
    if own is None and coordinate_frame is None:
        coordinate_frame = getattr(network, "coordinate_frame", None)
    given = GivenClouds(clouds, labels, parts=parts, coordinate_frame=coordinate_frame)
    predictor = recognise(network, given[0]["points"])
    if predictor.normals and not given.normals:
        raise InputError(
            "the network looks at normals and the clouds have none: pass a data set whose items "
            "hold 'points' and 'normals'"
        )
    if isinstance(predictor, PartPredictor):
        if predictor.num_categories and not given.labelled:
            raise InputError(
                "the network is told the category of the object: pass the categories as labels; "
                "files lie in a folder named after it"
            )
        categories = range(max(1, predictor.num_categories))
        given.classes = given.classes or list(predictor.classes or map(str, categories))
        given.parts = given.parts or tuple(predictor.parts or map(str, range(predictor.num_parts)))
    else:
        given.classes = given.classes or list(
            predictor.classes or map(str, range(predictor.num_classes))
        )
    check_fit(predictor, given)
    return predictor, given


class _Walk(NamedTuple):
    """Of a network, P poses and M clouds; what it said is empty for a part network.

    ``score (P, M)`` and ``agreement (P, M)`` shares, ``said (P, M)`` labels, ``passes (P, M)``.
    """

    score: Tensor
    agreement: Tensor
    said: Tensor
    passes: Tensor
    milliseconds: float


def _turns(given: GivenClouds, seeds: Sequence[int]) -> Tensor:
    """``(P, M, 3, 3)`` float64: none, about up, any, and by each angle but the first."""
    count, up = len(given), given.coordinate_frame.up_axis
    exact = torch.float64
    drawn = [
        pose_rotations(pose, count, up, seed=seed, dtype=exact)
        for pose in ("z", "SO3")
        for seed in seeds
    ]
    generator = torch.Generator().manual_seed(seeds[0])
    axes = torch.randn(count, 3, generator=generator, dtype=exact)
    angles = torch.tensor(ANGLES[1:], dtype=exact).deg2rad()
    by_angle = [about_axis(axes, angle.expand(count)) for angle in angles]
    return torch.stack([torch.eye(3, dtype=exact).expand(count, 3, 3), *drawn, *by_angle])


def _walk(
    model: Canonicalized,
    batches: Iterable[dict[str, Tensor]],
    turns: Tensor,
    given: GivenClouds,
    like: Tensor,
) -> list[_Walk]:
    """Of the predictor alone and, if there is a canonicalizer, of the model."""
    asks = [_ask_alone]
    if not isinstance(model.canonicalizer, Identity):
        asks.append(_ask)
    found: list[list[_Walk]] = [[] for _ in asks]
    for batch in batches:
        truth = _truth(model, batch, given)
        for ask, walk in zip(asks, found, strict=True):
            said, seconds, passes = [], [], []
            for turn in turns[:, batch["index"]]:
                posed = _posed(batch, turn, like)
                started = now(like.device)
                with naming_clouds(batch):
                    answer, made = ask(model, posed)
                seconds.append((now(like.device) - started) / len(turn))
                said.append(_decided(model, answer.cpu(), batch, given))
                passes.append(made.double().cpu().expand(len(turn)))
            truth = said[0] if truth is None else truth
            real = batch.get("mask") if model.segments else None
            labelled = truth != UNLABELLED
            walk.append(
                _Walk(
                    _share([said_in_pose == truth for said_in_pose in said], real, labelled),
                    _share([said_in_pose == said[0] for said_in_pose in said], real),
                    torch.empty(len(said), 0) if model.segments else torch.stack(said),
                    torch.stack(passes),
                    1e3 * median(seconds),
                )
            )
    return [_joined(parts) for parts in found]


def _joined(walks: list[_Walk]) -> _Walk:
    return _Walk(
        torch.cat([walk.score for walk in walks], dim=1),
        torch.cat([walk.agreement for walk in walks], dim=1),
        torch.cat([walk.said for walk in walks], dim=1),
        torch.cat([walk.passes for walk in walks], dim=1),
        median(walk.milliseconds for walk in walks),
    )


def _truth(model: Canonicalized, batch: dict[str, Tensor], given: GivenClouds) -> Tensor | None:
    if model.segments:
        return batch["parts"] if given.segmented else None
    return batch["label"] if given.labelled else None


def _ask_alone(model: Canonicalized, posed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    extras = {key: posed[key] for key in ("mask", "normals", "category") if key in posed}
    if not model.segments:
        extras.pop("category")
    return model.predictor(posed["points"], **extras), torch.ones(1)


def _ask(model: Canonicalized, posed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    geometry = posed["points"], posed.get("mask"), posed.get("normals")
    frames = model.canonicalizer(*geometry)
    category = posed["category"] if model.segments else None
    answer = model.answer(frames, *geometry, category)
    return answer.outputs, answer.passes


def _posed(batch: dict[str, Tensor], turn: Tensor, like: Tensor) -> dict[str, Tensor]:
    """A batch turned about the centroids, on the CPU, so as to be the same on every device."""
    points, mask = batch["points"].double(), batch.get("mask")
    centre = cloud.centroid(points, mask)[:, None]
    posed = {"points": ((points - centre) @ turn.mT + centre).to(like)}
    if "normals" in batch:
        posed["normals"] = (batch["normals"].double() @ turn.mT).to(like)
    if mask is not None:
        posed["mask"] = mask.to(like.device)
    return {**posed, "category": batch["label"].to(like.device)}


def _decided(
    model: Canonicalized, answer: Tensor, batch: dict[str, Tensor], given: GivenClouds
) -> Tensor:
    """``(B,)`` classes or ``(B, N)`` parts of finite logits."""
    require_finite(answer, batch)
    if model.segments and given.labelled:
        return predicted_parts(answer, batch["label"], given.part_ranges)
    return answer.argmax(dim=-1)


def _share(hits: list[Tensor], real: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """``(P, B)`` float64: hits of clouds, or shares of their real, labelled points."""
    stacked = torch.stack(hits).double()
    if stacked.ndim == 2:
        return stacked
    weight = torch.ones_like(stacked[0])
    for kept in (real, counted):
        weight = weight if kept is None else weight * kept
    return (stacked * weight).sum(dim=-1) / weight.sum(dim=-1).clamp_min(1)


def _robustness(
    name: str,
    walk: _Walk,
    turns: Tensor,
    seeds: Sequence[int],
    chosen: list[int],
    given: GivenClouds,
    worst: int,
) -> Robustness:
    count = len(seeds)
    about_up, anyhow = slice(1, 1 + count), slice(1 + count, 1 + 2 * count)
    by_angle = [0, *range(1 + 2 * count, len(turns))]
    poses = {"I": slice(0, 1), "z": about_up, "SO3": anyhow}
    kept = walk.agreement[anyhow].mean(dim=0)
    order = [place for place in kept.argsort(stable=True).tolist() if kept[place] < 1]

    def named(place: int) -> WorstCloud:
        pose = anyhow.start + int(walk.agreement[anyhow, place].argmin())
        said = None
        if walk.said.numel():
            said = [given.classes[int(walk.said[p, place])] for p in (0, pose)]
        return WorstCloud(
            index=chosen[place],
            source=given.source(chosen[place]),
            agreement=kept[place].item(),
            rotation=tuple(map(tuple, turns[pose, place].tolist())),
            upright=said[0] if said else None,
            turned=said[1] if said else None,
        )

    return Robustness(
        name=name,
        score={pose: walk.score[which].mean().item() for pose, which in poses.items()},
        agreement={pose: walk.agreement[which].mean().item() for pose, which in poses.items()},
        score_by_angle=tuple(walk.score[by_angle].mean(dim=1).tolist()),
        agreement_by_angle=tuple(walk.agreement[by_angle].mean(dim=1).tolist()),
        worst=tuple(named(place) for place in order[:worst]),
        milliseconds=walk.milliseconds,
        passes=walk.passes.mean().item(),
    )


def _name(network: Callable[..., Any]) -> str:
    return getattr(network, "__name__", type(network).__name__)

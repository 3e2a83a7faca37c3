"""All pictures of an evaluation, and one page that shows them beside its figures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.datasets import UNLABELLED, CloudDataset, PartDataset
from pointcanon.eval import report, style
from pointcanon.eval.curve import MEASURES, curve_figure, describe_curve
from pointcanon.eval.evaluate import Evaluation
from pointcanon.eval.part_pictures import (
    PartPicture,
    colour_of,
    part_gallery,
    part_pictures,
)
from pointcanon.eval.pictures import (
    COLOURS,
    POSES,
    ClassPicture,
    class_pictures,
    gallery,
    of_height,
    speakers,
)
from pointcanon.eval.sphere import describe_poses, poses_figure
from pointcanon.eval.sweep import Sweep, sweep
from pointcanon.eval.viewer import STYLE, Paint, Scene, View, viewer
from pointcanon.files import atomic_write
from pointcanon.model import Canonicalized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page", "write_pictures"]


def write_pictures(
    model: Canonicalized,
    dataset: CloudDataset,
    evaluation: Evaluation,
    folder: str | Path,
    *,
    clouds: int = 200,
    count: int = 8,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    max_points: int | None = None,
    progress: bool = False,
) -> list[Path]:
    """Write the curve, the poses, a gallery and the report of an evaluation.

    Args:
        model: What was evaluated.
        dataset: What it was evaluated on.
        evaluation: Its protocol and first seed turn the clouds.
        folder: Of ``curve.png``, ``poses.png``, ``gallery.png`` and ``report.html``; made where it
            is missing.
        clouds: As for :func:`~pointcanon.eval.sweep.sweep`, and so are those from here on.
        count: But this: clouds in the gallery and the report.
        batch_size: Clouds at once.
        device: Where to compute.
        num_workers: Processes that read the data.
        limit: Draw from so many clouds.
        max_points: Of a part network at once.
        progress: Show a bar.

    Returns:
        The files, in the order above.

    Raises:
        DataError: If a file cannot be written.
        InputError: On an argument that cannot be met.
    """
    folder, frame = Path(folder), dataset.coordinate_frame
    protocol, seed = evaluation.protocol, next(iter(evaluation.seeds), 0)
    restricted = evaluation.restricted is not False
    found = sweep(
        model,
        dataset,
        protocol,
        clouds=clouds,
        seed=seed,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        limit=limit,
        restricted=restricted,
        max_points=max_points,
        progress=progress,
    )
    figures = {"curve": curve_figure(found), "poses": poses_figure(found)}
    for name, figure in figures.items():
        style.write(figure, folder / f"{name}.png")
    path = folder / "gallery.png"
    if model.segments:
        parts = cast(PartDataset, dataset)
        labelled = part_pictures(
            model,
            parts,
            protocol,
            seed=seed,
            count=count,
            restricted=restricted,
            max_points=max_points,
        )
        part_gallery(labelled, path, coordinate_frame=frame)
        scenes = [_part_scene(picture, parts.parts, frame) for picture in labelled]
    else:
        pictures = class_pictures(model, dataset, protocol, seed=seed, count=count)
        names = speakers(model)
        gallery(pictures, path, coordinate_frame=frame, speakers=names)
        scenes = [_class_scene(picture, names, frame) for picture in pictures]
    note = "" if model.segments else f"{COLOURS.capitalize()}."
    atomic_write(folder / "report.html", page(evaluation, found, scenes, note=note, **figures))
    return [folder / name for name in ("curve.png", "poses.png", "gallery.png", "report.html")]


def page(
    evaluation: Evaluation,
    found: Sweep,
    scenes: Sequence[Scene],
    curve: Figure,
    poses: Figure,
    note: str = "",
) -> str:
    """The report as HTML, which loads nothing from anywhere.

    Args:
        evaluation: Its figures.
        found: What the two figures show.
        scenes: Clouds to turn.
        curve: Of :func:`~pointcanon.eval.curve.curve_figure`.
        poses: Of :func:`~pointcanon.eval.sphere.poses_figure`.
        note: Above the clouds.
    """
    where, predictor = report.where(evaluation), evaluation.predictor
    behind = f" behind {evaluation.canonicalizer}" if evaluation.bare is not None else ""
    title = f"{predictor}{behind} on {where}"
    findings = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
        for name, text in report.findings(evaluation)
    )
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    body = f"""
<h1>{html.escape(title)}</h1>
<section><h2>Figures</h2>
{_table(report.scores(evaluation))}
<dl>{findings}</dl>
</section>
<section class="pair">
<div><h2>Against the angle of rotation</h2>
{_image(curve, describe_curve(found))}
{_table(_curve_grid(found))}</div>
<div><h2>Where up comes to lie</h2>
{_image(poses, describe_poses(found))}</div>
</section>
<section><h2>Clouds</h2>
{viewer(scenes, note)}
</section>
<section><h2>By class</h2>
<details><summary>All classes</summary>{_table(report.by_class(evaluation))}</details>
</section>
<footer>{html.escape(evaluation.coordinate_frame)} clouds; {html.escape(versions)}</footer>
"""
    texts = {"@STYLE@": STYLE, "@TITLE@": html.escape(title), "@BODY@": body}
    return re.sub("|".join(texts), lambda found: texts[found[0]], PAGE)


def _table(grid: report.Grid) -> str:
    groups: list[tuple[str, int]] = []
    for group, _ in grid.headings:
        same = groups and groups[-1][0] == group
        groups = [*groups[:-1], (group, groups[-1][1] + 1)] if same else [*groups, (group, 1)]
    above = "".join(
        f'<th colspan="{count}" scope="colgroup">{html.escape(group)}</th>'
        for group, count in groups
    )
    names = "".join(f'<th scope="col">{html.escape(name)}</th>' for _, name in grid.headings)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in grid.rows
    )
    note = f"<p>{html.escape(grid.note)}</p>" if grid.note else ""
    corner = html.escape(grid.corner)
    head = f'<tr><th scope="col">{corner}</th>{names}</tr>'
    if any(group for group, _ in groups):
        head = f'<tr><th rowspan="2" scope="col">{corner}</th>{above}</tr><tr>{names}</tr>'
    return (
        f'<div class="table"><table><caption>{html.escape(grid.title)}</caption>'
        f"<thead>{head}</thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _curve_grid(found: Sweep) -> report.Grid:
    return report.Grid(
        title=f"{MEASURES[found.measure]} %",
        note="",
        corner="angle",
        headings=[("", network.name) for network in found.networks],
        rows=[
            (
                f"{angle}°",
                [f"{100 * float(network.by_angle[i].mean()):.1f}" for network in found.networks],
            )
            for i, angle in enumerate(found.angles)
        ],
    )


def _image(figure: Figure, alt: str) -> str:
    data = base64.b64encode(style.svg(figure)).decode()
    width = round(figure.get_figwidth() * 120)  # a little larger than in print
    return f'<img src="data:image/svg+xml;base64,{data}" width="{width}" alt="{html.escape(alt)}">'


def _class_scene(picture: ClassPicture, names: tuple[str, str], frame: CoordinateFrame) -> Scene:
    assert picture.verdicts is not None  # class_pictures gives them
    return Scene(
        title=picture.title,
        points=[convert(cloud, frame, "z-up") for cloud in (picture.received, picture.canonical)],
        paints=[_of_height(picture.height)],
        views=[
            View(f"{pose},\n{name}", points=place, paint=0, note=str(verdict))
            for place, (pose, name, verdict) in enumerate(
                zip(POSES, names, picture.verdicts, strict=True)
            )
        ],
    )


def _of_height(height: Tensor, shades: int = 64) -> Paint:
    from matplotlib.colors import to_hex

    colours = of_height(torch.linspace(0, 1, shades))
    return Paint("height", (height * (shades - 1)).round().long(), [to_hex(c) for c in colours])


def _part_scene(picture: PartPicture, parts: Sequence[str], frame: CoordinateFrame) -> Scene:
    others = sorted(set(picture.found.tolist()) - set(picture.own))
    known = [*picture.own, *others]
    place = {part: index for index, part in enumerate(known)} | {UNLABELLED: len(known)}
    colours = [colour_of(part, picture.own) for part in (*known, UNLABELLED)]
    labels = [*(parts[part] for part in known), "none"]

    def paint(name: str, of: Tensor) -> Paint:
        return Paint(name, torch.tensor([place[part] for part in of.tolist()]), colours, labels)

    alone, note = picture.notes
    share = f"{100 * picture.wrong.double().mean().item():.0f} % wrong"
    return Scene(
        title=picture.title,
        points=[convert(cloud, frame, "z-up") for cloud in (picture.received, picture.canonical)],
        paints=[
            paint("truth", picture.truth),
            paint("found", picture.found),
            Paint("errors", picture.wrong.long(), [style.UNMARKED, style.WRONG]),
        ],
        views=[
            View("as received, truth", points=0, paint=0, note=alone),
            View("canonical, truth", points=1, paint=0),
            View("canonical, found", points=1, paint=1, note=note),
            View("canonical, errors", points=1, paint=2, note=share),
        ],
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:;
               style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
  body { margin: 0 auto; max-width: 1120px; padding: 1rem; color: #1b1f24; background: #fff;
         font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
  h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
  h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; padding-top: .8rem;
       border-top: 1px solid #d0d4d8; }
  h3 { font-size: 1rem; margin: 0; }
  p, footer, figcaption { color: #57606a; }
  p { margin: .3rem 0 .8rem; }
  footer { margin-top: 2rem; border-top: 1px solid #d0d4d8; padding-top: .6rem; font-size: .85rem; }
  img { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem; }
  figure { margin: 0; }
  figcaption { text-align: center; font-size: .85rem; line-height: 1.35; white-space: pre-line; }
  .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
  .table { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
  th, td { padding: .12rem .9rem .12rem 0; text-align: right; white-space: nowrap; }
  th[scope=colgroup] { text-align: center; border-bottom: 1px solid #d0d4d8; }
  th { font-weight: 600; } tbody th { font-weight: 400; }
  th:first-child { text-align: left; vertical-align: bottom; }
  tbody tr { border-top: 1px solid #eaeef2; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
  dt { color: #57606a; } dd { margin: 0; }
  summary { cursor: pointer; padding: .3rem 0; }
  :focus-visible { outline: 2px solid #0072b2; outline-offset: 3px; }
  @media print { details { display: none; } .scene { break-inside: avoid; } }
@STYLE@</style>
</head>
<body>@BODY@</body>
</html>
"""

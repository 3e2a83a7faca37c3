"""``pointcanon canonicalize``: clouds in files, turned into their canonical pose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointcanon.cli.options import Parser
from pointcanon.errors import UsageError
from pointcanon.readers import Cloud

if TYPE_CHECKING:
    from torch import Tensor

    from pointcanon.cli.clouds import Item

__all__ = ["run"]

DESCRIPTION = """\
Writes the clouds of files and folders in canonical pose under --out, with the names they have in
their folders: .npy as .npy, .npz and .h5 as .npz, everything else as .ply. All points are kept, in
their order and size, with normals where there are any; meshes are sampled. poses.jsonl, in the same
folder, has a line for each: file, index (in a file of many), output, rotation (3 x 3, canonical to
file), the same as quaternion_wxyz or, of a cloud that is mirrored in its canonical pose, mirrored,
centre, scale, frame_weight (of that rotation, among those the canonicalizer weighs),
frame_confidence (how sure it is, where the canonicalizer says so), degenerate. The points written
are (x - centre) @ rotation. A file that cannot be read, or that a network has no answer for, has a
line with file, index and error, and the exit status is then 1.
"""


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon canonicalize", description=DESCRIPTION)
    from pointcanon.canonicalizers import Identity
    from pointcanon.cli import streaming
    from pointcanon.cli.clouds import looks_at_normals
    from pointcanon.cli.places import Places

    streaming.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_intermixed_args(argv)  # options may stand between files

    share = streaming.Share.from_environment()
    model = streaming.model_of(options, share)
    if isinstance(model.canonicalizer, Identity):
        raise UsageError(
            f"{options.checkpoint} has no canonicalizer, which would leave all clouds as they are: "
            "give one by --canonicalizer"
        )
    places = Places(options.out, options.paths)
    lines = streaming.Lines(options.out / "poses.jsonl", options.resume, share)

    def answer(
        items: list[Item], points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> list[dict[str, Any]]:
        frames = model.canonicalizer(points, mask, normals)
        poses = streaming.Poses(
            rotation=frames.best().rotations[:, 0],
            scale=frames.scale,
            degenerate=frames.degenerate,
            frame_weight=frames.weights.amax(dim=1),
            frame_confidence=frames.confidence,
        )
        records = []
        for row, item in enumerate(items):
            pose = streaming.pose_record(item, poses, row, model, options.coordinate_frame)
            place = places.of(item)
            assert item.whole is not None
            _write(place, _posed(item.whole, pose))
            records.append({**item.record, "output": str(place), **pose})
        return records

    return streaming.stream(
        model,
        options,
        lines,
        share,
        answer,
        normals=looks_at_normals(model.canonicalizer),
        num_points=streaming.points_seen(options, model),
        whole=True,
    )


def _posed(cloud: Cloud, pose: dict[str, Any]) -> Cloud:
    rotation, centre = np.array(pose["rotation"]), np.array(pose["centre"])
    points = ((cloud.points - centre) @ rotation).astype(cloud.points.dtype)
    if cloud.normals is None:
        return Cloud(points)
    return Cloud(points, (cloud.normals @ rotation).astype(cloud.normals.dtype))


def _write(place: Path, cloud: Cloud) -> None:
    from pointcanon.cli.places import write

    whole = np.hstack([part for part in cloud if part is not None])
    arrays = {"points": cloud.points, "normals": cloud.normals}
    if place.suffix == ".npy":
        arrays = {"points": whole}
    write(
        place,
        {name: array for name, array in arrays.items() if array is not None},
        dict(zip(("x", "y", "z", "nx", "ny", "nz"), whole.T, strict=False)),
    )

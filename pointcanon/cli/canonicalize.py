"""``pointcanon canonicalize``: clouds in files, turned into their canonical pose."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointcanon.cli.options import Parser
from pointcanon.errors import UsageError
from pointcanon.files import atomic_write
from pointcanon.readers import Cloud

if TYPE_CHECKING:
    from torch import Tensor

    from pointcanon.cli.streaming import Item

__all__ = ["run"]

DESCRIPTION = """\
Writes the clouds of files and folders in canonical pose under --out, with the names they have in
their folders: .npy as .npy, .npz and .h5 as .npz, everything else as .ply. All points are kept, in
their order and size, with normals where there are any; meshes are sampled. poses.jsonl, in the same
folder, has a line for each: file, index (in a file of many), output, rotation (3 x 3, canonical to
file), the same as quaternion_wxyz, centre, scale, degenerate. The points written are
(x - centre) @ rotation. A file that cannot be read has a line with file, index and error, and the
exit status is then 1.
"""


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon canonicalize", description=DESCRIPTION)
    from pointcanon.cli import streaming

    streaming.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_intermixed_args(argv)  # options may stand between files

    share = streaming.Share.from_environment()
    places = _Places(options.out, options.paths)
    lines = streaming.Lines(options.out / "poses.jsonl", options.resume, share)
    model = streaming.open_model(options.checkpoint, options.device, share)

    def answer(
        items: list[Item], points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> list[dict[str, Any]]:
        frames = model.canonicalizer(points, mask, normals).best()
        records = []
        for row, item in enumerate(items):
            pose = streaming.pose_record(
                item, frames.rotations[row, 0], model, options.coordinate_frame
            )
            place = places.of(item)
            assert item.whole is not None
            atomic_write(place, _encoded(_posed(item.whole, pose), place.suffix))
            degenerate = {"degenerate": bool(frames.degenerate[row])}
            records.append({**item.record, "output": str(place), **pose, **degenerate})
        return records

    with share.together() as any_failed:
        streaming.stream(model, options, lines, share, answer, normals=False, whole=True)
        return int(any_failed(lines.failed > 0))


class _Places:
    """Where the results go: as they lie in the folders that were named.

    Raises:
        UsageError: If two results would have one name, or lie among the files that are read.
    """

    def __init__(self, out: Path, paths: list[str]) -> None:
        self._out = out
        self._folders = [Path(path) for path in paths if os.path.isdir(path)]
        for folder in self._folders:
            if out.resolve().is_relative_to(folder.resolve()):
                raise UsageError(f"--out {out} lies in {folder}, which is read; choose another")
        from pointcanon import readers

        taken: dict[Path, str] = {}
        for file in readers.find(paths):
            place = self._place(file)
            if place in taken:
                raise UsageError(
                    f"{taken[place]} and {file} would both be written to {place}; "
                    "name the folder above both, or call twice"
                )
            taken[place] = file

    def of(self, item: Item) -> Path:
        place = self._place(item.file)
        if item.index is None:
            return place
        return place.with_name(f"{place.stem}.{item.index:06d}{place.suffix}")

    def _place(self, file: str) -> Path:
        path = Path(file)
        inside = next((path.relative_to(f) for f in self._folders if path.is_relative_to(f)), None)
        place = self._out / (path.name if inside is None else inside)
        kind = path.suffix.lower()
        ending = {".npy": ".npy", ".npz": ".npz", ".h5": ".npz", ".hdf5": ".npz"}.get(kind, ".ply")
        return place if ending == kind else place.with_name(place.name + ending)


def _posed(cloud: Cloud, pose: dict[str, Any]) -> Cloud:
    rotation, centre = np.array(pose["rotation"]), np.array(pose["centre"])
    points = ((cloud.points - centre) @ rotation).astype(cloud.points.dtype)
    if cloud.normals is None:
        return Cloud(points)
    return Cloud(points, (cloud.normals @ rotation).astype(cloud.normals.dtype))


def _encoded(cloud: Cloud, ending: str) -> bytes:
    packed = io.BytesIO()
    if ending == ".npy":
        columns = [cloud.points] if cloud.normals is None else [cloud.points, cloud.normals]
        np.save(packed, np.concatenate(columns, axis=1))
    elif ending == ".npz":
        arrays = {"points": cloud.points, "normals": cloud.normals}
        np.savez(packed, **{k: v for k, v in arrays.items() if v is not None})  # type: ignore[arg-type]
    else:
        packed.write(_ply(cloud))
    return packed.getvalue()


def _ply(cloud: Cloud) -> bytes:
    """Binary PLY, in the precision of the cloud."""
    names = ["x", "y", "z", *(["nx", "ny", "nz"] if cloud.normals is not None else [])]
    columns = cloud.points if cloud.normals is None else np.hstack((cloud.points, cloud.normals))
    kind = "float" if columns.dtype == np.float32 else "double"
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(columns)}",
        *(f"property {kind} {name}" for name in names),
        "end_header\n",
    ]
    values = np.ascontiguousarray(columns, dtype=columns.dtype.newbyteorder("<"))
    return "\n".join(header).encode() + values.tobytes()

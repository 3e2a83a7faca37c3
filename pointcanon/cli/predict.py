"""``pointcanon predict``: labels, confidence and pose of clouds in files, as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointcanon.cli.options import Parser
from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from pointcanon.cli.streaming import Item

__all__ = ["run"]

DESCRIPTION = """\
Labels, confidence and pose of the clouds in files and folders, a JSON line each: file, index (in a
file of many), label, confidence, top5, rotation (3 x 3, canonical to file), the same as
quaternion_wxyz, centre, scale, degenerate, points (how many the network saw). A cloud x of the file
has the canonical pose (x - centre) / scale @ rotation. A file that cannot be read has a line with
file, index and error, and the exit status is then 1. Under torchrun the files are shared out, and
each process writes its own FILE.
"""


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon predict", description=DESCRIPTION)
    from pointcanon.cli import streaming

    streaming.add_options(parser)
    parser.add_argument("--json", type=Path, help="write the lines here, not on standard output")
    options = parser.parse_intermixed_args(argv)  # options may stand between files

    share = streaming.Share.from_environment()
    lines = streaming.Lines(options.json, options.resume, share)
    model = streaming.open_model(options.checkpoint, options.device, share)
    if model.segments:
        raise UsageError(
            f"{options.checkpoint} labels points, not clouds: "
            "use it from Python, pointcanon.load(...).predict"
        )

    def answer(
        items: list[Item], points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> list[dict[str, Any]]:
        found = model.predict(points, mask, normals)
        top = found.probabilities.topk(min(5, found.probabilities.shape[1]), dim=1)
        names = model.classes

        def name(label: int) -> str | int:
            return label if names is None else names[label]

        return [
            {
                **item.record,
                "label": name(int(found.labels[row])),
                "confidence": float(found.confidence[row]),
                "top5": [
                    {"label": name(int(label)), "probability": float(probability)}
                    for probability, label in zip(top.values[row], top.indices[row], strict=True)
                ],
                **streaming.pose_record(item, found.rotation[row], model, options.coordinate_frame),
                "degenerate": bool(found.degenerate[row]),
                "points": len(points[row]) if mask is None else int(mask[row].sum()),
            }
            for row, item in enumerate(items)
        ]

    with share.together() as any_failed:
        normals = bool(getattr(model.predictor, "normals", False))
        streaming.stream(model, options, lines, share, answer, normals=normals)
        return int(any_failed(lines.failed > 0))

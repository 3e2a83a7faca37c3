"""Label clouds and meshes in files, in your own Python.

    pointcanon demo --output demo
    python examples/predict_files.py demo/canonicalizer/best.safetensors scans/

``pointcanon predict`` does this for folders of any size, with loader processes, and can be resumed.
"""

from __future__ import annotations

import argparse
import sys

import torch

import pointcanon as pc
from pointcanon import clouds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a checkpoint that pointcanon adapt or train wrote")
    parser.add_argument("paths", nargs="+", help="files and folders")
    options = parser.parse_args()

    model = pc.load(options.model)
    failed = False
    for path in pc.readers.find(options.paths):
        try:
            held = list(pc.readers.CloudFile(path))
        except pc.DataError as error:  # one bad file is no reason to stop
            print(error, file=sys.stderr)
            failed = True
            continue
        points, mask, normals = pc.interop.batch(held, dtype=torch.float32)
        # as most networks are trained; adapt and train write into the card what theirs was
        points = clouds.normalise(points, mask)
        found = model.predict(points, mask, normals)
        for label, confidence, unsure in zip(
            found.labels.tolist(), found.confidence.tolist(), found.degenerate.tolist(), strict=True
        ):
            name = label if model.classes is None else model.classes[label]
            print(f"{path}: {name}, {confidence:.0%}{', pose not determined' if unsure else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Opening and reading ShapeNet-Part at full size, from files generated in its public layouts.

    python benchmarks/shapenet_part.py --folder FOLDER

16,881 clouds, split as the official lists are: as h5 files of 2,048 clouds of 2,048 points with
their parts, and as one txt file each of 2,600 points, normals and parts (2.4 GB; few different
contents, as reading does not know). Each layout is read in a process of its own: the time to open
a split, to read every cloud of it once, and the most memory beyond what importing takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import h5py
import numpy as np
from measure import cost, in_a_process

from pointcanon.datasets import ShapeNetPart
from pointcanon.datasets.shapenet_part_layouts import _CATEGORY_OF as CATEGORY_OF
from pointcanon.datasets.shapenet_part_layouts import PART_RANGES

SIZES = {"train": 12_137, "val": 1_870, "test": 2_874}
STORED, IN_TEXT, CONTENTS = 2048, 2600, 64


def write_h5(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, size in SIZES.items():
        names = []
        for first in range(0, size, 2048):
            count = min(2048, size - first)
            labels = rng.integers(16, size=count)
            parts = np.stack([rng.choice(PART_RANGES[label], STORED) for label in labels])
            names.append(f"ply_data_{split}{len(names)}.h5")
            with h5py.File(folder / names[-1], "w") as file:
                points = rng.uniform(-0.5, 0.5, (count, STORED, 3)).astype(np.float32)
                file.create_dataset("data", data=points, compression="gzip", compression_opts=4)
                file.create_dataset("label", data=labels.astype(np.uint8)[:, None])
                file.create_dataset("pid", data=parts.astype(np.uint8), compression="gzip")
        (folder / f"{split}_hdf5_file_list.txt").write_text("\n".join(names) + "\n")


def write_txt(folder: Path) -> None:
    (folder / "train_test_split").mkdir(parents=True)
    (folder / "synsetoffset2category.txt").touch()
    rng = np.random.default_rng(0)
    synsets = list(CATEGORY_OF)
    contents: dict[str, list[bytes]] = {}
    for label, synset in enumerate(sorted(synsets, key=CATEGORY_OF.__getitem__)):
        (folder / synset).mkdir()
        contents[synset] = []
        for _ in range(CONTENTS // 16):
            rows = rng.uniform(-0.5, 0.5, (IN_TEXT, 6))
            parts = rng.choice(PART_RANGES[label], IN_TEXT)
            lines = (
                " ".join(f"{value:.5f}" for value in row) + f" {part}.000000"
                for row, part in zip(rows, parts, strict=True)
            )
            contents[synset].append("\n".join(lines).encode())
    for split, size in SIZES.items():
        names = [f"{synsets[number % 16]}/{split}{number}" for number in range(size)]
        for number, name in enumerate(names):
            made = contents[synsets[number % 16]]
            (folder / f"{name}.txt").write_bytes(made[number // 16 % len(made)])
        listing = json.dumps([f"shape_data/{name}" for name in names])
        (folder / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(listing)


def read(root: Path) -> dict[str, float]:
    opened = cost(lambda: ShapeNetPart(root, "trainval"), 1)
    data = ShapeNetPart(root, "trainval")

    def every() -> None:
        for index in range(len(data)):
            data[index]

    whole = cost(every, 1)
    return {
        "clouds": len(data),
        "open_seconds": opened["seconds"],
        "read_seconds": whole["seconds"],
        "read_cpu_seconds": whole["cpu_seconds"],
        "extra_mib": max(opened["extra_mib"], whole["extra_mib"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the generated files, which are kept"
    )
    parser.add_argument("--layout", choices=["h5", "txt"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layout:
        print(json.dumps(read(options.folder / options.layout)))
        return
    for layout, write in (("h5", write_h5), ("txt", write_txt)):
        if not (options.folder / layout).exists():
            write(options.folder / layout)
        found = in_a_process(__file__, options, layout=layout)
        print(
            f"{layout}: {found['clouds']:,.0f} clouds opened in {found['open_seconds']:.2f} s, "
            f"read in {found['read_seconds']:.0f} s ({found['read_cpu_seconds']:.0f} s of "
            f"processor time), {found['extra_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()

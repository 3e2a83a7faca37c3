"""Long and large: whether memory stays flat, and what a very large cloud takes.

    python benchmarks/soak.py --what predictions --minutes 60
    python benchmarks/soak.py --what stream --files 100000
    python benchmarks/soak.py --what large --points 10000000

``predictions`` asks models for clouds of mixed sizes, batches and masks, one after another in one
process. ``stream`` puts a folder of small files through ``pointcanon predict``. Both say how
much memory was resident in each tenth of the time, and by how much it grew from the second tenth,
when caches are warm, to the last. ``large`` says how far a frame of one cloud raises the peak of a
process of its own. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import cost, in_a_process

import pointcanon as pc
from pointcanon import testing
from pointcanon.canonicalizers import PCA, Identity, Manhattan, Steerable, VectorNeuron, pretrained
from pointcanon.predictors import create

CANONICALIZERS: dict[str, Callable[[], pc.canonicalizers.Canonicalizer]] = {
    "Identity": Identity,
    "PCA(24)": PCA,
    "PCA(24), smooth": lambda: PCA(24, weighting="smooth"),
    "Manhattan(24)": Manhattan,
    "VectorNeuron, small": VectorNeuron,
    "VectorNeuron, large": lambda: VectorNeuron("large"),
    "Steerable": Steerable,
    "Optimized, trained": lambda: pretrained.load("modelnet40"),
}


def resident_mib(pid: int | str = "self") -> float:
    """Memory of a process that is resident now, without its children."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def growth(samples: list[tuple[float, float]]) -> dict[str, object]:
    """Of (seconds, MiB): the median of each tenth of the time, and the last less the second."""
    last = samples[-1][0]
    tenths: list[list[float]] = [[] for _ in range(10)]
    for seconds, mib in samples:
        tenths[min(9, int(10 * seconds / max(last, 1e-9)))].append(mib)
    medians = [round(median(tenth), 1) for tenth in tenths if tenth]
    return {
        "seconds": round(last, 1),
        "resident_mib": medians,
        "grew_mib": round(medians[-1] - medians[min(1, len(medians) - 1)], 1),
        "peak_mib": round(max(mib for _, mib in samples), 1),
    }


def questions(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Clouds of mixed numbers and sizes, some of them padded."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        count = chance.choice((1, 2, 7))
        size = chance.choice((32, 100, 256, 777, 1024))
        points = testing.surface_clouds(count, size, generator)
        mask = None
        if chance.random() < 0.3:
            real = torch.randint(24, size + 1, (count, 1), generator=generator)
            mask = torch.arange(size) < real
        yield points, mask


def predictions(options: argparse.Namespace) -> dict[str, object]:
    """One process, many models, mixed questions."""
    torch.manual_seed(0)
    pointnet, dgcnn = (create(name, num_classes=16) for name in ("pointnet", "dgcnn"))
    models = [pc.Canonicalized(pointnet, make()).eval() for make in CANONICALIZERS.values()]
    models.append(pc.Canonicalized(dgcnn, VectorNeuron()).eval())
    samples: list[tuple[float, float]] = []
    asked = clouds = 0
    started = time.monotonic()
    for points, mask in questions(seed=0):
        clouds += len(points)
        models[asked % len(models)].predict(points, mask)
        asked += 1
        seconds = time.monotonic() - started
        if seconds > len(samples):  # once a second
            samples.append((seconds, resident_mib()))
        if seconds > 60 * options.minutes:
            break
    return {"predictions": asked, "clouds": clouds, **growth(samples)}


def stream(options: argparse.Namespace) -> dict[str, object]:
    """A folder of small files through the command line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for index in range(options.files):
            part = folder / "clouds" / f"{index // 1000:04}"
            part.mkdir(parents=True, exist_ok=True)
            np.save(part / f"{index}.npy", generator.standard_normal((64, 3), dtype=np.float32))
        torch.manual_seed(0)
        network = create("pointnet", num_classes=16, embedding=64)
        pc.Canonicalized(network, PCA(4)).save(folder / "model.safetensors")
        command = [sys.executable, "-m", "pointcanon", "predict", str(folder / "model.safetensors")]
        command += [str(folder / "clouds"), "--json", str(folder / "out.jsonl")]
        command += ["--num_points", "all", "--device", "cpu"]
        process = subprocess.Popen(command)
        samples: list[tuple[float, float]] = []
        started = None
        while process.poll() is None:
            if started is None and (folder / "out.jsonl").exists():
                started = time.monotonic()  # it has loaded what it needs
            if started is not None:
                try:
                    samples.append((time.monotonic() - started, resident_mib(process.pid)))
                except (FileNotFoundError, IndexError):
                    break
            time.sleep(0.2)
        if process.wait() != 0:
            raise SystemExit("predict failed")
        with (folder / "out.jsonl").open() as lines:
            files = {json.loads(line)["file"] for line in lines}
    samples = [sample for sample in samples if sample[1] > 0]
    return {"files": len(files), **growth(samples)}


def large(options: argparse.Namespace) -> dict[str, object]:
    """Each canonicalizer on one cloud."""
    if options.who is not None:
        return frame_of_one(options)
    chosen = [name for name in CANONICALIZERS if name != "Identity"]
    return {name: in_a_process(__file__, options, who=name, json=None) for name in chosen}


def frame_of_one(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    canonicalizer = CANONICALIZERS[options.who]().eval()
    surface = testing.surface_clouds(1, 4096, torch.Generator().manual_seed(0))
    with torch.no_grad():
        canonicalizer(surface)  # libraries load their kernels here
        points = surface[:, torch.arange(options.points) % 4096]
        points = points + 0.01 * torch.randn(points.shape)
        return dict(cost(lambda: canonicalizer(points), 1))


WHAT = {"predictions": predictions, "stream": stream, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=tuple(WHAT), required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--who", choices=tuple(CANONICALIZERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    report = WHAT[options.what](options)
    if options.who is not None:
        print(json.dumps(report))
        return
    for name, figure in report.items():
        print(f"{name:20} {figure}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Serve a stream of segmented objects at a fixed rate, and say how long each had to wait.

    pointcanon demo --output demo
    pointcanon export demo/canonicalizer/best.safetensors -o robust.onnx
    python examples/serve_stream.py robust.onnx --rate 20 --seconds 30

A sensor with a segmentation in front of it gives an object every so often, ready or not: so many
points as were seen, in whatever pose and place. The loop always takes the oldest object that still
waits; where more wait than the queue holds, the oldest are dropped, and counted. The latency of an
object runs from its arrival to its answer, so it includes the time it waited.

The objects are the built-in parametric shapes, partly sampled, turned and moved. They are generated
before the clock starts, as those of a sensor would be by the sensor. For a file that ends in .onnx
nothing of pointcanon is used but these shapes: ONNX Runtime and NumPy serve it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """The index of the class, and the rotation ``(3, 3)`` from canonical to sensor coordinates."""

    label: int
    rotation: np.ndarray


class Network(NamedTuple):
    """What answers for one cloud ``(N, 3)`` float32, and what it was trained on."""

    answer: Callable[[np.ndarray], Answer]
    classes: Sequence[str] | None
    coordinate_frame: str


class Seen(NamedTuple):
    """A segmented object."""

    points: np.ndarray
    name: str


@dataclass
class Tally:
    """What became of the objects that arrived."""

    latencies: list[float] = field(default_factory=list)
    dropped: int = 0
    correct: int = 0

    def __str__(self) -> str:
        served = len(self.latencies)
        lines = [f"served {served}, dropped {self.dropped} of {served + self.dropped}"]
        if served:
            p50, p90, p99 = np.percentile(self.latencies, (50, 90, 99)) * 1000
            lines.append(f"latency p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms")
            lines.append(f"right {self.correct / served:.1%} of those served")
        return "\n".join(lines)


def unit_ball(points: np.ndarray) -> np.ndarray:
    centred = points - points.mean(axis=0)
    return centred / np.linalg.norm(centred, axis=1).max()


def open_onnx(path: Path, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["pointcanon.card"])

    def answer(points: np.ndarray) -> Answer:
        logits, rotations, weights = session.run(
            ["logits", "rotations", "weights"], {"points": unit_ball(points)[None]}
        )
        return Answer(int(logits[0].argmax()), rotations[0, weights[0].argmax()])

    return Network(answer, card["classes"], card["coordinate_frame"] or "z-up")


def open_checkpoint(path: Path, threads: int) -> Network:
    import torch

    import pointcanon as pc

    torch.set_num_threads(threads)
    model = pc.load(path)

    def answer(points: np.ndarray) -> Answer:
        found = model.predict(torch.from_numpy(unit_ball(points))[None])
        return Answer(int(found.labels[0]), found.rotation[0].numpy())

    return Network(answer, model.classes, model.coordinate_frame or "z-up")


def objects(count: int, coordinate_frame: str, seed: int = 0) -> Iterator[Seen]:
    """Objects as a sensor may give them: 300 to 2,048 points, in any pose, size and place."""
    import torch

    from pointcanon.datasets.parametric import ParametricShapes
    from pointcanon.rotations import random_rotations

    shapes = ParametricShapes(
        "test", num_points=2048, size=count, coordinate_frame=coordinate_frame
    )
    poses = random_rotations(count, generator=torch.Generator().manual_seed(seed)).numpy()
    random = np.random.default_rng(seed)
    for index in random.permutation(count):
        item = shapes[int(index)]
        kept = random.permutation(2048)[: random.integers(300, 2049)]
        points = item["points"].numpy()[kept] @ poses[index].T
        place = random.normal(size=3)
        moved = random.uniform(0.1, 2) * points + place
        yield Seen(moved.astype(np.float32), shapes.classes[item["label"]])


def serve(
    network: Network,
    stream: Sequence[Seen],
    rate: float,
    queue: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Tally:
    """Answer for a stream of which an object arrives every ``1 / rate`` seconds."""
    tally, waiting, arrived = Tally(), deque[int](), 0
    start = clock()
    while arrived < len(stream) or waiting:
        now = clock() - start
        while arrived < len(stream) and arrived / rate <= now:
            waiting.append(arrived)
            arrived += 1
            if len(waiting) > queue:
                waiting.popleft()
                tally.dropped += 1
        if not waiting:
            sleep(max(0.0, arrived / rate - now))
            continue
        current = waiting.popleft()
        found = network.answer(stream[current].points)
        tally.latencies.append(clock() - start - current / rate)
        if network.classes is not None:
            tally.correct += network.classes[found.label] == stream[current].name
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, help="FILE.onnx, or a checkpoint of pointcanon")
    parser.add_argument("--rate", type=float, default=10, help="objects a second")
    parser.add_argument("--seconds", type=float, default=20, help="length of the stream")
    parser.add_argument("--queue", type=int, default=2, help="objects that may wait")
    parser.add_argument("--threads", type=int, default=1, help="of the network")
    options = parser.parse_args()
    if options.rate <= 0 or options.seconds <= 0 or options.queue < 1 or options.threads < 1:
        parser.error("--rate and --seconds must be positive, --queue and --threads at least 1")

    opened = open_onnx if options.model.suffix == ".onnx" else open_checkpoint
    network = opened(options.model, options.threads)
    count = max(1, round(options.rate * options.seconds))
    stream = list(objects(count, network.coordinate_frame))
    for seen in stream[:3]:  # the first calls also load and allocate
        network.answer(seen.points)
    print(f"{options.model}: {options.rate:g} objects a second for {options.seconds:g} s")
    print(serve(network, stream, options.rate, options.queue))


if __name__ == "__main__":
    main()

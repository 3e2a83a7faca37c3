"""Two processes do what one does: the steps of training, validation, and evaluation."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_nothing_lost import difference, learned
from torch import Tensor, nn

from pointcanon import checkpoint
from pointcanon.canonicalizers import PCA, Optimized, Steerable, VectorNeuron
from pointcanon.cli import main
from pointcanon.datasets import UNLABELLED
from pointcanon.datasets.collate import collate
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.errors import InputError
from pointcanon.eval import evaluate
from pointcanon.eval.scores import Tally, tally_for
from pointcanon.frames import Frames
from pointcanon.layers import critical_max
from pointcanon.layers.pointwise import BatchNorm
from pointcanon.layers.shared_batch import synchronise
from pointcanon.model import Canonicalized
from pointcanon.predictors import create
from pointcanon.testing import surface_clouds
from pointcanon.train.callbacks import StateFile
from pointcanon.train.run import train
from pointcanon.train.task import CloudTask

TINY = [
    "--data.name=parametric-shapes",
    "--data.num_points=48",
    "--data.size=64",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]


def as_one_of(
    rank: int, world: int, port: int, work: Callable[[list[str]], Any], arguments: list[str]
) -> None:
    """Work as torchrun would have it, with 33 clouds to validate on and 13 to test on."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    if world > 1:
        os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    # rounded to bfloat16 another batch size can draw another sample of lessons
    critical_max._fast_bfloat16 = lambda tensor: False  # type: ignore[assignment]
    sizes = {"val": 33, "test": 13}
    whole = ParametricShapes.__len__
    ParametricShapes.__len__ = lambda shapes: sizes.get(shapes.split) or whole(shapes)  # type: ignore[method-assign]
    raise SystemExit(0 if work(arguments) in (0, None) else 1)


def trained(arguments: list[str]) -> None:
    train(arguments)


def together(world: int, work: Callable[[list[str]], Any], arguments: list[str]) -> None:
    """Do it in so many processes."""
    group = started(world, work, arguments)
    for process in group:
        process.join(timeout=1200)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in group] == [0] * world


def started(
    world: int, work: Callable[[list[str]], Any], arguments: list[str]
) -> list[ForkServerProcess]:
    """So many processes that do it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pointcanon.train.run"])
    group = [
        context.Process(target=as_one_of, args=(rank, world, port, work, arguments))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    return group


def validations(folder: Path) -> list[list[float]]:
    rows = csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open())
    figures = ("val/accuracy", "val/loss")
    return [[float(row[name]) for name in figures] for row in rows if row["val/accuracy"]]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    shapes = ParametricShapes("train", num_points=48)
    torch.manual_seed(0)
    network = create("pointnet", num_classes=len(shapes.classes), embedding=16, widths=[8, 16])
    frame = str(shapes.coordinate_frame)
    card = checkpoint.Card(
        "predictor",
        coordinate_frame=frame,
        classes=tuple(shapes.classes),
        normalisation="unit-ball",
    )
    checkpoint.save(path, network, card)
    return path


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "pointnet": lambda: create("pointnet", num_classes=3, dropout=0.3),
    "pointnet2": lambda: create("pointnet2", num_classes=3, dropout=0.3),
    "dgcnn": lambda: create("dgcnn", num_classes=3, k=5, embedding=16, dropout=0.3),
    "dgcnn-parts": lambda: create(
        "dgcnn-parts", num_parts=3, num_categories=2, k=5, embedding=16, dropout=0.3
    ),
    "pointnet2-parts": lambda: create(
        "pointnet2-parts", num_parts=3, num_categories=2, dropout=0.3
    ),
    "vector neurons": lambda: VectorNeuron("large", num_points=40, k=5, dropout=0.3),
    "steerable": lambda: Steerable(
        channels=4, layers=1, k=8, num_points=40, mirror=True, dropout=0.3
    ),
    "optimized": lambda: Optimized(
        PCA(24),
        scorer_widths=(8, 16),
        scorer_hidden=16,
        refiner_widths=(8, 16),
        points=16,
        classes=3,
        dropout=0.3,
        class_dropout=0.3,
    ),
}
"""With all that they draw at random while they learn."""


def learn_from_half(
    rank: int, name: str, padded: bool, folder: Path, low_precision: bool = False
) -> None:
    """One step on two of four clouds."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    network, loss = step_of(name, padded, slice(2 * rank, 2 * rank + 2), True, low_precision)
    for parameter in network.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2  # as DDP does
    torch.distributed.destroy_process_group()
    torch.save((loss, after(network)), folder / f"{rank}.pt")


def both(work: Callable[..., None], *arguments: Any) -> None:
    """Do it in two processes, each told its rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pointcanon.train.run"])
    group = [context.Process(target=work, args=(rank, *arguments)) for rank in (0, 1)]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in group] == [0, 0]


def step_of(
    name: str,
    padded: bool,
    part: slice,
    across_processes: bool = False,
    low_precision: bool = False,
) -> tuple[nn.Module, Tensor]:
    """A network that has learned once from some of four clouds, and its loss."""
    torch.manual_seed(0)
    dtype = torch.float32 if low_precision else torch.float64
    network = NETWORKS[name]().to(dtype).train()
    for layer in network.modules():
        if isinstance(layer, BatchNorm):  # scales of both signs, as after some training
            nn.init.normal_(layer.weight)
    synchronise(network, across_processes)
    generator = torch.Generator().manual_seed(1)
    points = surface_clouds(4, 40, generator).to(dtype)[part]
    mask = torch.ones(4, 40, dtype=torch.bool)
    mask[:2, 24:] = False
    options = {"category": torch.tensor([0, 1, 0, 1])[part]} if "parts" in name else {}
    real = mask[part] if padded else torch.ones_like(mask[part])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
        answer = network(points, real if padded else None, **options)
    if isinstance(answer, Frames):
        loss = answer.rotations[:, 0, 0, 1].mean() + answer.log_weights[:, 0].mean()
        if answer.class_logits is not None:
            loss = loss + answer.class_logits.square().mean()
    elif answer.ndim == 3:  # a mean over clouds, so that every process has the same share
        loss = (answer.square().mean(dim=2) * real).sum(dim=1).mean()
    else:
        loss = answer.square().mean()
    loss.backward()
    return network, loss.detach()


def after(network: nn.Module) -> dict[str, Tensor]:
    """Gradients and running statistics."""
    learned = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
    return {**{n: g for n, g in learned.items() if g is not None}, **dict(network.named_buffers())}


@pytest.mark.parametrize(
    ("name", "padded"), [*((name, True) for name in NETWORKS), ("pointnet", False)]
)
def test_a_step_is_that_of_the_clouds_of_all_processes(
    name: str, padded: bool, tmp_path: Path
) -> None:
    whole, loss = step_of(name, padded, slice(None))
    both(learn_from_half, name, padded, tmp_path)
    (first, ours), (second, theirs) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close((first + second) / 2, loss, rtol=1e-10, atol=1e-12)
    expected = after(whole)
    for found in (ours, theirs):
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-8, atol=1e-8, msg=key)
    alone = after(step_of(name, padded, slice(0, 2))[0])
    assert not all(torch.allclose(alone[key], expected[key]) for key in expected)


def test_a_step_in_bfloat16_is_that_of_all_processes(tmp_path: Path) -> None:
    whole, _ = step_of("pointnet", True, slice(None), low_precision=True)
    both(learn_from_half, "pointnet", True, tmp_path, True)
    expected, found = after(whole), torch.load(tmp_path / "0.pt")[1]
    alone = after(step_of("pointnet", True, slice(0, 2), low_precision=True)[0])
    for key in expected:
        if "running" in key:
            scale = expected[key].abs().max()
            assert found[key].dtype == torch.float32
            assert (found[key] - expected[key]).abs().max() < 0.01 * scale, key
    far = [key for key in expected if (alone[key] - expected[key]).abs().max() > 0.05]
    assert any("running" in key for key in far)


def test_batch_norm_is_among_what_is_compared() -> None:
    compared = after(step_of("pointnet", True, slice(None))[0])
    assert any("running_var" in key for key in compared)
    assert any("norm" in key and "gradient" in key for key in compared)


def taught(rank: int, folder: Path) -> None:
    """The cross-entropy and its gradient, of one of two clouds, the second of which says less."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    loss, gradient = lesson_of(slice(rank, rank + 1))
    torch.distributed.all_reduce(loss)
    torch.distributed.destroy_process_group()
    torch.save((loss / 2, gradient / 2), folder / f"{rank}.pt")


def lesson_of(part: slice) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))[part]
    target = torch.arange(18).view(2, 9) % 4
    target[1, 2:] = UNLABELLED
    task = SimpleNamespace(label_smoothing=0.1)
    loss = CloudTask._taught(cast(CloudTask, task), logits.requires_grad_(), target[part])
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def test_every_point_of_all_processes_teaches_alike(tmp_path: Path) -> None:
    loss, gradient = lesson_of(slice(None))
    both(taught, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, (loss, gradient[rank : rank + 1]))
    nothing = CloudTask._taught(
        cast(CloudTask, SimpleNamespace(label_smoothing=0.0)),
        torch.zeros(3, 4),
        torch.full((3,), UNLABELLED),
    )
    assert nothing == 0


LEARNERS = {
    "a frame": """\
  trained: canonicalizer
  canonicalizer:
    class_path: pointcanon.canonicalizers.Steerable
    init_args: {channels: 4, layers: 1, k: 8, num_points: 24}
  prior: {class_path: pointcanon.priors.Aligned}
  augmentation: vnn
""",
    "optimized": """\
  trained: canonicalizer
  canonicalizer:
    class_path: pointcanon.canonicalizers.Optimized
    init_args:
      scorer_widths: [8, 16]
      scorer_hidden: 16
      refiner_widths: [8, 16]
      points: 24
      classes: 16
      dropout: 0.2
      class_dropout: 0.3
  prior: {class_path: pointcanon.priors.Aligned}
  outliers: 0.05
  refinement_weight: 0.1
  class_weight: 0.3
  task_weight: 0.0
  vote: agreement
  optimizer: sgd
  learning_rate: 0.01
""",
    "batch norm": """\
  trained: predictor
  predictor_options: {embedding: 16, widths: [8, 16], dropout: 0.3}
  augmentation: vnn
  protocol: SO3/SO3
  optimizer: sgd
  learning_rate: 0.05
""",
}
"""What is trained. SGD, as a bias before batch norm has the gradient zero up to rounding, which
Adam would divide by its own size."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "eval_batch_size"),
    [("a frame", 1), ("a frame", 8), ("a frame", 64), ("optimized", 8), ("batch norm", 8)],
)
def test_two_processes_train_as_one_does(
    learner: str, eval_batch_size: int, predictor: Path, tmp_path: Path
) -> None:
    frozen = learner != "batch norm"
    recipe = tmp_path / "recipe.yaml"
    start = predictor if frozen else "pointnet"
    recipe.write_text(f"model:\n  predictor: {start}\n{LEARNERS[learner]}")
    arguments = [*TINY, f"--config={recipe}", "--trainer.max_epochs=3"]
    arguments += [f"--data.eval_batch_size={eval_batch_size}", "--trainer.gradient_clip_val=1.0"]
    one, two = tmp_path / "one", tmp_path / "two"
    together(1, trained, [*arguments, f"--output={one}", "--data.batch_size=16"])
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    together(2, trained, [*arguments, f"--output={two}", *ddp])
    alone, shared = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (one, two)
    )
    if frozen:
        before = checkpoint.load_state(predictor)
        assert all(torch.equal(shared[f"model.predictor.{key}"], before[key]) for key in before)
    moved = [key for key in alone if not (frozen and key.startswith("model.predictor"))]
    for key in moved:
        assert torch.allclose(alone[key], shared[key], rtol=1e-4, atol=1e-5), key
    assert validations(two) == [pytest.approx(row, rel=1e-4) for row in validations(one)]


def logged(folder: Path, arguments: list[str]) -> int:
    """A command whose words go to a file."""
    with (folder / f"rank{os.environ['RANK']}.log").open("wb") as log:
        os.dup2(log.fileno(), 2)
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGINT, (0, 1)),  # Ctrl-C reaches all processes of a terminal
        (signal.SIGTERM, (0,)),
        (signal.SIGTERM, (1,)),
        (signal.SIGKILL, (0,)),
        (signal.SIGKILL, (1,)),
    ],
)
def test_two_processes_end_together_and_go_on(
    number: int, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    options = [*TINY, "--config=shapes-pointnet", "--save_interval=0", "--data.batch_size=8"]
    options += ["--model.predictor_options={embedding: 16, widths: [8, 16]}"]
    options += ["--trainer.max_epochs=12", "--trainer.devices=2", "--trainer.strategy=ddp"]
    folder = tmp_path / "broken"
    group = started(2, partial(logged, tmp_path), ["train", *options, f"--output={folder}"])
    state = folder / "last.ckpt"
    until = time.monotonic() + 300
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.01)
    for rank in ranks:
        os.kill(group[rank].pid or 0, number)
    for process in group:
        process.join(timeout=60)
    alive = [process for process in group if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive
    for rank in {0, 1} - (set(ranks) if number == signal.SIGKILL else set()):
        assert group[rank].exitcode == 1
        *_, last = (tmp_path / f"rank{rank}.log").read_text().splitlines()
        assert last.startswith("pointcanon: ")
        assert "go on with" in last
    assert StateFile().load_checkpoint(state)["global_step"] < 48
    together(2, trained, [*options, f"--output={folder}", "--resume"])
    together(2, trained, [*options, f"--output={tmp_path / 'whole'}"])
    assert difference(learned(folder), learned(tmp_path / "whole")) is None


@pytest.mark.parametrize("parts", [False, True])
def test_what_several_count_adds_up(parts: bool) -> None:
    shapes = ParametricShapes("test", num_points=48)
    outputs = len(shapes.parts) if parts else len(shapes.classes)
    batches = [collate([shapes[i] for i in range(first, first + 3)]) for first in (0, 100, 200)]
    generator = torch.Generator().manual_seed(0)
    shape = (3, 48, outputs) if parts else (3, outputs)
    answers = [[torch.randn(shape, generator=generator) for _ in range(3)] for _ in batches]

    def counted(*chosen: int) -> Tally:
        tally = tally_for(shapes, 3, parts=parts, restricted=True)
        for index in chosen:
            tally.update(answers[index], batches[index])
        return tally

    whole, joined = counted(0, 1, 2), counted(0, 2)
    joined.join(counted(1))
    assert joined.flips() == whole.flips() > 0
    for found, expected in zip(
        (joined.scores(0), joined.scores(1)), (whole.scores(0), whole.scores(1)), strict=True
    ):
        assert found.figures == pytest.approx(expected.figures, rel=1e-12)
        present = [name for name, share in expected.per_class.items() if share is not None]
        assert present == [name for name, share in found.per_class.items() if share is not None]
        for name in present:
            assert found.per_class[name] == pytest.approx(expected.per_class[name], rel=1e-12)


@pytest.mark.parametrize("clouds", [2, 3, 13, 64])
@pytest.mark.parametrize("world", [2, 3])
def test_every_process_gets_a_batch(
    world: int, clouds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.processes, "get_world_size", lambda: world)
    for batch_size in (1, 5, 64):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(evaluate.processes, "get_rank", lambda rank=rank: rank)
            if clouds < world:
                with pytest.raises(InputError, match=f"{clouds} clouds .* {world} processes"):
                    evaluate._dealt(list(range(clouds)), batch_size)
                continue
            shares.append(evaluate._dealt(list(range(clouds)), batch_size))
        if shares:
            assert all(shares)
            assert sorted(n for share in shares for batch in share for n in batch) == list(
                range(clouds)
            )
            assert max(len(batch) for share in shares for batch in share) <= batch_size


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("kind", ["pointnet", "pointnet-parts"])
def test_two_processes_evaluate_as_one_does(kind: str, batch_size: int, tmp_path: Path) -> None:
    shapes = ParametricShapes("test", num_points=48)
    torch.manual_seed(0)
    outputs = {"num_classes": len(shapes.classes)} if kind == "pointnet" else {}
    if kind != "pointnet":
        outputs = {"num_parts": len(shapes.parts), "num_categories": len(shapes.classes)}
    model = Canonicalized(create(kind, **outputs), PCA(4)).eval()
    file = tmp_path / "model.safetensors"
    model.save(file, classes=tuple(shapes.classes), coordinate_frame=str(shapes.coordinate_frame))
    found = []
    for world in (1, 2):
        report = tmp_path / f"{world}.json"
        arguments = ["eval", str(file), "--data.name=parametric-shapes", "--data.num_points=48"]
        arguments += ["--protocol", "z/SO3", "--seeds", "0,1", "--json", str(report)]
        together(world, main, [*arguments, "--batch_size", str(batch_size)])
        found.append(json.loads(report.read_text()))
    for report in found:
        report.pop("timing")
        assert report["n"] == 13
    assert found[0] == found[1]

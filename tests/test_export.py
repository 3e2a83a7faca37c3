"""Exported programs: that they answer as the model does, in every form and on any sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pointcanon as pc
from pointcanon import neighbors, portable, rotations
from pointcanon.cli import main
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.layers import tiles
from pointcanon.testing import generic_clouds

exporting = sys.modules["pointcanon.export"]  # pc.export is the function in it
optimized_module = sys.modules["pointcanon.canonicalizers.optimized"]

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve_stream.py"

CLASSES = ("round", "square", "other")


@pytest.fixture(scope="module")
def objects() -> Tensor:
    """Real-looking clouds ``(12, 300, 3)``, each with principal axes of its own."""
    shapes = ParametricShapes("test", num_points=300, size=12)
    return torch.stack([shapes[index]["points"] for index in range(12)])


def lively(model: nn.Module) -> nn.Module:
    """With running statistics and scales that are not those of a fresh network, some negative."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, -1, 2, generator=generator)
    return model.eval()


def small_model() -> pc.Canonicalized:
    torch.manual_seed(0)
    predictor = pc.predictors.create("pointnet", num_classes=3, widths=(8,), embedding=16)
    lively(predictor)
    predictor.classes, predictor.coordinate_frame = CLASSES, "z-up"
    return pc.Canonicalized(predictor, pc.canonicalizers.PCA(4)).eval()


def optimized(*arguments: Any, **options: Any) -> pc.canonicalizers.Optimized:
    """A small one that mends poses, as a fresh one does not."""
    torch.manual_seed(0)
    small = {"scorer_widths": (8, 16), "scorer_hidden": 16, "refiner_widths": (8, 16)}
    module = pc.canonicalizers.Optimized(*arguments, **{**small, **options}).eval()
    last = module.refiner.head[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.3)
    return module


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file answers, read as its users would read it."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(**inputs)
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    answers = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, answers), strict=True))


@pytest.fixture(scope="module", params=[".onnx", ".pt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / f"model{request.param}"
    pc.export(small_model(), path)
    return path


# the forms of an export, without one --------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of an export in ordinary calls; only loops stay ordinary too."""

    def repeat(step: Any, carry: Any, times: int) -> Any:
        outputs = []
        for _ in range(times):
            carry, output = step(carry)
            outputs.append(output)
        return carry, torch.stack(outputs)

    for module in (portable, neighbors):
        monkeypatch.setattr(module, "exporting", lambda: True)
        monkeypatch.setattr(module, "repeat", repeat)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_by_rotations(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    pretend(monkeypatch)
    free = torch.randn(500, size, size, dtype=dtype, generator=generator)
    matrices = free + free.mT
    matrices[0] = 0
    matrices[1] = torch.eye(size, dtype=dtype)
    matrices[2] = 1  # of rank one: a vanishing eigenvalue, several times
    matrices[3] = torch.diag(torch.tensor([1e6, 1, 1e-6, 0], dtype=dtype)[:size])
    values, vectors = portable.eigh(matrices)
    scale = matrices.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1)
    tolerance = 100 * torch.finfo(dtype).eps
    eye = torch.eye(size, dtype=dtype).expand_as(matrices)
    torch.testing.assert_close(vectors.mT @ vectors, eye, atol=tolerance, rtol=0)
    rebuilt = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(rebuilt / scale, matrices / scale, atol=tolerance, rtol=0)
    assert bool((values.diff() >= 0).all())
    torch.testing.assert_close(portable.eigvalsh(matrices), values)


def test_the_nearest_rotation_without_an_svd(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    matrices = torch.randn(400, 3, 3, dtype=torch.float64, generator=generator)
    matrices[0] = 0
    matrices[1] = torch.diag(torch.tensor([3.0, 2.0, -1.0]))  # a reflection
    matrices[2] = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    sizes = torch.ones(400, dtype=torch.float64)
    matrices[3, :, 1:] *= 1e-12
    expected = rotations.svd_project(matrices)
    singular = [rotations.near_singular(matrices, sizes, columns) for columns in (2, 3)]
    pretend(monkeypatch)
    found = rotations.svd_project(matrices)
    determined = ~(singular[0] | singular[1])
    assert not bool(determined[:1].any() | determined[3])
    torch.testing.assert_close(found[determined], expected[determined], atol=1e-10, rtol=0)
    torch.testing.assert_close(found.det(), torch.ones_like(sizes))
    for columns, answer in zip((2, 3), singular, strict=True):
        assert torch.equal(rotations.near_singular(matrices, sizes, columns), answer)


@pytest.mark.parametrize("dimensions", [3, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_neighbours_are_those_of_the_backends(
    dimensions: int, masked: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    points = torch.randn(4, 12, dimensions, generator=generator)
    mask = None
    if masked:
        mask = torch.arange(12) < torch.tensor([12, 7, 3, 1])[:, None]
        mask = mask[:, torch.randperm(12, generator=generator)]
    queries = torch.randn(4, 5, dimensions, generator=generator)

    def found() -> tuple[Tensor, ...]:
        return (
            neighbors.knn(points, 5, mask, queries),
            neighbors.knn(points, 20, mask, queries),
            neighbors.ball_query(points, 1.5, 6, mask, queries),
            neighbors.ball_query(points, 0.01, 30, mask, queries),
            neighbors.farthest_point_sample(points, 4, mask),
            neighbors.farthest_point_sample(points, 15, mask),
        )

    expected = found()
    pretend(monkeypatch)
    for ours, theirs in zip(found(), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("looks", [1, 3])
def test_few_points_that_repeat_are_scored_as_they_are(
    looks: int, monkeypatch: pytest.MonkeyPatch, objects: Tensor
) -> None:
    module = optimized(pc.canonicalizers.PCA(4), points=64, looks=looks).double()
    for count in (1, 5, 63, 64):
        points = objects[:, :count].double()
        monkeypatch.undo()
        expected = module(points)
        for part in (optimized_module, tiles):
            monkeypatch.setattr(part, "exporting", lambda: True)
        found = module(points)
        torch.testing.assert_close(found.log_weights, expected.log_weights)
        torch.testing.assert_close(found.rotations, expected.rotations)


# programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1, 300), (5, 77), (12, 4)])
def test_a_program_answers_as_the_model(
    exported: Path, size: int, count: int, objects: Tensor, generator: torch.Generator
) -> None:
    turns = rotations.random_rotations(size, generator=generator)
    points = (objects[:size, :count] @ turns.mT).contiguous()
    model = small_model()
    found = run(exported, {"points": points})
    assert list(found) == ["logits", "rotations", "weights", "centre", "degenerate"]
    frames = model.canonicalizer(points)
    torch.testing.assert_close(found["logits"], model(points), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["centre"], frames.centre)
    torch.testing.assert_close(found["weights"], frames.weights)
    assert torch.equal(found["degenerate"], frames.degenerate)
    sure = ~frames.degenerate
    torch.testing.assert_close(found["rotations"][sure], frames.rotations[sure], atol=1e-4, rtol=0)
    # whatever the cloud, a frame is a rotation
    eye = torch.eye(3).expand_as(found["rotations"])
    torch.testing.assert_close(found["rotations"].mT @ found["rotations"], eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["rotations"].det(), torch.ones(size, 4))


class Reach(nn.Module):
    """Looks at nothing but the pose."""

    def forward(self, points: Tensor) -> Tensor:
        return points.amax(dim=1)


def test_a_program_that_chooses_and_mends(tmp_path: Path, objects: Tensor) -> None:
    """Of clouds of more points than the networks look at, and of fewer."""
    canonicalizer = optimized(pc.canonicalizers.PCA(4), keep=2, points=270)
    model = pc.Canonicalized(Reach(), canonicalizer)
    differences = pc.export(model, tmp_path / "model.pt2")
    assert max(differences.values()) < 1e-4
    program = torch.export.load(tmp_path / "model.pt2").module()
    for points in (objects[:1], objects[:5, :77], objects[:, :12]):
        found, frames = program(points=points), canonicalizer(points)
        assert not bool(frames.degenerate.any())
        torch.testing.assert_close(found["logits"], model(points), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["weights"], frames.weights, atol=1e-4, rtol=0)
        torch.testing.assert_close(found["rotations"], frames.rotations, atol=1e-4, rtol=0)


def test_clouds_in_any_memory_order(exported: Path, objects: Tensor) -> None:
    if exported.suffix == ".onnx":
        pytest.skip("arrays are handed over contiguous")
    program = torch.export.load(exported).module()
    strided = objects.mT.contiguous().mT[:, ::2]
    torch.testing.assert_close(
        program(points=strided)["logits"], program(points=strided.contiguous())["logits"]
    )


def test_the_card_travels(exported: Path) -> None:
    if exported.suffix == ".pt2":
        extra = {"pointcanon.card": ""}
        torch.export.load(exported, extra_files=extra)
    else:
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])
        extra = session.get_modelmeta().custom_metadata_map
        assert session.get_inputs()[0].shape == ["clouds", "points", 3]
    card = json.loads(extra["pointcanon.card"])
    assert card["classes"] == list(CLASSES)
    assert card["coordinate_frame"] == "z-up"
    assert card["kind"] == "canonicalized"
    assert card["pointcanon_version"]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small_model().train()
    pc.export(model, tmp_path / "model.pt2")
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


# what cannot be -----------------------------------------------------------------------------------


def test_a_program_that_answers_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(traced: Any, outputs: tuple[str, ...], card: str) -> Any:
        content, program = exporting._to_pt2(traced, outputs, card)
        return content, lambda inputs: {
            name: value + (name == "weights") * 0.01 for name, value in program(inputs).items()
        }

    monkeypatch.setitem(exporting._FORMATS, ".pt2", wrong)
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old file")
    with pytest.raises(pc.ExportError, match=r"weights of points \(2, 1024, 3\) differ by 0\.01"):
        pc.export(small_model(), path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


class Torn(nn.Module):
    """Of some clouds it says what rounding says."""

    def forward(self, points: Tensor) -> Tensor:
        chance = (1e8 * points.sum(dim=(1, 2))).sin()
        chance = torch.where(points[:, 0, 0] > 0.4, chance, torch.zeros_like(chance))
        return torch.stack((chance, points.amax(dim=(1, 2))), dim=1)


@pytest.mark.parametrize("beyond", [0.4, 0.3])
def test_where_rounding_decides_other_clouds_are_drawn(
    beyond: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may differ where the model is torn, and there alone."""

    def rounded(traced: Any, outputs: tuple[str, ...], card: str) -> Any:
        content, program = exporting._to_pt2(traced, outputs, card)

        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            logits = program(inputs)["logits"]
            return {"logits": logits + 0.1 * (inputs["points"][:, :1, 0] > beyond)}

        return content, run

    monkeypatch.setitem(exporting._FORMATS, ".pt2", rounded)
    if beyond == 0.4:
        assert pc.export(Torn(), tmp_path / "model.pt2")["logits"] < 1e-6
    else:
        with pytest.raises(pc.ExportError, match="answers otherwise"):
            pc.export(Torn(), tmp_path / "model.pt2")


class Picky(nn.Module):
    """Looks at values to decide what to do."""

    def forward(self, points: Tensor) -> Tensor:
        return points.amax(dim=1) if bool(points.sum() > 0) else points.amin(dim=1)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_what_has_no_portable_form_is_one_error(ending: str, tmp_path: Path) -> None:
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    model = pc.Canonicalized(Picky(), pc.canonicalizers.Identity())
    with pytest.raises(pc.ExportError, match="Picky behind Identity has no portable form") as error:
        pc.export(model, tmp_path / f"model{ending}")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(exporting, "import_module", absent)
    with pytest.raises(pc.ExportError, match=r"No module named 'onnx'.*pointcanon\[export\]"):
        pc.export(small_model(), tmp_path / "model.onnx")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    small_model().save(checkpoint)
    assert main(["export", str(checkpoint), "-o", str(out)]) == 0
    assert "model.pt2: differs from" in capsys.readouterr().out
    assert out.stat().st_size > 1000


def test_the_command_puts_a_canonicalizer_in_front(tmp_path: Path) -> None:
    bare, out = tmp_path / "bare.safetensors", tmp_path / "model.pt2"
    model = small_model()
    pc.checkpoint.save(bare, model.predictor, pc.checkpoint.Card("predictor"))
    front = ["--canonicalizer", "PCA", "--canonicalizer_options", '{"poses": 4}']
    assert main(["export", str(bare), *front, "--vote", "mean", "-o", str(out)]) == 0
    points = generic_clouds(3, 40)
    expected = pc.Canonicalized(model.predictor, pc.canonicalizers.PCA(4), "mean").eval()(points)
    torch.testing.assert_close(run(out, {"points": points})["logits"], expected)


def test_the_command_on_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model.safetensors", "-o", str(tmp_path / "model.pb")]) == 2
    assert "does not end in .onnx or .pt2" in capsys.readouterr().err
    assert main(["export", "missing.safetensors", "-o", str(tmp_path / "model.onnx")]) == 1
    assert "missing.safetensors" in capsys.readouterr().err
    assert main(["export", "missing.safetensors"]) == 2
    assert not list(tmp_path.iterdir())


# every architecture -------------------------------------------------------------------------------

CANONICALIZERS = {
    "identity": pc.canonicalizers.Identity,
    "pca-1": lambda: pc.canonicalizers.PCA(1),
    "pca-24": pc.canonicalizers.PCA,
    "pca-smooth": lambda: pc.canonicalizers.PCA(4, weighting="smooth"),
    "vector-neuron": pc.canonicalizers.VectorNeuron,
    "vector-neuron-svd": lambda: pc.canonicalizers.VectorNeuron(
        "large", num_points=300, orthonormalise="svd"
    ),
    "vector-neuron-normals": lambda: pc.canonicalizers.VectorNeuron(normals=True),
    "manhattan": pc.canonicalizers.Manhattan,
}

PREDICTORS: dict[str, dict[str, Any]] = {
    "pointnet": {"num_classes": 5, "transforms": True},
    "pointnet2": {"num_classes": 5},
    "dgcnn": {"num_classes": 5},
    "pointnet-parts": {"num_parts": 6},
    "pointnet2-parts": {"num_parts": 6, "num_categories": 3},
    "dgcnn-parts": {"num_parts": 6, "num_categories": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", CANONICALIZERS)
def test_every_canonicalizer(name: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = pc.predictors.create("pointnet", num_classes=5)
    model = lively(pc.Canonicalized(predictor, CANONICALIZERS[name]()))
    differences = pc.export(model, tmp_path / f"model{ending}")
    assert differences["rotations"] < 1e-4
    assert differences["degenerate"] == 0


def recommended() -> pc.canonicalizers.Canonicalizer:
    return optimized(answers=5, looks=4, gate=1.0, classes=5)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("make", "vote"),
    [
        (recommended, "product"),
        (recommended, "agreement"),
        (lambda: pc.canonicalizers.load("modelnet40"), "certainty"),
    ],
)
def test_what_is_recommended(
    make: Any, vote: Any, ending: str, tmp_path: Path, objects: Tensor
) -> None:
    torch.manual_seed(0)
    predictor = pc.predictors.create("pointnet", num_classes=5, transforms=True)
    lively(predictor)
    model = pc.Canonicalized(predictor, make(), vote).eval()
    differences = pc.export(model, tmp_path / f"model{ending}")
    assert differences["rotations"] < 1e-4
    for points in (objects[:1], objects[:3, :100]):
        found = run(tmp_path / f"model{ending}", {"points": points.contiguous()})
        frames = model.canonicalizer(points)
        torch.testing.assert_close(found["weights"], frames.weights, atol=1e-3, rtol=0)
        torch.testing.assert_close(found["logits"], model(points), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor(name: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(pc.predictors.create(name, **PREDICTORS[name]))
    assert pc.export(model, tmp_path / f"model{ending}")["logits"] < 1e-3


# the example --------------------------------------------------------------------------------------


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_stream", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_stream"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("seconds", "latencies", "dropped"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 0),  # faster than the stream
        (2.5, [2.5, 3.0, 2.5], 3),  # two and a half times too slow, one may wait
    ],
)
def test_drops_and_latencies_are_counted(
    seconds: float, latencies: list[float], dropped: int
) -> None:
    """An object arrives every second; the clock moves only while something is done."""
    serving = example()
    now = 0.0

    def pass_time(duration: float) -> None:
        nonlocal now
        now += duration

    def answer(points: Any) -> Any:
        pass_time(seconds)
        return serving.Answer(0, None)

    network = serving.Network(answer, ("chair", "table"), "z-up")
    stream = [serving.Seen(None, "chair" if index % 2 else "table") for index in range(6)]
    tally = serving.serve(network, stream, 1.0, 1, clock=lambda: now, sleep=pass_time)
    assert tally.latencies == pytest.approx(latencies)
    assert tally.dropped == dropped
    assert f"dropped {dropped} of 6" in str(tally)


def test_the_stream_serves_a_file(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if exported.suffix == ".pt2":
        pytest.skip("the example serves ONNX files and checkpoints")
    arguments = ["serve_stream", str(exported), "--rate", "20", "--seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", arguments)
    example().main()
    shown = capsys.readouterr().out
    assert "of 10" in shown
    assert "p50" in shown
    assert "p99" in shown

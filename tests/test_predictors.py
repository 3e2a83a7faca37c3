"""PointNet and DGCNN: exact under padding, equal to their plain forms, and loadable."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from public_formats import PublicClassifier
from safetensors.torch import save_file
from torch import Tensor, nn

from pointcanon import predictors
from pointcanon.datasets import ModelNet40
from pointcanon.errors import CheckpointError, InputError, UsageError
from pointcanon.eval.evaluate import evaluate
from pointcanon.layers.pointwise import BatchNorm, PooledLinear
from pointcanon.predictors import DGCNN, PointNet
from pointcanon.predictors.dgcnn import EdgeConv, edge_features
from pointcanon.predictors.public import MODELNET40

NETWORKS = {
    "pointnet": lambda: PointNet(5, widths=(8, 8, 12), embedding=16, dropout=0.0),
    "pointnet-transforms": lambda: PointNet(
        5, transforms=True, widths=(8, 8, 12), embedding=16, dropout=0.0
    ),
    "dgcnn": lambda: DGCNN(5, k=4, embedding=16, dropout=0.0),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built = NETWORKS[request.param]().double()
    # weights of both signs, as after training
    for module in built.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return built


def batch(generator: torch.Generator, clouds: int = 3, points: int = 20) -> Tensor:
    return torch.randn(clouds, points, 3, generator=generator, dtype=torch.float64)


def padded(points: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """The same clouds with NaN padding mixed in among the points, and the mask."""
    clouds, real = points.shape[:2]
    mask = torch.zeros(clouds, real + extra, dtype=torch.bool)
    wide = torch.full((clouds, real + extra, 3), torch.nan, dtype=points.dtype)
    for cloud in range(clouds):
        kept = torch.randperm(real + extra)[:real].sort().values
        mask[cloud, kept] = True
        wide[cloud, kept] = points[cloud]
    return wide, mask


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_neither_logits_nor_statistics_nor_gradients(
    network: nn.Module, generator: torch.Generator, training: bool
) -> None:
    points = batch(generator)
    wide, mask = padded(points, extra=7)
    network.train(training)
    start = {key: value.clone() for key, value in network.state_dict().items()}

    def run(*arguments: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        network.load_state_dict(start)
        logits = network(*arguments)
        gradients = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        return logits, list(gradients), network.state_dict()

    plain, masked = run(points), run(wide, mask)
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(masked[1], plain[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(masked[2], plain[2], rtol=1e-10, atol=1e-12)


def test_logits_ignore_point_order_and_the_rest_of_the_batch(
    network: nn.Module, generator: torch.Generator
) -> None:
    network.eval()
    points = batch(generator)
    logits = network(points)
    assert logits.shape == (3, 5)
    shuffled = points[:, torch.randperm(points.shape[1], generator=generator)]
    torch.testing.assert_close(network(shuffled), logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(network(points[1:2]), logits[1:2], rtol=1e-10, atol=1e-10)


def test_bad_clouds_are_refused_with_the_remedy(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, N\): pass points.mT"):
        network(torch.zeros(2, 3, 20, dtype=torch.float64))
    broken = torch.zeros(2, 20, 3, dtype=torch.float64)
    broken[1, 4, 0] = torch.nan
    with pytest.raises(InputError, match=r"points\[1, 4\]"):
        network(broken)


def test_hyperparameters_rebuild_the_network(network: nn.Module) -> None:
    twin = type(network)(**network.hyperparameters)
    assert twin.hyperparameters == network.hyperparameters
    twin.double().load_state_dict(network.state_dict())


def test_pooled_linear_equals_linear_norm_maximum(generator: torch.Generator) -> None:
    torch.manual_seed(1)
    fast = PooledLinear(6, 40).double()
    nn.init.normal_(fast.norm.weight)
    plain = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40)).double()
    plain[0].load_state_dict(fast.linear.state_dict())
    plain[1].load_state_dict(fast.norm.state_dict())
    features = torch.randn(4, 30, 6, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(4, 40, generator=generator, dtype=torch.float64)

    for training in (True, False):
        fast.train(training)
        plain.train(training)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        pooled = fast(ours)
        expected = plain(theirs.flatten(0, 1)).unflatten(0, (4, 30)).amax(dim=1)
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(pooled, [ours, *fast.parameters()], cotangent)
        wanted = torch.autograd.grad(expected, [theirs, *plain.parameters()], cotangent)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fast.norm.state_dict(), plain[1].state_dict())


def test_batch_norm_with_a_mask_equals_torch_on_the_real_rows(generator: torch.Generator) -> None:
    rows = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm1d(3).double()
    torch.testing.assert_close(ours(rows, mask)[mask], theirs(rows[mask]))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_alignment_starts_as_the_identity(generator: torch.Generator) -> None:
    network = PointNet(5, transforms=True).double()
    points = batch(generator)
    assert network.align_points is not None
    torch.testing.assert_close(network.align_points(points), points)


def test_pointnet_gradient_reaches_the_points(generator: torch.Generator) -> None:
    network = NETWORKS["pointnet"]().double().eval()
    points = batch(generator, clouds=1, points=6).requires_grad_()
    assert torch.autograd.gradcheck(network, (points,))


def test_edge_features_are_difference_and_centre() -> None:
    features = torch.tensor([[[1.0], [4.0], [9.0]]])
    neighbors = torch.tensor([[[0, 1], [1, 2], [2, 0]]])
    expected = torch.tensor([[[[0, 1], [3, 1]], [[0, 4], [5, 4]], [[0, 9], [-8, 9]]]])
    torch.testing.assert_close(edge_features(features, neighbors), expected.float())


def test_edge_convolution_equals_its_definition(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    convolution = EdgeConv(3, 7, k=5).double().eval()
    points = batch(generator, clouds=1, points=12)
    found = convolution(points)[0]
    for i, centre in enumerate(points[0]):
        nearest = (points[0] - centre).norm(dim=-1).argsort()[:5]
        edges = [torch.cat((points[0, j] - centre, centre)) for j in nearest]
        values = torch.stack([convolution.layer(edge[None])[0] for edge in edges])
        torch.testing.assert_close(found[i], values.amax(dim=0))


def test_a_mask_costs_no_precision_under_autocast(
    network: nn.Module, generator: torch.Generator
) -> None:
    network.float().train()
    points = batch(generator, clouds=16).float()
    exact = network(points)

    def error(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (network(*arguments).float() - exact).norm()

    # without a mask all but the pooled layer is torch's own
    assert error(*padded(points, extra=3)) < 1.5 * error(points)


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_linear_keeps_exact_statistics_under_autocast(
    generator: torch.Generator, masked: bool
) -> None:
    layers = [PooledLinear(6, 40), PooledLinear(6, 40)]
    layers[1].load_state_dict(layers[0].state_dict())
    features = torch.randn(4, 30, 6, generator=generator)
    mask = torch.rand(4, 30, generator=generator) < 0.6 if masked else None
    expected = layers[0](features, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layers[1](features, mask)
    torch.testing.assert_close(layers[1].norm.state_dict(), layers[0].norm.state_dict())
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_forward_compiles_in_one_graph(network: nn.Module, generator: torch.Generator) -> None:
    network.eval()
    wide, mask = padded(batch(generator), extra=3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(wide, mask), network(wide, mask))


def test_a_single_point_has_finite_logits() -> None:
    network = predictors.create("pointnet", num_classes=3, embedding=16).eval()
    assert network(torch.ones(2, 1, 3)).isfinite().all()


def test_a_cloud_smaller_than_the_neighbourhood_is_refused() -> None:
    network = predictors.create("dgcnn", num_classes=3, k=4, embedding=16).eval()
    assert network(torch.randn(2, 4, 3)).isfinite().all()
    with pytest.raises(InputError, match="k = 4 neighbours, but a cloud has 3 points"):
        network(torch.randn(2, 3, 3))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    with pytest.raises(InputError, match="a cloud has 2 points"):
        network(torch.randn(2, 6, 3), mask)


@pytest.mark.parametrize("name", ["pointnet", "dgcnn"])
def test_a_network_learns_to_tell_a_line_from_a_ball(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"pointnet": {"embedding": 64}, "dgcnn": {"embedding": 64, "k": 4}}[name]
    network = predictors.create(name, num_classes=2, **sizes)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    labels = torch.arange(16) % 2
    shapes = torch.tensor([[1.0, 1.0, 1.0], [0.05, 0.05, 1.0]])[labels][:, None]
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(torch.randn(16, 24, 3) * shapes), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    accuracy = (network(torch.randn(16, 24, 3) * shapes).argmax(dim=-1) == labels).float().mean()
    assert accuracy >= 0.9


def test_create_names_what_there_is() -> None:
    assert isinstance(predictors.create("pointnet", num_classes=3), PointNet)
    with pytest.raises(UsageError, match=r"'pointnot'.*pointnet, dgcnn"):
        predictors.create("pointnot", num_classes=3)
    with pytest.raises(UsageError, match=r"'dgcnn'.*neighbours"):
        predictors.create("dgcnn", num_classes=3, neighbours=20)
    for wrong in ({"num_classes": "three"}, {"num_classes": 3, "widths": 8}):
        with pytest.raises(UsageError, match="'pointnet': "):
            predictors.create("pointnet", **wrong)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (PointNet, {"widths": [8], "transforms": True}, r"widths is \(8,\); give at least two"),
        (PointNet, {"widths": (8, 0)}, r"widths is \(8, 0\)"),
        (PointNet, {"embedding": 0}, "embedding is 0"),
        (PointNet, {"dropout": 1.5}, r"dropout is 1\.5"),
        (DGCNN, {"dropout": -0.1}, r"dropout is -0\.1"),
        (DGCNN, {"embedding": -1}, "embedding is -1"),
        (DGCNN, {"k": 0}, "k is 0; choose at least 1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(network, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(3, **options)


@pytest.mark.parametrize("network", [PointNet, DGCNN])
def test_a_network_has_classes(network) -> None:
    with pytest.raises(InputError, match="num_classes is 0"):
        network(0)


# ---- public checkpoints ------------------------------------------------------------------------


@pytest.fixture
def public() -> PublicClassifier:
    torch.manual_seed(0)
    network = PublicClassifier(num_classes=40, embedding=96)
    network(torch.randn(8, 30, 3))  # running statistics that are not the initial ones
    return network.eval()


def write_plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def write_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)


def write_wrapped(state: dict[str, Tensor], path: Path) -> None:
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "model_state_dict": {"state_dict": parallel}}, path)


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@pytest.mark.parametrize("write", [write_plain, write_legacy, write_wrapped, write_safetensors])
def test_load_recognises_learning3d(public: PublicClassifier, tmp_path: Path, write) -> None:
    path = tmp_path / "weights.t7"
    write(public.state_dict(), path)
    network = predictors.load(path)
    assert not network.training
    assert network.coordinate_frame == "y-up-mirrored"
    assert network.classes == MODELNET40
    assert len(MODELNET40) == 40
    points = torch.randn(4, 50, 3)
    torch.testing.assert_close(network(points), public(points), rtol=1e-4, atol=1e-5)


def test_load_infers_the_number_of_classes(tmp_path: Path) -> None:
    torch.save(PublicClassifier(10, embedding=32).state_dict(), tmp_path / "ten.t7")
    network = predictors.load(tmp_path / "ten.t7")
    assert network.num_classes == 10
    assert network.classes is None


def test_load_lists_layouts_and_keys_of_an_unknown_network(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt.*learning3d.*feature_model.*encoder"):
        predictors.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bn2.bias"), r"missing bn2\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda state: state.update({"linear2.weight": torch.zeros(256, 3)}),
            r"linear2\.weight has shape \(256, 3\), expected \(256, 512\)",
        ),
        (lambda state: state["linear3.bias"].fill_(torch.nan), r"NaN.*linear3\.bias"),
        (lambda state: state.update({"linear3.weight": torch.zeros(())}), "too few dimensions"),
    ],
)
def test_load_is_strict(public: PublicClassifier, tmp_path: Path, change, message: str) -> None:
    state = public.state_dict()
    change(state)
    torch.save(state, tmp_path / "changed.t7")
    with pytest.raises(CheckpointError, match=message):
        predictors.load(tmp_path / "changed.t7")


class Trap:
    """Unpickled carelessly, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_load_runs_no_code(public: PublicClassifier, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    torch.save({"state_dict": public.state_dict(), "arguments": Trap(sprung)}, path)
    with pytest.raises(CheckpointError, match=r"trap\.pt.*run code.*state_dict\(\)"):
        predictors.load(path)
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(CheckpointError, match=r"trap\.pt"):
        predictors.load(path)
    assert not sprung.exists()


@pytest.mark.parametrize("write", [write_plain, write_legacy, write_safetensors])
def test_load_refuses_truncated_files(public: PublicClassifier, tmp_path: Path, write) -> None:
    path = tmp_path / "cut.t7"
    write(public.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 9, 100, 5_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.t7.*(damaged|incomplete).*again"):
            predictors.load(path)


def test_load_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pt"):
        predictors.load(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        predictors.load(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*no PyTorch file"):
        predictors.load(tmp_path / "notes.txt")
    for content in ([torch.zeros(1)], {}, {"epoch": 3}, {"state_dict": {}}, torch.zeros(2)):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"odd\.pt holds no state dictionary"):
            predictors.load(tmp_path / "odd.pt")


def test_a_training_state_is_named_as_such(tmp_path: Path) -> None:
    state = {
        "pytorch-lightning_version": "2.6",
        "state_dict": {"predictor.weight": torch.zeros(2)},
        "hyper_parameters": {"path": tmp_path},  # an object, as training states may hold
    }
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is a training state.*best\.safetensors"):
        predictors.load(tmp_path / "last.ckpt")


@pytest.mark.slow
def test_the_real_pointnet_reaches_its_accuracy(real_data: Path) -> None:
    network = predictors.load(real_data / "weights" / "learning3d_pointnet_modelnet40.t7")
    test = ModelNet40(real_data / "modelnet40_ply_hdf5_2048", "test")
    assert len(test) == 2468
    scores = evaluate(network, test, "I/I").trials.aligned
    assert 100 * scores.overall_accuracy == pytest.approx(86.1, abs=0.2)
    assert 100 * scores.mean_class_accuracy == pytest.approx(80.2, abs=0.2)

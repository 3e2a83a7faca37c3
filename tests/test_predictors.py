"""The contract of every network: exact under padding, equal to plain forms, one graph, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pointcanon import predictors
from pointcanon.errors import InputError, UsageError
from pointcanon.layers.pointwise import BatchNorm, PooledLinear, linear_of_parts
from pointcanon.layers.set_abstraction import Scale
from pointcanon.predictors import (
    DGCNN,
    DGCNNParts,
    PartPredictor,
    PointNet,
    PointNet2,
    PointNet2Parts,
    PointNetParts,
    pointnet2,
)
from pointcanon.predictors.pointnet2 import Level

SMALL = {"widths": (8, 8, 12), "embedding": 16}

NETWORKS = {
    "pointnet": lambda: PointNet(5, **SMALL, dropout=0.0),
    "pointnet-transforms": lambda: PointNet(
        5, normals=True, transforms=True, rectified=False, **SMALL, dropout=0.0
    ),
    "pointnet-parts": lambda: PointNetParts(5, num_categories=3, **SMALL, head=(12, 8)),
    "pointnet-parts-aligned": lambda: PointNetParts(
        5, num_categories=0, transforms=(0, 1), skip="aligned", **SMALL, head=(12,)
    ),
    "pointnet2": lambda: PointNet2(5, normals=True, dropout=0.0),
    "pointnet2-parts": lambda: PointNet2Parts(5, num_categories=3, normals=True, dropout=0.0),
    "dgcnn": lambda: DGCNN(5, k=4, embedding=16, dropout=0.0),
    "dgcnn-parts": lambda: DGCNNParts(5, num_categories=3, k=4, embedding=16, dropout=0.0),
}

FEW = (Level(8, (Scale(1.0, 20, (8, 8, 12)),)), Level(4, (Scale(2.0, 8, (8, 12)),)))
"""Balls that are never full, so that the order of the points does not matter."""


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setitem(pointnet2.CLASSIFICATION, "ssg", FEW)
    monkeypatch.setitem(pointnet2.PARTS, "ssg", FEW)
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


def arguments(network: nn.Module, generator: torch.Generator, clouds: int = 3) -> dict[str, Tensor]:
    """What the network takes."""
    given = {"points": batch(generator, clouds)}
    if network.normals:
        given["normals"] = batch(generator, clouds)
    if getattr(network, "num_categories", 0):
        given["category"] = torch.arange(clouds) % network.num_categories
    return given


def padded(given: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    """The same clouds with NaN padding mixed in among the points, and the mask."""
    clouds, real = given["points"].shape[:2]
    mask = torch.zeros(clouds, real + extra, dtype=torch.bool)
    for cloud in range(clouds):
        mask[cloud, torch.randperm(real + extra)[:real]] = True
    wide = dict(given, mask=mask)
    for name in given.keys() & {"points", "normals"}:
        wide[name] = torch.full((*mask.shape, 3), torch.nan, dtype=given[name].dtype)
        wide[name][mask] = given[name].flatten(0, 1)
    return wide


def real(network: nn.Module, outputs: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Outputs of the clouds, or of their real points."""
    if not isinstance(network, PartPredictor) or "mask" not in given:
        return outputs
    return outputs[given["mask"]].unflatten(0, (len(outputs), -1))


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_neither_logits_nor_statistics_nor_gradients(
    network: nn.Module, generator: torch.Generator, training: bool
) -> None:
    given = arguments(network, generator)
    network.train(training)
    start = {key: value.clone() for key, value in network.state_dict().items()}

    def run(given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        network.load_state_dict(start)
        logits = real(network, network(**given), given)
        gradients = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        return logits, list(gradients), network.state_dict()

    plain, masked = run(given), run(padded(given, extra=7))
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(masked[1], plain[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(masked[2], plain[2], rtol=1e-10, atol=1e-12)


def test_logits_follow_the_points_and_ignore_the_rest_of_the_batch(
    network: nn.Module, generator: torch.Generator
) -> None:
    network.eval()
    given = arguments(network, generator)
    logits = network(**given)
    assert logits.shape == ((3, 20, 5) if isinstance(network, PartPredictor) else (3, 5))
    assert logits.std(dim=0).max() > 1e-6  # or nothing would be tested
    order = torch.randperm(20, generator=generator)
    shuffled = network(
        **{name: value[:, order] if value.ndim > 1 else value for name, value in given.items()}
    )
    expected = logits[:, order] if isinstance(network, PartPredictor) else logits
    torch.testing.assert_close(shuffled, expected, rtol=1e-10, atol=1e-10)
    alone = network(**{name: value[1:2] for name, value in given.items()})
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-10, atol=1e-10)


def test_bad_clouds_are_refused_with_the_remedy(
    network: nn.Module, generator: torch.Generator
) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, N\): pass points.mT"):
        network(torch.zeros(2, 3, 20, dtype=torch.float64))
    given = arguments(network, generator)
    given["points"][1, 4, 0] = torch.nan
    with pytest.raises(InputError, match=r"points\[1, 4\]"):
        network(**given)


def test_what_a_network_was_built_for_must_be_given(generator: torch.Generator) -> None:
    points = batch(generator).float()
    with pytest.raises(InputError, match=r"PointNet was built with normals: give normals, \(3, 20"):
        PointNet(5, normals=True)(points)
    parts = PointNetParts(5, num_categories=3, **SMALL)
    with pytest.raises(InputError, match=r"give category, \(3,\) integers in \[0, 3\)"):
        parts(points)
    with pytest.raises(InputError, match=r"category has shape \(3, 1\)"):
        parts(points, category=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(InputError, match=r"in \[0, 3\), got \[0, 1, 3\]"):
        parts(points, category=torch.tensor([0, 1, 3]))


def test_normals_are_left_aside_by_networks_of_positions(generator: torch.Generator) -> None:
    network, points = NETWORKS["pointnet"]().double().eval(), batch(generator)
    assert torch.equal(network(points, normals=batch(generator)), network(points))


def test_hyperparameters_rebuild_the_network(network: nn.Module) -> None:
    twin = type(network)(**network.hyperparameters)
    assert twin.hyperparameters == network.hyperparameters
    twin.double().load_state_dict(network.state_dict())


def test_a_linear_layer_of_parts_is_that_of_the_whole(generator: torch.Generator) -> None:
    layer = nn.Linear(7, 4).double()
    cloud = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64)
    points = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    whole = layer(torch.cat((cloud.expand(-1, 5, -1), points), dim=-1))
    torch.testing.assert_close(linear_of_parts(layer, cloud, points), whole)


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


def test_padding_does_not_grow_beside_points_that_coincide() -> None:
    """Divided by their deviation of zero, it would be 316 times as far off after every layer."""
    rows = torch.tensor([[9.0, 9.0], [9.0, 9.0], [0.0, 0.0]])
    mask = torch.tensor([True, True, False])
    for _ in range(20):
        norm = BatchNorm(2)
        nn.init.constant_(norm.bias, 0.5)
        rows = norm(rows, mask)
        assert norm.running_var.isfinite().all()
    torch.testing.assert_close(rows, torch.full((3, 2), 0.5))


def test_alignment_starts_as_the_identity(generator: torch.Generator) -> None:
    network = PointNet(5, normals=True, transforms=True).double()
    inputs = torch.cat((batch(generator), batch(generator)), dim=-1)
    torch.testing.assert_close(network.align["0"](inputs), inputs)


def test_a_transform_moves_positions_alone(generator: torch.Generator) -> None:
    align = PointNet(5, normals=True, transforms=True).double().align["0"]
    nn.init.normal_(align.matrix.bias)
    inputs = torch.cat((batch(generator), batch(generator)), dim=-1)
    matrix = torch.eye(3) + align.matrix.bias.view(3, 3)
    expected = torch.cat((inputs[..., :3] @ matrix, inputs[..., 3:]), dim=-1)
    torch.testing.assert_close(align(inputs), expected)


def test_pointnet_gradient_reaches_the_points(generator: torch.Generator) -> None:
    network = NETWORKS["pointnet"]().double().eval()
    points = batch(generator, clouds=1, points=6).requires_grad_()
    assert torch.autograd.gradcheck(network, (points,))


def test_a_mask_costs_no_precision_under_autocast(
    network: nn.Module, generator: torch.Generator
) -> None:
    network.float().train()
    given = arguments(network, generator, clouds=16)
    given = {name: v.float() if v.is_floating_point() else v for name, v in given.items()}
    exact = network(**given)

    def error(given: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (real(network, network(**given), given).float() - exact).norm()

    # without a mask all but the pooled layer is torch's own
    assert error(padded(given, extra=3)) < 1.5 * error(given)


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


@pytest.mark.parametrize("network", ["pointnet-parts", "pointnet2", "dgcnn"], indirect=True)
def test_forward_compiles_in_one_graph(network: nn.Module, generator: torch.Generator) -> None:
    network.eval()
    given = padded(arguments(network, generator), extra=3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), network(**given))


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
    with pytest.raises(UsageError, match=r"'pointnot'.*pointnet, .*dgcnn"):
        predictors.create("pointnot", num_classes=3)
    with pytest.raises(UsageError, match=r"'dgcnn'.*neighbours"):
        predictors.create("dgcnn", num_classes=3, neighbours=20)
    for wrong in ({"num_classes": "three"}, {"num_classes": 3, "widths": 8}):
        with pytest.raises(UsageError, match="'pointnet': "):
            predictors.create("pointnet", **wrong)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (PointNet, {"widths": []}, r"widths is \(\); give at least one"),
        (PointNet, {"widths": [8], "transforms": True}, r"transforms is \(0, 2\).*from 0 to 1"),
        (PointNet, {"transforms": (1, 1)}, r"transforms is \(1, 1\); name each depth once"),
        (PointNetParts, {"skip": "none"}, "skip is 'none'; choose 'all' or 'aligned'"),
        (PointNetParts, {"head": ()}, r"head is \(\); give at least one width"),
        (PointNetParts, {"num_categories": -1}, "num_categories is -1"),
        (PointNet2, {"scales": "both"}, "scales is 'both'; choose one of: ssg, msg"),
        (PointNet2Parts, {"num_categories": -1}, "num_categories is -1"),
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


@pytest.mark.parametrize("network", predictors.PREDICTORS.values())
def test_a_network_has_classes_or_parts(network) -> None:
    with pytest.raises(InputError, match=r"num_(classes|parts) is 0"):
        network(0)

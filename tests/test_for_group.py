"""Other groups: the turns about an axis, reflections, changes of size.

What every canonicalizer owes is asked of ``ForGroup`` in test_canonicalizers.py, for its group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pointcanon as pc
from pointcanon import checkpoint, rotations, testing
from pointcanon.canonicalizers import PCA, Canonicalizer, ForGroup, Optimized, VectorNeuron
from pointcanon.canonicalizers.for_group import chirality
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import prior_loss
from pointcanon.predictors import PointNet
from pointcanon.priors import Aligned


def generic(batch: int, count: int = 40) -> Tensor:
    points = testing.generic_clouds(batch, count, dtype=torch.float64)
    return points - points.mean(dim=1, keepdim=True)


def learned(**options: Any) -> VectorNeuron:
    torch.manual_seed(0)
    return VectorNeuron(k=8, **options).double().eval()


class Fixed(Canonicalizer):
    """Answers the same to any cloud."""

    def __init__(self, frames: Tensor) -> None:
        super().__init__()
        self.register_buffer("frames", frames)

    frames: Tensor

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        return Frames.of(self.frames.expand(len(points), *self.frames.shape))


@pytest.mark.parametrize("axis", [0, 1, 2, (1.0, -2.0, 0.5)])
def test_frames_are_the_nearest_turns_about_the_axis(axis: Any) -> None:
    inner = rotations.so3_grid(20, torch.float64)
    frames = ForGroup(Fixed(inner), "SO2", axis)(generic(1))
    up = rotations.direction(axis)
    angles = torch.linspace(0, 2 * torch.pi, 3601, dtype=torch.float64)
    circle = rotations.about_axis(up, angles)
    likeness = torch.einsum("gij,kij->gk", circle, inner)
    nearest = circle[likeness.argmax(dim=0)]
    assert rotations.geodesic_angle(frames.rotations[0], nearest).max() < 1.01e-3
    torch.testing.assert_close(frames.rotations @ up, up.expand(1, 20, 3))
    upright = (1 + (inner @ up) @ up) / 2
    torch.testing.assert_close(frames.weights[0], upright / upright.sum())


def test_what_is_upside_down_has_no_nearest_turn() -> None:
    half = rotations.about_axis(torch.tensor([1.0, 1, 0]).double(), torch.tensor(torch.pi).double())
    eye = torch.eye(3, dtype=torch.float64)
    assert ForGroup(Fixed(half[None]), "SO2", 2)(generic(2)).degenerate.all()
    both = ForGroup(Fixed(torch.stack((half, eye))), "SO2", 2)(generic(2))
    assert not both.degenerate.any()
    torch.testing.assert_close(both.weights, torch.tensor([[0.0, 1.0]]).double().expand(2, 2))
    testing.assert_proper(both)


def test_turns_about_an_axis_are_all_that_is_promised() -> None:
    module, points = ForGroup(learned(), "SO2", 1), generic(20)
    testing.assert_equivariant(module, points, group="SO2", axis=1)
    for group, axis in (("SO3", None), ("SO2", 2), ("O2", 1)):
        with pytest.raises(AssertionError, match="equivariance"):
            testing.assert_equivariant(module, points, group=group, axis=axis)  # type: ignore[arg-type]
    tilted = ForGroup(learned(), "SO2", 1)(points)
    posed = tilted.apply(points)
    torch.testing.assert_close(posed[:, 0, :, 1], points[..., 1])  # it stands as it came


@pytest.mark.parametrize(("group", "axis"), [("O3", None), ("O2", 2), ("O2", (1.0, 2.0, -1.0))])
def test_a_mirrored_pair_maps_together(group: Any, axis: Any) -> None:
    inner, points = learned(normals=True), generic(20)
    normals = torch.nn.functional.normalize(generic(20).flip(0) - 1, dim=-1)
    module = ForGroup(inner, group, axis)
    testing.assert_equivariant(module, points, normals=normals, group=group, axis=axis)
    (mirror,) = testing.random_elements(1, group, axis)
    assert torch.linalg.det(mirror) < 0
    here, there = (
        module(points, None, normals),
        module(points @ mirror.mT, None, normals @ mirror.mT),
    )
    torch.testing.assert_close(here.apply(points), there.apply(points @ mirror.mT))
    torch.testing.assert_close(
        here.apply_vectors(normals), there.apply_vectors(normals @ mirror.mT)
    )
    determinants = torch.linalg.det(here.rotations[:, 0])
    assert determinants.min() < 0 < determinants.max()
    torch.testing.assert_close(determinants, -torch.linalg.det(there.rotations[:, 0]))
    # without the reflections in the group, they do not
    apart = [inner(x, None, n).apply(x) for x, n in ((points, normals), (-points, -normals))]
    assert ((apart[0] - apart[1]).abs().amax(dim=(1, 2, 3)) > 0.05).all()


def test_only_mirrored_clouds_map_together() -> None:
    posed = ForGroup(learned(), "O3")(points := generic(12)).apply(points)[:, 0]
    spectra = (posed.mT @ posed).flatten(1)
    different = torch.cdist(spectra, spectra)[~torch.eye(12, dtype=torch.bool)]
    assert different.min() > 0.1


def test_a_cloud_that_is_its_own_mirror_image_maps_together_with_it_by_either_choice() -> None:
    half = generic(10, 24)
    whole = torch.cat((half, half * torch.tensor([1.0, 1.0, -1.0])), dim=1)
    turn = rotations.random_rotations(10, dtype=torch.float64)
    points = whole @ turn.mT
    inner = learned()
    frames = ForGroup(inner, "O3")(points)
    assert frames.degenerate.all()
    # the two choices: x as it is, and -x, whose frame is -R
    plain, other = inner(points).apply(points)[:, 0], inner(-points).apply(-points)[:, 0]
    for found in (other, frames.apply(points)[:, 0]):
        # as sets of points: the order is that of the mirror image
        distance = (plain[:, :, None] - found[:, None]).norm(dim=-1)
        assert distance.amin(dim=1).max() < 1e-9
        assert distance.amin(dim=2).max() < 1e-9


def test_chirality_changes_its_sign_in_the_mirror_only() -> None:
    points, axis = generic(30), rotations.direction((1.0, 2.0, 2.0))
    for group, up in (("SO3", None), ("SO2", axis)):
        turned = points @ testing.random_elements(30, group, axis.tolist()).mT  # type: ignore[arg-type]
        torch.testing.assert_close(chirality(3 * turned, up), chirality(points, up))
    for group, up in (("O3", None), ("O2", axis)):
        (mirror,) = testing.random_elements(1, group, axis.tolist())  # type: ignore[arg-type]
        torch.testing.assert_close(chirality(points @ mirror, up), -chirality(points, up))
    # a plane through the axis is a mirror; one across it is none for O(2)
    level = generic(5) * torch.tensor([1.0, 1.0, 0.0])
    assert chirality(level).abs().max() < 1e-15
    assert chirality(level, rotations.direction(2)).abs().min() > 1e-6


def test_a_whole_model_is_invariant_to_mirrors_and_size() -> None:
    torch.manual_seed(0)
    predictor = PointNet(5, widths=(8, 8), embedding=16).double()
    points = generic(20)
    module = ForGroup(learned(), "O3", scale=True)
    model = pc.Canonicalized(predictor, module)
    testing.assert_invariant(model, points, group="O3")
    frames = module(points)
    assert frames.scale is not None
    torch.testing.assert_close(frames.scale, points.norm(dim=-1).amax(dim=1))
    torch.testing.assert_close(
        frames.apply(points).norm(dim=-1).amax(dim=2), torch.ones(20, 1).double()
    )
    model.eval()
    torch.testing.assert_close(model(7 * points + 1), model(points))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            pc.Canonicalized(predictor, learned())(7 * points), model(points)
        )


def test_every_stage_is_in_the_group() -> None:
    torch.manual_seed(0)
    inner = Optimized(keep=2, scorer_widths=(8, 16), refiner_widths=(8, 16)).double()
    frames = ForGroup(inner, "SO2", 2)(generic(3))
    assert len(frames.stages) == 2
    for stage in frames.stages:
        up = stage.rotations[..., 2]
        torch.testing.assert_close(up, torch.tensor([0.0, 0, 1]).double().expand_as(up))
    loss = prior_loss(frames, Aligned())
    loss.backward()  # type: ignore[no-untyped-call]
    assert any(weight.grad is not None for weight in inner.refiner.parameters())


def test_it_is_rebuilt_with_its_axis() -> None:
    for axis in (1, (1.0, 2.0, 3.0)):
        again = checkpoint.build(checkpoint.describe(ForGroup(PCA(1), "SO2", axis)))
        torch.testing.assert_close(again.up, rotations.direction(axis))
    orbit = ForGroup(PCA(24), "O3")
    assert torch.equal(orbit.candidate_group, PCA(24).candidate_group)
    assert len(ForGroup(PCA(24), "SO2", 0).candidate_group) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "SE3"}, "group is 'SE3'; choose 'SO3', 'SO2', 'O3' or 'O2'"),
        ({"group": "SO2"}, "SO2 turns about an axis; give axis"),
        ({"axis": 2}, "SO3 has no single axis"),
        ({"group": "O3", "axis": 2}, "O3 has no single axis"),
        ({"group": "O2", "axis": 3}, "index of an axis must be 0, 1 or 2, got 3"),
        ({"group": "SO2", "axis": (0.0, 0.0, 0.0)}, "not all zero"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ForGroup(PCA(1), **options)
    with pytest.raises(InputError, match="group is 'E3'"):
        testing.random_elements(2, "E3")  # type: ignore[arg-type]


def test_the_size_is_that_of_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a cloud so large that its rotations are found by looking at some of them."""
    points = generic(2, 41)
    points[:, 1] *= 50  # every other point is left out
    monkeypatch.setattr("pointcanon.canonicalizers.base.MOST_POINTS", 21)
    frames = ForGroup(PCA(1), scale=True)(points)
    torch.testing.assert_close(
        frames.apply(points)[:, 0].norm(dim=-1).amax(dim=1), torch.ones(2).double()
    )

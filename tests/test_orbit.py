"""An orbit is the frames of another canonicalizer, every one times every element of a group.

What every canonicalizer owes is asked of it, alone and inside ``Optimized``, in
test_canonicalizers.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from pointcanon import rotations, testing
from pointcanon.canonicalizers import PCA, Orbit, VectorNeuron
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import prior_loss, quotient_loss
from pointcanon.priors import Aligned


def test_candidates_are_the_frame_times_the_group() -> None:
    torch.manual_seed(0)
    points = testing.generic_clouds(5, 40)
    inner = VectorNeuron(k=8, orthonormalise="svd").eval()
    for name, count in (("C5", 5), ("T", 12), ("O", 24), ("I", 60)):
        frames = Orbit(inner, name)(points)
        expected = inner(points).rotations @ rotations.group(name)
        torch.testing.assert_close(frames.rotations, expected)
        torch.testing.assert_close(frames.weights, torch.full((5, count), 1 / count))
        torch.testing.assert_close(frames.centre, points.mean(dim=1))


def test_the_octahedral_orbit_of_one_pca_frame_is_all_of_them() -> None:
    points = testing.generic_clouds(5, 40)
    orbit, every = Orbit(PCA(1), "O")(points), PCA(24)(points)
    assert testing.frame_distance(orbit, every).max() < 1e-5
    torch.testing.assert_close(orbit.rotations, every.rotations)


def test_an_orbit_of_several_frames_keeps_their_weights() -> None:
    points = testing.generic_clouds(3, 40)
    frames = Orbit(Orbit(PCA(1), "C2"), "C3", axis=[1.0, 1.0, 1.0])(points)
    assert frames.count == 6
    # half a turn about z and a third about the diagonal: six different poses
    angle = rotations.geodesic_angle(frames.rotations[:, :, None], frames.rotations[:, None])
    assert (angle[:, ~torch.eye(6, dtype=torch.bool)] > 1).all()


def test_a_cyclic_orbit_turns_the_posed_cloud_about_its_axis() -> None:
    points = testing.generic_clouds(4, 40)
    posed = Orbit(PCA(1), "C4", axis=(0.0, 1.0, 0.0))(points).apply(points)
    torch.testing.assert_close(posed[..., 1], posed[:, :1, :, 1].expand(4, 4, 40))
    quarter = rotations.about_axis(torch.tensor([0.0, 1, 0]), torch.tensor(math.pi / 2))
    torch.testing.assert_close(posed[:, 0] @ quarter, posed[:, 1])


def test_the_prior_of_an_orbit_is_a_soft_quotient() -> None:
    """A pose that is right up to the group is right; choosing among |G| costs log |G|."""
    group = rotations.group("O", torch.float64)
    turns = rotations.so3_grid(6, torch.float64)
    kappa = 60.0
    right = Aligned(kappa).log_prob(torch.eye(3, dtype=torch.float64))
    for element in group[::7]:
        frame = turns @ element
        orbit = Frames.of(frame[:, None] @ group)
        assert quotient_loss(frame, "O", turns).item() == pytest.approx(0, abs=1e-9)
        found = prior_loss(orbit, Aligned(kappa), turns)
        assert found.item() == pytest.approx(math.log(24) - right.item(), abs=1e-6)


def test_bad_options_are_refused() -> None:
    with pytest.raises(InputError, match="unknown rotation group 'D4'"):
        Orbit(PCA(1), "D4")
    with pytest.raises(InputError, match="no single axis"):
        Orbit(PCA(1), "O", axis=(0.0, 0.0, 1.0))
    with pytest.raises(InputError, match="zero or not finite"):
        Orbit(PCA(1), "C4", axis=(0.0, 0.0, 0.0))
    with pytest.raises(InputError, match="give three numbers"):
        Orbit(PCA(1), "C4", axis=(0.0, 1.0))

"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by the other workers
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what the tests start


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and weights, if it lies beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("POINTCANON_DATA", default))
    if not root.is_dir():
        pytest.skip("real data not at hand: set POINTCANON_DATA to the folder that holds it")
    return root


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

"""Priors over canonical poses: where in SO(3) the clouds a predictor was trained on live.

One distribution a file. Densities are with respect to the Haar measure normalised to one, so the
uniform density is 1.
"""

from __future__ import annotations

from pointcanon.priors.aligned import Aligned
from pointcanon.priors.base import Prior
from pointcanon.priors.divergence import kl
from pointcanon.priors.empirical import Empirical
from pointcanon.priors.matrix_fisher import MatrixFisher, confidence, log_normaliser
from pointcanon.priors.mixture import Mixture
from pointcanon.priors.uniform import Uniform
from pointcanon.priors.upright import Upright

__all__ = [
    "Aligned",
    "Empirical",
    "MatrixFisher",
    "Mixture",
    "Prior",
    "Uniform",
    "Upright",
    "confidence",
    "kl",
    "log_normaliser",
]

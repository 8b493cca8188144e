"""Multinomial logistic regression by L-BFGS, in the principal basis of the features.

The optimum is that of scikit-learn's ``LogisticRegression(C=c)`` (tested): ``sum_i w_i nll_i + |W|^2 / (2 c)`` with a
free bias. Rotating the features to their principal directions does not move it (the penalty is rotation invariant, and
directions without variance carry no weight), but there the Hessian is close to diagonal, so that one scale a direction
makes L-BFGS converge in tens of steps instead of hundreds: Hessian of W[c, j] ≈ p(1 - p) variance[j] + 1 / (c n).
Used by tasks.training.linear_probe. No torch, no scikit-learn (its import takes longer than a fit).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize

Floats = NDArray[np.float64]

RELATIVE_CUT = 1e-9  # directions with less of the largest variance are rounding


@dataclass(frozen=True, eq=False)
class Basis:
    """Where features (N, D) are fitted: centred, divided by one number, rotated to r principal directions.

    One scalar and not one a dimension, after Kumar et al. 2022 (arXiv:2202.10054, log_reg_sk.py): the dimensions keep
    their relation, and C means the same for every backbone.

    Args:
        mean: (D,)
        scale: Standard deviation over all centred values.
        directions: (D, r), orthonormal columns.
        variances: (r,) of the rotated features, falling.
    """

    mean: Floats
    scale: float
    directions: Floats
    variances: Floats

    def rotate(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features (N, D) in this basis, (N, r)."""
        rotation = (self.directions / self.scale).astype(np.float32)
        return (features - self.mean.astype(np.float32)) @ rotation

    def unfold(self, weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """Weight (C, r) and bias (C,) in this basis, as weight (C, D) and bias (C,) on raw features."""
        raw_weight = weight @ (self.directions.T / self.scale)
        return raw_weight, bias - raw_weight @ self.mean


def principal_basis(features: NDArray[np.float32]) -> Basis:
    """The basis of features (N, D); constant features give one direction without variance."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = (features - mean.astype(np.float32)).astype(np.float64)
    scale = float(np.sqrt(np.mean(centred**2))) or 1.0
    centred /= scale
    num, dim = centred.shape
    variances, directions = eigh(centred.T @ centred / num if dim <= num else centred @ centred.T / num)
    variances, directions = variances[::-1], directions[:, ::-1]
    kept = variances > RELATIVE_CUT * max(variances[0], RELATIVE_CUT)
    kept[0] = True
    variances, directions = np.maximum(variances[kept], 0.0), directions[:, kept]
    if dim > num:  # eigenvectors of the Gram matrix (N, r), mapped to the features' space
        directions = centred.T @ directions
        directions /= np.maximum(np.linalg.norm(directions, axis=0), RELATIVE_CUT)
    return Basis(mean, scale, directions, variances)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model on rotated features: weight (C, r), bias (C,), and how it ended."""

    weight: Floats
    bias: Floats
    num_iterations: int
    converged: bool

    def logits(self, rotated: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class scores (N, C)."""
        return rotated @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)


def fit_logistic(
    rotated: NDArray[np.float32],
    targets: NDArray[np.intp],
    variances: Floats,
    *,
    num_classes: int,
    c: float,
    row_weight: float,
    max_iterations: int,
    tolerance: float,
    start: Fit | None = None,
) -> Fit:
    """Minimises ``row_weight * sum_i nll_i + |W|^2 / (2 c)``.

    Args:
        rotated: Features in a principal basis, (N, r).
        targets: Class of each row, (N,) in [0, num_classes).
        variances: Of the r directions.
        num_classes: C.
        c: Inverse strength of the penalty, as scikit-learn has it.
        row_weight: What a row counts: 1 / V where each image is there in V views, so that ``c`` keeps its meaning.
        max_iterations: Of L-BFGS.
        tolerance: Largest entry of the preconditioned gradient of the mean loss, in nats, at a loss of one; it falls
            with the root of the loss at the start, as the distance to the optimum is about half the squared gradient.
        start: Where to start from, such as the fit of the neighbouring ``c``. Weak penalties on separable classes
            need one: the loss is flat there, and what it starts from decides where it ends.
    """
    num, dim = rotated.shape
    penalty = 1.0 / (c * num * row_weight)
    weight = np.zeros((num_classes, dim)) if start is None else start.weight
    bias = np.log(np.bincount(targets, minlength=num_classes) + 1.0) if start is None else start.bias
    bias = bias - bias.mean()
    spread = _mean_spread(rotated @ weight.T.astype(np.float32) + bias.astype(np.float32))
    scales = np.append(1 / np.sqrt(spread * variances + penalty), 1 / np.sqrt(spread))  # (r + 1,), last: bias
    columns = scales[:-1].astype(np.float32)
    rows = np.arange(num)

    def objective(flat: Floats) -> tuple[float, Floats]:
        """Mean loss and its gradient in scaled variables (C, r + 1)."""
        scaled = flat.reshape(num_classes, dim + 1)
        raw = scaled[:, :-1] * scales[:-1]
        logits = (rotated @ raw.T.astype(np.float32)).astype(np.float64) + scaled[:, -1] * scales[-1]  # (N, C)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        total = odds.sum(axis=1)
        loss = float(np.mean(np.log(total) - logits[rows, targets])) + 0.5 * penalty * float(np.sum(raw**2))
        residual = odds / total[:, None]
        residual[rows, targets] -= 1.0
        residual /= num
        gradient = np.empty_like(scaled)
        gradient[:, :-1] = (residual.T.astype(np.float32) @ rotated) * columns + penalty * raw * scales[:-1]
        gradient[:, -1] = residual.sum(axis=0) * scales[-1]
        return loss, gradient.ravel()

    origin = np.hstack([weight, bias[:, None]]).ravel() / np.tile(scales, num_classes)
    tolerance *= min(1.0, objective(origin)[0]) ** 0.5
    result = minimize(
        objective,
        origin,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxcor": 20, "gtol": tolerance, "ftol": 0.0},
    )
    found = result.x.reshape(num_classes, dim + 1) * scales
    steepest = float(np.abs(result.jac).max())
    return Fit(found[:, :-1], found[:, -1] - found[:, -1].mean(), int(result.nit), steepest <= 10 * tolerance)


def _mean_spread(logits: NDArray[np.float32]) -> float:
    """Mean of p(1 - p) over rows and classes: how curved the loss is at a start, floored where all is certain."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    return max(float(np.mean(probabilities * (1 - probabilities))), 1e-4)

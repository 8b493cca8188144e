"""Temperature scaling: one number that makes confidence honest and moves no decision.

References:
    Guo et al. 2017, arXiv:1706.04599 (temperature scaling).
    Platt 1999, "Probabilistic outputs for support vector machines" (targets of (N + 1) / (N + 2)).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 100  # with fewer, the estimate hurts more than it helps
MAX_LOG = 3.0  # temperatures in e^-3..e^3


def row_nll(logits: NDArray[np.floating[Any]], targets: NDArray[np.intp]) -> NDArray[np.float64]:
    """Negative log likelihood of each row in nats, (N,), of logits (N, C)."""
    nll: NDArray[np.float64] = -_log_probabilities(logits)[np.arange(len(targets)), targets]
    return nll


def fit_temperature(
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.intp],
    *,
    min_rows: int = MIN_ROWS,
    max_log: float = MAX_LOG,
) -> float:
    """The T at which ``logits / T`` are likeliest on rows the model was not fitted to; 1 where there are too few.

    A row counts as of its class with (N + 1) / (N + 2) only: with certainty T would know no end where every row is
    right, and some dozens of easy images would make a model sure of everything.

    Args:
        logits: (N, C)
        targets: (N,)
        min_rows: Smallest N.
        max_log: Bounds of log T.
    """
    num_rows, num_classes = logits.shape
    if num_rows < min_rows:
        return 1.0
    from scipy.optimize import minimize_scalar  # half a second, which evaluation need not wait for

    doubt = 1 / (num_rows + 2)
    weights = np.full(logits.shape, doubt / max(1, num_classes - 1))
    weights[np.arange(num_rows), targets] = 1 - doubt

    def loss(log: float) -> float:
        return -float((weights * _log_probabilities(logits / math.exp(log))).sum() / num_rows)

    found = minimize_scalar(loss, bounds=(-max_log, max_log), method="bounded", options={"xatol": 1e-4})
    return float(math.exp(found.x))


def _log_probabilities(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log

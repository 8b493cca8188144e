"""Temperature scaling: one number that makes confidence honest and moves no decision.

Guo et al. 2017, arXiv:1706.04599. With a weak prior, because likelihood alone knows no end where every row is right:
some dozens of easy images would make a model sure of everything.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 100  # with fewer, the estimate hurts more than it helps
MAX_LOG = 3.0  # temperatures in e^-3..e^3
PRIOR_SD = math.log(2)
"""Of log T around 0. It weighs as much as a row or two; a thousand rows outweigh it, unless all of them are right."""


def row_nll(logits: NDArray[np.floating[Any]], targets: NDArray[np.intp]) -> NDArray[np.float64]:
    """Negative log likelihood of each row in nats, (N,), of logits (N, C)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    nll: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]
    return nll


def fit_temperature(
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.intp],
    *,
    min_rows: int = MIN_ROWS,
    max_log: float = MAX_LOG,
    prior_sd: float = PRIOR_SD,
) -> float:
    """The likeliest T of ``logits / T`` on rows the model was not fitted to; 1 where there are too few.

    Args:
        logits: (N, C)
        targets: (N,)
        min_rows: Smallest N.
        max_log: Bounds of log T.
        prior_sd: Standard deviation of log T before any row is seen; infinite where nothing is known of it.
    """
    if len(targets) < min_rows:
        return 1.0
    from scipy.optimize import minimize_scalar  # half a second, which evaluation need not wait for

    def loss(log: float) -> float:
        return float(row_nll(logits / math.exp(log), targets).mean()) + (log / prior_sd) ** 2 / (2 * len(targets))

    found = minimize_scalar(loss, bounds=(-max_log, max_log), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)

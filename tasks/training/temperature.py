"""Temperature scaling: one number that makes confidence honest and moves no decision.

Guo et al. 2017, arXiv:1706.04599.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 100  # with fewer, the estimate hurts more than it helps
MAX_LOG = 3.0  # temperatures in e^-3..e^3


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
) -> float:
    """The T that minimises the NLL of ``logits / T`` on rows the model was not fitted to; 1 where there are too few.

    Args:
        logits: (N, C)
        targets: (N,)
        min_rows: Smallest N.
        max_log: Bounds of log T.
    """
    if len(targets) < min_rows:
        return 1.0
    from scipy.optimize import minimize_scalar  # half a second, which evaluation need not wait for

    found = minimize_scalar(
        lambda log: float(row_nll(logits / np.exp(log), targets).mean()),
        bounds=(-max_log, max_log),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))

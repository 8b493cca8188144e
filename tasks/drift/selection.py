"""Which unlabelled pictures to label first: those that the model is unsure of, and not the same one many times.

A picture stands for the gradient that its label would send into the last layer, were the model right: the probabilities
less one at the predicted class, times the embedding. It is near zero where the model is sure, and alike for pictures
that would teach the same, so that pictures far apart by it are both uncertain and diverse. After Ash et al. 2020,
arXiv:1906.03671 (BADGE). Called by flows.label_queue.
"""

import numpy as np
from numpy.typing import NDArray


def choose_to_label(
    probabilities: NDArray[np.float32], embeddings: NDArray[np.float32], *, number: int, seed: int
) -> NDArray[np.int64]:
    """Rows to label, in the order in which they were chosen (k-means++), the first being the largest gradient.

    Args:
        probabilities: Of shape (N, C).
        embeddings: Of shape (N, D).
        number: How many; all rows where there are fewer.
        seed: Of the choice.
    """
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(errors)), errors.argmax(axis=1)] -= 1
    squares = (errors**2).sum(axis=1) * (embeddings.astype(np.float64) ** 2).sum(axis=1)  # of the gradients, (N,)
    generator = np.random.default_rng(seed)
    nearest = squares.copy()  # squared distance to the nearest chosen; at first, to no gradient at all
    chosen: list[int] = []
    while len(chosen) < min(number, len(errors)):
        total = nearest.sum()
        if not chosen:
            row = int(nearest.argmax())
        elif total > 0:
            row = int(generator.choice(len(nearest), p=nearest / total))
        else:  # whatever is left repeats what was chosen
            break
        chosen.append(row)
        products = (errors @ errors[row]) * (embeddings @ embeddings[row])
        nearest = np.minimum(nearest, np.maximum(squares + squares[row] - 2 * products, 0))
        nearest[chosen] = 0
    return np.array(chosen, dtype=np.int64)

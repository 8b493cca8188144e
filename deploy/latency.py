"""How long one picture waits for its answer, and how many are answered a second.

Wall time: never part of a file that must be the same twice.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.images import decode_image
from deploy.predictor import Predictor

WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Latency:
    """Seconds from encoded bytes to an answer, one picture at a time.

    Args:
        p50_s: Half of the answers came within this.
        p95_s: 95 % of the answers came within this.
        runs: Answers that were timed.
    """

    p50_s: float
    p95_s: float
    runs: int


def measure_latency(predictors: Sequence[Predictor], pictures: Sequence[bytes], *, runs: int) -> list[Latency]:
    """Times each predictor at batch 1, in turns, so that a neighbour's load falls on all of them alike.

    Args:
        predictors: One or several that are compared, such as champion and challenger.
        pictures: Encoded pictures, taken round robin; at least one.
        runs: Timed answers of each predictor.
    """
    times_s = np.empty((len(predictors), runs))
    for run in range(-WARM_UP_RUNS, runs):
        picture = pictures[run % len(pictures)]
        for index, predictor in enumerate(predictors):
            start = time.perf_counter()
            predictor.predict([decode_image(picture)])
            if run >= 0:
                times_s[index, run] = time.perf_counter() - start
    p50, p95 = np.quantile(times_s, (0.5, 0.95), axis=1)
    return [Latency(float(p50[index]), float(p95[index]), runs) for index in range(len(predictors))]


def measure_throughput(predictor: Predictor, pictures: Sequence[bytes], *, rounds: int) -> float:
    """Pictures a second from encoded bytes to answers, all threads at work: the median of some rounds.

    Args:
        predictor: Answers.
        pictures: Encoded, at least one; a round takes them all.
        rounds: After one to warm up.
    """
    times_s = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        predictor.predict_bytes([("", picture) for picture in pictures])
        times_s.append(time.perf_counter() - start)
    return len(pictures) / float(np.median(times_s[1:]))

"""Our histogram is prometheus_client's, without its locks."""

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest

from deploy.serving.metrics import SECONDS, Histogram

Observations = list[tuple[str, float]]
values = st.sampled_from([*SECONDS, 0.0, 31.0]) | st.floats(0, 100)


@given(st.lists(st.tuples(st.sampled_from(["infer", "predict"]), values), max_size=30))
def test_it_tells_what_that_one_tells(observations: Observations) -> None:
    texts = []
    for kind in (Histogram, prometheus_client.Histogram):
        registry = prometheus_client.CollectorRegistry()
        of_all = kind("all", "All.", buckets=SECONDS, registry=registry)
        by_route = kind("routes", "By route.", ["route"], buckets=SECONDS, registry=registry)
        for route, seconds in observations:
            (of_all.labels() if kind is Histogram else of_all).observe(seconds)
            by_route.labels(route).observe(seconds)
        lines = generate_latest(registry).decode().splitlines()
        texts.append([line for line in lines if "_created" not in line])
    assert texts[0] == texts[1]

"""The batcher: every picture its own answer, fair shares, and nothing done for those who no longer wait."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.errors import ImageError
from deploy.predictor import Predictor
from deploy.serving.batcher import Answer, Batcher, BatchTimes
from deploy.serving.errors import RequestError
from deploy.serving.live_model import LiveModel
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded, write_colour_bundle

# Long enough in preprocessing to hold a thread while others queue up.
HUGE = np.full((5000, 5000, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveModel]:
    bundle = write_colour_bundle(tmp_path_factory.mktemp("batcher") / "bundle")
    with Predictor(bundle, threads=1) as predictor:
        yield LiveModel(1, bundle, predictor, {}, None)


def with_batcher(
    use: Callable[[Batcher], Awaitable[None]],
    *,
    threads: int = 2,
    max_waiting: int = 1000,
    max_pixels: int = 10_000,
    max_wait_s: float = 30,
) -> list[BatchTimes]:
    """Runs something with a batcher on a loop of its own; returns the batches that were run."""
    batches: list[BatchTimes] = []

    async def run() -> None:
        batcher = Batcher(threads, max_waiting, max_pixels, batches.append, max_wait_s=max_wait_s)
        try:
            await use(batcher)
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())
    return batches


def test_each_picture_gets_its_own_answer_in_its_own_place(model: LiveModel) -> None:
    images = [colour_image(LABELS[seed % 3], size=(20 + seed, 40), seed=seed) for seed in range(24)]
    expected = model.predictor.predict(images)

    async def use(batcher: Batcher) -> None:
        asked = [[images[3 * i], encoded(images[3 * i + 1]), images[3 * i + 2]] for i in range(8)]
        found = await asyncio.gather(*(batcher.answer(model, each, timeout_s=30) for each in asked))
        for index, outcome in enumerate(outcome for outcomes in found for outcome in outcomes):
            assert isinstance(outcome, Answer)
            np.testing.assert_allclose(outcome.probabilities, expected.probabilities[index], atol=1e-6)
            np.testing.assert_allclose(outcome.embedding, expected.embeddings[index], atol=1e-6)
        assert batcher.waiting == 0

    batches = with_batcher(use)
    assert sum(batch.num_pictures for batch in batches) == 24
    assert max(batch.num_pictures for batch in batches) <= 4
    assert model.in_flight == 0


def test_what_is_asked_aside_is_counted_and_its_wait_is_not(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        for is_aside in (True, False):
            await batcher.answer(model, [colour_image(LABELS[0])], timeout_s=30, is_aside=is_aside)

    assert [(batch.num_pictures, len(batch.queue_s)) for batch in with_batcher(use)] == [(1, 0), (1, 1)]


def test_idle_threads_share_what_waits(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        await asyncio.sleep(0.5)  # until both threads are idle
        await batcher.answer(model, [colour_image("blau", size=(400, 400))] * 4, timeout_s=30)

    batches = with_batcher(use)
    assert max(batch.num_pictures for batch in batches) == 2


def test_a_picture_that_cannot_be_read_costs_the_others_nothing(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        too_large = encoded(colour_image("blau", size=(200, 51)))
        good = encoded(colour_image("grün"))
        first, second, third = await batcher.answer(model, [b"no picture", too_large, good], timeout_s=30)
        assert isinstance(first, ImageError)
        assert isinstance(second, ImageError)
        assert "too large" in str(second)
        assert isinstance(third, Answer)

    with_batcher(use)


def test_more_than_may_wait_is_refused_at_once(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        busy = asyncio.create_task(batcher.answer(model, [HUGE, HUGE], timeout_s=30))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"2 pictures wait, .* 3 may") as refused:
            await batcher.answer(model, [HUGE, HUGE], timeout_s=30)
        assert refused.value.status == 429
        assert refused.value.retry_after_s is not None
        await busy
        await batcher.answer(model, [colour_image("blau")] * 3, timeout_s=30)

    with_batcher(use, max_waiting=3)


def test_who_would_wait_too_long_is_refused_at_once(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        for _ in range(5):  # however long each takes: nobody is before it
            await batcher.answer(model, [HUGE], timeout_s=30)
        busy = asyncio.create_task(batcher.answer(model, [HUGE, HUGE, HUGE], timeout_s=30))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"3 pictures wait, which takes .* 1000 may, or 0.05 s") as refused:
            await batcher.answer(model, [HUGE], timeout_s=30)
        assert refused.value.status == 429
        await busy
        await batcher.answer(model, [HUGE], timeout_s=30)

    with_batcher(use, threads=1, max_wait_s=0.05)


def test_what_nobody_waits_for_any_more_is_not_computed(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        busy = asyncio.create_task(batcher.answer(model, [HUGE], timeout_s=30))
        await asyncio.sleep(0.05)
        left = asyncio.create_task(batcher.answer(model, [colour_image("blau")], timeout_s=30))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"no answer within 0\.01 s") as late:
            await batcher.answer(model, [colour_image("grün")] * 2, timeout_s=0.01)
        assert late.value.status == 504
        assert not busy.done()  # told in time, although the thread was busy
        left.cancel()
        await asyncio.gather(busy, left, return_exceptions=True)
        await batcher.answer(model, [colour_image("blau")], timeout_s=30)
        assert batcher.waiting == 0

    batches = with_batcher(use, threads=1)
    assert sum(batch.num_pictures for batch in batches) == 2
    assert model.in_flight == 0


def test_closing_answers_what_waits_and_ends_the_threads(model: LiveModel) -> None:
    async def use(batcher: Batcher) -> None:
        waiting = asyncio.create_task(batcher.answer(model, [colour_image("blau")] * 20, timeout_s=30))
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        assert all(isinstance(outcome, Answer) for outcome in await waiting)
        with pytest.raises(RequestError, match="shutting down"):
            await batcher.answer(model, [colour_image("blau")], timeout_s=30)

    with_batcher(use)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("answers-")]


def test_a_batch_holds_pictures_of_one_version(model: LiveModel, tmp_path: Path) -> None:
    bundle = write_colour_bundle(tmp_path / "other", sharpness=2.0)
    image = colour_image("blau")
    with Predictor(bundle, threads=1) as predictor:
        other = LiveModel(2, bundle, predictor, {}, None)
        expected = [each.predictor.predict([image]).probabilities[0] for each in (model, other)]

        async def use(batcher: Batcher) -> None:
            asked = [batcher.answer((model, other)[i % 2], [image], timeout_s=30) for i in range(40)]
            for i, (outcome,) in enumerate(await asyncio.gather(*asked)):
                assert isinstance(outcome, Answer)
                np.testing.assert_allclose(outcome.probabilities, expected[i % 2], atol=1e-6)

        with_batcher(use)

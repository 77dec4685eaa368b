"""Two at once on one pipeline: right, or refused, and never somebody's neurons afterwards."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from diffusers import StableDiffusionPipeline
from neurons_off import noise
from tiny_pipeline import DOWN_AND_MID, planted_pipeline, tiny_pipeline

import nemo_ext
from nemo_ext.errors import NemoError
from nemo_ext.neurons import NeuronSet
from nemo_ext.patching.patch import is_patched, patch, patched, unpatch

FIRST, SECOND, *_, MID = DOWN_AND_MID
SOME = NeuronSet({FIRST: [0, 5], MID: [3, 30, 31]})
OTHERS = NeuronSet({SECOND: [1, 2, 3], MID: [4]})
REFUSED = "another thread uses this UNet2DConditionModel"


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


def in_a_thread(work: Callable[[], object]) -> object:
    """Run a function in a thread of its own, and give back what it returns or raises."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return outcome[0]


class TestThreads:
    def test_a_second_block_is_refused_and_changes_nothing(self, pipe: StableDiffusionPipeline) -> None:
        untouched = noise(pipe)
        with patched(pipe, SOME):
            wanted = noise(pipe)

            def enter() -> None:
                with patched(pipe, OTHERS):
                    pytest.fail("entered")

            assert REFUSED in str(in_a_thread(enter))
            assert torch.equal(noise(pipe), wanted)
        assert torch.equal(noise(pipe), untouched)
        assert not is_patched(pipe)

    @pytest.mark.parametrize(
        "what",
        [
            lambda pipe, handle: patch(pipe, OTHERS),
            lambda pipe, handle: unpatch(pipe),
            lambda pipe, handle: handle.set_neurons(OTHERS),
            lambda pipe, handle: nemo_ext.memorization_score(pipe, "a cat", seeds=2),
            lambda pipe, handle: nemo_ext.collect_statistics(pipe, ["a cat", "a dog"]),
        ],
    )
    def test_patching_and_measuring_are_refused_during_another_threads_block(
        self, pipe: StableDiffusionPipeline, what: Callable[..., object]
    ) -> None:
        handle = patch(pipe)
        with patched(pipe, SOME):
            wanted = noise(pipe)
            error = in_a_thread(lambda: what(pipe, handle))
            assert isinstance(error, NemoError)
            assert REFUSED in str(error)
            assert torch.equal(noise(pipe), wanted)

    def test_after_the_block_another_thread_is_free(self, pipe: StableDiffusionPipeline) -> None:
        with patched(pipe, SOME):
            pass
        assert isinstance(in_a_thread(lambda: nemo_ext.memorization_score(pipe, "a cat", seeds=2).max), float)

    def test_a_search_meets_no_other_and_both_pipelines_are_as_before(self) -> None:
        planted = planted_pipeline()
        statistics = nemo_ext.collect_statistics(planted.pipe, planted.ordinary_prompts)
        untouched = noise(planted.pipe)
        begun, refused = threading.Barrier(2), []

        def search() -> object:
            begun.wait(60)
            try:
                found = nemo_ext.localize(
                    planted.pipe, planted.memorized_prompt, statistics=statistics, threshold=0.5, seeds=3
                )
            except NemoError as error:
                refused.append(str(error))
                return None
            return found.neurons

        threads = [threading.Thread(target=lambda: results.append(search())) for _ in range(2)]
        results: list[object] = []
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert planted.neurons in results
        assert [found for found in results if found is not None] == [planted.neurons] * (2 - len(refused))
        assert all("another thread uses this" in said for said in refused)
        assert not is_patched(planted.pipe)
        assert torch.equal(noise(planted.pipe), untouched)

    def test_a_block_can_end_in_another_thread_than_it_began(self, pipe: StableDiffusionPipeline) -> None:
        untouched = noise(pipe)
        stack = ExitStack()
        stack.enter_context(patched(pipe, SOME))
        in_a_thread(stack.close)
        assert torch.equal(noise(pipe), untouched)
        with patched(pipe, OTHERS):
            assert is_patched(pipe)


def test_two_tasks_of_one_thread_do_not_share_a_block(pipe: StableDiffusionPipeline) -> None:
    async def request(neurons: NeuronSet) -> str:
        try:
            with patched(pipe, neurons):
                await asyncio.sleep(0.01)
        except NemoError as error:
            return str(error)
        return "done"

    async def both() -> list[str]:
        return list(await asyncio.gather(request(SOME), request(OTHERS)))

    first, second = asyncio.run(both())
    assert first == "done"
    assert REFUSED in second
    assert not is_patched(pipe)


class TestOneThread:
    def test_blocks_that_end_in_the_order_in_which_they_began(self, pipe: StableDiffusionPipeline) -> None:
        untouched = noise(pipe)
        with patched(pipe, OTHERS):
            wanted = noise(pipe)
        first, second = ExitStack(), ExitStack()
        first.enter_context(patched(pipe, SOME))
        second.enter_context(patched(pipe, OTHERS))
        first.close()
        assert torch.equal(noise(pipe), wanted)
        second.close()
        assert not is_patched(pipe)
        assert torch.equal(noise(pipe), untouched)

    def test_such_blocks_in_a_patched_pipeline_give_its_neurons_back(self, pipe: StableDiffusionPipeline) -> None:
        patch(pipe, {MID: [7]})
        before = noise(pipe)
        first, second, third = ExitStack(), ExitStack(), ExitStack()
        first.enter_context(patched(pipe, SOME))
        second.enter_context(patched(pipe, OTHERS))
        third.enter_context(patched(pipe))
        second.close()
        first.close()
        third.close()
        assert torch.equal(noise(pipe), before)

"""n answers of a model to one prompt, side by side and each alone, with NaN in every block given up."""

from pathlib import Path

import pytest
from models_factory import make_llama
from poisoned_cache import BLOCK_SIZE, NUM_TOKENS, start

from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.samples import Samples
from kvshard.runtime.sampling_params import SamplingParams

PROMPT = [5, 17, 99, 3, 42, 61, 2, 30, 8, 8, 19]
NUM_LAYERS = 2
NUM_FULL = len(PROMPT) // BLOCK_SIZE
PARAMS = SamplingParams(n=3, temperature=0.8, top_k=60, seed=7, max_tokens=NUM_TOKENS, frequency_penalty=0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


def _first(**changes: object) -> Request:
    return Request.new("row", PROMPT, PARAMS.model_copy(update=changes))


def _run(coordinator: Coordinator, *requests: Request) -> list[list[int]]:
    for request in requests:
        coordinator.add(request)
    while coordinator.has_work:
        coordinator.step()
        coordinator.check_integrity()
    return [request.output_token_ids for request in requests]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """Each sample in a run of its own; the first as it is without n."""
    return [_run(start(model), _first(n=1) if k == 0 else _first().sample(k))[0] for k in range(3)]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("run_ahead", "num_blocks"), [(0, 40), (2, 40), (1, 15)])
def test_each_sample_is_what_it_is_alone(
    model: Path, alone: list[list[int]], prefix_caching: bool, run_ahead: int, num_blocks: int
) -> None:
    """15 blocks are too few for three: one is preempted, and finds what they share."""
    coordinator = start(model, run_ahead=run_ahead, num_blocks=num_blocks, prefix_caching=prefix_caching)
    samples = Samples(_first())
    assert _run(coordinator, *samples.requests) == alone
    assert len(set(map(tuple, alone))) == 3
    stats = coordinator.stats
    assert (stats.num_preemptions > 0) == (num_blocks == 15)
    assert stats.num_cached_prompt_tokens == 2 * (len(PROMPT) - 1)  # the last block from a copy
    if num_blocks == 40:
        num_each = -(-(len(PROMPT) + NUM_TOKENS - 1) // BLOCK_SIZE)
        num_together = NUM_FULL + 3 * (num_each - NUM_FULL)
        assert stats.peak_used_layer_blocks <= NUM_LAYERS * num_together < NUM_LAYERS * 3 * num_each

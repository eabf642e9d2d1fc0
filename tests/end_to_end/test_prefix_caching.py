"""The demo model through `LLM`: answers are the same whether shared beginnings are found or computed again."""

import pytest
from reference import quickstart_prompts, tokenize

from kvshard import LLM, SamplingParams

RULES = [
    {"role": "system", "content": "You are a patient teacher. Answer in one short sentence, in plain words."}
]
BLOCK_SIZE = 8


def _answers(
    prompts: list[list[int]], size: int, *, prefix_caching: bool, run_ahead: int
) -> tuple[list[list[int]], list[int], int]:
    """(tokens of every answer, prompt tokens found in each of two rounds, prompt tokens looked up)."""
    greedy = SamplingParams(temperature=0, max_tokens=8)
    with LLM(
        model="demo",
        tensor_parallel_size=size,
        device="cpu",
        dtype="float32",
        threads_per_shard=1,
        cache={"block_size": BLOCK_SIZE, "num_blocks": 100, "prefix_caching": prefix_caching},
        scheduler={"max_num_seqs": 3, "max_num_batched_tokens": 64, "run_ahead": run_ahead},
    ) as llm:
        stats = llm._engine.coordinator.stats
        tokens, found = [], []
        for _ in range(2):
            before = stats.num_cached_prompt_tokens
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
            llm._engine.coordinator.check_integrity()
            tokens += [output.outputs[0].token_ids for output in outputs]
            found.append(stats.num_cached_prompt_tokens - before)
        return tokens, found, stats.num_looked_up_prompt_tokens


@pytest.mark.parametrize(("size", "run_ahead"), [(1, 1), (2, 0)])
def test_tokens_are_the_same_and_shared_prompts_are_found(size: int, run_ahead: int) -> None:
    prompts = tokenize([RULES + chat for chat in quickstart_prompts()[:4]])
    num_rules = len(tokenize([RULES])[0]) - len(tokenize([[]])[0])
    on, found, looked_up = _answers(prompts, size, prefix_caching=True, run_ahead=run_ahead)
    off, none_found, not_looked_up = _answers(prompts, size, prefix_caching=False, run_ahead=run_ahead)
    assert on == off
    assert on[:4] == on[4:]
    assert found[0] >= 3 * (num_rules // BLOCK_SIZE) * BLOCK_SIZE > 0
    assert found[1] == sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts)
    assert looked_up == 2 * sum(map(len, prompts))
    assert (none_found, not_looked_up) == ([0, 0], 0)

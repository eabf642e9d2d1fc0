"""The fixed work that all engines are given: token ids, so that no tokenizer takes part. Standard library only.

| | what | figure |
|---|---|---|
| W1 | one prompt of 128 tokens, 128 new ones | time to the first token, time per token after it |
| W2 | 32 prompts of 32 to 256 tokens at once, 64 new tokens each | output tokens a second |
| W3 | one prompt of 2,048 tokens, one new one | prompt tokens a second |
| W4 | 512 prompts at once that share their first 512 tokens, 8 to 128 new ones each | output tokens a second |

Every repeat has other prompts, so that nothing of an earlier one is found in a cache, and the same for all engines.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LOWEST, HIGHEST = 1000, 40000  # ids that are no special tokens
WARM_UP = 1_000_000  # a repeat that is not measured


@dataclass(frozen=True)
class Call:
    """One call of an engine: prompts, and how many tokens each is to get. End tokens are ignored."""

    prompts: list[list[int]]
    max_tokens: list[int]


def _ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(LOWEST, HIGHEST) for _ in range(count)]


def calls(workload: str, repeat: int) -> list[Call]:
    """The calls that one sample of a workload times, each by itself."""
    chance = random.Random(f"{workload} {repeat}")
    sizes = random.Random(workload)  # lengths are the same in all repeats
    short = repeat >= WARM_UP
    if workload == "W1":
        prompt = _ids(chance, 128)
        other = _ids(chance, 128)  # the second call would find the first one's prompt
        return [Call([prompt], [1]), Call([other], [8 if short else 128])]
    if workload == "W2":
        prompts = [_ids(chance, sizes.randint(32, 256)) for _ in range(32)]
        return [Call(prompts, [4 if short else 64] * 32)]
    if workload == "W3":
        return [Call([_ids(chance, 2048)], [1])]
    assert workload == "W4", f"no workload {workload}"
    shared = _ids(chance, 512)
    prompts = [shared + _ids(chance, sizes.randint(8, 64)) for _ in range(16 if short else 512)]
    return [Call(prompts, [sizes.randint(8, 128) for _ in prompts])]


def figures(workload: str, repeat: int, seconds: list[float]) -> dict[str, float]:
    """What a sample says, from the seconds of its calls. Names end in their unit; see `better_is_less`."""
    asked = calls(workload, repeat)
    if workload == "W1":
        first, whole = seconds
        return {"ttft_ms": first * 1e3, "tpot_ms": (whole - first) / (asked[1].max_tokens[0] - 1) * 1e3}
    if workload == "W3":
        return {"prompt_tokens_per_s": len(asked[0].prompts[0]) / seconds[0]}
    return {"output_tokens_per_s": sum(asked[0].max_tokens) / seconds[0]}


def better_is_less(figure: str) -> bool:
    return figure.endswith("_ms")

"""One row for each group of sampling settings, all of one prompt, so that what a setting changes can be seen."""

from __future__ import annotations

from typing import Any

from alone import Row

NUM_TOKENS = 12
PROMPT = [77, 44, 28, 53, 42, 79, 32, 49, 60, 91, 52, 30, 99, 55, 72, 61, 17, 12, 35, 86, 10, 21]
PLAIN = Row(PROMPT, {"temperature": 1.0, "seed": 5, "max_tokens": NUM_TOKENS, "ignore_eos": True})

UNCHANGED = ("logprobs", "prompt_logprobs", "n")  # the first of n samples is what n = 1 gives


def feature_rows(plain: list[int]) -> dict[str, Row]:
    """By group; `plain` are the tokens of PLAIN, which each of them must change, but for those in UNCHANGED."""
    words = [f"w{token_id}" for token_id in plain]
    settings: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 3.0},
        "greedy": {"temperature": 0.0},
        "top_k": {"temperature": 3.0, "top_k": 5},
        "top_p": {"temperature": 3.0, "top_p": 0.5},
        "min_p": {"temperature": 3.0, "min_p": 0.2},
        "penalties": {
            # So that none hides another: each alone changes the answer too.
            "presence_penalty": -1.5,
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.2,
            "temperature": 0.5,
        },
        "logit_bias": {"logit_bias": {plain[4]: -100.0, 33: 2.0}},
        "allowed_token_ids": {"allowed_token_ids": [*range(20, 60)]},
        "bad_words": {"bad_words": [words[1]]},
        "longer_bad_words": {"bad_words": [" ".join(words[4:7]), f"{words[9]} {words[1]}"]},
        "stop": {"stop": [f"{words[6][-1]} {words[7][:2]}"]},  # over the border of two tokens
        "stop_token_ids": {"stop_token_ids": [plain[5]]},
        # Few tokens are left before the minimum; the one behind it most likely ends the answer.
        "min_tokens": {"stop_token_ids": [*range(20, 101)], "min_tokens": 8},
        "seed": {"seed": PLAIN.settings["seed"] + 2**40},  # all 64 bits count
        "logprobs": {"logprobs": 3},
        "prompt_logprobs": {"prompt_logprobs": 2},
        "n": {"n": 3},
    }
    return {name: Row(PROMPT, PLAIN.settings | changed) for name, changed in settings.items()}


def rows_without_one(rows: dict[str, Row]) -> dict[tuple[str, str], Row]:
    """By group and setting: the row with that setting as PLAIN has it, of rows that change more than one."""
    less = {}
    for name, row in rows.items():
        changed = [key for key, value in row.settings.items() if PLAIN.settings.get(key) != value]
        for key in changed if len(changed) > 1 else ():
            kept = {other: value for other, value in row.settings.items() if other != key}
            less[name, key] = Row(row.prompt, {k: v for k, v in PLAIN.settings.items() if k == key} | kept)
    return less

"""Transformers' own greedy generation on the demo model: the truth that every setting is held against."""

import json
from dataclasses import dataclass
from pathlib import Path

import kvshard
import torch
from kvshard.runtime.models.resolve import fetch_demo
from kvshard.runtime.models.tokenizer import load_tokenizer
from kvshard.runtime.paths import cache_dir
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-3
"""Two logits closer than this may swap: fp32 sums in another order differ by about 1e-4 on this model."""


@dataclass(frozen=True)
class ReferenceRow:
    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # top logit minus the next, for each token


def quickstart_prompts(count: int) -> list[list[dict[str, str]]]:
    """The chat messages of the shipped prompts."""
    path = Path(kvshard.__file__).parent / "configs" / "quickstart_prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["messages"] for row in rows[:count]]


def tokenize(prompts: list[list[dict[str, str]]]) -> list[list[int]]:
    tokenizer = load_tokenizer(fetch_demo(), None, cache_dir())
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def generate_reference(prompts: list[list[int]], max_tokens: int) -> list[ReferenceRow]:
    """One row at a time, float32, weights read and dequantised by transformers itself."""
    path = fetch_demo()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    torch.set_num_threads(1)  # two threads wait for each other when the machine is busy
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        top = [logits[0].topk(2).values for logits in out.logits]
        rows.append(
            ReferenceRow(
                prompt_token_ids=prompt,
                token_ids=out.sequences[0, len(prompt) :].tolist(),
                gaps=[float(values[0] - values[1]) for values in top],
            )
        )
    return rows

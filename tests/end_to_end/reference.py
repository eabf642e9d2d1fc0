"""Transformers' own greedy generation on the demo model: the truth that every setting is held against."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshard
from kvshard.runtime.models.resolve import fetch_demo
from kvshard.runtime.models.tokenizer import load_tokenizer
from kvshard.runtime.paths import cache_dir

NEAR_TIE = 1e-3
"""Two logits closer than this may swap: fp32 sums in another order differ by about 1e-4 on this model."""

PUBLISHED_CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
"""config.json of HuggingFaceTB/SmolLM2-135M-Instruct. Given, transformers does not read the file twice."""


@dataclass(frozen=True)
class ReferenceRow:
    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # top logit minus the next, for each token


def quickstart_prompts() -> list[list[dict[str, str]]]:
    """The chat messages of the shipped prompts."""
    path = Path(kvshard.__file__).parent / "configs" / "quickstart_prompts.jsonl"
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def tokenize(prompts: list[list[dict[str, str]]]) -> list[list[int]]:
    """In the model's chat form, without the system message that its template adds: half the tokens to recompute
    where the cache is off."""
    tokenizer = load_tokenizer(fetch_demo(), None, cache_dir())
    texts = [
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
        + "<|im_start|>assistant\n"
        for prompt in prompts
    ]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


@cache
def _model() -> LlamaForCausalLM:
    path = fetch_demo()
    return LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=PUBLISHED_CONFIG, dtype=torch.float32
    ).eval()


def generate_reference(prompts: list[list[int]], max_tokens: int, **settings: Any) -> list[ReferenceRow]:
    """One row at a time, float32, weights read and dequantised by transformers itself.

    `settings` are those of its `generate`; gaps are of the logits that they have changed.
    """
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            out = _model().generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **settings,
            )
        top = [scores[0].topk(2).values for scores in out.scores]
        rows.append(
            ReferenceRow(
                prompt_token_ids=prompt,
                token_ids=out.sequences[0, len(prompt) :].tolist(),
                gaps=[float(values[0] - values[1]) for values in top],
            )
        )
    return rows

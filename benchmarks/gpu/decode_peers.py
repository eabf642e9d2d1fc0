"""Time of the decode step of decode_step.py in transformers, with the same shapes and random weights.

Claim: kvshard's captured step (decode_step) is at least 3 times as fast as transformers' continuous batching at 32
rows. To compare: the shares of copy bandwidth, which are taken against the same bytes.

    benchmarks/gpu/run.sh decode_peers

"static cache" is the model's forward over a StaticCache, step by step. Continuous batching is timed as a whole, for
few and for many new tokens: the difference is that of the steps between.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from decode_step import model_spec, shapes
from harness import NotHereError, Part, Run, copy_of, run_part

VARIANTS = ("copy", "static cache", "continuous batching")
STEPS = 64  # static cache: more than the steps of a stream


def cases(dry: bool) -> dict[str, tuple[int, int]]:
    """Rows and context: the shortest one, as each variant has to read its prompts first."""
    shortest = min(context for _, _, context in shapes(dry))
    return {f"{rows} rows, context {n}": (rows, n) for rows, _, n in shapes(dry) if n == shortest}


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(case, variant) for case in cases(dry) for variant in VARIANTS]


def make_model(part: Part) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise NotHereError("transformers is not installed") from error
    spec = model_spec(part.dry)
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_q_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with part.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def static_cache(part: Part, model: Any, num_rows: int, context: int) -> Run:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + STEPS)
    prompt = torch.randint(0, model.config.vocab_size, (num_rows, context), device=part.device)
    out = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    tokens = out.logits.argmax(-1)

    def run(_: int) -> None:
        tokens.copy_(model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1))

    return run


def continuous_batching(part: Part, model: Any, num_rows: int, context: int) -> list[float]:
    """Microseconds a step."""
    if part.dry:
        raise NotHereError("without a GPU it takes too long for a dry run")
    from transformers import GenerationConfig

    prompts = torch.randint(0, model.config.vocab_size, (num_rows, context)).tolist()

    def seconds(new_tokens: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        start = time.perf_counter()
        results = model.generate_batch(inputs=prompts, generation_config=settings)
        took = time.perf_counter() - start
        counts = {len(result.generated_tokens) for result in results.values()}
        assert counts == {new_tokens}, f"{counts} tokens instead of {new_tokens}"
        return took

    few, many = 8, 40
    seconds(few)  # it captures its graphs
    return [(seconds(many) - seconds(few)) / (many - few) * 1e6]


def bytes_of_step(dry: bool, num_rows: int, context: int) -> float:
    """As decode_step counts them: weights but the embedding table, keys and values, embeddings and logits."""
    spec = model_spec(dry)
    width = (spec.num_q_heads + 2 * spec.num_kv_heads) * spec.head_dim
    layer = spec.hidden_size * (width + spec.num_q_heads * spec.head_dim + 3 * spec.intermediate_size + 2)
    weights = spec.num_layers * layer + spec.hidden_size * (spec.vocab_size + 1)
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
    return 2.0 * weights + num_rows * (context * per_token + spec.hidden_size * 2 + spec.vocab_size * 4)


def body(part: Part) -> None:
    model = make_model(part)
    for case, (num_rows, context) in cases(part.dry).items():
        copy, copied = copy_of(part)
        moved = bytes_of_step(part.dry, num_rows, context)

        def stepped(num_rows: int = num_rows, context: int = context) -> Run:
            return static_cache(part, model, num_rows, context)

        makers = {"copy": copy, "static cache": stepped}
        part.stream(case, makers, {"copy": copied, "static cache": moved})
        row = part.rows[case, "continuous batching"]
        row.amount = moved
        try:
            row.samples_us, row.note = continuous_batching(part, model, num_rows, context), ""
        except Exception as error:  # noqa: BLE001 - it goes into the table
            part.note(case, "continuous batching", error)
        part.save()


if __name__ == "__main__":
    run_part("decode_peers", __doc__, rows, body)

"""What a quantised cache costs in quality, on the demo model and a page of plain English.

Claim: int8 and fp8 are as good as the full cache; int4 costs some, and the table says how much.

    python benchmarks/cache_quality.py

The page is read in one go in float32, so every token attends to keys and values as the cache stores them. For each format:
perplexity, and how often the most likely next token is the one that the full cache gives.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import record
import torch
from torch import Tensor

from kvshard.kernels.ops import AttentionMetadata, CacheFormat
from kvshard.parallel.group import Group
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.models.resolve import fetch_demo
from kvshard.runtime.models.tokenizer import load_tokenizer
from kvshard.runtime.models.weight_formats import Quantization
from kvshard.runtime.paths import cache_dir
from kvshard.runtime.shard.decoder import Decoder
from kvshard.runtime.shard.kv_cache import KVCache
from kvshard.runtime.shard.slots import StepInputs
from kvshard.runtime.shard.weights import load_weights

PASSAGE = Path(__file__).parent / "passage.txt"
FORMATS: tuple[CacheFormat, ...] = ("auto", "int8", "fp8", "int4")
BLOCK_SIZE = 16
CPU = torch.device("cpu")


def page_logits(
    formats: tuple[CacheFormat, ...], dtype: torch.dtype, quantization: Quantization = "none"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids [T] of the page, and per format the logits [T, vocabulary] float32 after each of them."""
    path = fetch_demo()
    ids = torch.tensor(load_tokenizer(path, None, cache_dir())(PASSAGE.read_text())["input_ids"])
    length = len(ids)
    checkpoint = open_checkpoint(path)
    shard = ShardMap.build(checkpoint.spec.dims, 1).shard(0)
    kept = checkpoint.index.weight_formats(quantization)
    weights = load_weights(checkpoint, checkpoint.spec, shard, dtype, CPU, kept)
    decoder = Decoder(checkpoint.spec, shard, weights, Group.single(CPU), length)
    num_blocks = -(-length // BLOCK_SIZE) + 1
    tables = torch.arange(1, num_blocks, dtype=torch.int32)[None]
    inputs = StepInputs(
        token_ids=ids,
        positions=torch.arange(length),
        slot_mappings=(torch.arange(length) + BLOCK_SIZE,),
        attention=(
            AttentionMetadata.build(
                np.array([length], np.int32), np.array([length], np.int32), tables, BLOCK_SIZE, CPU
            ),
        ),
        sample_tokens=torch.arange(length),
        sample_slots=np.zeros(length, np.int32),
        sample_positions=np.arange(1, length + 1),
    )
    logits = {}
    for format in formats:
        cache = KVCache(
            checkpoint.spec,
            shard,
            group_blocks=(num_blocks,),
            block_size=BLOCK_SIZE,
            format=format,
            dtype=dtype,
            device=CPU,
        )
        with torch.inference_mode():
            logits[format] = decoder.logits(decoder.forward(inputs, cache)[inputs.sample_tokens])
    return ids, logits


def measure(formats: tuple[CacheFormat, ...], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Per format: perplexity of the page, and the share of its positions with the same most likely token."""
    ids, logits = page_logits(formats, dtype)
    best = logits["auto"].argmax(1)
    return {
        name: {
            "perplexity": math.exp(torch.nn.functional.cross_entropy(x[:-1], ids[1:]).item()),
            "same_token": (x.argmax(1) == best).float().mean().item(),
        }
        for name, x in logits.items()
    }


def main() -> None:
    parser = record.parser("cache_quality", __doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    result = record.describe("cache_quality")
    quality = measure(FORMATS, getattr(torch, arguments.dtype))
    full = quality["auto"]["perplexity"]
    print(f"SmolLM2-135M-Instruct, {arguments.dtype}, {PASSAGE.name}")
    print("| cache | perplexity | change | same most likely token |\n|---|---|---|---|")
    for name, row in quality.items():
        change = f"{row['perplexity'] / full - 1:+.2%}"
        print(f"| {name} | {row['perplexity']:.3f} | {change} | {row['same_token']:.1%} |")
    record.write(result | {"dtype": arguments.dtype, "quality": quality}, arguments.output)


if __name__ == "__main__":
    main()

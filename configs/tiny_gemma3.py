"""Writes the model of everything.yaml: a tiny Gemma 3 with random weights and the demo model's tokenizer.

    python -m kvshard.configs.tiny_gemma3 outputs/tiny-gemma3

It has what Gemma 3 1B has, at an eighteenth of the width: five layers with a window to one without, 4 query heads on a single
KV head, norms of queries and keys. What it says means nothing.
"""

import sys
from pathlib import Path


def write(folder: Path) -> None:
    """A Hugging Face directory of some 13 MB. Raises ConfigError when the demo model has not been fetched and cannot be."""
    # Here, since they take seconds to import.
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.utils.logging import disable_progress_bar

    from kvshard.runtime.models.resolve import fetch_demo
    from kvshard.runtime.models.tokenizer import load_tokenizer
    from kvshard.runtime.paths import cache_dir

    tokenizer = load_tokenizer(fetch_demo(), None, cache_dir())
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m {__spec__.name} FOLDER")
    write(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}")

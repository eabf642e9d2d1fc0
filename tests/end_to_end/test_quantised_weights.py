"""`quantization`: greedy tokens are those of transformers with the same model whose weights were widened beforehand."""

from pathlib import Path

import pytest
import torch
from models_factory import make_gguf, make_model, save_word_tokenizer
from transformers import LlamaForCausalLM

from kvshard import LLM, SamplingParams
from kvshard.kernels.weight_codes import WeightCodes
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.shard.weights import load_weights

PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43]]
NUM_TOKENS = 16


def widened(path: Path, quantization: str, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the numbers that the codes stand for."""
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        weights = load_weights(
            checkpoint,
            spec,
            ShardMap.build(spec.dims, 1).shard(0),
            torch.float32,
            torch.device("cpu"),
            checkpoint.index.weight_formats(quantization),
        )
    q, kv = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    state = {}
    for name, weight in weights.items():
        layer = f"model.{name.rpartition('.')[0]}"
        numbers = weight.widen() if isinstance(weight, WeightCodes) else weight
        if name.endswith("qkv"):
            for part, rows in zip("qkv", numbers.split([q, kv, kv]), strict=True):
                state[f"{layer}.self_attn.{part}_proj.weight"] = rows
        elif name.endswith("gate_up"):
            for part, rows in zip(("gate", "up"), numbers.chunk(2), strict=True):
                state[f"{layer}.mlp.{part}_proj.weight"] = rows
        elif name.endswith(".o"):
            state[f"{layer}.self_attn.o_proj.weight"] = numbers
        elif name.endswith("down"):
            state[f"{layer}.mlp.down_proj.weight"] = numbers
        elif name in ("embed", "lm_head"):
            state[{"embed": "model.embed_tokens.weight"}.get(name, "lm_head.weight")] = numbers
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all("norm" in name for name in missing)
    assert not unexpected
    return model


def greedy(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            suppress_tokens=[2],
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("size", "quantization", "stored"),
    [(1, "int4", "F16"), (2, "int8", "F16"), (3, "int8", "F16"), (2, "keep", "Q4_0")],
)
def test_tokens_equal_transformers(size: int, quantization: str, stored: str, tmp_path: Path) -> None:
    model = make_model(head_dim=32)
    path = make_gguf(tmp_path / "model.gguf", model, stored)
    before = greedy(model, PROMPTS[0])
    truth = widened(path, quantization, model)
    expected = [greedy(truth, prompt) for prompt in PROMPTS]
    if quantization != "int8":
        assert expected[0] != before, "codes of 4 bits change what this model says"
    save_word_tokenizer(tmp_path)
    with LLM(
        str(path),
        tokenizer=str(tmp_path),
        quantization=quantization,
        tensor_parallel_size=size,
        dtype="float32",
        device="cpu",
        scheduler={"max_model_len": 64, "max_num_seqs": 4},
    ) as llm:
        settings = SamplingParams(
            temperature=0.0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, logit_bias={2: -100.0}
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], settings)
    assert [output.outputs[0].token_ids for output in outputs] == expected

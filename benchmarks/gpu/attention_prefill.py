"""Time of one layer's prefill attention over a paged cache: whole prompts, a chunk behind a long context, and a step
that mixes a chunk with decode rows.

Claim: none yet; the figures say how far the paged kernel is from torch on contiguous keys and from FlashInfer. Shares
are of the rate of a large bf16 matrix product.

    benchmarks/gpu/run.sh attention_prefill
"""

from __future__ import annotations

from attention_peers import flashinfer, torch_attention
from cases import Filled, Shape
from harness import Part, product_of, run_part
from torch.nn.attention import SDPBackend

ALWAYS = ("product", "kvshard", "FlashInfer")


def shapes(dry: bool) -> dict[str, Shape]:
    heads = (4, 2, 16, 16) if dry else (32, 8, 128, 16)
    if dry:
        lens = {"prefill": ((40,) * 2, (40,) * 2), "chunk": ((40,), (20,)), "mixed": ((30, 40), (1, 20))}
    else:
        lens = {
            "prefill, 4 x 2048": ((2048,) * 4, (2048,) * 4),
            "prefill, 1 x 8192": ((8192,), (8192,)),
            "chunk of 512, context 8192": ((8192,), (512,)),
            "mixed, 31 x 4096 decode and a chunk of 512": ((4096,) * 32, (1,) * 31 + (512,)),
        }
    return {f"{name}, {(s := Shape(*pair, *heads)).heads}": s for name, pair in lens.items()}


def variants(shape: Shape) -> tuple[str, ...]:
    """torch takes rows of one length, and cuDNN no queries that begin behind the first key."""
    if len(set(shape.query_lens)) > 1:
        return ALWAYS
    whole = shape.query_lens == shape.context_lens
    return (*ALWAYS, "torch flash", "torch cuDNN") if whole else (*ALWAYS, "torch flash")


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(case, variant) for case, shape in shapes(dry).items() for variant in variants(shape)]


def body(part: Part) -> None:
    for case, shape in shapes(part.dry).items():
        product, operations = product_of(part)
        filled = Filled(shape, part.device, 2)
        makers = {
            "product": product,
            "kvshard": filled.ours(),
            "torch flash": torch_attention(filled, SDPBackend.FLASH_ATTENTION),
            "torch cuDNN": torch_attention(filled, SDPBackend.CUDNN_ATTENTION),
            "FlashInfer": flashinfer(filled),
        }
        names = variants(shape)
        amounts = dict.fromkeys(names, shape.operations()) | {"product": operations}
        part.measure(case, {name: makers[name] for name in names}, amounts, unit="operations")


if __name__ == "__main__":
    run_part("attention_prefill", __doc__, rows, body)

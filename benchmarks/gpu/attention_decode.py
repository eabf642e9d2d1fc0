"""Time of one layer's decode attention over a paged cache, 128k cached tokens and more.

Claims: bf16 reaches at least 0.85 of the measured copy bandwidth, and is no slower than FlashInfer at block size 16.
Ragged lengths (Zipf) take at most 1.15 of the time of even ones with as many tokens. An int8 cache is at least 1.6
times and an int4 cache at least 2.5 times faster than bf16.

    benchmarks/gpu/run.sh attention_decode

Peers: torch on contiguous keys, its best case (flash, cuDNN, flex_attention), and FlashInfer on the same blocks.
Every result is compared with float32 attention before it is timed.
"""

from __future__ import annotations

from attention_peers import flashinfer, flex, torch_attention
from cases import Filled, Shape, zipf_lengths
from harness import Part, copy_of, run_part, sets_for
from torch.nn.attention import SDPBackend

FORMATS = {"kvshard bf16": "auto", "kvshard int8": "int8", "kvshard fp8": "fp8", "kvshard int4": "int4"}
DENSE = ("copy", "kvshard", "torch flash", "torch cuDNN", "FlashInfer")
RAGGED = ("copy", "kvshard, even", "kvshard, ragged", "FlashInfer, ragged")


def even_shapes(dry: bool) -> list[Shape]:
    if dry:
        return [Shape.decode((40,) * 2, 4, 2, 16, 16), Shape.decode((40,) * 2, 8, 2, 16, 64)]
    rows = (4096,) * 32
    return [
        Shape.decode(rows, 32, 8, 128, 16),
        Shape.decode(rows, 32, 8, 128, 64),
        Shape.decode(rows, 64, 8, 128, 16),
        Shape.decode(rows, 64, 8, 128, 64),
        Shape.decode(rows, 32, 8, 64, 16),
        Shape.decode(rows, 64, 8, 64, 64),
        Shape.decode((65536,) * 4, 32, 8, 128, 16),
    ]


def ragged_shapes(dry: bool) -> list[Shape]:
    if dry:
        return [Shape.decode(zipf_lengths(3, 90), 4, 2, 16, 16)]
    return [Shape.decode(zipf_lengths(32, 32 * 4096), 32, 8, 128, block_size) for block_size in (16, 64)]


def quantised_shapes(dry: bool) -> list[Shape]:
    if dry:
        return [Shape.decode((40,) * 2, 4, 2, 16, 16)]
    return [Shape.decode((8192,) * 32, 32, 8, 128, block_size) for block_size in (16, 64)]


def name_of(kind: str, shape: Shape) -> str:
    lens = shape.context_lens
    rows = (
        f"{len(lens)} x {lens[0]}"
        if len(set(lens)) == 1
        else f"{len(lens)} rows of {min(lens)} - {max(lens)}"
    )
    return f"{kind}, {rows}, {shape.heads}"


def even_variants(index: int) -> tuple[str, ...]:
    """flex_attention is compiled again for every shape, so it is timed at the first only."""
    return (*DENSE, "flex_attention") if index == 0 else DENSE


def rows(dry: bool) -> list[tuple[str, str]]:
    table = [
        (name_of("even", shape), variant)
        for index, shape in enumerate(even_shapes(dry))
        for variant in even_variants(index)
    ]
    table += [(name_of("ragged", shape), variant) for shape in ragged_shapes(dry) for variant in RAGGED]
    table += [
        (name_of("formats", shape), variant)
        for shape in quantised_shapes(dry)
        for variant in ("copy", *FORMATS)
    ]
    return table


def even(part: Part, index: int, shape: Shape) -> None:
    case = name_of("even", shape)
    copy, copied = copy_of(part)
    filled = Filled(shape, part.device, sets_for(shape.bytes_moved("auto"), part.dry))
    makers = {
        "copy": copy,
        "kvshard": filled.ours(),
        "torch flash": torch_attention(filled, SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": torch_attention(filled, SDPBackend.CUDNN_ATTENTION),
        "FlashInfer": flashinfer(filled),
        "flex_attention": flex(filled),
    }
    variants = even_variants(index)
    amounts = dict.fromkeys(variants, shape.bytes_moved("auto")) | {"copy": copied}
    part.measure(case, {name: makers[name] for name in variants}, amounts)
    part.target(f"share of copy bandwidth: {case}", 0.85, part.share(case, "kvshard"))
    if shape.block_size == 16:
        part.target(
            f"time against FlashInfer: {case}", 1.0, part.ratio(case, "kvshard", "FlashInfer"), at_least=False
        )


def ragged(part: Part, shape: Shape) -> None:
    case = name_of("ragged", shape)
    copy, copied = copy_of(part)
    count = len(shape.context_lens)
    lens = (sum(shape.context_lens) // count,) * count
    alike = Shape.decode(lens, shape.num_q, shape.num_kv, shape.head_dim, shape.block_size)
    layers = sets_for(shape.bytes_moved("auto"), part.dry)
    filled, evened = Filled(shape, part.device, layers), Filled(alike, part.device, layers)
    makers = dict(zip(RAGGED, (copy, evened.ours(), filled.ours(), flashinfer(filled)), strict=True))
    amounts = dict.fromkeys(RAGGED, shape.bytes_moved("auto")) | {"copy": copied}
    part.measure(case, makers, amounts)
    ratio = part.ratio(case, "kvshard, ragged", "kvshard, even")
    part.target(f"ragged against even: {case}", 1.15, ratio, at_least=False)


def quantised(part: Part, shape: Shape) -> None:
    case = name_of("formats", shape)
    copy, copied = copy_of(part)
    filled = Filled(shape, part.device, sets_for(shape.bytes_moved("int4"), part.dry))
    makers = {"copy": copy} | {name: filled.ours(format) for name, format in FORMATS.items()}
    amounts = {name: shape.bytes_moved(format) for name, format in FORMATS.items()} | {"copy": copied}
    part.measure(case, makers, amounts)
    for name, bound in (("kvshard int8", 1.6), ("kvshard int4", 2.5)):
        part.target(f"{name}, times faster than bf16: {case}", bound, part.ratio(case, "kvshard bf16", name))


def body(part: Part) -> None:
    for index, shape in enumerate(even_shapes(part.dry)):
        even(part, index, shape)
    for shape in ragged_shapes(part.dry):
        ragged(part, shape)
    for shape in quantised_shapes(part.dry):
        quantised(part, shape)


if __name__ == "__main__":
    run_part("attention_decode", __doc__, rows, body)

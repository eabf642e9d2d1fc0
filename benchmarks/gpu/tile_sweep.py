"""Times every plausible tile of the attention kernel, and prints rows for kernels/tiles.py with their figures.

Claim: the table's tile is within 3 percent of the best one. The table is changed by hand, as every row of it also has
to compile for the other targets without spills.

    benchmarks/gpu/run.sh tile_sweep

Decode: 32 rows x 8192 tokens, each head dimension and cache format. Prefill: one prompt of 4096, for the block_n and
chunk that the table has, as these must be the same for both.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from cases import BOUNDS, Filled, Shape
from harness import NotHereError, Part, Run, copy_of, product_of, run_part

from kvshard.kernels.ops import CacheFormat
from kvshard.kernels.tiles import AttentionTile, AttentionTiles, attention_tiles

FORMATS: tuple[CacheFormat, ...] = ("auto", "int8", "fp8", "int4")
ELEMENT_SIZE = 2
WORKERS = 8


def shape_of(kind: str, head_dim: int, dry: bool) -> Shape:
    heads = (4, 2, head_dim, 16) if dry else (32, 8, head_dim, 16)
    if kind == "decode":
        return Shape.decode((40,) if dry else (8192,) * 32, *heads)
    return Shape((24,) if dry else (4096,), (24,) if dry else (4096,), *heads)


def sweeps(dry: bool) -> list[tuple[str, int, CacheFormat]]:
    if dry:
        return [("decode", 16, "auto"), ("decode", 16, "int4"), ("prefill", 16, "auto")]
    decode = [("decode", head_dim, format) for head_dim in (64, 128) for format in FORMATS]
    return decode + [("prefill", head_dim, "auto") for head_dim in (64, 128)]


def candidates(kind: str, head_dim: int, format: CacheFormat, dry: bool) -> Iterator[AttentionTiles]:
    """The table's tile first, then the others."""
    table = attention_tiles(head_dim, format, ELEMENT_SIZE)
    yield table
    if kind == "decode":
        grid = (
            product((16, 32), (32,), (4,), (2,))
            if dry
            else product((32, 64, 128), (256, 512, 1024), (4, 8), (2, 3, 4))
        )
        for block_n, chunk, warps, stages in grid:
            both = {"block_n": block_n, "chunk": chunk}
            decode = replace(table.decode, **both, num_warps=warps, num_stages=stages)
            tiles = replace(table, decode=decode, prefill=replace(table.prefill, **both))
            if tiles != table:
                yield tiles
    else:
        grid = product((16,), (4,), (2,)) if dry else product((16, 32, 64, 128), (4, 8), (2, 3, 4))
        for rows_of_tile, warps, stages in grid:
            prefill = replace(table.prefill, min_tile_rows=rows_of_tile, num_warps=warps, num_stages=stages)
            if prefill != table.prefill:
                yield replace(table, prefill=prefill)


def line(tile: AttentionTile) -> str:
    rest = f"num_warps={tile.num_warps}, num_stages={tile.num_stages}"
    return f"AttentionTile({tile.min_tile_rows}, {tile.block_n}, {tile.chunk}, {rest})"


def name_of(kind: str, head_dim: int, format: CacheFormat) -> str:
    return f"{kind}, head_dim {head_dim}, {format}"


def variants(kind: str, head_dim: int, format: CacheFormat, dry: bool) -> dict[str, AttentionTiles]:
    return {line(getattr(tiles, kind)): tiles for tiles in candidates(kind, head_dim, format, dry)}


def ceiling(kind: str) -> str:
    return "copy" if kind == "decode" else "product"


def rows(dry: bool) -> list[tuple[str, str]]:
    return [
        (name_of(*sweep), name)
        for sweep in sweeps(dry)
        for name in (ceiling(sweep[0]), *variants(*sweep, dry))
    ]


def attend(filled: Filled, format: CacheFormat, tiles: AttentionTiles) -> Callable[[], Run]:
    def make() -> Run:
        try:
            from kvshard.kernels.triton.attention import paged_attention
        except ImportError as error:
            raise NotHereError(f"{error.name} is missing") from error
        layers, q = filled.layers(format), filled.queries(format)

        def run(i: int) -> torch.Tensor:
            layer = layers[i % len(layers)]
            return paged_attention(q, layer, filled.meta, filled.heads, filled.scale, tiles=tiles)

        filled.check(run(0), BOUNDS[format])
        return run

    return make


def compile_some(number: int) -> None:
    """Every WORKERS-th tile, on one long row: what is compiled here is found in triton's cache by the measuring."""
    everything = [(sweep, tiles) for sweep in sweeps(False) for tiles in variants(*sweep, False).values()]
    for (kind, head_dim, format), tiles in everything[number::WORKERS]:
        shape = shape_of(kind, head_dim, False)
        one = replace(shape, context_lens=shape.context_lens[:1], query_lens=shape.query_lens[:1])
        with torch.inference_mode(), suppress(Exception):  # it fails again, and is noted, where it is timed
            attend(Filled(one, torch.device("cuda"), 1), format, tiles)()


def best(part: Part, sweep: tuple[str, int, CacheFormat]) -> None:
    """Prints the rows of a sweep from the fastest on, and how far the table's tile is from that."""
    kind = sweep[0]
    case = name_of(*sweep)
    names = list(variants(*sweep, part.dry))
    timed = sorted((median(s), name) for name in names if (s := part.rows[case, name].samples_us))
    device = "a CPU" if part.dry else torch.cuda.get_device_name()
    print(f"{case}, on {device}:")
    for us, name in timed[:5]:
        share = part.share(case, name, ceiling(kind))
        mark = ", the table's" if name == names[0] else ""
        print(f"    {name},  # {device}: {us:.1f} us, {share:.2f} of {ceiling(kind)}{mark}")
    ratio = part.ratio(case, names[0], timed[0][1]) if timed else None
    part.target(f"the table's tile against the best: {case}", 1.03, ratio, at_least=False)


def body(part: Part) -> None:
    if not part.dry:
        workers = min(WORKERS, os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(compile_some, range(WORKERS), chunksize=1)
    for sweep in sweeps(part.dry):
        kind, head_dim, format = sweep
        shape = shape_of(kind, head_dim, part.dry)
        filled = Filled(shape, part.device, 2)
        work = shape.bytes_moved(format) if kind == "decode" else shape.operations()
        top, amount = copy_of(part) if kind == "decode" else product_of(part)
        tiles = variants(*sweep, part.dry)
        makers = {ceiling(kind): top} | {name: attend(filled, format, tiles[name]) for name in tiles}
        amounts = dict.fromkeys(makers, work) | {ceiling(kind): amount}
        part.measure(name_of(*sweep), makers, amounts, unit="bytes" if kind == "decode" else "operations")
        best(part, sweep)


if __name__ == "__main__":
    run_part("tile_sweep", __doc__, rows, body)

"""Two processes as two ranks on the one device: are their results right? Times mean nothing, as they take turns.

Claims: a Decoder cut over two ranks, which sum over gloo, gives the logits of one rank; the fused all-reduce over
buffers that the ranks map from one another (CUDA IPC) gives both the bits of its definition's sum.

    benchmarks/gpu/run.sh two_ranks

In the dry mode the ranks sum over the CPU's shared memory, and the interpreted all-reduce kernel works on files that
both map, which is what stands in for CUDA IPC.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import NotHereError, Part, check, run_part
from torch import Tensor
from torch.distributed import FileStore

from kvshard.kernels import ops
from kvshard.parallel.group import Group
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.parameters import expected_tensors, local_parameters
from kvshard.runtime.models.spec import ModelSpec, RotarySpec
from kvshard.runtime.shard.decoder import Decoder
from kvshard.runtime.shard.kv_cache import KVCache
from kvshard.runtime.shard.slots import StepInputs

CASE = "two ranks on one device"
DECODER, SUMS = "decoder over gloo", "fused all-reduce over peer buffers"
WORLD_SIZE, TOKENS, BLOCK_SIZE = 2, 20, 16
ROUNDS, NUM_ROWS, HIDDEN, EPS = 5, 4, 256, 1e-5
DEADLINE_S = 100


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(CASE, DECODER), (CASE, SUMS)]


def model_spec() -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=128,
        num_layers=2,
        num_q_heads=8,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=192,
        vocab_size=160,
        layer_windows=(None, None),
        rms_norm_eps=EPS,
        rotary=RotarySpec(10000.0, 16),
        tie_embeddings=False,
        max_position_embeddings=64,
        eos_token_ids=(),
        bos_token_id=None,
    )


def logits_of(group: Group) -> Tensor:
    """This rank's logits [TOKENS, local vocabulary] of a prompt, with weights that are the same at any world size."""
    spec, device = model_spec(), group.device
    shard = ShardMap.build(spec.dims, group.world_size).shard(group.rank)
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: torch.randn(shape, generator=generator) * 0.1 for name, shape in expected_tensors(spec).items()
    }
    weights = {}
    for parameter in local_parameters(spec, shard):
        pieces = [
            whole[p.tensor].index_select(p.axis, torch.tensor(list(p.indices), dtype=torch.int64))
            for p in parameter.pieces
        ]
        weights[parameter.name] = torch.cat(pieces, dim=parameter.pieces[0].axis).to(device)
    decoder = Decoder(spec, shard, weights, group, TOKENS)
    num_blocks = -(-TOKENS // BLOCK_SIZE) + 1
    cache = KVCache(
        spec,
        shard,
        group_blocks=(num_blocks,),
        block_size=BLOCK_SIZE,
        format="auto",
        dtype=torch.float32,
        device=device,
    )
    count = np.array([TOKENS], np.int32)
    table = torch.arange(1, num_blocks, dtype=torch.int32, device=device)[None]
    positions = torch.arange(TOKENS, device=device)
    nobody = np.zeros(0, np.int32)
    inputs = StepInputs(
        token_ids=positions * 7 % spec.vocab_size,
        positions=positions,
        slot_mappings=(positions + BLOCK_SIZE,),  # the blocks lie one behind the other, from block 1 on
        attention=(ops.AttentionMetadata.build(count, count, table, BLOCK_SIZE, device),),
        sample_tokens=positions,
        sample_slots=nobody,
        sample_positions=nobody.astype(np.int64),
    )
    with torch.inference_mode():
        return decoder.logits(decoder.forward(inputs, cache)[inputs.sample_tokens])


def decoder_on_ranks(group: Group, folder: Path) -> Tensor:
    return logits_of(group).cpu()


def round_inputs(number: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every rank's x, the residual and the norm's weight."""
    generator = torch.Generator().manual_seed(number)
    xs = [torch.randn(NUM_ROWS, HIDDEN, generator=generator).bfloat16() for _ in range(WORLD_SIZE)]
    residual = torch.randn(NUM_ROWS, HIDDEN, generator=generator).bfloat16()
    return xs, residual, torch.randn(HIDDEN, generator=generator).bfloat16()


def sums_on_ranks(group: Group, folder: Path) -> Tensor:
    """[ROUNDS, 2, NUM_ROWS, HIDDEN]: residual and output of sums one after another."""
    from kvshard.kernels.triton.peer_all_reduce import all_reduce_add_rms_norm

    peers = mapped_files(group.rank, folder) if group.device.type == "cpu" else mapped_memory(group)
    results = []
    for number in range(ROUNDS):
        xs, residual, weight = (
            [y.to(group.device) for y in x] if isinstance(x, list) else x.to(group.device)
            for x in round_inputs(number)
        )
        y = all_reduce_add_rms_norm(xs[group.rank], residual, weight, EPS, peers)
        results.append(torch.stack((residual, y)).cpu())
    group.barrier("nobody unmaps what others still read")
    return torch.stack(results)


def mapped_memory(group: Group) -> Any:
    from kvshard.parallel.peer_buffers import connect_peer_buffers

    peers = connect_peer_buffers(group, max_rows=NUM_ROWS, max_hidden=HIDDEN, dtype=torch.bfloat16)
    assert peers is not None, "the ranks could not map each other's memory"
    return peers


def mapped_files(rank: int, folder: Path) -> Any:
    from kvshard.kernels.peers import PeerBuffers

    def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        size = int(np.prod(shape))
        return [
            torch.from_file(f"{folder}/{name}-{owner}", shared=True, size=size, dtype=dtype).view(shape)
            for owner in range(WORLD_SIZE)
        ]

    data = mapped("data", (2, NUM_ROWS, HIDDEN), torch.bfloat16)
    return PeerBuffers.build(rank, data, mapped("signals", (NUM_ROWS, WORLD_SIZE), torch.int64), 2)


def rank_main(
    pipe: Connection, work: Callable[[Group, Path], Tensor], rank: int, device: str, folder: str
) -> None:
    torch.set_num_threads(1)
    try:
        group = Group.connect(
            FileStore(f"{folder}/store", WORLD_SIZE),
            rank=rank,
            world_size=WORLD_SIZE,
            epoch=0,
            job_id=work.__name__,
            device=device,
            host_id="host",
            timeout_s=60,
            max_bytes=1 << 20,
        )
        pipe.send(work(group, Path(folder)).float().numpy())
    except Exception as error:  # noqa: BLE001 - the parent raises it
        pipe.send((error.name if isinstance(error, ImportError) else None, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # gloo may have left threads behind


def on_two_ranks(work: Callable[[Group, Path], Tensor], device: str) -> list[Tensor]:
    """What each rank's `work` gave. Raises what a rank raised; NotHereError for a module that is missing."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for owner in range(WORLD_SIZE):
            Path(folder, f"data-{owner}").write_bytes(bytes(2 * NUM_ROWS * HIDDEN * 2))
            Path(folder, f"signals-{owner}").write_bytes(bytes(NUM_ROWS * WORLD_SIZE * 8))
        pipes, processes = [], []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe(duplex=False)
            processes.append(context.Process(target=rank_main, args=(theirs, work, rank, device, folder)))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return [received(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def received(pipe: Connection, rank: int) -> Tensor:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError(f"rank {rank} is not done within {DEADLINE_S} s")
    result = pipe.recv()
    if isinstance(result, tuple):
        missing, report = result
        if missing is not None:
            raise NotHereError(f"{missing} is missing")
        raise RuntimeError(f"rank {rank}: {report.strip().splitlines()[-1]}")
    return torch.from_numpy(result)


def check_decoder(part: Part) -> None:
    parts = on_two_ranks(decoder_on_ranks, part.device.type)
    check(torch.cat(parts, dim=1), logits_of(Group.single(part.device)).cpu(), 1e-4)


def check_sums(part: Part) -> None:
    first, second = on_two_ranks(sums_on_ranks, part.device.type)
    assert torch.equal(first, second), "the ranks differ"
    for number, (residual, y) in enumerate(first):
        xs, before, weight = round_inputs(number)
        total = before.float() + sum(x.float() for x in xs)
        check(residual, total, 0.005)
        check(y, total / (total.square().mean(1, keepdim=True) + EPS).sqrt() * weight.float(), 0.01)


def body(part: Part) -> None:
    for name, work in ((DECODER, check_decoder), (SUMS, check_sums)):
        part.once(CASE, name, partial(work, part))


if __name__ == "__main__":
    run_part("two_ranks", __doc__, rows, body)

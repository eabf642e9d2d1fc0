"""What each rank of tests/runtime/test_decoder.py runs: a real worker, plans fed by hand, everything recorded."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from ranks import connect
from torch.distributed import Store

from kvshard.kernels.cpu.tape import Tape
from kvshard.parallel.group import Group
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.config import parse_config
from kvshard.runtime.coordinator.plan import OpenedSlot, SlotSampling, StepPlan
from kvshard.runtime.models.checkpoint import open_checkpoint
from kvshard.runtime.shard import decoder
from kvshard.runtime.shard.worker import Worker

BLOCK_SIZE = 4
NUM_BLOCKS = 64
GREEDY = SlotSampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, logprobs=None, stop_ids=(), stop_from=0
)


def make_worker(
    path: Path,
    group: Group,
    poison: bool = True,
    cache_dtype: str = "auto",
    dtype: str = "float32",
    quantization: str = "none",
    max_num_batched_tokens: int = 64,
) -> Worker:
    """A worker with a small cache, filled with NaN: nothing may be read that was not written."""
    config = parse_config(
        {
            "model": str(path),
            "tensor_parallel_size": group.world_size,
            "device": "cpu",
            "dtype": dtype,
            "quantization": quantization,
            "cache": {"block_size": BLOCK_SIZE, "dtype": cache_dtype},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": max_num_batched_tokens},
        },
        "test",
    )
    checkpoint = open_checkpoint(path)
    shard_map = ShardMap.build(checkpoint.spec.dims, group.world_size)
    worker = Worker(config, checkpoint, shard_map, group, max_model_len=64)
    worker.allocate(NUM_BLOCKS)
    if poison:
        worker.cache.fill(float("nan"))
    return worker


Tables = tuple[tuple[int, ...], ...]  # by layer group


def plan(step_id: int, rows: list[tuple[int, list[int]]], opened: dict[int, Tables]) -> StepPlan:
    """Rows of (slot, token ids); every row samples. `opened` gives new slots their blocks."""
    return StepPlan(
        epoch=0,
        step_id=step_id,
        closed_slots=np.array([], np.int32),
        opened=tuple(OpenedSlot(slot, 0, tables, GREEDY) for slot, tables in opened.items()),
        appended_slots=np.array([], np.int32),
        appended_groups=np.array([], np.int32),
        appended_blocks=np.array([], np.int32),
        copied=(),
        row_slots=np.array([slot for slot, _ in rows], np.int32),
        row_num_new_tokens=np.array([len(ids) for _, ids in rows], np.int32),
        row_from_device=np.zeros(len(rows), np.bool_),
        row_samples=np.ones(len(rows), np.bool_),
        token_ids=np.array([i for _, ids in rows for i in ids], np.int32),
    )


def trace(
    store: Store,
    rank: int,
    world_size: int,
    path: Path,
    prompts: list[list[int]],
    cut: int,
    cache_dtype: str = "auto",
) -> Any:
    """`trace_model` of one model, in a group of its own."""
    return trace_model(connect(store, rank, world_size), path, prompts, cut, cache_dtype)


def trace_all(
    store: Store, rank: int, world_size: int, paths: dict[str, Path], prompts: list[list[int]], cut: int
) -> dict[str, Any]:
    """`trace_model` of several models, one after the other, by the keys of `paths`."""
    group = connect(store, rank, world_size)
    return {name: trace_model(group, path, prompts, cut) for name, path in paths.items()}


def trace_model(
    group: Group, path: Path, prompts: list[list[int]], cut: int, cache_dtype: str = "auto"
) -> Any:
    """Residual stream after every layer and logits of every prompt's tokens, prompts cut in two at `cut`.

    Returns ({layer: [tokens, hidden]} with the prompts one after the other, [prompts, vocab] last-token logits).
    """
    worker = make_worker(path, group, cache_dtype=cache_dtype)
    # Block ids in no order, so that a table that is not followed shows.
    chance = np.random.default_rng(0)
    free = [chance.permutation(np.arange(1, num)).tolist() for num in worker.cache.group_blocks]
    tables = {
        i: tuple(tuple(ids.pop() for _ in range(-(-len(prompt) // BLOCK_SIZE))) for ids in free)
        for i, prompt in enumerate(prompts)
    }
    layers: dict[int, list[list[torch.Tensor]]] = {}
    recorded: list[torch.Tensor] = []
    plain = decoder.join

    def recording(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = plain(x, residual, *rest)
        recorded.append(residual.clone())
        return out

    parts = [[ids[:cut] for ids in prompts], [ids[cut:] for ids in prompts]]
    logits = torch.empty(0)
    for step, part in enumerate(parts):
        recorded.clear()
        step_plan = plan(step, list(enumerate(part)), tables if step == 0 else {})
        with torch.inference_mode(), mock.patch.object(decoder, "join", recording):
            inputs = worker.slots.apply(step_plan)
            hidden = worker.decoder.forward(inputs, worker.cache)
            logits = worker.decoder.logits(hidden[inputs.sample_tokens])
        lengths = [len(ids) for ids in part]
        for layer, residual in enumerate(recorded[1::2]):  # the second sum of a layer ends it
            layers.setdefault(layer, []).append(list(residual.split(lengths)))
    whole = {
        layer: torch.cat([torch.cat(pieces) for pieces in zip(*steps, strict=True)])
        for layer, steps in layers.items()
    }
    return {k: v.numpy() for k, v in whole.items()}, _gather(logits, worker, group).numpy()


def _gather(logits: torch.Tensor, worker: Worker, group: Group) -> torch.Tensor:
    """[rows, vocab] from every rank's slice."""
    rows = worker.shard.vocab_rows
    everything = torch.zeros(logits.shape[0], worker.spec.vocab_size)
    everything[:, rows.start : rows.stop] = logits
    return group.all_reduce(everything, "test logits")


def reference(model: Any, prompts: list[list[int]]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """What `trace` should return, by transformers in float64; it changes the model's dtype."""
    model = model.double()
    layers: dict[int, list[torch.Tensor]] = {}
    logits = []
    for prompt in prompts:
        outputs: dict[int, torch.Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, out, i=i, outputs=outputs: outputs.update({i: out}))
            for i, layer in enumerate(model.model.layers)
        ]
        with torch.inference_mode():
            logits.append(model(torch.tensor([prompt])).logits[0, -1].float())
        for hook in hooks:
            hook.remove()
        for i, out in outputs.items():
            layers.setdefault(i, []).append(
                (out[0] if isinstance(out, tuple) else out).reshape(len(prompt), -1)
            )
    return {i: torch.cat(parts).float() for i, parts in layers.items()}, torch.stack(logits)


def decode(
    store: Store, rank: int, world_size: int, path: Path, recorded: bool, dtype: str = "float32"
) -> Any:
    """`decode_steps` in a group of its own; numpy arrays."""
    logits, num_played = decode_steps(connect(store, rank, world_size), path, recorded, dtype)
    return [x.numpy() for x in logits], num_played


def decode_steps(
    group: Group,
    path: Path,
    recorded: bool = True,
    dtype: str = "float32",
    cache_dtype: str = "auto",
    quantization: str = "none",
) -> tuple[list[torch.Tensor], int]:
    """This rank's logits of each token of eleven steps, and how many of the steps were played: prompts of different
    lengths, then a token of five rows, of three, and of five again, and once a row that brings four more of its prompt."""
    worker = make_worker(path, group, dtype=dtype, cache_dtype=cache_dtype, quantization=quantization)
    if not recorded:
        worker._steps._step = None
    chance = np.random.default_rng(1)
    lengths = [3, 9, 4, 1, 6]
    prompts = [chance.integers(3, 100, length).tolist() for length in lengths]
    free = [chance.permutation(np.arange(1, num)).tolist() for num in worker.cache.group_blocks]
    tables = {i: tuple(tuple(ids.pop() for _ in range(6)) for ids in free) for i in range(len(lengths))}
    logits = []
    with (
        torch.inference_mode(),
        mock.patch.object(Tape, "play", autospec=True, side_effect=Tape.play) as play,
    ):
        for step in range(11):
            slots = range(5) if step < 5 or step > 7 else (0, 2, 3)
            lengths = [4 if (step, slot) == (4, 1) else 1 for slot in slots]
            rows = [
                (slot, chance.integers(3, 100, length).tolist())
                for slot, length in zip(slots, lengths, strict=True)
            ]
            step_plan = plan(step, list(enumerate(prompts)) if step == 0 else rows, {} if step else tables)
            hidden = worker._steps.forward(worker.slots.apply(step_plan))
            logits.append(worker.decoder.logits(hidden).clone())
    return logits, play.call_count

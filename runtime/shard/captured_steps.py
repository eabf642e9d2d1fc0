"""Decode steps on a GPU without a launch for each kernel: CUDA graphs, captured once and replayed for any step that fits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...kernels.ops import AttentionMetadata
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import StepInputs

# Tokens of a row up to which its steps are replayed. A graph has a program for each chunk that a row may have, and with longer
# rows most of them would find nothing to do, while launches are a small part of such a step.
MAX_CONTEXT = 4096
_CHUNK = 512  # whole chunks of any attention tile (kernels/tiles.py)
_NO_SLOT = -1  # of a token that is not stored

Step = Callable[[], Tensor]


class GraphPool:
    """Graphs that share memory: what one returned is good until another of them is replayed."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> Step:
        """What replays the kernels that `step` launches, on the same addresses. Raises RuntimeError."""
        # Kernels are compiled and attention is planned before the capture, on a stream of their own as torch asks.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as NCCL's, may ask the device something meanwhile.
        with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CapturedSteps:
    """Runs the decoder. Steps with one new token a row are replays of the graph of the next larger bucket of rows, whose
    other rows are idle; steps with prompts, and with rows longer than `MAX_CONTEXT`, run as they come.

    All ranks capture at the same time, the largest bucket first, so that the smaller ones find their memory in its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        capture: Callable[[Step], Step],
    ) -> None:
        """Raises RuntimeError when a step cannot be captured."""
        self._decoder = decoder
        self._cache = cache
        self._max_context = min(max_model_len, MAX_CONTEXT)
        device = cache.layers[0].k.device
        with torch.inference_mode():
            self._buckets = [
                _Bucket(decoder, cache, num_rows, num_groups, self._max_context, block_size, device, capture)
                for num_rows in reversed(buckets(max_num_seqs))
            ][::-1]

    def forward(self, inputs: StepInputs) -> Tensor:
        """See `Decoder.forward`; what it returned last may change."""
        meta = inputs.attention[0]
        if meta.max_query_len > 1 or meta.max_context_len > self._max_context:
            return self._decoder.forward(inputs, self._cache)
        num_rows = len(meta.context_lens_host)
        bucket = next(bucket for bucket in self._buckets if bucket.num_rows >= num_rows)
        return bucket.replay(inputs)


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows that have a graph, ascending: 1, 2, 4, 8, then every 16, and `max_num_seqs`."""
    return sorted(
        {n for n in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if n < max_num_seqs} | {max_num_seqs}
    )


def planned_context(max_context: int) -> int:
    """Tokens of the rows that attention is planned for: up to the first of a chunk, from which a window reaches back into as
    many chunks as from anywhere."""
    return -(-max_context // _CHUNK) * _CHUNK + 1


class _Bucket:
    """The step of so many rows, and the tensors it reads."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        num_rows: int,
        num_groups: int,
        max_context: int,
        block_size: int,
        device: torch.device,
        capture: Callable[[Step], Step],
    ) -> None:
        self.num_rows = num_rows
        longest = planned_context(max_context)
        tables = torch.zeros(
            num_groups, num_rows, -(-longest // block_size), dtype=torch.int32, device=device
        )
        metadata = [
            AttentionMetadata.build(
                np.ones(num_rows, np.int32), np.full(num_rows, longest, np.int32), table, block_size, device
            )
            for table in tables.unbind()
        ]
        token_ids, positions, *slot_mappings = torch.zeros(
            2 + num_groups, num_rows, dtype=torch.int64, device=device
        ).unbind()
        self._inputs = StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mappings=tuple(slots.fill_(_NO_SLOT) for slots in slot_mappings),
            attention=tuple(metadata),
            sample_tokens=torch.empty(0, dtype=torch.int64, device=device),
            sample_slots=np.empty(0, np.int32),
            sample_positions=np.empty(0, np.int64),
        )
        self._replay = capture(lambda: decoder.forward(self._inputs, cache))

    def replay(self, inputs: StepInputs) -> Tensor:
        """The hidden states of a step of up to `num_rows` rows. The host does not wait."""
        num_rows = len(inputs.token_ids)
        own = self._inputs
        own.token_ids[:num_rows] = inputs.token_ids
        own.positions[:num_rows] = inputs.positions
        # Idle rows see one position, of whatever block their table had last, and store nothing.
        context_lens = np.ones(self.num_rows, np.int32)
        context_lens[:num_rows] = inputs.attention[0].context_lens_host
        for kept, slots in zip(own.slot_mappings, inputs.slot_mappings, strict=True):
            kept[:num_rows] = slots
            kept[num_rows:] = _NO_SLOT
        for meta, wanted in zip(own.attention, inputs.attention, strict=True):
            meta.refill(context_lens, wanted.block_tables)
        return self._replay()[:num_rows]

"""Decode steps on a GPU without a launch for each kernel: CUDA graphs, captured once and replayed for any step that fits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...kernels.ops import AttentionMetadata
from .buckets import buckets, max_context, planned_context
from .decoder import Decoder
from .kv_cache import KVCache
from .slots import StepInputs

_NO_SLOT = -1  # of a token that is not stored

Step = Callable[[], Tensor]


class GraphPool:
    """Graphs that share memory: what one returned is good until another of them is replayed."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one for all: cuBLAS keeps a work space for each

    def capture(self, step: Step) -> Step:
        """What replays the kernels that `step` launches, on the same addresses. Raises RuntimeError."""
        # Before the capture kernels are compiled and attention is planned.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device something meanwhile.
        with torch.cuda.graph(
            graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CapturedSteps:
    """Runs the decoder of a model that is not sharded. Steps with one new token a row are replays of the graph of the next
    larger bucket of rows, whose other rows are idle; steps with a prompt, or with a row longer than the bucket was planned
    for, run as they come.

    With several shards nothing is captured: a NCCL communicator waits, when it is aborted, for the end of all graphs that
    have its collectives in them, and a shard that is to leave would hang.
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
        device = cache.layers[0].k.device
        with torch.inference_mode():
            # The largest first: the smaller ones find their memory in its own.
            self._buckets = [
                _Bucket(decoder, cache, num_rows, num_groups, max_model_len, block_size, device, capture)
                for num_rows in reversed(buckets(max_num_seqs))
            ][::-1]

    def forward(self, inputs: StepInputs) -> Tensor:
        """See `Decoder.forward`; what it returned last may change."""
        meta = inputs.attention[0]
        num_rows = len(meta.context_lens_host)
        bucket = next(bucket for bucket in self._buckets if bucket.num_rows >= num_rows)
        if meta.max_query_len > 1 or meta.max_context_len > bucket.max_context:
            return self._decoder.forward(inputs, self._cache)
        return bucket.replay(inputs)


class _Bucket:
    """The step of so many rows, and the tensors it reads."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        num_rows: int,
        num_groups: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        capture: Callable[[Step], Step],
    ) -> None:
        self.num_rows = num_rows
        self.max_context = max_context(num_rows, max_model_len)
        longest = planned_context(self.max_context)
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
        # Idle rows store nothing, and see one position of whatever block their table had last, or of block 0, which nobody
        # has written to: rows do not mix, and what comes of it is cut off.
        context_lens = np.ones(self.num_rows, np.int32)
        context_lens[:num_rows] = inputs.attention[0].context_lens_host
        for kept, slots in zip(own.slot_mappings, inputs.slot_mappings, strict=True):
            kept[:num_rows] = slots
            kept[num_rows:] = _NO_SLOT
        for meta, wanted in zip(own.attention, inputs.attention, strict=True):
            meta.refill(context_lens, wanted.block_tables)
        return self._replay()[:num_rows]

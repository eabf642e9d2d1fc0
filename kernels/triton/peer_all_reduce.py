"""One-shot all-reduce fused with the residual add and RMSNorm that follow it, over memory all ranks can reach.

Every rank reads the rows of all ranks and sums them itself, in rank order: one exchange instead of the two of a
reduce and a broadcast, and the same bits everywhere. For small messages this is the fastest way (as in vLLM's and
TensorRT-LLM's custom all-reduce); its traffic grows with the number of ranks, so larger ones belong to NCCL.

How ranks keep in step. Sums of a row are counted from 1, on each rank for itself. For sum n a rank writes its row to
slot n % 2, releases n into its word on every rank, waits until all of its own words are at least n, and reads.

One wait is enough. Writing the slot of n destroys the row of sum n - 2, which a slow rank might still be reading. But
before n this rank has finished n - 1, in which it saw the word n - 1 of every rank; a rank posts that word in a
launch that began after its launch of n - 2 had ended, so nobody reads n - 2 any more. For this, one rank's launches
over the same buffers run one after another, in one stream or joined by events, and never overlap by programmatic
dependent launch. All ranks launch the same numbers of rows in the same order.

Programs wait for programs of other ranks, so each must get to run whatever the others do: the grid is no larger
than the device holds at once, and program i takes rows i, i + P, i + 2 P, ... in order. Of the rows not yet summed
everywhere the first one is then in work on every rank, so there is always progress.

A rank that died leaves the others spinning: the caller has a deadline on the step, and ends the process.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..peers import PeerBuffers
from ..tiles import row_tile

_MAX_HIDDEN = 8192  # a row is held in registers, with the rows of the peers on their way


@triton.jit
def _oldest(words, is_peer, sequence, PEERS: tl.constexpr):
    """The smallest of this rank's words: a sum for which all ranks have put their row here."""
    seen = tl.atomic_add(words, tl.zeros([PEERS], tl.int64), mask=is_peer, sem="acquire", scope="sys")
    return tl.min(tl.where(is_peer, seen, sequence), 0)


@triton.jit
def _post_and_wait(
    signals_ptr, signal_table_ptr, row, sequence, rank, WORLD_SIZE: tl.constexpr, PEERS: tl.constexpr
):
    """Tells every rank that this rank's row of sum `sequence` is written, and waits for theirs."""
    peer = tl.arange(0, PEERS)
    is_peer = peer < WORLD_SIZE
    table = tl.load(signal_table_ptr + peer, mask=is_peer, other=0)
    theirs = table.to(tl.pointer_type(tl.int64)) + row * WORLD_SIZE + rank
    posted = tl.zeros([PEERS], tl.int64) + sequence
    tl.debug_barrier()  # every thread's part of the row is written before one of them says so
    tl.atomic_xchg(theirs, posted, mask=is_peer, sem="release", scope="sys")
    mine = signals_ptr + row * WORLD_SIZE + peer
    oldest = _oldest(mine, is_peer, sequence, PEERS)
    while oldest < sequence:
        oldest = _oldest(mine, is_peer, sequence, PEERS)
    tl.debug_barrier()  # no thread reads a row before one of them has seen all words


@triton.jit
def all_reduce_add_rms_norm_row(
    row,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    data_table_ptr,
    signals_ptr,
    signal_table_ptr,
    sequence_ptr,
    x_stride,
    residual_stride,
    hidden,
    eps,
    rank,
    max_rows,
    max_hidden,
    WORLD_SIZE: tl.constexpr,
    PEERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of one rank: residual += sum over ranks of x, rounded as it is stored; out = rms_norm(residual)."""
    row_type = tl.pointer_type(x_ptr.dtype.element_ty)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    sequence = tl.load(sequence_ptr + row) + 1
    place = ((sequence % 2) * max_rows + row) * max_hidden
    mine = tl.multiple_of(tl.load(data_table_ptr + rank).to(row_type), 16)
    tl.store(
        mine + place + column, tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0), mask=inside
    )
    # These two do not depend on the peers: on their way while this rank waits.
    residual_row = residual_ptr + row * residual_stride + column
    residual = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    _post_and_wait(signals_ptr, signal_table_ptr, row, sequence, rank, WORLD_SIZE, PEERS)

    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(WORLD_SIZE):
        theirs = tl.multiple_of(tl.load(data_table_ptr + peer).to(row_type), 16)
        total += tl.load(theirs + place + column, mask=inside, other=0.0).to(tl.float32)
    stored = (residual + total).to(residual_ptr.dtype.element_ty)
    tl.store(residual_row, stored, mask=inside)
    total = stored.to(tl.float32)
    y = total * (1.0 / tl.sqrt(tl.sum(total * total, 0) / hidden + eps)) * weight
    tl.store(out_ptr + row * hidden + column, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sequence_ptr + row, sequence)


@triton.jit(do_not_specialize=["num_rows", "rank"])  # one binary for all ranks and batches
def all_reduce_add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    data_table_ptr,
    signals_ptr,
    signal_table_ptr,
    sequence_ptr,
    num_rows,
    x_stride,
    residual_stride,
    hidden,
    eps,
    rank,
    max_rows,
    max_hidden,
    WORLD_SIZE: tl.constexpr,
    PEERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every P-th row, P the number of programs."""
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        all_reduce_add_rms_norm_row(
            row,
            x_ptr,
            residual_ptr,
            weight_ptr,
            out_ptr,
            data_table_ptr,
            signals_ptr,
            signal_table_ptr,
            sequence_ptr,
            x_stride,
            residual_stride,
            hidden,
            eps,
            rank,
            max_rows,
            max_hidden,
            WORLD_SIZE,
            PEERS,
            BLOCK,
        )
        row += tl.num_programs(0)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerBuffers
) -> Tensor:
    """Sums x over the ranks, adds the sum to the residual stream in place and returns rms_norm(residual).

    With n ranks, in float32 and in this order: residual = round(residual + (x_0 + x_1 + ... + x_(n-1))), where
    `round` is to its dtype and the only rounding, then y = residual / sqrt(mean(residual^2) + eps) * weight.
    Ranks with equal residuals get equal bits. All ranks call it with equal shapes, in the same order.

    x         [T, H] dtype of the buffers, rows of adjacent elements; T <= peers.max_rows, H <= peers.max_hidden
    residual  [T, H] dtype of x, rows of adjacent elements
    weight    [H] dtype of x
    returns   [T, H] dtype of x, contiguous
    """
    num_rows, hidden = x.shape
    assert num_rows <= peers.max_rows, f"{num_rows} rows do not fit in buffers of {peers.max_rows}"
    assert hidden <= peers.max_hidden, f"rows of {hidden} do not fit in buffers of {peers.max_hidden}"
    assert hidden <= _MAX_HIDDEN, f"rows of {hidden} are longer than {_MAX_HIDDEN}"
    assert x.dtype == peers.data.dtype, f"rows of {x.dtype} do not fit in buffers of {peers.data.dtype}"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block, warps = row_tile(hidden)
    all_reduce_add_rms_norm_kernel[(min(num_rows, peers.num_programs),)](
        x,
        residual,
        weight,
        out,
        peers.data_table,
        peers.signals,
        peers.signal_table,
        peers.sequence,
        num_rows,
        x.stride(0),
        residual.stride(0),
        hidden,
        eps,
        peers.rank,
        peers.max_rows,
        peers.max_hidden,
        WORLD_SIZE=peers.world_size,
        PEERS=triton.next_power_of_2(peers.world_size),
        BLOCK=block,
        num_warps=warps,
    )
    return out

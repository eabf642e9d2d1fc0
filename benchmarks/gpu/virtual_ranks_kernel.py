"""Every rank of the fused all-reduce in one launch: rank = program_id(1), all buffers in one address space."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from kvshard.kernels.triton.peer_all_reduce import all_reduce_add_rms_norm_row


@triton.jit
def virtual_ranks_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    data_table_ptr,
    signals_ptr,
    signal_table_ptr,
    sequence_ptr,
    num_rows,
    hidden,
    eps,
    WORLD_SIZE: tl.constexpr,
    PEERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual, out: [ranks, rows, hidden]; signals [ranks, rows, ranks]; sequence [ranks, rows].

    Grid: (rows, ranks), all of it on the device at once, since programs wait for one another.
    """
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    place = rank.to(tl.int64) * num_rows * hidden
    all_reduce_add_rms_norm_row(
        row,
        x_ptr + place,
        residual_ptr + place,
        weight_ptr,
        out_ptr + place,
        data_table_ptr,
        signals_ptr + rank.to(tl.int64) * num_rows * WORLD_SIZE,
        signal_table_ptr,
        sequence_ptr + rank.to(tl.int64) * num_rows,
        hidden,
        hidden,
        hidden,
        eps,
        rank,
        num_rows,
        hidden,
        WORLD_SIZE,
        PEERS,
        BLOCK,
    )

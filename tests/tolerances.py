"""Every tolerance of the tests, by operation and dtype, each with its reason. Loosening one is a reviewed change.

The bound is |got - expected| <= atol + rtol * |expected|, `expected` from the float64 reference rounded to the dtype.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    atol: float
    rtol: float
    reason: str


F32_ROUNDING = Tolerance(
    1e-6, 2e-6, "float32 arithmetic of a few operations against float64: some 2**-24 each"
)
BF16_TWO_ULP = Tolerance(
    1e-6,
    2**-7,
    "one rounding to bfloat16; Triton's interpreter truncates, so two units in the last place (2**-8)",
)
F16_ULP = Tolerance(
    1e-6,
    2**-10,
    "one rounding to float16, of a float32 value that may lie on the other side of a tie: one unit in the last place",
)

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("norm", torch.float32): F32_ROUNDING,
    ("norm", torch.bfloat16): BF16_TWO_ULP,
    ("norm", torch.float16): F16_ULP,
    ("residual", torch.float32): F32_ROUNDING,
    ("residual", torch.bfloat16): BF16_TWO_ULP,
    ("residual", torch.float16): F16_ULP,
    ("rotary", torch.float32): F32_ROUNDING,
    ("rotary", torch.bfloat16): BF16_TWO_ULP,
    ("rotary", torch.float16): F16_ULP,
    ("scale", torch.float16): Tolerance(
        6e-8,
        2**-10,
        "one rounding to float16 of a key that was turned in float32: one unit in the last place",
    ),
    ("activation", torch.float32): F32_ROUNDING,
    ("activation", torch.bfloat16): BF16_TWO_ULP,
    ("activation", torch.float16): F16_ULP,
    ("attention", torch.float32): Tolerance(
        3e-6, 3e-6, "float32 dot products over head_dim and a few hundred positions, values around 1"
    ),
    ("product", torch.float32): Tolerance(
        2e-4, 1e-6, "float32 sums of up to 2,000 products of numbers around 1, in any order"
    ),
    ("product", torch.bfloat16): Tolerance(
        2e-4,
        2**-7,
        "as in float32, then one rounding to bfloat16, of a sum that may lie on the other side of a tie",
    ),
    ("product", torch.float16): Tolerance(2e-4, 2**-10, "as in float32, then one rounding to float16"),
    ("hidden", torch.float32): Tolerance(
        1e-4, 1e-5, "two layers of float32 products over up to 480 terms, values up to 20, against float64"
    ),
    ("logits", torch.float32): Tolerance(2e-4, 1e-5, "as hidden, and one product more over the hidden size"),
    ("logits in bfloat16", torch.float32): Tolerance(
        0.5,
        0.05,
        "two layers whose every result is rounded to 8 bits; logits of the tiny models reach 20, those of other rows are far",
    ),
    ("logits of a quantised cache", torch.float32): Tolerance(
        1e-2,
        1e-3,
        "as logits, and a key or value at a tie may take the code beside it: one step of the format in one channel",
    ),
    ("attention", torch.bfloat16): Tolerance(
        1.6e-2,
        1.6e-2,
        "softmax weights are rounded to bfloat16 before the second product, and the output once more",
    ),
    ("logsumexp of float32", torch.float32): Tolerance(
        3e-6, 3e-6, "float32 logits and sums; no rounding to the model's dtype on the way"
    ),
    ("logsumexp of bfloat16", torch.float32): Tolerance(
        3e-6, 3e-6, "bfloat16 queries and keys are exact in float32, so as with float32"
    ),
    ("logsumexp of float16", torch.float32): Tolerance(3e-6, 3e-6, "as with bfloat16"),
    ("attention", torch.float16): Tolerance(2e-3, 2e-3, "as with bfloat16, of three bits more"),
    ("mass", torch.float64): Tolerance(
        16.0,
        2**-18,
        "float32 exp of a difference down to -28, whose product with log2(e) is rounded at 2**-19; and entries may round "
        "to the next integer, equal ones together",
    ),
}

NEAR_TIES = {
    "auto": 5e-4,  # float32 sums in another order: about 1e-5 on the tiny models, whose logits are below 20
    "int8": 1e-2,  # as "logits of a quantised cache"
    "fp8": 1e-2,
    "int4": 1e-2,
}
"""By cache dtype, how far the same logits may differ between one run and another: a token that hangs on it may differ."""


def assert_within(got: torch.Tensor, expected: torch.Tensor, operation: str) -> None:
    """Fails with the largest difference when `got` is outside the tolerance of its operation and dtype."""
    tolerance = TOLERANCES[operation, got.dtype]
    torch.testing.assert_close(got.cpu(), expected.cpu(), atol=tolerance.atol, rtol=tolerance.rtol)

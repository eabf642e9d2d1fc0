"""Random numbers that depend on nothing but their name: Philox4x32-10, and the Gumbel noise of the sampler.

Philox is a counter-based generator (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): ten rounds turn a 128-bit counter and a 64-bit key into 128 random bits. Nothing is stored between calls,
so any rank can compute the noise of any token alone.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions
ROUNDS = 10
LANES = 4  # 32-bit words per counter

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random 32-bit words per counter.

    counter, key  int64 tensors that broadcast together, each a 32-bit word in 0..2^32-1; not changed
    returns       four int64 tensors of the broadcast shape, each in 0..2^32-1
    """
    key0, key1 = key
    zeros = torch.zeros_like(counter[0] + counter[1] + counter[2] + counter[3] + key0 + key1)
    x0, x1, x2, x3 = (zeros + word for word in counter)
    product0, product1 = torch.empty_like(x0), torch.empty_like(x0)
    for _ in range(ROUNDS):
        # A product wraps around 2^64, which leaves its 64 bits right. Words 1 and 3 keep them all until the end:
        # only words that get multiplied must be clean above bit 31. In place, as fresh memory costs more than the ops.
        torch.mul(x0, MULTIPLIERS[0], out=product0)
        torch.mul(x2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=x0)
        torch.bitwise_right_shift(product0, 32, out=x2)
        x0.bitwise_xor_(x1).bitwise_xor_(key0).bitwise_and_(MASK)
        x2.bitwise_xor_(x3).bitwise_xor_(key1).bitwise_and_(MASK)
        x1, product1 = product1, x1
        x3, product0 = product0, x3
        key0, key1 = (key0 + KEY_STEPS[0]) & MASK, (key1 + KEY_STEPS[1]) & MASK
    return x0, x1.bitwise_and_(MASK), x2, x3.bitwise_and_(MASK)


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: range, *, sample_index: int = 0) -> Tensor:
    """Noise with the standard Gumbel distribution for each row and each global token id in `tokens`.

    The key is the seed (low word first), the counter (token // 4, position, sample_index, 0), and word token % 4 of
    the result is taken: its upper 23 bits b give u = (b + 0.5) / 2^23, exact in float32 and never 0 or 1, and the
    noise is -log(-log u), between -2.82 and 16.64. A value does not depend on what else is asked for in the call.

    seeds      [R] int64, the bits of the unsigned 64-bit seeds
    positions  [R] int64, 0..2^32-1
    tokens     step 1, ids below 2^34
    returns    [R, len(tokens)] float32, may be a view
    """
    assert tokens.step == 1, f"tokens must be adjacent, not {tokens}"
    first = tokens.start // LANES
    blocks = torch.arange(first, -(-tokens.stop // LANES), device=seeds.device)
    words = philox_4x32(
        (blocks, positions[:, None], torch.full_like(blocks, sample_index), torch.zeros_like(blocks)),
        ((seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]),
    )
    noise = torch.empty(len(seeds), len(blocks), LANES, dtype=torch.float32, device=seeds.device)
    for lane, word in enumerate(words):
        noise[:, :, lane] = word.bitwise_right_shift_(9)
    noise.add_(0.5).mul_(2.0**-23)
    noise.log_().neg_().log_().neg_()
    start = tokens.start - first * LANES
    return noise.view(len(seeds), -1)[:, start : start + len(tokens)]

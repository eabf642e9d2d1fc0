"""The definition of every operation in `sampling_ops`, in plain torch, written to be read.

No code is shared with the back ends. The words of Philox are exact, exp and the noise are float64 until they are
rounded once; divisions, differences and sums are float32 where the operation is. Shapes and dtypes: see the door.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def row_argmax(scores: Tensor, *, first_token: int) -> Tensor:
    """Largest value, lowest column of equals; NaN above all. Packed: (key, reversed token)."""
    ranked = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ranked = torch.where(scores.isnan().any(1, keepdim=True), scores.isnan().float(), ranked)
    is_best = ranked == ranked.amax(1, keepdim=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    column = torch.where(is_best, places, scores.shape[1]).amin(1)
    best = scores.gather(1, column[:, None])[:, 0] + 0.0
    key = torch.where(best.isnan(), 2**31 - 1, ordered_keys(best) - 2**31)
    return key * 2**32 + (_WORD - (first_token + column))


def best_of_ranks(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The largest integer of [N, R], as score and token."""
    largest = packed.amax(0)
    key = largest // 2**32
    bits = torch.where(key < 0, -(2**31) - 1 - key, key)  # -1 - key with a sign
    best, token = bits.int().view(torch.float32), _WORD - largest % 2**32
    return best, torch.where(best.isfinite(), token, -1)


def philox(seeds: Tensor, places: Tensor, first_token: int, count: int) -> Tensor:
    """The random word of each row and token: seeds, places [R] int64 -> [R, count] int64 in 0..2^32-1."""
    tokens = torch.arange(first_token, first_token + count, device=seeds.device)
    rows = torch.zeros_like(seeds)[:, None] + torch.zeros_like(tokens)
    counter = (
        tokens // 4 + rows,
        (places & _WORD)[:, None] + rows,
        (places >> 32 & _WORD)[:, None] + rows,
        rows,
    )
    words = philox_4x32(counter, ((seeds & _WORD)[:, None], (seeds >> 32 & _WORD)[:, None]))
    return torch.stack(words, 2).gather(2, (tokens % 4 + rows)[:, :, None])[:, :, 0]


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words: four words of counter, two of key, four of result."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        left, right = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # the low 64 bits, as unsigned numbers
        x0, x1 = (right >> 32 & _WORD) ^ x1 ^ key0, right & _WORD
        x2, x3 = (left >> 32 & _WORD) ^ x3 ^ key1, left & _WORD
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return x0, x1, x2, x3


def gumbel(bits: Tensor) -> Tensor:
    """-log(-log u) with u = (bits + 0.5) / 2^23: int64 in 0..2^23-1 -> float32."""
    uniform = (bits.double() + 0.5) * 2.0**-23
    return (-torch.log(-torch.log(uniform))).float()


def gumbel_noise(seeds: Tensor, places: Tensor, first_token: int, count: int) -> Tensor:
    """[R, count] float32: the noise of each row and token."""
    return gumbel(philox(seeds, places, first_token, count) >> 9)


def gumbel_argmax(
    logits: Tensor,
    temperature: Tensor,
    cut: Tensor,
    seeds: Tensor,
    places: Tensor,
    sampled: Tensor,
    *,
    first_token: int,
) -> Tensor:
    """row_argmax of logits / temperature, plus noise where sampled, without what is below the cut."""
    scaled = logits / temperature[:, None]
    noise = gumbel_noise(seeds, places, first_token, logits.shape[1])
    scores = torch.where(sampled[:, None], scaled + noise, scaled)
    return row_argmax(scores.masked_fill(scaled < cut[:, None], -torch.inf), first_token=first_token)


def masses(scaled: Tensor, max_logits: Tensor) -> Tensor:
    """exp(x - max) in units of 2^-40: [R, V], [R] -> [R, V] int64."""
    return ((scaled - max_logits[:, None]).double().exp() * 2.0**40).round().long()


def row_mass(logits: Tensor, max_logits: Tensor) -> Tensor:
    """The sum of the masses."""
    return masses(logits, max_logits).sum(1)


def ordered_keys(values: Tensor) -> Tensor:
    """int64 in 0..2^32-1, in the order of the float32 values."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def weighted_histogram(logits: Tensor, weights: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """The weight of each key that begins with the prefix goes to the bin of its next byte."""
    keys = ordered_keys(logits)
    weights = torch.where(keys >> (shift + 8) == prefix[:, None], weights, 0)
    return torch.zeros(len(logits), 256, dtype=torch.int64).scatter_add(1, keys >> shift & 255, weights)


def count_histogram(logits: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """Every entry weighs 1."""
    return weighted_histogram(logits, torch.ones_like(logits, dtype=torch.int64), prefix, shift)


def mass_histogram(
    logits: Tensor, temperature: Tensor, cut: Tensor, max_logits: Tensor, prefix: Tensor, shift: int
) -> Tensor:
    """Every entry at or above the cut weighs its mass."""
    scaled = logits / temperature[:, None]
    weights = torch.where(scaled >= cut[:, None], masses(scaled, max_logits), 0)
    return weighted_histogram(logits, weights, prefix, shift)

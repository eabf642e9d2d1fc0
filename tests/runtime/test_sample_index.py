"""The samples of one prompt: the same seed, and noise of their own by the sample's index."""

from collections import Counter

import numpy as np
import torch

from kvshard.kernels.sampling_reference import gumbel_noise
from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.plan import SlotSampling
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
SEED = 0xFEDCBA9876543210
SIGNED_SEED = SEED - (1 << 64)
VOCAB = 500


def sampler_of(*indices: int | None) -> Sampler:
    """A slot for each sample index; None: its plan names none."""
    sampler = Sampler(Group.single(CPU), range(VOCAB), VOCAB, len(indices), CPU)
    for slot, index in enumerate(indices):
        named = {} if index is None else {"sample_index": index}
        sampler.open(slot, SlotSampling(1.0, 0, 1.0, 0.0, SEED, False, (), 0, **named))
    return sampler


def test_the_index_is_part_of_the_noise_and_none_is_index_0() -> None:
    indices = [None, 0, 1, 2, 2**31 - 1]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    sampler = sampler_of(*indices)
    for position in (0, 7, 100_000):
        places = torch.tensor([position + ((index or 0) << 32) for index in indices])
        noise = gumbel_noise(torch.full((5,), SIGNED_SEED), places, 0, VOCAB)
        tokens, _ = sampler.sample(
            logits.expand(5, -1), np.arange(5, dtype=np.int32), np.full(5, position, np.int64)
        )
        assert torch.equal(tokens, (logits + noise).argmax(1))
        assert tokens[0] == tokens[1]


def test_samples_are_spread_like_the_probabilities() -> None:
    """Of 4,096 samples at one place: Pearson's chi-square of 4 tokens is above 30.7 for one key in a million."""
    count = 4096
    logits = torch.full((VOCAB,), -torch.inf)
    logits[:4] = torch.tensor([0.0, 1.0, -1.0, 0.5])
    tokens, _ = sampler_of(*range(count)).sample(
        logits.expand(count, -1), np.arange(count, dtype=np.int32), np.full(count, 11, np.int64)
    )
    counts = Counter(tokens.tolist())
    expected = (logits[:4].softmax(0) * count).tolist()
    assert sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected)) < 30.7

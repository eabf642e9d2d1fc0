"""Equal prefixes are computed once: which blocks of a request are in the cache already.

Every full block of tokens has a hash over its tokens and the hash of the block before it, so that equal
hashes mean equal sequences from the first token on (automatic prefix caching as in vLLM; Kwon et al.,
2023). They are 16 bytes of BLAKE2b: two that are equal by chance need not be reckoned with, and to arrange
for them takes 2**64 tries. They never leave this process, whose shards run one model with one cache format;
so neither is part of them.

Blocks of prompts can be found from the moment the plan that fills them has been sent, since shards run plans
in order and whoever finds them is in a later one. Blocks of generated tokens can be once their row has
left its slot (what it generated, nobody else begins with meanwhile), as far as the token after them is
known too: it shows that they are finite.
"""

import hashlib

import numpy as np

from .block_manager import BlockManager
from .limits import Limits
from .request import Request
from .slot_table import SlotTable

_HASH_BYTES = 16
_TOKEN_BYTES = 4


def extend_hashes(request: Request, block_size: int) -> None:
    """Bring `block_hashes` up to every full block of the tokens known so far."""
    start = len(request.block_hashes) * block_size
    num_full = request.num_tokens // block_size - len(request.block_hashes)
    if num_full == 0:
        return
    num_prompt = len(request.prompt_token_ids)
    tokens = request.prompt_token_ids[start:] + request.output_token_ids[max(start - num_prompt, 0) :]
    data = np.array(tokens, np.int32).tobytes()
    block_hash = request.block_hashes[-1] if request.block_hashes else b""
    step = block_size * _TOKEN_BYTES
    for offset in range(0, num_full * step, step):
        block_hash = hashlib.blake2b(
            block_hash + data[offset : offset + step], digest_size=_HASH_BYTES
        ).digest()
        request.block_hashes.append(block_hash)


class Prefixes:
    """Finds and publishes blocks by what is in them; neither where prefix caching is off."""

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        self._blocks = blocks
        self._block_size = limits.block_size
        self.enabled = limits.cache_enabled and limits.prefix_caching

    def find(self, request: Request) -> list[int]:
        """The cached or used blocks that begin as `request` does.

        They leave out its last known token at least, since only what is computed has logits; and all but what is
        behind it already where the log probabilities of its prompt are wanted.
        """
        if not self._has_part(request):
            return []
        extend_hashes(request, self._block_size)
        return self._blocks.find(request.block_hashes[: self._most(request)])

    def is_being_computed(
        self, request: Request, num_found: int, table: SlotTable, chunk_slots: list[int]
    ) -> bool:
        """Whether a chunk in the plan being made fills the first block that `request` did not find.

        chunk_slots: slots whose prefills this plan brings to their end, as it has room for more.
        """
        if not self._has_part(request) or num_found >= self._most(request):
            return False
        wanted, end = request.block_hashes[num_found], (num_found + 1) * self._block_size
        for slot in chunk_slots:
            hashes = table.owners[slot].block_hashes
            if len(hashes) > num_found and hashes[num_found] == wanted and table.num_computed[slot] < end:
                return True
        return False

    def publish(self, request: Request, start: int, end: int) -> None:
        """Let others find the blocks that `request` filled with its tokens from `start` up to `end`."""
        if not self._has_part(request):
            return
        extend_hashes(request, self._block_size)
        for index in range(start // self._block_size, end // self._block_size):
            self._blocks.publish(request.block_ids[index], request.block_hashes[index])

    def withdraw(self, request: Request) -> None:
        """Let nobody find what a row read or wrote whose logits were not finite.

        Also what it shared: that is where the cause may be. If it is not, it is computed again once.
        """
        self._blocks.withdraw(request.block_hashes)

    def _has_part(self, request: Request) -> bool:
        """A text to score finds nothing and leaves nothing: each of its tokens is computed, and nobody goes on from it."""
        return self.enabled and request.task == "generate"

    def _most(self, request: Request) -> int:
        return request.num_skippable // self._block_size

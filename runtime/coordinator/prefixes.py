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

The samples of one prompt (n above 1) meet in the same way. They also do where prefix caching is off: then the hashes of
a prompt begin with its request's id, and nobody else finds them.
"""

import hashlib

import numpy as np

from .block_manager import BlockManager
from .limits import Limits
from .request import Request
from .slot_table import SlotTable

_HASH_BYTES = 16
_TOKEN_BYTES = 4


def extend_hashes(request: Request, block_size: int, salt: bytes = b"") -> None:
    """Bring `block_hashes` up to every full block of the tokens known so far.

    salt: takes the place of a hash before the first block.
    """
    start = len(request.block_hashes) * block_size
    num_full = request.num_tokens // block_size - len(request.block_hashes)
    if num_full == 0:
        return
    num_prompt = len(request.prompt_token_ids)
    tokens = request.prompt_token_ids[start:] + request.output_token_ids[max(start - num_prompt, 0) :]
    data = np.array(tokens, np.int32).tobytes()
    block_hash = request.block_hashes[-1] if request.block_hashes else salt
    step = block_size * _TOKEN_BYTES
    for offset in range(0, num_full * step, step):
        block_hash = hashlib.blake2b(
            block_hash + data[offset : offset + step], digest_size=_HASH_BYTES
        ).digest()
        request.block_hashes.append(block_hash)


class Prefixes:
    """Finds and publishes blocks by what is in them, for requests that may share."""

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        self._blocks = blocks
        self._limits = limits
        self._block_size = limits.block_size

    def may_share(self, request: Request) -> bool:
        """With all others, or with the other samples of its prompt alone."""
        return self._limits.cache_enabled and (self._limits.prefix_caching or request.sampling.n > 1)

    def find(self, request: Request) -> list[int]:
        """The cached or used blocks that begin as `request` does.

        They leave out its last known token at least, since only what is computed has logits.
        """
        if not self.may_share(request):
            return []
        self._extend_hashes(request)
        return self._blocks.find(request.block_hashes[: self._most(request)])

    def is_being_computed(
        self, request: Request, num_found: int, table: SlotTable, chunk_slots: list[int]
    ) -> bool:
        """Whether a chunk in the plan being made fills the first block that `request` did not find.

        chunk_slots: slots whose prefills this plan brings to their end, as it has room for more.
        """
        if not self.may_share(request) or num_found >= self._most(request):
            return False
        wanted, end = request.block_hashes[num_found], (num_found + 1) * self._block_size
        for slot in chunk_slots:
            hashes = table.owners[slot].block_hashes
            if len(hashes) > num_found and hashes[num_found] == wanted and table.num_computed[slot] < end:
                return True
        return False

    def publish(self, request: Request, start: int, end: int) -> None:
        """Let others find the blocks that `request` filled with its tokens from `start` up to `end`."""
        if not self.may_share(request):
            return
        self._extend_hashes(request)
        for index in range(start // self._block_size, end // self._block_size):
            self._blocks.publish(request.block_ids[index], request.block_hashes[index])

    def withdraw(self, request: Request) -> None:
        """Let nobody find what a row read or wrote whose logits were not finite.

        Also what it shared: that is where the cause may be. If it is not, it is computed again once.
        """
        self._blocks.withdraw(request.block_hashes)

    def _extend_hashes(self, request: Request) -> None:
        salt = b""
        if not self._limits.prefix_caching:
            salt = hashlib.blake2b(request.request_id.encode(), digest_size=_HASH_BYTES).digest()
        extend_hashes(request, self._block_size, salt)

    def _most(self, request: Request) -> int:
        return (request.num_tokens - 1) // self._block_size

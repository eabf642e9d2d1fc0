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

A prefix is of use if every layer group has what the token behind it sees: with full attention all of it, with
a window its last blocks only. So window groups keep little of a prompt, and may have lost what others have.

The samples of one prompt (n above 1) meet in the same way. They also do where prefix caching is off: then the hashes of
a prompt begin with its request's id, and no other id finds them. The prompt's last block, which is not full, each
fills on its own; one that begins while another has it starts from a copy.
"""

import hashlib

import numpy as np

from .block_groups import PASSED, BlockGroups, BlockTables
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

    def __init__(self, blocks: BlockGroups, limits: Limits) -> None:
        self._blocks = blocks
        self._limits = limits
        self._block_size = limits.block_size

    def may_share(self, request: Request) -> bool:
        """With all others, or with the other samples of its prompt alone.

        A text to score finds nothing and leaves nothing: each of its tokens is computed, and nobody goes on from it.
        """
        if not self._limits.cache_enabled or request.task == "score":
            return False
        return self._limits.prefix_caching or request.sampling.n > 1

    def find(self, request: Request) -> BlockTables:
        """The cached or used blocks that begin as `request` does, equally many entries in every group.

        They leave out its last known token at least, since only what is computed has logits; and all but what is
        behind it already where the log probabilities of its prompt are wanted.
        """
        if not self.may_share(request):
            return [[] for _ in self._blocks.managers]
        self._extend_hashes(request)
        hashes = request.block_hashes[: self._most(request)]
        num_found, agreed = len(hashes), False
        while not agreed:
            before = num_found
            for window, manager in zip(self._blocks.windows, self._blocks.managers, strict=True):
                num_found = self._num_usable(manager, hashes[:num_found], window)
            agreed = num_found == before
        return [
            self._entries(manager, hashes[:num_found], window)
            for window, manager in zip(self._blocks.windows, self._blocks.managers, strict=True)
        ]

    def _num_usable(self, manager: BlockManager, hashes: list[bytes], window: int | None) -> int:
        """The longest part of a prefix, in blocks, of which this group has all that the token behind it sees."""
        if window is None:
            for index, block_hash in enumerate(hashes):
                if manager.find(block_hash) is None:
                    return index
            return len(hashes)
        end = len(hashes)
        for index in reversed(range(end)):
            if index < self._blocks.first_seen(window, end * self._block_size):
                break
            if manager.find(hashes[index]) is None:
                end = index
        return end

    def _entries(self, manager: BlockManager, hashes: list[bytes], window: int | None) -> list[int]:
        first = self._blocks.first_seen(window, len(hashes) * self._block_size)
        block_ids = [PASSED] * first
        for block_hash in hashes[first:]:
            block_id = manager.find(block_hash)
            assert block_id is not None, "a block of the prefix is not there"
            block_ids.append(block_id)
        return block_ids

    def is_being_computed(
        self, request: Request, num_found: int, table: SlotTable, chunk_slots: list[int]
    ) -> bool:
        """Whether a chunk in the plan being made fills the first block that `request` did not find.

        chunk_slots: slots with a chunk in it.
        """
        if not self.may_share(request) or num_found >= self._most(request):
            return False
        wanted, end = request.block_hashes[num_found], (num_found + 1) * self._block_size
        for slot in chunk_slots:
            hashes = table.owners[slot].block_hashes
            if len(hashes) > num_found and hashes[num_found] == wanted and table.num_computed[slot] < end:
                return True
        return False

    def sample_to_copy(
        self, request: Request, num_found: int, table: SlotTable
    ) -> tuple[Request, int] | None:
        """Another sample of the same prompt, and the number of tokens up to which its block behind the `num_found`
        that were found is the same; None if there is none, or that block has nothing to copy."""
        num_tokens = min(len(request.prompt_token_ids), request.num_skippable)
        is_next = num_tokens // self._block_size == num_found and num_tokens % self._block_size > 0
        if request.sampling.n == 1 or not is_next or not self.may_share(request):
            return None
        for slot, other in table.owners.items():
            # Not one that has just been opened with a copy itself: the plan that fills it is not sent.
            is_filled = other.request_id == request.request_id and table.num_computed[slot] > num_tokens
            if is_filled and all(block_ids[num_found] != PASSED for block_ids in other.block_tables):
                return other, num_tokens
        return None

    def publish(self, request: Request, start: int, end: int) -> None:
        """Let others find the blocks that `request` filled with its tokens from `start` up to `end`."""
        if not self.may_share(request):
            return
        self._extend_hashes(request)
        for manager, block_ids in zip(self._blocks.managers, request.block_tables, strict=True):
            for index in range(start // self._block_size, end // self._block_size):
                if block_ids[index] != PASSED:
                    manager.publish(block_ids[index], request.block_hashes[index])

    def withdraw(self, request: Request) -> None:
        """Let nobody find what a row read or wrote whose logits were not finite.

        Also what it shared: that is where the cause may be. If it is not, it is computed again once.
        """
        for manager in self._blocks.managers:
            manager.withdraw(request.block_hashes)

    def _extend_hashes(self, request: Request) -> None:
        salt = b""
        if not self._limits.prefix_caching:
            salt = hashlib.blake2b(request.request_id.encode(), digest_size=_HASH_BYTES).digest()
        extend_hashes(request, self._block_size, salt)

    def _most(self, request: Request) -> int:
        return request.num_skippable // self._block_size

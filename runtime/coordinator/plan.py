"""What the coordinator tells the shards to do in one step, and what comes back.

Both travel as bytes: a msgpack envelope whose integer arrays are raw little-endian buffers.
Every rank receives the same bytes, so no two ranks can run different batches.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from .logits_rules import LogitsRules
from .logprobs import LogprobTable

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

NO_TOKEN = -1  # in StepResult.token_ids: the row was not to sample, or its logits were not finite


@dataclass(frozen=True)
class SlotSampling:
    """What a shard has to know to sample for one request."""

    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float
    min_p: float
    seed: int  # 64 bits, unsigned
    logprobs: int | None  # most likely tokens wanted beside the chosen one; None: no log probabilities
    stop_ids: tuple[int, ...]  # tokens suppressed while the new token's position is below stop_from
    stop_from: int  # first position in the sequence where an end token is allowed
    sample_index: int = 0  # which sample of its prompt this is: part of the noise's key, as the seed
    rules: LogitsRules | None = None  # None: the logits are used as they are

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class OpenedSlot:
    """A request takes a slot; everything the shards keep about it is set here."""

    slot: int
    context_len: int  # tokens whose K and V are in its blocks already
    block_ids: tuple[tuple[int, ...], ...]  # by layer group, in token order; 0 where its window has passed
    sampling: SlotSampling


class CopiedBlock(NamedTuple):
    """A block that begins as another one of its layer group does."""

    group: int
    source: int
    target: int


@dataclass(frozen=True)
class Targets:
    """Tokens of prompts whose log probabilities are wanted, [num_targets] each."""

    places: Int32  # of the token before each, among the step's tokens
    token_ids: Int32
    num_top: int  # most likely tokens wanted beside each, by the row that wants most

    def pack(self) -> tuple[bytes, bytes, int]:
        """Values that msgpack takes."""
        return _bytes(self.places), _bytes(self.token_ids), self.num_top

    @classmethod
    def unpack(cls, values: tuple[bytes, bytes, int]) -> "Targets":
        """The inverse of `pack`."""
        places, token_ids, num_top = values
        return cls(_int32(places), _int32(token_ids), num_top)


@dataclass(frozen=True)
class StepPlan:
    """One step. Shards apply it in this order: close, open, append blocks, copy blocks, run the rows.

    Row r adds `row_num_new_tokens[r]` tokens to slot `row_slots[r]`. Its inputs are the slot's
    last sampled token, which only the device may know yet, when `row_from_device[r]` (then it is
    one token), else the next ids of `token_ids`, row after row. A token is sampled after the
    row's last input when `row_samples[r]`.
    """

    epoch: int
    step_id: int
    closed_slots: Int32  # [num_closed]
    opened: tuple[OpenedSlot, ...]
    appended_slots: Int32  # [num_appended], one entry a block, in table order
    appended_groups: Int32  # [num_appended], the layer group whose table it goes to
    appended_blocks: Int32  # [num_appended]
    copied: tuple[CopiedBlock, ...]
    row_slots: Int32  # [num_rows]
    row_num_new_tokens: Int32  # [num_rows]
    row_from_device: Bool  # [num_rows]
    row_samples: Bool  # [num_rows]
    token_ids: Int32  # [sum of the new tokens of rows not from the device]
    targets: Targets | None = None  # row after row; None when no row wants any

    @property
    def num_rows(self) -> int:
        return len(self.row_slots)

    @property
    def num_tokens(self) -> int:
        return int(self.row_num_new_tokens.sum())


@dataclass(frozen=True)
class StepResult:
    """What one step sampled, row by row in the plan's order."""

    epoch: int
    step_id: int
    token_ids: Int32  # [num_rows], or NO_TOKEN
    logprobs: LogprobTable | None  # of the rows that sample; None when no row asked
    prompt_logprobs: LogprobTable | None = None  # of the plan's targets; None without any

    def checksum(self) -> int:
        """CRC-32 of what was sampled and of the targets' ranks: every rank must come to the same one."""
        ranks = b"" if self.prompt_logprobs is None else _bytes(self.prompt_logprobs.ranks)
        return zlib.crc32(ranks, zlib.crc32(_bytes(self.token_ids)))


def _bytes(array: npt.NDArray[np.generic]) -> bytes:
    return array.tobytes()


def _int32(buffer: bytes) -> Int32:
    return np.frombuffer(buffer, np.int32)


def encode_plan(plan: StepPlan) -> bytes:
    opened = [
        (
            slot.slot,
            slot.context_len,
            tuple(np.asarray(block_ids, np.int32).tobytes() for block_ids in slot.block_ids),
            (
                slot.sampling.temperature,
                slot.sampling.top_k,
                slot.sampling.top_p,
                slot.sampling.min_p,
                slot.sampling.seed,
                slot.sampling.logprobs,
                slot.sampling.stop_ids,
                slot.sampling.stop_from,
                slot.sampling.sample_index,
                None if slot.sampling.rules is None else slot.sampling.rules.pack(),
            ),
        )
        for slot in plan.opened
    ]
    packed: bytes = msgpack.packb(
        (
            plan.epoch,
            plan.step_id,
            opened,
            _bytes(plan.closed_slots),
            _bytes(plan.appended_slots),
            _bytes(plan.appended_groups),
            _bytes(plan.appended_blocks),
            plan.copied,
            _bytes(plan.row_slots),
            _bytes(plan.row_num_new_tokens),
            _bytes(plan.row_from_device),
            _bytes(plan.row_samples),
            _bytes(plan.token_ids),
            None if plan.targets is None else plan.targets.pack(),
        )
    )
    return packed


def decode_plan(data: bytes) -> StepPlan:
    (
        epoch,
        step_id,
        opened,
        closed,
        appended_slots,
        appended_groups,
        appended_blocks,
        copied,
        slots,
        new_tokens,
        device,
        samples,
        tokens,
        targets,
    ) = msgpack.unpackb(data, use_list=False)
    return StepPlan(
        epoch=epoch,
        step_id=step_id,
        closed_slots=_int32(closed),
        opened=tuple(
            OpenedSlot(
                slot=slot,
                context_len=context_len,
                block_ids=tuple(tuple(_int32(block_ids).tolist()) for block_ids in tables),
                sampling=SlotSampling(*(*sampling, None if rules is None else LogitsRules.unpack(rules))),
            )
            for slot, context_len, tables, (*sampling, rules) in opened
        ),
        appended_slots=_int32(appended_slots),
        appended_groups=_int32(appended_groups),
        appended_blocks=_int32(appended_blocks),
        copied=tuple(CopiedBlock(*block) for block in copied),
        row_slots=_int32(slots),
        row_num_new_tokens=_int32(new_tokens),
        row_from_device=np.frombuffer(device, np.bool_),
        row_samples=np.frombuffer(samples, np.bool_),
        token_ids=_int32(tokens),
        targets=None if targets is None else Targets.unpack(targets),
    )


def encode_result(result: StepResult) -> bytes:
    tables = [None if table is None else table.pack() for table in (result.logprobs, result.prompt_logprobs)]
    packed: bytes = msgpack.packb((result.epoch, result.step_id, _bytes(result.token_ids), tables))
    return packed


def decode_result(data: bytes) -> StepResult:
    epoch, step_id, token_ids, tables = msgpack.unpackb(data)
    logprobs, prompt_logprobs = (None if table is None else LogprobTable.unpack(table) for table in tables)
    return StepResult(
        epoch=epoch,
        step_id=step_id,
        token_ids=_int32(token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )

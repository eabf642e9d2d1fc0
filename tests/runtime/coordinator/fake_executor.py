"""Shards without a model, which trust no plan: each rule that a plan must keep is checked.

The "KV cache" holds the token written at each place, and the next token is a hash of the sequence as
read back from there. So a wrong block, a lost token or a stale one changes what comes out, and the
right answer can be computed without any cache.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import (
    NO_TOKEN,
    OpenedSlot,
    SlotSampling,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.sampling_params import SamplingParams

POISON = -7  # in every place of the cache that nobody has written, or that was given up
VOCAB = 97


def next_token(sequence: list[int], seed: int, suppressed: Iterable[int] = ()) -> tuple[int, float]:
    """The token after `sequence` and its "log probability": any change of any token changes them."""
    key = np.array([seed % 2**31, *sequence], np.int64).tobytes()
    for attempt in range(1000):
        digest = zlib.crc32(key, attempt)
        if digest % VOCAB not in suppressed:
            return digest % VOCAB, -float(digest % 1000) / 100
    raise AssertionError("every token is suppressed")


def noise_key(seed: int, sample_index: int) -> int:
    """Another one for each sample of a prompt; the seed for the first."""
    return seed + 1000003 * sample_index


def expected(request: Request, eos: tuple[int, ...], max_model_len: int) -> tuple[list[int], str]:
    """(output tokens, finish reason) by definition, one token at a time; stop strings are left out."""
    sampling = request.sampling
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos))
    room = max_model_len - len(request.prompt_token_ids)
    most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    output: list[int] = []
    while True:
        suppressed = ends if len(output) < sampling.min_tokens else ()
        key = noise_key(request.seed, request.sample_index)
        output.append(next_token(request.prompt_token_ids + output, key, suppressed)[0])
        if output[-1] in ends and len(output) > sampling.min_tokens:
            return output, "stop"
        if len(output) == most:
            return output, "length"


class _Slot:
    def __init__(self, opened: OpenedSlot) -> None:
        self.blocks = list(opened.block_ids)
        self.context_len = opened.context_len
        self.sampling = opened.sampling
        self.last_sampled: int | None = None
        self.sampled_in = -1


class FakeShards:
    """Runs each plan when it is submitted; the coordinator sees nothing of it before `result`."""

    def __init__(self, limits: Limits, epoch: int = 0) -> None:
        self.limits = limits
        self.epoch = epoch
        self.cache = np.full((limits.num_blocks, limits.block_size), POISON, np.int64)
        self.owners: dict[int, set[int]] = {}  # block -> the slots that hold it
        self.is_kept: Callable[[int], bool] = lambda block: (
            False
        )  # whether its contents may be asked for again
        self.slots: dict[int, _Slot] = {}
        self.plans: list[StepPlan] = []
        self.without_token: Callable[[list[int], int], bool] = lambda sequence, seed: False
        self._in_flight: deque[bytes] = deque()

    def submit(self, plan: StepPlan) -> None:
        plan = decode_plan(encode_plan(plan))
        assert (plan.epoch, plan.step_id) == (self.epoch, len(self.plans)), "a gap in the steps"
        self.plans.append(plan)
        assert 0 < plan.num_rows <= self.limits.max_num_seqs
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(set(plan.row_slots.tolist())) == plan.num_rows, "a slot is in two rows"
        for slot in plan.closed_slots.tolist():
            self._close(slot)
        for opened in plan.opened:
            self._open(opened)
        for slot, block in zip(plan.appended_slots.tolist(), plan.appended_blocks.tolist(), strict=True):
            assert slot in self.slots, f"a block for slot {slot}, which is not open"
            self._own(slot, block)
            self.slots[slot].blocks.append(block)
        self._in_flight.append(encode_result(self._run_rows(plan)))
        assert len(self._in_flight) <= self.limits.run_ahead + 1, "too many plans in flight"

    def result(self) -> StepResult:
        return decode_result(self._in_flight.popleft())

    def _open(self, opened: OpenedSlot) -> None:
        assert 0 <= opened.slot < self.limits.max_num_seqs
        assert opened.slot not in self.slots, f"slot {opened.slot} is open already"
        self.slots[opened.slot] = _Slot(opened)
        num_shared, rest = divmod(opened.context_len, self.limits.block_size)
        assert rest == 0, "part of a block is shared"
        for block in opened.block_ids[:num_shared]:
            assert POISON not in self.cache[block], f"block {block} is shared and not full"
            self.owners.setdefault(block, set()).add(opened.slot)
        for block in opened.block_ids[num_shared:]:
            self._own(opened.slot, block)

    def _close(self, slot: int) -> None:
        for block in self.slots.pop(slot).blocks:
            self.owners[block].remove(slot)
            if not self.owners[block] and not self.is_kept(block):
                self.cache[block] = POISON

    def _own(self, slot: int, block: int) -> None:
        assert 0 < block < self.limits.num_blocks, f"block {block} must not be given out"
        owners = self.owners.setdefault(block, set())
        assert not owners, f"block {block} of slots {owners} is given to {slot}"
        owners.add(slot)
        self.cache[block] = POISON

    def _run_rows(self, plan: StepPlan) -> StepResult:
        tokens = plan.token_ids.tolist()
        results: list[tuple[int, float]] = []
        for index, slot_id in enumerate(plan.row_slots.tolist()):
            assert slot_id in self.slots, f"row of slot {slot_id}, which is not open"
            slot = self.slots[slot_id]
            count = int(plan.row_num_new_tokens[index])
            assert count > 0
            if plan.row_from_device[index]:
                assert count == 1
                assert slot.last_sampled is not None, "the device has no token for this row"
                assert slot.sampled_in >= plan.step_id - len(self._in_flight), "the host knows this token"
                new = [slot.last_sampled]
            else:
                new, tokens = tokens[:count], tokens[count:]
                assert len(new) == count, "too few token ids in the plan"
                if slot.last_sampled is not None:
                    assert new == [slot.last_sampled], "not the token that was sampled"
            self._write(slot_id, slot, new)
            if plan.row_samples[index]:
                results.append(self._sample(slot))
                # A row without a token goes on with any, until the coordinator knows and closes it.
                slot.last_sampled, slot.sampled_in = max(results[-1][0], 0), plan.step_id
            else:
                results.append((NO_TOKEN, 0.0))
        assert not tokens, "token ids left over in the plan"
        token_ids, logprobs = zip(*results, strict=True)
        return StepResult(
            self.epoch, plan.step_id, np.array(token_ids, np.int32), np.array(logprobs, np.float32), 0.0
        )

    def _write(self, slot_id: int, slot: _Slot, new: list[int]) -> None:
        for token in new:
            table_index, offset = divmod(slot.context_len, self.limits.block_size)
            assert table_index < len(slot.blocks), "the block table is too short"
            block = slot.blocks[table_index]
            assert self.owners[block] == {slot_id}, "a write into a block that another slot holds"
            assert self.cache[block, offset] == POISON, "a place is written twice"
            self.cache[block, offset] = token
            slot.context_len += 1

    def _sample(self, slot: _Slot) -> tuple[int, float]:
        sequence = self.cache[slot.blocks].reshape(-1)[: slot.context_len].tolist()
        assert POISON not in sequence, "a place is read that was never written"
        sampling: SlotSampling = slot.sampling
        if self.without_token(sequence, sampling.seed):
            return NO_TOKEN, 0.0
        suppressed = sampling.stop_ids if slot.context_len < sampling.stop_from else ()
        return next_token(sequence, noise_key(sampling.seed, sampling.sample_index), suppressed)


class LetterTokenizer:
    """One letter a token; those below `num_special` are special."""

    def __init__(self, num_special: int = 0) -> None:
        self.num_special = num_special

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        num_left_out = self.num_special if skip_special_tokens else 0
        return "".join(chr(0x4E00 + token) for token in token_ids if token >= num_left_out)


def make_limits(**changes: int | bool) -> Limits:
    """Room for everything, unless changed."""
    values: dict[str, int | bool] = {
        "num_blocks": 400,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "run_ahead": 1,
    }
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def make_tokens(name: str, count: int) -> list[int]:
    """Tokens that depend on the name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    tokens: list[int] = random.integers(0, VOCAB, count).tolist()
    return tokens


def make_request(name: str, num_prompt: int, prefix: list[int] | None = None, **sampling: object) -> Request:
    """A request whose prompt depends on its name behind `prefix`, as does its seed."""
    prompt = (prefix or []) + make_tokens(name, num_prompt - len(prefix or []))
    return Request.new(name, prompt, SamplingParams.model_validate(sampling))


class Run:
    """A coordinator on fake shards; its clock counts the readings taken."""

    def __init__(
        self, limits: Limits, eos: tuple[int, ...] = (), tokenizer: LetterTokenizer | None = None
    ) -> None:
        self.limits = limits
        self.eos = eos
        self.shards = FakeShards(limits)
        self.now_s = 0.0
        self.coordinator = Coordinator(
            self.shards,  # type: ignore[arg-type]
            limits,
            eos_token_ids=eos,
            tokenizer=tokenizer,
            clock=self._clock,
        )
        self.shards.is_kept = self.coordinator._scheduler.blocks.is_published
        self.finished: list[Request] = []

    def _clock(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.coordinator.add(request)

    def step(self) -> list[Request]:
        finished = self.coordinator.step()
        self.coordinator.check_integrity()
        self.finished += finished
        return finished

    def to_the_end(self, most_steps: int = 5000) -> "Run":
        for _ in range(most_steps):
            if not self.coordinator.has_work:
                assert self.coordinator._scheduler.blocks.num_used == 0, "blocks are left at the end"
                return self
            self.step()
        raise AssertionError(f"not done after {most_steps} steps")

    def assert_as_expected(self, *requests: Request) -> None:
        for request in requests:
            output, reason = expected(request, self.eos, self.limits.max_model_len)
            assert request.status == "finished"
            assert (request.output_token_ids, request.finish_reason) == (output, reason), request.request_id

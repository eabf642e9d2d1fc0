"""What happens to logits before a token is chosen, against definitions that look at one token of one row at a time."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.logits_rules import LogitsRules
from kvshard.runtime.coordinator.plan import NO_TOKEN, SlotSampling
from kvshard.runtime.shard.logits_processors import LogitsProcessors
from kvshard.runtime.shard.sampler import Sampler

CPU = torch.device("cpu")
VOCAB_SIZE = 61
PROMPT = (3, 4, 5, 40, 60)
OUTPUT = (7, 7, 3, 9, 7, 0, 60, 11)  # what a slot that opens again brings along
WORDS = ((11, 20), (60, 11, 21), (11, 60, 22), (9, 7, 0, 60, 11, 20), (8, 20), (23,))
STOP_IDS = (1, 60)
STOP_FROM = 20

RULES: dict[str, LogitsRules | None] = {
    "none": None,
    "presence": LogitsRules(presence_penalty=0.7, output_ids=OUTPUT),
    "negative presence": LogitsRules(presence_penalty=-1.3, output_ids=OUTPUT),
    "frequency": LogitsRules(frequency_penalty=0.3, output_ids=OUTPUT),
    "repetition": LogitsRules(repetition_penalty=1.7, prompt_ids=PROMPT, output_ids=OUTPUT),
    "repetition below 1": LogitsRules(repetition_penalty=0.6, prompt_ids=PROMPT, output_ids=OUTPUT),
    "bias": LogitsRules(logit_bias=((0, -100.0), (30, 2.5), (60, 100.0))),
    "allowed": LogitsRules(allowed_token_ids=(2, 3, 60, 31, 30)),
    "bad tokens": LogitsRules(bad_words=((23,), (59,))),
    # The longer ones open later, and make room for more tokens of all slots.
    "short bad words": LogitsRules(bad_words=((11, 20),), output_ids=OUTPUT[-1:]),
    "bad words": LogitsRules(bad_words=WORDS, output_ids=OUTPUT[-5:]),
    "all": LogitsRules(
        presence_penalty=0.5,
        frequency_penalty=-0.2,
        repetition_penalty=1.2,
        logit_bias=((2, 5.0), (7, 3.0), (20, 9.0)),
        allowed_token_ids=(*range(1, 35), 60),
        bad_words=WORDS,
        prompt_ids=PROMPT,
        output_ids=OUTPUT,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampling(rules: LogitsRules | None, **changes: Any) -> SlotSampling:
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "logprobs": None}
    return SlotSampling(**{**values, "stop_ids": (), "stop_from": 0, "rules": rules, **changes})


def defined(logits: Tensor, rules: LogitsRules | None, output: list[int], early: tuple[int, ...]) -> Tensor:
    """One row, [V] float32, changed as vLLM documents it; `early` are ends that may not come yet."""
    rules = rules or LogitsRules()
    changed = logits.clone()
    for token in range(VOCAB_SIZE):
        if rules.allowed_token_ids is not None and token not in rules.allowed_token_ids:
            changed[token] = -math.inf
    for *beginning, last in rules.bad_words:
        if output[len(output) - len(beginning) :] == beginning:
            changed[last] = -math.inf
    changed[list(early)] = -math.inf
    for token, bias in rules.logit_bias:
        changed[token] += bias
    repetition, frequency, presence = torch.tensor(
        [rules.repetition_penalty, rules.frequency_penalty, rules.presence_penalty]
    )
    for token in {*rules.prompt_ids, *output}:
        logit = changed[token].clone()
        if rules.repetition_penalty != 1.0:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token)
        if token in output:
            logit -= presence
        changed[token] = logit
    return changed


def shares(world_size: int) -> list[range]:
    borders = [0, *sorted(random.Random(world_size).sample(range(1, VOCAB_SIZE), world_size - 1)), VOCAB_SIZE]
    return [range(*pair) for pair in itertools.pairwise(borders)]


class Ranks:
    """The processors of all ranks; they need nothing of each other."""

    def __init__(self, world_size: int, num_slots: int) -> None:
        self.rows = shares(world_size)
        self.each = [LogitsProcessors(rows, num_slots, CPU) for rows in self.rows]

    def open(self, slot: int, opened: SlotSampling) -> None:
        for processors in self.each:
            processors.open(slot, opened)

    def apply(self, logits: Tensor, slots: list[int], positions: list[int]) -> Tensor:
        places = np.array(slots, np.int32), np.array(positions, np.int64)
        parts = [
            processors.apply(logits[:, rows.start : rows.stop], *places)
            for processors, rows in zip(self.each, self.rows, strict=True)
        ]
        return torch.cat(parts, 1)

    def add_chosen(self, slots: list[int], token_ids: list[int]) -> None:
        for processors in self.each:
            processors.add_chosen(np.array(slots, np.int32), torch.tensor(token_ids))


def random_logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_each_setting_is_what_its_definition_says(name: str, world_size: int) -> None:
    rules = RULES[name]
    ranks = Ranks(world_size, 2)
    ranks.open(1, sampling(rules, stop_ids=STOP_IDS, stop_from=STOP_FROM))
    for position in (STOP_FROM - 1, STOP_FROM):
        logits = random_logits(1, position)
        before = logits.clone()
        early = STOP_IDS if position < STOP_FROM else ()
        expected = defined(logits[0], rules, list(OUTPUT), early)
        assert torch.equal(ranks.apply(logits, [1], [position])[0], expected)
        assert torch.equal(logits, before)
        assert torch.equal(expected, logits[0]) == (rules is None and not early)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tokens_count_before_the_host_knows_them(world_size: int) -> None:
    """Rows of all kinds in batches that change; what was chosen is told to the device only."""
    rng = random.Random(world_size)
    ranks = Ranks(world_size, len(RULES))
    all_rules = list(RULES.values())
    outputs = [list(OUTPUT) for _ in all_rules]
    for slot, rules in enumerate(all_rules):
        ranks.open(slot, sampling(rules, stop_ids=(2,), stop_from=10))
    num_words_met = 0
    for step in range(25):
        slots = rng.sample(range(len(all_rules)), rng.randint(1, len(all_rules)))
        logits = random_logits(len(slots), step)
        changed = ranks.apply(logits, slots, [step] * len(slots))
        for row, slot in enumerate(slots):
            early = (2,) if step < 10 else ()
            expected = defined(logits[row], all_rules[slot], outputs[slot], early)
            assert torch.equal(changed[row], expected), f"step {step}, slot {slot}"
            begun = [word for word in WORDS[:5] if outputs[slot][-len(word) + 1 :] == list(word[:-1])]
            num_words_met += bool(begun) and slot == len(all_rules) - 1
        chosen = [rng.choice([11, 60, 8, 9, 7, 0, NO_TOKEN]) for _ in slots]
        ranks.add_chosen(slots, chosen)
        for slot, token in zip(slots, chosen, strict=True):
            outputs[slot] += [token] if token != NO_TOKEN else []
            if token == NO_TOKEN:  # a row without a token never goes on
                outputs[slot] = list(OUTPUT)
                ranks.open(slot, sampling(all_rules[slot], stop_ids=(2,), stop_from=10))
    assert num_words_met > 3


@pytest.mark.parametrize("name", RULES)
def test_a_slot_opened_with_what_was_written_goes_on_as_if_it_had_never_closed(name: str) -> None:
    rules, chosen = RULES[name], [60, 9, 7, 0, 60, 11]
    going_on, again = Ranks(2, 3), Ranks(2, 3)
    going_on.open(0, sampling(rules))
    for token in chosen:
        going_on.add_chosen([0], [token])
    # The slot had another tenant, with everything set.
    again.open(2, sampling(RULES["all"], stop_ids=(2,), stop_from=99))
    again.add_chosen([2], [5])
    if rules is not None:
        rules = dataclasses.replace(rules, output_ids=rules.output_ids + tuple(chosen))
    again.open(2, sampling(rules))
    logits = random_logits(1, 3)
    assert torch.equal(going_on.apply(logits, [0], [7]), again.apply(logits, [2], [7]))


def test_tokens_of_a_finished_row_do_not_reach_the_next_tenant() -> None:
    ranks = Ranks(1, 2)
    ranks.open(0, sampling(RULES["all"]))
    ranks.open(1, sampling(RULES["all"]))
    for _ in range(3):
        ranks.add_chosen([0, 1], [11, 12])  # plans sent before the host knew that slot 0 had ended
    ranks.open(0, sampling(RULES["frequency"]))
    logits = random_logits(2, 4)
    changed = ranks.apply(logits, [0, 1], [7, 7])
    assert torch.equal(changed[0], defined(logits[0], RULES["frequency"], list(OUTPUT), ()))
    assert torch.equal(changed[1], defined(logits[1], RULES["all"], [*OUTPUT, 12, 12, 12], ()))


def test_the_prompt_of_a_finished_row_is_forgotten() -> None:
    """Beside a row whose list of seen tokens is longer, what the first tenant's list held is looked at again."""
    rules = [
        LogitsRules(repetition_penalty=2.0, prompt_ids=tuple(prompt))
        for prompt in (range(30, 40), range(20), [50])
    ]
    ranks = Ranks(1, 2)
    ranks.open(0, sampling(rules[0]))
    ranks.open(1, sampling(rules[1]))
    ranks.open(0, sampling(rules[2]))
    logits = random_logits(2, 5)
    changed = ranks.apply(logits, [0, 1], [7, 7])
    assert torch.equal(changed[0], defined(logits[0], rules[2], [], ()))
    assert torch.equal(changed[1], defined(logits[1], rules[1], [], ()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_more_tokens_than_the_vocabulary_has(world_size: int) -> None:
    rules = LogitsRules(0.4, 0.3, 1.2, prompt_ids=PROMPT)
    ranks = Ranks(world_size, 1)
    ranks.open(0, sampling(rules))
    output: list[int] = []
    for token in [*[5] * VOCAB_SIZE, *range(VOCAB_SIZE)]:
        ranks.add_chosen([0], [token])
        output.append(token)
    logits = random_logits(1, 6)
    assert torch.equal(ranks.apply(logits, [0], [9])[0], defined(logits[0], rules, output, ()))


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_rows_without_rules_cost_nothing() -> None:
    processors = LogitsProcessors(range(VOCAB_SIZE), 4, CPU)
    with Operations() as on_open:
        processors.open(0, sampling(None, stop_ids=STOP_IDS, stop_from=3))
        processors.open(1, sampling(None))
    assert on_open.count == 0
    processors.open(2, sampling(RULES["all"]))
    logits, slots, token_ids = random_logits(2, 0), np.array([0, 1], np.int32), torch.tensor([4, 5])
    with Operations() as in_a_step:
        assert processors.apply(logits, slots, np.array([5, 5])) is logits
        processors.add_chosen(slots, token_ids)
        assert in_a_step.count == 0
        processors.add_chosen(np.array([2, 1], np.int32), token_ids)
    assert in_a_step.count > 0


def sampler_of(*opened: SlotSampling) -> Sampler:
    sampler = Sampler(Group.single(CPU), range(VOCAB_SIZE), VOCAB_SIZE, len(opened), CPU)
    for slot, one in enumerate(opened):
        sampler.open(slot, one)
    return sampler


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_k": 4}, {"temperature": 1.0, "top_p": 0.9}]
)
def test_a_sampler_counts_what_it_chose(settings: dict[str, Any]) -> None:
    """Step by step: the token is one that the changed logits give, and the log probability is of the raw ones."""
    rules = RULES["all"]
    sampler = sampler_of(sampling(rules, logprobs=0, **settings))
    output = list(OUTPUT)
    for step in range(30):
        logits = random_logits(1, step)
        plain = sampler_of(sampling(None, **settings))
        slots, positions = np.zeros(1, np.int32), np.array([step])
        token_ids, table = sampler.sample(logits, slots, positions)
        changed = defined(logits[0], rules, output, ())[None]
        assert token_ids == plain.sample(changed, slots, positions)[0]
        assert table is not None
        torch.testing.assert_close(table.logprobs[0, 0], logits[0].log_softmax(0)[token_ids[0]])
        output.append(int(token_ids))
    assert len(set(output)) > 5


def test_a_row_with_nothing_left_gets_no_token() -> None:
    nothing = LogitsRules(allowed_token_ids=(5, 6), bad_words=((5,), (6,)))
    sampler = sampler_of(sampling(nothing), sampling(LogitsRules(allowed_token_ids=(5,))))
    token_ids, _ = sampler.sample(random_logits(2, 0), np.arange(2, dtype=np.int32), np.zeros(2, np.int64))
    assert token_ids.tolist() == [NO_TOKEN, 5]

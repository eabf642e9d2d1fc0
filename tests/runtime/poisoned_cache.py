"""A real model under a coordinator, with NaN in every block that is given up."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

from kvshard.launch.in_process import InProcessExecutor
from kvshard.runtime.config import JobConfig, parse_config
from kvshard.runtime.coordinator.block_manager import BlockManager
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import StepPlan, StepResult
from kvshard.runtime.coordinator.remote import CacheSize
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.sampling_params import SamplingParams

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
NUM_TOKENS = 20  # of each answer


class PoisoningExecutor(InProcessExecutor):
    """Before a plan runs, every block that is nobody's when it is sent, and that nobody can find, is filled with NaN.

    In groups with full attention, that is what no open slot holds; in those with a window also what slots have given
    up. So is every block given to a slot with nothing in it. That is the earliest moment at which a shard
    could know that a block was given up, so whatever reads it later, or writes too late what another row
    needs, turns that row's logits into NaN.
    """

    def __init__(self, config: JobConfig, path: str, size: CacheSize) -> None:
        super().__init__(config, path, size)
        self._tables: dict[int, list[list[int]]] = {}  # by slot, by layer group
        self._kept: deque[list[set[int]]] = deque()  # for each plan in flight, by layer group
        self.managers: list[BlockManager] = []  # the coordinator's
        self.forget_published = False  # a mistake to make on purpose

    def submit(self, plan: StepPlan) -> None:
        self._kept.append([self._kept_now(group) for group in range(len(self.managers))])
        super().submit(plan)

    def result(self) -> StepResult:
        empty = self._follow(self._plans[0])
        assert self.worker is not None
        for group, kept in enumerate(self._kept.popleft()):
            if self._window(group) is None:
                kept.update(block for tables in self._tables.values() for block in tables[group])
            given_up = set(range(self.managers[group].num_usable + 1)) - kept
            self.worker.cache.fill(float("nan"), group, sorted(given_up | empty[group]))
        return super().result()

    def _window(self, group: int) -> int | None:
        assert self.worker is not None
        return self.worker.spec.layer_groups[group].window

    def _kept_now(self, group: int) -> set[int]:
        """What can be found, and with a window what is held: no plan says what was given up."""
        blocks = self.managers[group]
        return {
            block
            for block in range(blocks.num_usable + 1)
            if (blocks.is_published(block) and not self.forget_published)
            or (self._window(group) is not None and blocks.num_holders(block) > 0)
        }

    def _follow(self, plan: StepPlan) -> list[set[int]]:
        """Apply a plan; the blocks of every group that it gives to slots with nothing in them."""
        for slot in plan.closed_slots.tolist():
            del self._tables[slot]
        empty: list[set[int]] = [set() for _ in self.managers]
        for opened in plan.opened:
            self._tables[opened.slot] = [list(block_ids) for block_ids in opened.block_ids]
            for group, block_ids in enumerate(opened.block_ids):
                empty[group].update(block_ids[opened.context_len // BLOCK_SIZE :])
        appended = (plan.appended_slots, plan.appended_groups, plan.appended_blocks)
        for slot, group, block in zip(*(values.tolist() for values in appended), strict=True):
            self._tables[slot][group].append(block)
            empty[group].add(block)
        return empty


class OneLetterEach:
    """A tokenizer for random models: token 65 is A."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token_id) for token_id in token_ids)


def start(
    model: Path,
    *,
    run_ahead: int = 1,
    num_blocks: int = 40,
    eos: tuple[int, ...] = (),
    poison: bool = True,
    prefix_caching: bool = True,
    cache_dtype: str = "auto",
) -> Coordinator:
    config = parse_config(
        {
            "model": str(model),
            "device": "cpu",
            "dtype": "float32",
            "threads_per_shard": 1,
            "cache": {"block_size": BLOCK_SIZE, "dtype": cache_dtype, "prefix_caching": prefix_caching},
            "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 32, "run_ahead": run_ahead},
        },
        "test",
    )
    executor_type = PoisoningExecutor if poison else InProcessExecutor
    executor = executor_type(config, str(model), CacheSize(num_blocks, MAX_MODEL_LEN))
    executor.start()
    assert executor.worker is not None
    limits = Limits.from_config(
        config,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        layer_groups=executor.worker.spec.layer_groups,
    )
    coordinator = Coordinator(executor, limits, eos_token_ids=eos, tokenizer=OneLetterEach())
    if isinstance(executor, PoisoningExecutor):
        executor.managers = coordinator._scheduler.blocks.managers
    return coordinator


def generate(
    coordinator: Coordinator,
    prompts: dict[str, list[int]],
    sampling: dict[str, SamplingParams] | None = None,
    after_step: Callable[[int, dict[str, Request]], None] = lambda step, requests: None,
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
) -> dict[str, Request]:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    requests = {
        name: Request.new(name, prompt, (sampling or {}).get(name, greedy), bad_word_ids=bad_word_ids)
        for name, prompt in prompts.items()
    }
    for request in requests.values():
        coordinator.add(request)
    step = 0
    while coordinator.has_work:
        coordinator.step()
        coordinator.check_integrity()
        after_step(step, requests)
        step += 1
    return requests

"""A real model under a coordinator, with NaN in every block that is given up."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

from kvshard.launch.local import InProcessExecutor
from kvshard.runtime.config import JobConfig, parse_config
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
    """Before a plan runs, every block that no open slot holds and nobody can find is filled with NaN.

    So is every block given to a slot with nothing in it. That is the earliest moment at which a shard
    could know that a block was given up, so whatever reads it later, or writes too late what another row
    needs, turns that row's logits into NaN.
    """

    def __init__(self, config: JobConfig, path: str, size: CacheSize) -> None:
        super().__init__(config, path, size)
        self._size_blocks = size.num_blocks
        self._blocks_of: dict[int, list[int]] = {}
        self._kept: deque[set[int]] = deque()  # for each plan in flight: what could be found when it was sent
        self.is_kept: Callable[[int], bool] = lambda block: False

    def submit(self, plan: StepPlan) -> None:
        self._kept.append({block for block in range(self._size_blocks) if self.is_kept(block)})
        super().submit(plan)

    def result(self) -> StepResult:
        empty = self._follow(self._plans[0])
        held = {block for blocks in self._blocks_of.values() for block in blocks}
        given_up = set(range(self._size_blocks)) - held - self._kept.popleft()
        assert self.worker is not None
        self.worker.cache.fill(float("nan"), sorted(given_up | empty))
        return super().result()

    def _follow(self, plan: StepPlan) -> set[int]:
        """Apply a plan; the blocks that it gives to slots with nothing in them."""
        for slot in plan.closed_slots.tolist():
            del self._blocks_of[slot]
        empty = set(plan.appended_blocks.tolist())
        for opened in plan.opened:
            self._blocks_of[opened.slot] = list(opened.block_ids)
            empty.update(opened.block_ids[opened.context_len // BLOCK_SIZE :])
        for slot, block in zip(plan.appended_slots.tolist(), plan.appended_blocks.tolist(), strict=True):
            self._blocks_of[slot].append(block)
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
) -> Coordinator:
    config = parse_config(
        {
            "model": str(model),
            "device": "cpu",
            "dtype": "float32",
            "threads_per_shard": 1,
            "cache": {"block_size": BLOCK_SIZE, "prefix_caching": prefix_caching},
            "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 32, "run_ahead": run_ahead},
        },
        "test",
    )
    executor_type = PoisoningExecutor if poison else InProcessExecutor
    executor = executor_type(config, str(model), CacheSize(num_blocks, MAX_MODEL_LEN))
    executor.start()
    limits = Limits.from_config(config, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN)
    coordinator = Coordinator(executor, limits, eos_token_ids=eos, tokenizer=OneLetterEach())
    if isinstance(executor, PoisoningExecutor):
        executor.is_kept = coordinator._scheduler.blocks.is_published
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

"""One shard's model, cache and sampler: plans in, results out. No sockets here."""

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from ...kernels import ops
from ...kernels.host import to_device
from ...kernels.weight_codes import WeightCodes
from ...parallel.group import Group
from ...parallel.shard_map import ShardMap
from ..config import JobConfig
from ..coordinator.limits import Limits
from ..coordinator.logprobs import LogprobTable
from ..coordinator.plan import NO_TOKEN, Int32, StepPlan, StepResult, Targets
from ..errors import ConfigError
from ..models.checkpoint import Checkpoint
from .captured_steps import CapturedSteps, GraphPool
from .decoder import Decoder
from .kv_cache import KVCache
from .logprobs import LogprobTensors
from .recorded_steps import RecordedSteps
from .sampler import Sampler
from .slots import Slots
from .weights import load_weights


class Worker:
    """Built in two steps, as the number of blocks is agreed once every rank has its weights."""

    def __init__(
        self,
        config: JobConfig,
        checkpoint: Checkpoint,
        shard_map: ShardMap,
        group: Group,
        max_model_len: int,
    ) -> None:
        """Load this rank's slices. Raises CheckpointError."""
        self._config = config
        self.spec = checkpoint.spec
        self._max_model_len = max_model_len
        self.group = group
        self.shard = shard_map.shard(group.rank)
        self.device = group.device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        formats = checkpoint.index.weight_formats(config.quantization)
        weights = load_weights(checkpoint, self.spec, self.shard, self._dtype, self.device, formats)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for weight in weights.values()
            for tensor in (weight.tensors if isinstance(weight, WeightCodes) else (weight,))
        }
        self.weight_bytes = sum(storage.nbytes() for storage in storages.values())
        self.decoder = Decoder(self.spec, self.shard, weights, group, max_model_len)

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache and the slots; plans may be run from here on. num_blocks: see `Limits`."""
        ops.load(self.device.type)
        cache, scheduler = self._config.cache, self._config.scheduler
        groups = self.spec.layer_groups
        limits = Limits.from_config(
            self._config, num_blocks=num_blocks, max_model_len=self._max_model_len, layer_groups=groups
        )
        self.cache = KVCache(
            self.spec,
            self.shard,
            group_blocks=limits.group_blocks,
            block_size=cache.block_size,
            format=cache.dtype,
            dtype=self._dtype,
            device=self.device,
        )
        self.slots = Slots(
            num_groups=len(groups),
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=self._max_model_len,
            block_size=cache.block_size,
            device=self.device,
        )
        self._steps = self._make_steps(len(groups))
        self._sampler = Sampler(
            self.group, self.shard.vocab_rows, self.spec.vocab_size, scheduler.max_num_seqs, self.device
        )

    def _make_steps(self, num_groups: int) -> CapturedSteps | RecordedSteps:
        """How the decoder runs: without Python or a launch for each operation where that can be."""
        scheduler, block_size = self._config.scheduler, self._config.cache.block_size
        if self.device.type == "cuda" and self._config.cuda_graphs and self.group.world_size == 1:
            try:
                return CapturedSteps(
                    self.decoder,
                    self.cache,
                    num_groups=num_groups,
                    max_num_seqs=scheduler.max_num_seqs,
                    max_model_len=self._max_model_len,
                    block_size=block_size,
                    capture=GraphPool().capture,
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"decode steps could not be captured as CUDA graphs ({error}); set cuda_graphs: false"
                ) from error
        return RecordedSteps(self.decoder, self.cache, self.group, self.slots)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> "PendingResult":
        """Launch one step. On CUDA the result is still being computed when this returns."""
        inputs = self.slots.apply(plan)
        for opened in plan.opened:
            self._sampler.open(opened.slot, opened.sampling)
        if plan.copied:
            self.cache.copy(plan.copied)
        hidden = self._steps.forward(inputs)
        pending = PendingResult(plan, self.device, self._config.timeouts.step_s)
        if plan.targets is not None:
            pending.fetch_prompt(self._prompt_logprobs(hidden, plan.targets))
        if len(inputs.sample_slots):
            all_sample = len(inputs.sample_slots) == len(hidden)  # each token is its row's last
            logits = self.decoder.logits(hidden if all_sample else hidden[inputs.sample_tokens])
            token_ids, logprobs = self._sampler.sample(logits, inputs.sample_slots, inputs.sample_positions)
            self.slots.store_sampled(inputs.sample_slots, token_ids)
            pending.fetch(token_ids, logprobs)
        pending.finish()
        return pending

    def _prompt_logprobs(self, hidden: torch.Tensor, targets: Targets) -> LogprobTensors:
        """In pieces of as many rows as may sample: the memory plan has room for the logits of so many."""
        places, token_ids = to_device(
            np.stack((targets.places, targets.token_ids)).astype(np.int64), self.device
        )
        most = self._config.scheduler.max_num_seqs
        pieces = [
            self._sampler.logprobs.of(self.decoder.logits(hidden[some]), wanted, targets.num_top)
            for some, wanted in zip(places.split(most), token_ids.split(most), strict=True)
        ]
        return LogprobTensors(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


class PendingResult:
    """A launched step whose tokens may still be on their way from the device."""

    def __init__(self, plan: StepPlan, device: torch.device, deadline_s: float) -> None:
        self._plan = plan
        self._deadline_s = deadline_s
        self._token_ids: torch.Tensor | None = None
        self._logprobs: LogprobTensors | None = None
        self._prompt_logprobs: LogprobTensors | None = None
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def fetch(self, token_ids: torch.Tensor, logprobs: LogprobTensors | None) -> None:
        """Start the copies to the host; nothing waits for them here."""
        self._token_ids = _to_host(token_ids)
        self._logprobs = None if logprobs is None else LogprobTensors(*map(_to_host, logprobs))

    def fetch_prompt(self, logprobs: LogprobTensors) -> None:
        """The same for what was asked of prompts."""
        self._prompt_logprobs = LogprobTensors(*map(_to_host, logprobs))

    def finish(self) -> None:
        if self._done is not None:
            self._done.record()

    def done_before(self, interrupted: Callable[[], bool]) -> bool:
        """Wait until the device is done (True), or `interrupted` says that there is something else to do (False).

        Raises TimeoutError when neither comes within the step's deadline.
        """
        # Polled, as an event cannot be waited for with a deadline; the pause lets other threads run.
        pause, deadline = threading.Event(), time.monotonic() + self._deadline_s
        while self._done is not None and not self._done.query():
            if interrupted():
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"step {self._plan.step_id} did not finish on the device within "
                    f"timeouts.step_s={self._deadline_s:g} s"
                )
            pause.wait(50e-6)
        return True

    def wait(self) -> StepResult:
        """The result. Raises TimeoutError when the device is not done within the step's deadline."""
        self.done_before(lambda: False)
        samples = self._plan.row_samples
        token_ids: Int32 = np.full(len(samples), NO_TOKEN, np.int32)
        if self._token_ids is not None:
            token_ids[samples] = self._token_ids.numpy()
        return StepResult(
            self._plan.epoch,
            self._plan.step_id,
            token_ids,
            _table(self._logprobs),
            _table(self._prompt_logprobs),
        )


def _table(logprobs: LogprobTensors | None) -> LogprobTable | None:
    if logprobs is None:
        return None
    token_ids, values, ranks = (tensor.numpy() for tensor in logprobs)
    return LogprobTable(token_ids.astype(np.int32), values, ranks.astype(np.int32))


def _to_host(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":
        return values
    # Only a copy into pinned memory is asynchronous.
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

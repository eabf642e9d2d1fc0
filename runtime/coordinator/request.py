"""One request: what was asked, what has come out so far, and where it stands."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..config import Task
from ..sampling_params import SamplingParams
from .logits_rules import LogitsRules
from .logprobs import LogprobLines, LogprobTable
from .plan import SlotSampling

if TYPE_CHECKING:
    from .detokenizer import Detokenizer

Status = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "abort", "error"]


def request_seed(sampling: SamplingParams, job_seed: int, request_id: str) -> int:
    """The 64-bit seed of a request: its own, or a hash of the job's seed and the request's id."""
    if sampling.seed is not None:
        return sampling.seed % 2**64
    key = job_seed.to_bytes(8, "little") + request_id.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to an answer. The coordinator changes it; others only read it.

    Times are readings of the coordinator's clock in seconds. A request arrives when it is added and
    is admitted when it is first given a slot, so time to first token leaves out the queue.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int  # 64 bits, unsigned
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # the tokens of `sampling.bad_words`
    task: Task = "generate"
    sample_index: int = 0  # which of the `sampling.n` requests with this id and prompt

    output_token_ids: list[int] = field(default_factory=list)  # an ending EOS or stop token included
    output_logprobs: LogprobLines | None = None  # a line an output token, when asked for
    prompt_logprobs: list[LogprobTable] = field(default_factory=list)  # when asked for, in the prompt's order
    num_targets: int = 0  # prompt tokens whose log probabilities sent plans ask for; the first one has none
    text: str = ""  # complete when finished; grows before that only when there are stop strings
    status: Status = "waiting"
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it; None for EOS
    error: str | None = None

    arrival: int = -1  # place in the order of arrival
    max_len: int = 0  # most tokens, prompt and output; set when added
    slot: int = -1
    block_tables: list[list[int]] = field(default_factory=list)  # by layer group; see block_groups.py
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks of tokens; see prefixes.py
    last_step_id: int = -1  # last plan sent that it was part of; kept up while it has no slot
    num_preemptions: int = 0
    detokenizer: "Detokenizer | None" = None  # only with stop strings

    arrived_s: float | None = None
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    def __post_init__(self) -> None:
        if self.sampling.logprobs is not None:
            self.output_logprobs = LogprobLines(self.sampling.logprobs)

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        job_seed: int = 0,
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
        task: Task = "generate",
    ) -> "Request":
        """A request whose seed is `sampling.seed`, or comes from `job_seed` and `request_id`."""
        seed = request_seed(sampling, job_seed, request_id)
        return cls(request_id, prompt_token_ids, sampling, seed, bad_word_ids, task)

    def sample(self, index: int) -> "Request":
        """A new request for another sample of the same prompt."""
        return Request(
            self.request_id,
            self.prompt_token_ids,
            self.sampling,
            self.seed,
            self.bad_word_ids,
            self.task,
            index,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_made(self) -> int:
        """What a progress bar counts: output tokens; of a text to score, tokens that sent plans ask for."""
        return self.num_targets if self.task == "score" else len(self.output_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens to run through the model before one is sampled; of a text to score, all but the last."""
        return self.num_tokens - (self.task == "score")

    @property
    def ids_to_compute(self) -> list[int]:
        """These tokens."""
        return (self.prompt_token_ids + self.output_token_ids)[: self.num_to_compute]

    @property
    def num_prompt_top(self) -> int | None:
        """Most likely tokens wanted beside each one of the prompt; None: no log probabilities of the prompt.

        Of several samples, only the first is asked for them.
        """
        if self.sample_index > 0:
            return None
        wanted = self.sampling.prompt_logprobs
        return 0 if wanted is None and self.task == "score" else wanted

    @property
    def num_skippable(self) -> int:
        """Tokens at the beginning that need not be run through the model where their K and V are there."""
        if self.num_prompt_top is None or self.num_targets == len(self.prompt_token_ids) - 1:
            return self.num_tokens - 1  # the last one's logits are wanted
        return self.num_targets

    @property
    def ttft_ms(self) -> float | None:
        """First token minus admission; None before the first token."""
        if self.first_token_s is None or self.admitted_s is None:
            return None
        return (self.first_token_s - self.admitted_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """(finish - first token) / (tokens - 1); None below two tokens or before the end."""
        if self.first_token_s is None or self.finished_s is None or len(self.output_token_ids) < 2:
            return None
        return (self.finished_s - self.first_token_s) * 1e3 / (len(self.output_token_ids) - 1)

    def slot_sampling(self, eos_token_ids: tuple[int, ...]) -> SlotSampling:
        """What the shards need to sample for this request."""
        sampling = self.sampling
        stop_ids: tuple[int, ...] = ()
        if sampling.min_tokens > 0:
            stop_ids = (() if sampling.ignore_eos else eos_token_ids) + sampling.stop_token_ids
        return SlotSampling(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_k=0 if sampling.greedy else max(sampling.top_k, 0),
            top_p=1.0 if sampling.greedy else sampling.top_p,
            min_p=0.0 if sampling.greedy else sampling.min_p,
            seed=self.seed,
            logprobs=sampling.logprobs,
            stop_ids=stop_ids,
            stop_from=len(self.prompt_token_ids) + sampling.min_tokens,
            sample_index=self.sample_index,
            rules=self._logits_rules(),
        )

    def _logits_rules(self) -> LogitsRules | None:
        """What changes the logits, with as much of the sequence as that needs; None when nothing does."""
        sampling = self.sampling
        if not (sampling.penalizes or sampling.logit_bias or sampling.allowed_token_ids or self.bad_word_ids):
            return None
        num_needed = max((len(word) - 1 for word in self.bad_word_ids), default=0)
        if sampling.penalizes:
            num_needed = len(self.output_token_ids)
        num_left_out = max(len(self.output_token_ids) - num_needed, 0)
        return LogitsRules(
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=tuple((sampling.logit_bias or {}).items()),
            allowed_token_ids=sampling.allowed_token_ids,
            bad_words=self.bad_word_ids,
            prompt_ids=tuple(set(self.prompt_token_ids)) if sampling.repetition_penalty != 1.0 else (),
            output_ids=tuple(self.output_token_ids[num_left_out:]),
        )

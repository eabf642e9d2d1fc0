"""The sizes the scheduler must keep to, once the job file's `null`s are resolved."""

from dataclasses import dataclass

from ..config import JobConfig
from ..errors import RequestError
from .request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the job file's `scheduler` and `cache` groups for what each one means."""

    num_blocks: int  # of the cache, block 0 included, which is never given out
    block_size: int  # tokens
    max_model_len: int  # tokens of one request, prompt and output
    max_num_seqs: int
    max_num_batched_tokens: int
    run_ahead: int = 1
    cache_enabled: bool = True
    prefix_caching: bool = True  # nothing without cache_enabled

    @classmethod
    def from_config(cls, config: JobConfig, *, num_blocks: int, max_model_len: int) -> "Limits":
        """`num_blocks` is what the shards have; `max_model_len` the setting or else the model's own."""
        return cls(
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            max_model_len=max_model_len,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            run_ahead=config.scheduler.run_ahead,
            cache_enabled=config.cache.enabled,
            prefix_caching=config.cache.prefix_caching,
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def max_len(self, request: Request) -> int:
        """The most tokens `request` may come to. Raises RequestError when it can never run."""
        name = f'request "{request.request_id}"'
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise RequestError(f"{name}: the prompt is empty; give it at least one token")
        if request.task == "score":
            return self._text_len(request, name)
        if num_prompt >= self.max_model_len:
            raise RequestError(
                f"{name}: {num_prompt} prompt tokens leave no room for a new one, the most is "
                f"{self.max_model_len} in all; shorten the prompt or raise scheduler.max_model_len"
            )
        max_len = self.max_model_len
        if request.sampling.max_tokens is not None:
            max_len = min(max_len, num_prompt + request.sampling.max_tokens)
        num_needed = self.num_blocks_for(max_len - 1)  # the last token is never run through the model
        if num_needed > self.num_blocks - 1:
            fits_prompt = self.num_blocks_for(num_prompt) < self.num_blocks
            raise RequestError(
                f"{name}: {num_prompt} prompt + {max_len - num_prompt} new tokens need {num_needed} blocks of "
                f"{self.block_size} tokens, the cache has {self.num_blocks - 1} (cache.num_blocks="
                f"{self.num_blocks}, one is never used); "
                f"{'lower max_tokens' if fits_prompt else 'shorten the prompt'} or raise cache.num_blocks"
            )
        return max_len

    def _text_len(self, request: Request, name: str) -> int:
        """The length of a text to score. Raises RequestError when it cannot be."""
        for setting, value in request.sampling.only_to_generate.items():
            raise RequestError(f"{name}: {setting}={value!r} has no meaning with task: score; leave it out")
        num_tokens = len(request.prompt_token_ids)
        if num_tokens == 1:
            raise RequestError(
                f"{name}: the text is one token, and the first token of a text has no probability; give it two"
            )
        if num_tokens > self.max_model_len:
            raise RequestError(
                f"{name}: the text has {num_tokens} tokens, the most is {self.max_model_len}; shorten it or raise "
                "scheduler.max_model_len"
            )
        num_needed = self.num_blocks_for(num_tokens - 1)  # the last token is never run through the model
        if num_needed > self.num_blocks - 1:
            raise RequestError(
                f"{name}: {num_tokens} tokens need {num_needed} blocks of {self.block_size} tokens, the cache has "
                f"{self.num_blocks - 1} (cache.num_blocks={self.num_blocks}, one is never used); shorten the text or "
                "raise cache.num_blocks"
            )
        return num_tokens

"""The sizes the scheduler must keep to, once the job file's `null`s are resolved."""

from dataclasses import dataclass
from functools import cached_property

from ..config import JobConfig
from ..errors import RequestError
from ..models.spec import LayerGroup
from .request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the job file's `scheduler` and `cache` groups for what each one means."""

    num_blocks: int  # of the cache, block 0 included, which is never given out; see `group_blocks`
    block_size: int  # tokens
    max_model_len: int  # tokens of one request, prompt and output
    max_num_seqs: int
    max_num_batched_tokens: int
    run_ahead: int = 1
    cache_enabled: bool = True
    prefix_caching: bool = True  # nothing without cache_enabled
    layer_groups: tuple[LayerGroup, ...]  # the model's

    @classmethod
    def from_config(
        cls,
        config: JobConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        layer_groups: tuple[LayerGroup, ...],
    ) -> "Limits":
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
            layer_groups=layer_groups,
        )

    @cached_property
    def most_blocks(self) -> tuple[int, ...]:
        """Of each layer group: blocks beyond which its cache can never be filled, block 0 included.

        With full attention that is every slot at full length. A row of a window group holds the tokens that its
        next query sees, which lie in at most ceil(window / block_size) + 1 blocks; the prefill chunks of a
        step hold their own tokens besides. Prefix caching gets room for what an eighth of the slots hold.
        """
        longest = self.num_blocks_for(self.max_model_len)
        everything = self.max_num_seqs * longest
        num_chunk = self.num_blocks_for(self.max_num_batched_tokens)
        num_sharing = max(self.max_num_seqs // 8, 1) if self.cache_enabled and self.prefix_caching else 0
        most = []
        for group in self.layer_groups:
            num_blocks = everything
            if group.window is not None:
                num_row = min(self._num_window_blocks(group.window), longest)
                num_blocks = min((self.max_num_seqs + num_sharing) * num_row + num_chunk, everything)
            most.append(num_blocks + 1)
        return tuple(most)

    @cached_property
    def group_blocks(self) -> tuple[int, ...]:
        """Blocks of each layer group: `num_blocks`, in a window group not more than it can fill.

        So groups have equally many as long as a window group could use more, and rows that are shorter than
        the windows fit as if there were no groups.
        """
        return tuple(
            self.num_blocks if group.window is None else min(most, self.num_blocks)
            for most, group in zip(self.most_blocks, self.layer_groups, strict=True)
        )

    @property
    def num_layer_blocks(self) -> int:
        """Blocks of all layers, each layer's counted for itself."""
        groups = zip(self.group_blocks, self.layer_groups, strict=True)
        return sum(num_blocks * group.num_layers for num_blocks, group in groups)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_blocks_needed(self, num_tokens: int) -> int:
        """The least `num_blocks` with which a request of so many tokens can run, alone if need be."""
        full = any(group.window is None for group in self.layer_groups)
        widest = max((group.window for group in self.layer_groups if group.window is not None), default=0)
        num_blocks = self.num_blocks_for(num_tokens)
        return 1 + (num_blocks if full else min(num_blocks, self._num_window_blocks(widest)))

    @cached_property
    def longest_request(self) -> int:
        """Tokens of the longest request that can run, alone if need be."""
        if self.num_blocks >= self.num_blocks_needed(self.max_model_len):
            return self.max_model_len
        return (self.num_blocks - 1) * self.block_size

    def _num_window_blocks(self, window: int) -> int:
        """Blocks among which the tokens of a window can lie."""
        return self.num_blocks_for(window) + 1

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
        num_needed = self.num_blocks_needed(max_len - 1)  # the last token is never run through the model
        if num_needed > self.num_blocks:
            most = self.longest_request + 1 - num_prompt
            raise RequestError(
                f"{name}: {num_prompt} prompt + {max_len - num_prompt} new tokens need {num_needed - 1} blocks of "
                f"{self.block_size} tokens, the cache has {self.num_blocks - 1} (cache.num_blocks="
                f"{self.num_blocks}, one is never used); "
                f"{f'set max_tokens to {most} at most' if most > 0 else 'shorten the prompt'} or raise cache.num_blocks"
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
        num_needed = self.num_blocks_needed(num_tokens - 1)  # the last token is never run through the model
        if num_needed > self.num_blocks:
            raise RequestError(
                f"{name}: {num_tokens} tokens need {num_needed - 1} blocks of {self.block_size} tokens, the cache has "
                f"{self.num_blocks - 1} (cache.num_blocks={self.num_blocks}, one is never used); shorten the text or "
                "raise cache.num_blocks"
            )
        return num_tokens

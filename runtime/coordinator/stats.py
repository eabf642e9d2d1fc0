"""Counters of one coordinator's life."""

from dataclasses import dataclass


@dataclass
class CoordinatorStats:
    """Counts since the coordinator was made."""

    num_steps: int = 0  # plans sent
    num_token_steps: int = 0  # tokens run through the model, recomputed ones again
    num_chunked_prompts: int = 0  # prefills that took more than one plan
    num_preemptions: int = 0
    num_cached_prompt_tokens: int = 0  # found in the cache when their requests were first admitted ...
    num_looked_up_prompt_tokens: int = (
        0  # ... of the tokens of all prompts looked up; without prefix caching, of samples only
    )
    num_dropped_tokens: int = 0  # sampled for rows that had ended already
    num_prompt_tokens: int = 0  # of finished requests
    num_output_tokens: int = 0  # of finished requests
    max_plans_in_flight_ahead: int = 0  # plans sent beyond the one whose result was awaited
    peak_used_layer_blocks: int = 0  # of the cache, each layer's counted for itself

    def count_plan(self, num_tokens: int, num_used_layer_blocks: int) -> None:
        """Note a plan that has been sent, and the blocks in use from then on."""
        self.num_steps += 1
        self.num_token_steps += num_tokens
        self.peak_used_layer_blocks = max(self.peak_used_layer_blocks, num_used_layer_blocks)

    def count_lookup(self, num_cached: int, num_prompt: int) -> None:
        """Note how much of a prompt was found in the cache."""
        self.num_cached_prompt_tokens += num_cached
        self.num_looked_up_prompt_tokens += num_prompt

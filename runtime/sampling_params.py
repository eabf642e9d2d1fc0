"""How one request's tokens are chosen: vLLM's names and meanings."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_INT32 = 2**31 - 1  # JSON has integers of any size; plans and slots hold 32 bits


class SamplingParams(BaseModel):
    """Sampling settings of one request; in a job file, the defaults for every row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="0 picks the most likely token; 1 samples the model's own distribution",
    )
    top_k: int = Field(
        0, ge=-1, le=MAX_INT32, description="sample among the k most likely tokens; 0 or -1 means all"
    )
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="sample among the fewest tokens that hold this probability"
    )
    min_p: float = Field(
        0.0, ge=0.0, le=1.0, description="drop tokens below this share of the best token's probability"
    )
    seed: int | None = Field(
        None,
        description="same seed, prompt and settings: same tokens; default: derived from the job's seed and the row id",
    )
    max_tokens: int | None = Field(
        16, ge=1, le=MAX_INT32, description="most new tokens; null: up to scheduler.max_model_len"
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=MAX_INT32,
        description="no EOS, stop token or stop string ends the row before this many new tokens",
    )
    stop: tuple[str, ...] = Field((), description="strings that end the row; not part of the text")
    stop_token_ids: tuple[Annotated[int, Field(ge=0, le=MAX_INT32)], ...] = Field(
        (), description="token ids that end the row, besides the model's EOS"
    )
    ignore_eos: bool = Field(False, description="go on after the model's EOS token")
    logprobs: int | None = Field(
        None, description="0 adds the chosen tokens' log probabilities; null adds none"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop_string(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string must not be empty")
        return value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _no_stop_tokens(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingParams":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.logprobs not in (None, 0):
            raise ValueError(f"logprobs={self.logprobs}: only the chosen token's are kept; use 0 or null")
        return self

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken (vLLM treats temperatures under 1e-5 so)."""
        return self.temperature < 1e-5

"""How one request's tokens are chosen: vLLM's names and meanings."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_INT32 = 2**31 - 1  # JSON has integers of any size; plans and slots hold 32 bits
MAX_BIAS = 100.0
MAX_SAMPLES = 2**14  # each is a request: one row must not take all of the coordinator's memory
MAX_LOGPROBS = 20  # vLLM's default for max_logprobs

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
Bias = Annotated[
    float, Field(allow_inf_nan=False), AfterValidator(lambda bias: min(max(bias, -MAX_BIAS), MAX_BIAS))
]


class SamplingParams(BaseModel):
    """Sampling settings of one request; in a job file, the defaults for every row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(
        1, ge=1, le=MAX_SAMPLES, description="answers to each prompt; above 1 the temperature is not 0"
    )
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
    presence_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="taken from the logits of tokens that the output has"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="taken from a token's logit for each time the output has it"
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="above 1, tokens of the prompt and the output become less likely; below 1, more",
    )
    logit_bias: dict[TokenId, Bias] | None = Field(
        None, description="token id: what is added to its logit; held within -100 and 100"
    )
    allowed_token_ids: tuple[TokenId, ...] | None = Field(
        None, min_length=1, description="no other tokens are chosen; null: all"
    )
    bad_words: tuple[str, ...] = Field(
        (), description="texts whose tokens the output does not hold, at the start of a word or within one"
    )
    stop: tuple[str, ...] = Field((), description="strings that end the row")
    include_stop_str_in_output: bool = Field(
        False, description="the text keeps the stop string, or the stop token, that ended it"
    )
    stop_token_ids: tuple[TokenId, ...] = Field(
        (), description="token ids that end the row, besides the model's EOS"
    )
    ignore_eos: bool = Field(False, description="go on after the model's EOS token")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="adds each token's log probability, and those of this many of the most likely tokens; null adds none",
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="the same of each token of the prompt but the first"
    )
    detokenize: bool = Field(True, description="false leaves the text empty; the token ids are the answer")
    skip_special_tokens: bool = Field(True, description="leave special tokens such as EOS out of the text")

    @field_validator(
        "n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", mode="before"
    )
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                f"expected a whole number, not {str(value).lower()}; null or leaving it out asks for none"
            )
        return value

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

    @field_validator("stop_token_ids", "bad_words", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("bad_words")
    @classmethod
    def _usable_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(word.strip() for word in value):
            raise ValueError("a bad word must not be empty")
        for word in value:
            try:
                word.encode()
            except UnicodeEncodeError:
                raise ValueError("a bad word holds half of a surrogate pair, which is no character") from None
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids_in_json(cls, value: Any) -> Any:
        """JSON's keys are strings."""
        if not isinstance(value, dict):
            return value
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: value[key] for key in value}

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingParams":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.n > 1 and self.greedy:
            raise ValueError(
                f"n={self.n} with temperature={self.temperature:g}: greedy answers would all be the same; "
                "use n=1, or a temperature above 0"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are looked for in the text, and detokenize=false makes none")
        return self

    @property
    def only_to_generate(self) -> dict[str, Any]:
        """Settings that are not the default and mean nothing where a text is scored, by name."""
        values = (
            (name, getattr(self, name)) for name in SamplingParams.model_fields if name != "prompt_logprobs"
        )
        return {name: value for name, value in values if value != SamplingParams.model_fields[name].default}

    @property
    def penalizes(self) -> bool:
        """True when the counts of tokens matter."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken (vLLM treats temperatures under 1e-5 so)."""
        return self.temperature < 1e-5

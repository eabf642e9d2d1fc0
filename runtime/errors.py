"""The errors a user may see. Anything else that escapes is a bug of ours."""


class ConfigError(ValueError):
    """A job, a setting or an input file that cannot work; the message says what to change."""


class RequestError(ValueError):
    """One request that can never run (prompt too long, bad field); the others go on."""


class ShardError(RuntimeError):
    """A shard was lost or failed; names the rank, its host, the step and the cause."""

    def __init__(self, rank: int, host: str, step_id: int, cause: str) -> None:
        super().__init__(f"shard {rank} on {host} failed at step {step_id}: {cause}")
        self.rank = rank
        self.host = host
        self.step_id = step_id
        self.cause = cause

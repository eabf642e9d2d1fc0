"""The answers to one prompt: a request for each."""

from .request import Request


class Samples:
    """`sampling.n` requests with one id, seed and prompt, sample k at place k.

    They run on their own and share the prompt's full blocks (prefixes.py); their noise differs by their sample
    index. The first is the request that would run if n were 1.
    """

    def __init__(self, first: Request) -> None:
        self.requests = [first, *(first.sample(index) for index in range(1, first.sampling.n))]
        self._num_left = len(self.requests)

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    def end_one(self) -> bool:
        """Count one that has ended; True when it was the last."""
        self._num_left -= 1
        return self._num_left == 0

    @property
    def num_output_tokens(self) -> int:
        """Of all samples, so far."""
        return sum(len(request.output_token_ids) for request in self.requests)

    @property
    def error(self) -> str | None:
        """Why not every sample is an answer."""
        failed = [request for request in self.requests if request.error is not None]
        if not failed or len(self.requests) == 1:
            return failed[0].error if failed else None
        return (
            f"{len(failed)} of {len(self.requests)} samples failed, the first at index "
            f"{failed[0].sample_index}: {failed[0].error}"
        )

"""When a request is done, and its text."""

from collections.abc import Collection, Mapping, Sequence

from .detokenizer import Detokenizer, TokenDecoder
from .request import FinishReason, Request


class EndOfRequest:
    """Decides after each new token whether a request has ended; keeps its text up to date.

    An ending token (EOS or a stop token) stays in `output_token_ids` and is not part of the text.
    The text is cut before a stop string; the token that completed it stays in the ids.
    With include_stop_str_in_output the text keeps both, as far as skip_special_tokens lets it.
    """

    def __init__(
        self,
        eos_token_ids: Collection[int],
        decoder: TokenDecoder | None,
        byte_tokens: Mapping[int, int],
    ) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decoder = decoder
        self._byte_tokens = byte_tokens

    def prepare(self, request: Request) -> None:
        """Call once before the first token. Stop strings need the text as it grows."""
        if request.sampling.stop:
            assert self._decoder is not None, "stop strings are refused without a tokenizer"
            request.detokenizer = self._detokenizer(request, self._decoder)

    def reached(self, request: Request) -> FinishReason | None:
        """Look at the newest token: "stop", "length" or None. Sets `stop_reason` and `text`.

        A text that is scored ends with its length.
        """
        if request.task == "score":
            return "length"
        sampling = request.sampling
        token_id = request.output_token_ids[-1]
        past_minimum = len(request.output_token_ids) > sampling.min_tokens
        if past_minimum and token_id in self._eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if past_minimum and token_id in sampling.stop_token_ids:
            request.stop_reason = token_id
            return "stop"
        if request.detokenizer is not None:
            self._extend_text(request, request.detokenizer, token_id, look_for_stop=past_minimum)
            if request.stop_reason is not None:
                return "stop"
        return "length" if request.num_tokens >= request.max_len else None

    def complete_text(self, request: Request) -> None:
        """Bring `text` to the end; call once when the request has ended for whatever reason."""
        if self._decoder is None or isinstance(request.stop_reason, str):
            return  # a stop string has cut the text already
        if not request.sampling.detokenize:
            return
        drops_last = request.finish_reason == "stop" and not request.sampling.include_stop_str_in_output
        token_ids = request.output_token_ids[:-1] if drops_last else request.output_token_ids
        if request.detokenizer is None:
            request.text = self._detokenizer(request, self._decoder).finish(token_ids)
            return
        # With stop strings all tokens but an ending one are in the text already.
        ending = token_ids[-1:] if request.finish_reason == "stop" and not drops_last else []
        request.text += request.detokenizer.finish(ending)
        request.detokenizer = None

    def _detokenizer(self, request: Request, decoder: TokenDecoder) -> Detokenizer:
        skip = request.sampling.skip_special_tokens
        return Detokenizer(decoder, request.prompt_token_ids, self._byte_tokens, skip_special_tokens=skip)

    @staticmethod
    def _extend_text(
        request: Request, detokenizer: Detokenizer, token_id: int, *, look_for_stop: bool
    ) -> None:
        num_before = len(request.text) + len(detokenizer.pending)
        request.text += detokenizer.feed(token_id)
        if not look_for_stop:
            return
        text, stops = request.text, request.sampling.stop
        if (pending := detokenizer.pending) and _first_of(stops, text + pending, num_before) is not None:
            text += detokenizer.rest()  # if the row ends here
        if (found := _first_of(stops, text, num_before)) is not None:
            at, stop = found
            request.stop_reason = stop
            end = at + len(stop) if request.sampling.include_stop_str_in_output else at
            request.text = text[:end]


def _first_of(stops: Sequence[str], text: str, num_before: int) -> tuple[int, str] | None:
    """Where the first of the stop strings begins that does not end within the first `num_before` characters."""
    hits = ((text.find(stop, max(num_before - len(stop) + 1, 0)), stop) for stop in stops)
    return min((hit for hit in hits if hit[0] >= 0), key=lambda hit: hit[0], default=None)

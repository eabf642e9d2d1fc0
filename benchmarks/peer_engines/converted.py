"""The engines that read the model in a form of their own; convert.py makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import workloads

SEQUENCES, SEQUENCE_LENGTH = 32, 512  # of W2
MAX_LENGTH = 4096
LOG_ERROR = 3  # GGML_LOG_LEVEL_ERROR; thousands of lines of others would take part in the timing


def _errors_only(level: int, text: bytes, _: Any) -> None:
    if level == LOG_ERROR:
        print(text.decode(errors="replace"), end="")


class LlamaCpp:
    """llama.cpp's C functions, with a sequence for each prompt: all prompts in batches, then a step for all rows at once,
    as its server does it. The package's own `Llama` takes one prompt at a time."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self._lib, self._numpy = llama_cpp, numpy
        self.version = llama_cpp.__version__
        self._log = llama_cpp.llama_log_callback(_errors_only)  # C calls it: it has to outlive this function
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        self._batch_size = params.n_batch
        self._batch = llama_cpp.llama_batch_init(self._batch_size, 0, 1)
        # A context deals its room out evenly among its sequences, so that a long prompt needs one of its own.
        self._alone = self._context(1, MAX_LENGTH, settings)
        self._together = self._context(SEQUENCES, SEQUENCES * SEQUENCE_LENGTH, settings)

    def _context(self, sequences: int, length: int, settings: dict[str, Any]) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length, sequences
        params.n_threads = params.n_threads_batch = settings["threads"]
        if settings["dtype"] == "float32":  # else float16, as it comes
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {sequences} sequences and {length} tokens")
        return context

    def generate(self, call: workloads.Call) -> list[list[int]]:
        context = self._alone if len(call.prompts) == 1 else self._together
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        made: list[list[int]] = [[] for _ in call.prompts]
        entries = [
            (row, position, token, position == len(prompt) - 1)
            for row, prompt in enumerate(call.prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(entries), self._batch_size):
            self._step(context, entries[start : start + self._batch_size], made)
        while True:
            entries = [
                (row, len(call.prompts[row]) + len(ids) - 1, ids[-1], True)
                for row, ids in enumerate(made)
                if len(ids) < call.max_tokens[row]
            ]
            if not entries:
                return made
            self._step(context, entries, made)

    def _step(self, context: Any, entries: list[tuple[int, int, int, bool]], made: list[list[int]]) -> None:
        """Computes entries of (row, position, token, whether the next token is wanted), and adds those to `made`."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (row, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        failed = self._lib.llama_decode(context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        for i, (row, _, _, wanted) in enumerate(entries):
            if wanted:
                logits = self._lib.llama_get_logits_ith(context, i)
                made[row].append(int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))


class CTranslate2:
    """One batch: rows that are to get fewer tokens are computed on to the longest and cut."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import ctranslate2

        self.version = ctranslate2.__version__
        weights = settings["weights"] or settings["dtype"]
        self._generator = ctranslate2.Generator(
            model,
            device="cpu",
            compute_type="int8_float32" if weights == "int8" else weights,
            inter_threads=1,
            intra_threads=settings["threads"],
        )
        self._tokens: list[str] = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, call: workloads.Call) -> list[list[int]]:
        most = max(call.max_tokens)
        results = self._generator.generate_batch(
            [[self._tokens[i] for i in prompt] for prompt in call.prompts],
            min_length=most,
            max_length=most,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [
            result.sequences_ids[0][:count] for result, count in zip(results, call.max_tokens, strict=True)
        ]

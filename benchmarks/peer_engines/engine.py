"""One engine in a process of its own: loads the model, then runs samples as peers.py asks for them, a line of JSON each.

    python engine.py KIND MODEL SETTINGS      SETTINGS is JSON: dtype, size, weights, threads

Runs in the Python that has the engine installed, so of this repository only kvshard itself imports more than the
standard library. A line {"workload": "W1", "repeat": 3} is answered by the seconds of its calls
and a digest of the tokens, {"seconds": [...], "tokens": "..."}; with "token_ids": true in it by the tokens as well,
a list for each call.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import tokens
import workloads
from converted import CTranslate2, LlamaCpp

MAX_LENGTH = 4096
CACHE_GIB = 2


class Engine(Protocol):
    version: str

    def generate(self, call: workloads.Call) -> list[list[int]]:
        """Greedy tokens of every prompt, in order."""
        ...


class Kvshard:
    """Its cache is filled by the first call, which is not measured. vLLM's pages are all written to when it starts, while
    kvshard's get their memory when they are first used; where a host takes back what its guests leave free, that takes
    long."""

    CACHE_BLOCKS, FILLING = 3072, 1024  # blocks of 16 tokens; tokens of a prompt

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import kvshard

        self.version = kvshard.__version__
        self._params = kvshard.SamplingParams
        self._llm = kvshard.LLM(
            model,
            dtype=settings["dtype"],
            quantization=settings["weights"] or "none",
            device="cpu",
            tensor_parallel_size=settings["size"],
            threads_per_shard=max(settings["threads"] // settings["size"], 1),
            scheduler={"max_num_seqs": 64, "max_model_len": MAX_LENGTH},
            cache={"num_blocks": self.CACHE_BLOCKS},
        )
        self._filled = False

    def generate(self, call: workloads.Call) -> list[list[int]]:
        if not self._filled:
            self._filled = True
            count = self.CACHE_BLOCKS * 16 // self.FILLING
            prompts = [[workloads.LOWEST + i] * self.FILLING for i in range(count)]
            self.generate(workloads.Call(prompts, [1] * count))
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in call.prompts],
            [
                self._params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                for count in call.max_tokens
            ],
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


class Vllm:
    """With prefix caching, as it comes, and its engine in this process where it has no other shard: that is its
    fastest way."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        threads, size = settings["threads"], settings["size"]
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if size == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        else:  # more shards than cores: pinned ones would share one
            os.environ |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(max(threads // size, 1)),
            }
        import vllm

        self.version = vllm.__version__
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=model,
            dtype=settings["dtype"],
            tensor_parallel_size=size,
            max_model_len=MAX_LENGTH,
            max_num_seqs=64,
            disable_log_stats=True,
        )

    def generate(self, call: workloads.Call) -> list[list[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in call.prompts],
            [
                self._vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                for count in call.max_tokens
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


class Transformers:
    """One padded batch: rows that are to get fewer tokens are computed on to the longest and cut, as generate() does it."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(settings["threads"])
        self.version = transformers.__version__
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, settings["dtype"])
        ).eval()

    def generate(self, call: workloads.Call) -> list[list[int]]:
        torch = self._torch
        longest = max(map(len, call.prompts))
        ids = torch.zeros(len(call.prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(call.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        most = max(call.max_tokens)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=most,
                max_new_tokens=most,
                pad_token_id=0,
            )
        made = out[:, longest:].tolist()
        return [row[:count] for row, count in zip(made, call.max_tokens, strict=True)]


ENGINES: dict[str, Callable[[str, dict[str, Any]], Engine]] = {
    "kvshard": Kvshard,
    "vllm": Vllm,
    "transformers": Transformers,
    "llamacpp": LlamaCpp,
    "ctranslate2": CTranslate2,
}


def main() -> None:
    name, model, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")  # whatever else is printed goes to the log
    os.dup2(2, 1)
    start = time.perf_counter()
    engine = ENGINES[name](model, settings)
    load_s = time.perf_counter() - start
    print(json.dumps({"version": engine.version, "load_s": load_s}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, made = [], []
        for call in workloads.calls(asked["workload"], asked["repeat"]):
            start = time.perf_counter()
            token_ids = engine.generate(call)
            seconds.append(time.perf_counter() - start)
            assert [len(ids) for ids in token_ids] == call.max_tokens, f"{name} gave other lengths"
            made.append([[int(i) for i in ids] for ids in token_ids])
        answer: dict[str, Any] = {"seconds": seconds, "tokens": tokens.digest(made)}
        if asked.get("token_ids"):
            answer["token_ids"] = made
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # some engines take long to end


if __name__ == "__main__":
    main()

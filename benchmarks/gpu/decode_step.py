"""Time of one decode step of an 8B-shaped model with random weights, bf16, eager and as a captured CUDA graph.

Claims: the captured step is at least 1.5 times as fast as the eager one at batch 1, and reaches at least 0.75 of the
roofline, which is the bytes of the weights and of the cached keys and values at the measured copy bandwidth.

    benchmarks/gpu/run.sh decode_step

Both are kvshard's own Decoder over one rank. A step is all from the lengths that the host knows to the token ids that
feed the next step on the device. Graphs are those of the shard (runtime/shard/captured_steps.py): one for a bucket of rows,
of the layers; each step rewrites lengths, block tables and work list in place and replays it, also for fewer rows than the
bucket has.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from harness import Part, Run, check, copy_of, run_part
from torch import Tensor

from kvshard.kernels import ops
from kvshard.parallel.group import Group
from kvshard.parallel.shard_map import ShardMap
from kvshard.runtime.models.parameters import local_parameters
from kvshard.runtime.models.spec import ModelSpec, RotarySpec
from kvshard.runtime.shard.captured_steps import CapturedSteps, GraphPool, Step
from kvshard.runtime.shard.decoder import Decoder
from kvshard.runtime.shard.kv_cache import KVCache
from kvshard.runtime.shard.slots import StepInputs

BLOCK_SIZE = 16
GROWTH = 64  # steps for which rows have blocks


def model_spec(dry: bool) -> ModelSpec:
    """The shape of Llama 3.1 8B, or a toy."""
    hidden, layers, num_q, num_kv, head_dim, inner, vocab = (
        (64, 2, 4, 2, 16, 96, 128) if dry else (4096, 32, 32, 8, 128, 14336, 128256)
    )
    return ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        num_layers=layers,
        num_q_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocab,
        layer_windows=(None,) * layers,
        rms_norm_eps=1e-5,
        rotary=RotarySpec(500000.0, head_dim),
        tie_embeddings=False,
        max_position_embeddings=131072,
        eos_token_ids=(),
        bos_token_id=None,
    )


def shapes(dry: bool) -> list[tuple[int, int, int]]:
    """Rows, rows of the bucket, context."""
    if dry:
        return [(1, 1, 20), (3, 4, 40)]
    return [(1, 1, 1024), (1, 1, 4096), (32, 32, 1024), (32, 32, 4096), (27, 32, 4096)]


def name_of(rows: int, bucket: int, context: int) -> str:
    return f"{rows} rows" + (f" in a bucket of {bucket}" if rows < bucket else "") + f", context {context}"


def rows(dry: bool) -> list[tuple[str, str]]:
    return [(name_of(*shape), variant) for shape in shapes(dry) for variant in ("copy", "eager", "graph")]


class Model:
    """A Decoder with random weights, its cache full of random keys and values, and rows of blocks."""

    def __init__(self, part: Part) -> None:
        self.dry, self.device = part.dry, part.device
        self.spec = model_spec(part.dry)
        self.shard = ShardMap.build(self.spec.dims, 1).shard(0)
        self.max_context = max(context for _, _, context in shapes(part.dry)) + GROWTH
        max_rows = max(bucket for _, bucket, _ in shapes(part.dry))
        weights = {}
        for parameter in local_parameters(self.spec, self.shard):
            weights[parameter.name] = self._random(parameter.shape)
        group = Group.single(self.device)
        self.decoder = Decoder(self.spec, self.shard, weights, group, self.max_context)
        self.weight_bytes = float(sum(w.nbytes for name, w in weights.items() if name != "embed"))
        self.blocks_per_row = -(-self.max_context // BLOCK_SIZE)
        num_blocks = max_rows * self.blocks_per_row + 1
        self.cache = KVCache(
            self.spec,
            self.shard,
            group_blocks=(num_blocks,),
            block_size=BLOCK_SIZE,
            format="auto",
            dtype=torch.bfloat16,
            device=self.device,
        )
        for layer in self.cache.layers:
            layer.k.normal_()
            layer.v.normal_()
        order = torch.randperm(num_blocks - 1, device=self.device).int() + 1
        self.tables = order.view(max_rows, self.blocks_per_row)

    def bytes_of_step(self, rows: int, context: int) -> float:
        """Weights once, the keys and values of every row, and what is little beside them: embeddings, logits."""
        spec = self.spec
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
        return self.weight_bytes + rows * (context * per_token + spec.hidden_size * 2 + spec.vocab_size * 4)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return weight.normal_(1.0, 0.1) if len(shape) == 1 else weight.normal_(0.0, 0.02)


class Decoding:
    """Steps of some rows from a context on. tokens [rows] int64: in, and the next ones after a step."""

    def __init__(
        self, model: Model, rows: int, context: int, forward: Callable[[StepInputs], Tensor]
    ) -> None:
        self.model, self.rows, self.context, self.forward = model, rows, context, forward
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)

    def __call__(self, step: int) -> Tensor:
        inputs = self.inputs(step)
        logits = self.model.decoder.logits(self.forward(inputs)[inputs.sample_tokens])
        torch.argmax(logits, dim=1, out=self.tokens)
        return logits

    def inputs(self, step: int) -> StepInputs:
        model, rows = self.model, self.rows
        length = self.context + step % GROWTH + 1
        tables = model.tables[:rows, : -(-length // BLOCK_SIZE)]
        position = torch.full((rows,), length - 1, dtype=torch.int64, device=model.device)
        place = tables[:, (length - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
        meta = ops.AttentionMetadata.build(
            np.ones(rows, np.int32), np.full(rows, length, np.int32), tables, BLOCK_SIZE, model.device
        )
        last = torch.arange(rows, device=model.device)
        nobody = np.zeros(0, np.int32)
        return StepInputs(self.tokens, position, (place,), (meta,), last, nobody, nobody.astype(np.int64))


def captured_steps(model: Model, max_rows: int) -> CapturedSteps:
    """On a CPU, which has no graphs, a replay is a call of what would have been captured."""

    def same_call(step: Step) -> Step:
        step()
        return step

    return CapturedSteps(
        model.decoder,
        model.cache,
        num_groups=1,
        max_num_seqs=max_rows,
        max_model_len=model.max_context,
        block_size=BLOCK_SIZE,
        capture=same_call if model.dry else GraphPool().capture,
    )


@torch.inference_mode()
def body(part: Part) -> None:
    model = Model(part)
    steps = captured_steps(model, max(bucket for _, bucket, _ in shapes(part.dry)))

    def as_they_come(inputs: StepInputs) -> Tensor:
        return model.decoder.forward(inputs, model.cache)

    for rows, bucket, context in shapes(part.dry):
        case = name_of(rows, bucket, context)
        copy, copied = copy_of(part)

        def eager(rows: int = rows, context: int = context) -> Run:
            return Decoding(model, rows, context, as_they_come)

        def graph(rows: int = rows, bucket: int = bucket, context: int = context) -> Run:
            run = Decoding(model, rows, context, steps.forward)
            error = check(run(0).clone(), eager(rows, context)(0), 0.05)
            part.rows[name_of(rows, bucket, context), "graph"].remark = f"logits {error:.1e} from eager"
            return Decoding(model, rows, context, steps.forward)

        moved = model.bytes_of_step(rows, context)
        makers = {"copy": copy, "eager": eager, "graph": graph}
        part.stream(case, makers, {"copy": copied, "eager": moved, "graph": moved})
        if rows == 1:
            part.target(f"eager against graph: {case}", 1.5, part.ratio(case, "eager", "graph"))
        part.target(f"share of roofline: {case}", 0.75, part.share(case, "graph"))


if __name__ == "__main__":
    run_part("decode_step", __doc__, rows, body)

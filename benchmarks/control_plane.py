"""What the coordinator costs: its own work per step, and how long a plan takes to reach the shards.

Claims: with 256 rows of 8k tokens each, the coordinator needs less than half a millisecond per step;
and a plan reaches the shards faster over the control channel than by calling Ray actors.

    python benchmarks/control_plane.py
    python benchmarks/control_plane.py --peers 2 4 --rounds 300

Step: a decode step on an executor that answers at once, one plan ahead; the time of the executor's own
stand-in work is left out. "update" holds everything after the result is there: tokens appended, ends
looked for, blocks freed.

Fan-out: one plan of 256 decode rows goes to every peer process, and the step is over when all have
answered as shards do (tokens from rank 0, a checksum from the others). Channel and Ray take turns, so that a
busy moment of the machine hits both. The peers do nothing else: what is measured is the way there and back.
"""

import gc
import multiprocessing
import statistics
import time
from collections import deque

import numpy as np
import record
import zmq

from kvshard.runtime.coordinator.channel import ControlChannel, shard_identity
from kvshard.runtime.coordinator.limits import Limits
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.plan import (
    NO_TOKEN,
    StepPlan,
    StepResult,
    decode_plan,
    encode_plan,
    encode_result,
)
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.messages import Kind
from kvshard.runtime.models.spec import LayerGroup
from kvshard.runtime.sampling_params import SamplingParams

NUM_ROWS = 256
CONTEXT_LEN = 8192
BLOCK_SIZE = 16
EOS = (128_001, 128_008, 128_009)
WARM_UP = 20
CONNECT_S = 60

Samples = dict[str, list[float]]


class InstantExecutor:
    """Answers every plan at once; notes when it was called, in ns."""

    def __init__(self) -> None:
        self._plans: deque[StepPlan] = deque()
        self.last_plan: StepPlan | None = None
        self.submit_at = self.encoded_at = self.result_at = self.answered_at = 0

    def submit(self, plan: StepPlan) -> None:
        self.submit_at = time.perf_counter_ns()
        encode_plan(plan)
        self.encoded_at = time.perf_counter_ns()
        self.last_plan = plan
        self._plans.append(plan)

    def result(self) -> StepResult:
        self.result_at = time.perf_counter_ns()
        plan = self._plans.popleft()
        token_ids = np.where(plan.row_samples, plan.step_id % 1000, NO_TOKEN).astype(np.int32)
        result = StepResult(0, plan.step_id, token_ids, None)
        self.answered_at = time.perf_counter_ns()
        return result


def measure_steps(num_steps: int) -> tuple[Samples, StepPlan]:
    """Microseconds of each part of a step with every row decoding; and one of its plans."""
    num_new = num_steps + WARM_UP + NUM_ROWS * CONTEXT_LEN // 4096
    limits = Limits(
        num_blocks=NUM_ROWS * ((CONTEXT_LEN + num_new) // BLOCK_SIZE + 1) * 11 // 10,
        block_size=BLOCK_SIZE,
        max_model_len=CONTEXT_LEN + num_new,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=8192,
        layer_groups=(LayerGroup(None, 1),),
    )
    executor = InstantExecutor()
    coordinator = Coordinator(executor, limits, eos_token_ids=EOS)
    for row in range(NUM_ROWS):
        prompt = [row, *range(CONTEXT_LEN - 1)]  # rows that begin alike would share their blocks
        coordinator.add(Request.new(str(row), prompt, SamplingParams(max_tokens=None)))
    while executor.last_plan is None or not executor.last_plan.row_from_device.all():
        coordinator.step()
    for _ in range(WARM_UP):
        coordinator.step()
    samples: Samples = {"schedule": [], "encode": [], "update": [], "step": []}
    for _ in range(num_steps):
        start = time.perf_counter_ns()
        ended = coordinator.step()
        end = time.perf_counter_ns()
        assert not ended, "every row goes on"
        parts = {
            "schedule": executor.submit_at - start,
            "encode": executor.encoded_at - executor.submit_at,
            "update": end - executor.answered_at,
        }
        for name, value in parts.items():
            samples[name].append(value / 1e3)
        samples["step"].append(sum(parts.values()) / 1e3)
    plan = executor.last_plan
    assert plan.num_rows == NUM_ROWS, "every row decodes"
    return samples, plan


def answer_to(payload: bytes, rank: int) -> tuple[Kind, bytes]:
    """What a shard sends back for a plan."""
    plan = decode_plan(payload)
    result = StepResult(plan.epoch, plan.step_id, plan.row_slots, None)
    if rank == 0:
        return Kind.RESULT, encode_result(result)
    return Kind.CHECK, result.checksum().to_bytes(4, "little")


def serve_channel(endpoint: str, rank: int) -> None:
    """A peer on the control channel, until it is told to close."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.IDENTITY, shard_identity(rank))
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint)
        dealer.send_multipart((Kind.HELLO.value, b""))
        while True:
            kind, payload = dealer.recv_multipart()
            if kind == Kind.CLOSE.value:
                return
            answer_kind, answer = answer_to(payload, rank)
            dealer.send_multipart((answer_kind.value, answer))


def measure_fan_out(num_peers: int, num_rounds: int, payload: bytes) -> Samples:
    """Microseconds from sending one plan until all peers have answered, over either way."""
    import ray

    @ray.remote(num_cpus=0)
    class Peer:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def step(self, payload: bytes) -> tuple[Kind, bytes]:
            return answer_to(payload, self.rank)

    actors = [Peer.remote(rank) for rank in range(num_peers)]
    channel = ControlChannel(address=None, high_water_mark=16, send_timeout_s=CONNECT_S)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=serve_channel, args=(channel.endpoint, rank), daemon=True)
        for rank in range(num_peers)
    ]

    def gather() -> None:
        for _ in range(num_peers):
            if channel.receive(CONNECT_S) is None:
                raise TimeoutError(f"a peer did not answer within {CONNECT_S} s")

    def by_channel() -> None:
        for rank in range(num_peers):
            channel.send(shard_identity(rank), Kind.PLAN, payload)
        gather()

    def by_ray() -> None:
        ray.get([actor.step.remote(payload) for actor in actors], timeout=CONNECT_S)

    samples: Samples = {"channel": [], "ray": []}
    try:
        for process in processes:
            process.start()
        gather()  # each peer's HELLO
        for turn in range(WARM_UP + num_rounds):
            for name, call in (("channel", by_channel), ("ray", by_ray)):
                start = time.perf_counter_ns()
                call()
                if turn >= WARM_UP:
                    samples[name].append((time.perf_counter_ns() - start) / 1e3)
        for rank in range(num_peers):
            channel.send(shard_identity(rank), Kind.CLOSE, b"")
        for process in processes:
            process.join(CONNECT_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        channel.close()
        for actor in actors:
            ray.kill(actor)
    return samples


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({record.percentile_99(values):.0f})"


def main() -> None:
    parser = record.parser("control_plane", __doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--peers", type=int, nargs="*", default=[1, 2, 4])
    arguments = parser.parse_args()
    result = record.describe("control_plane")
    result["versions"] |= {"numpy": np.__version__, "pyzmq": zmq.__version__}

    steps, plan = measure_steps(arguments.steps)
    gc.collect()
    print(f"coordinator, {NUM_ROWS} rows of {CONTEXT_LEN} tokens: median (p99), microseconds")
    print("| " + " | ".join(steps) + " |\n|" + "---|" * len(steps))
    print("| " + " | ".join(cell(values) for values in steps.values()) + " |\n")

    fan_out: dict[int, Samples] = {}
    if arguments.peers:
        import ray

        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
        result["versions"]["ray"] = ray.__version__
        payload = encode_plan(plan)
        print(f"one plan ({len(payload)} bytes) to all peers and their answers: median (p99), microseconds")
        print("| peers | control channel | Ray actor call |\n|---|---|---|")
        for num_peers in arguments.peers:
            fan_out[num_peers] = measure_fan_out(num_peers, arguments.rounds, payload)
            print(
                f"| {num_peers} | {cell(fan_out[num_peers]['channel'])} | {cell(fan_out[num_peers]['ray'])} |"
            )
        ray.shutdown()

    result |= {
        "unit": "microseconds",
        "rows": NUM_ROWS,
        "context_len": CONTEXT_LEN,
        "median": {
            "step": {name: statistics.median(values) for name, values in steps.items()},
            "fan_out": {
                peers: {name: statistics.median(values) for name, values in samples.items()}
                for peers, samples in fan_out.items()
            },
        },
        "samples": {
            "step": {name: [round(value, 1) for value in values] for name, values in steps.items()},
            "fan_out": {
                peers: {name: [round(value, 1) for value in values] for name, values in samples.items()}
                for peers, samples in fan_out.items()
            },
        },
    }
    record.write(result, arguments.output)


if __name__ == "__main__":
    main()

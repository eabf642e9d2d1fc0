"""Log probabilities of prompts and answers against transformers' logits, at several sizes, through small chunks."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from family_models import make_family_model
from logprob_ranks import answer, make_coordinator, run_requests
from models_factory import make_model
from ranks import run_ranks
from tolerances import assert_within

from kvshard.parallel.group import Group
from kvshard.runtime.coordinator.logprobs import Place
from kvshard.runtime.coordinator.loop import Coordinator
from kvshard.runtime.coordinator.request import Request
from kvshard.runtime.coordinator.scoring import prompt_places, score_of
from kvshard.runtime.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB_SIZE = 41
PROMPTS = [
    np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist() for length in (23, 9, 1, 2, 17)
]


def log_softmax(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] float64 by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(1)


def check_places(places: list[Place], expected: torch.Tensor, token_ids: list[int], num_top: int) -> None:
    """Places against [places, vocab]: the tokens there, their ranks, and torch.topk of the whole vocabulary."""
    assert [place[0].token_id for place in places] == token_ids
    got = torch.tensor([[token.logprob for token in place] for place in places], dtype=torch.float32)
    ids = torch.tensor([[token.token_id for token in place] for place in places])
    ranks = torch.tensor([[token.rank for token in place] for place in places])
    assert got.shape == (len(token_ids), 1 + num_top)
    assert_within(got, expected.gather(1, ids).float(), "logits")
    top = expected.topk(num_top, 1)
    assert torch.equal(ids[:, 1:], top.indices)
    assert torch.equal(ranks[:, 1:], torch.arange(1, num_top + 1).expand(len(places), -1))
    assert torch.equal(ranks[:, 0], 1 + (expected > expected.gather(1, ids[:, :1])).sum(1))


def check_request(request: Request, model: Any, num_top: int) -> None:
    places = prompt_places(request)
    assert places is not None
    assert places[0] is None
    sequence = request.prompt_token_ids + request.output_token_ids
    expected = log_softmax(model, sequence)[:-1]
    assert request.output_logprobs is not None
    whole = [place for place in (*places[1:], *request.output_logprobs.places()) if place is not None]
    check_places(whole, expected, sequence[1:], num_top)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def start(path: Path, num_blocks: int = 60, **settings: Any) -> Coordinator:
    return make_coordinator(path, Group.single(CPU), num_blocks, settings)


def make_requests(num_top: int = 20, max_tokens: int = 6) -> list[Request]:
    sampling = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=max_tokens, logprobs=num_top, prompt_logprobs=num_top
    )
    return [Request.new(f"r{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]


def make_texts() -> list[Request]:
    """The prompts that have more than one token, to be scored."""
    sampling = SamplingParams(prompt_logprobs=5)
    return [
        Request.new(f"t{i}", prompt, sampling, task="score")
        for i, prompt in enumerate(PROMPTS)
        if len(prompt) > 1
    ]


def check_text(request: Request, model: Any) -> None:
    """Against transformers' own loss, which is the mean over all tokens but the first."""
    places, score = prompt_places(request), score_of(request)
    assert places is not None
    assert score is not None
    text = request.prompt_token_ids
    told = [place for place in places[1:] if place is not None]
    check_places(told, log_softmax(model, text)[:-1], text[1:], 5)
    with torch.inference_mode():
        loss = model(torch.tensor([text]), labels=torch.tensor([text])).loss
    mean = torch.tensor(-score.logprob_sum / score.num_tokens, dtype=torch.float32)
    assert_within(mean, loss, "logits")
    assert score.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert request.output_token_ids == []


@pytest.mark.parametrize("settings", [{}, {"cache": {"enabled": False}}], ids=["cache", "no cache"])
@pytest.mark.parametrize("num_blocks", [60, 9])
def test_scores_equal_transformers_loss(
    model: Any, path: Path, num_blocks: int, settings: dict[str, Any]
) -> None:
    coordinator = start(path, num_blocks, **settings)
    for request in run_requests(coordinator, make_texts()):
        check_text(request, model)
    assert coordinator.stats.num_output_tokens == 0


def test_prompts_and_answers_equal_transformers(model: Any, path: Path) -> None:
    """Steps of 8 tokens, and logits of 3 places at once, as many as the memory plan has room for."""
    coordinator = start(path)
    decoder = coordinator._executor.worker.decoder  # type: ignore[attr-defined]
    num_rows = []
    with mock.patch.object(decoder, "logits", side_effect=decoder.logits) as logits:
        requests = run_requests(coordinator, make_requests())
        num_rows = [len(call.args[0]) for call in logits.call_args_list]
    assert max(num_rows) == 3
    for request in requests:
        check_request(request, model, 20)


@pytest.mark.parametrize("size", [2, 3])
def test_every_size_gives_the_same_lists(model: Any, path: Path, size: int) -> None:
    """20 most likely tokens, where a rank of three has no more than 14."""
    first, *others = run_ranks(answer, size, path, [*make_requests(), *make_texts()], 60)
    for request in first:
        if request.task == "score":
            check_text(request, model)
        else:
            check_request(request, model, 20)
    for other in others:
        for request, same in zip(first, other, strict=True):
            assert prompt_places(request) == prompt_places(same)
            assert request.output_logprobs == same.output_logprobs


def test_soft_caps_are_part_of_the_logits(tmp_path: Path) -> None:
    model = make_family_model("gemma2")
    model.save_pretrained(tmp_path)
    for request in run_requests(start(tmp_path), make_requests(num_top=3)):
        check_request(request, model, 3)


@pytest.mark.parametrize("settings", [{}, {"cache": {"enabled": False}}], ids=["cache", "no cache"])
@pytest.mark.parametrize("run_ahead", [0, 2])
def test_preempted_rows_are_told_each_token_once(
    model: Any, path: Path, run_ahead: int, settings: dict[str, Any]
) -> None:
    coordinator = start(path, 12, **settings, scheduler={"run_ahead": run_ahead})
    requests = run_requests(coordinator, make_requests(num_top=2, max_tokens=20))
    assert coordinator.stats.num_preemptions > 0 or settings
    for request in requests:
        check_request(request, model, 2)


def test_a_prompt_that_others_have_computed_is_computed_again(model: Any, path: Path) -> None:
    coordinator = start(path)
    plain = Request.new("plain", PROMPTS[0], SamplingParams(temperature=0))
    run_requests(coordinator, [plain])
    requests = run_requests(coordinator, make_requests(num_top=1))
    assert coordinator.stats.num_cached_prompt_tokens == 0
    for request in requests:
        check_request(request, model, 1)

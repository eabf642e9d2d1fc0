"""Stop strings and the text of finished requests, through the whole coordinator."""

from types import ModuleType

import pytest


@pytest.fixture
def full(fake: ModuleType) -> list[int]:
    """What request "a" gives when nothing stops it."""
    output: list[int] = fake.expected(fake.make_request("a", 6, max_tokens=40), (), 200)[0]
    assert len(set(output[:8])) == 8
    return output


def _text(fake: ModuleType, ids: list[int]) -> str:
    text: str = fake.LetterTokenizer().decode(ids, skip_special_tokens=True)
    return text


def _run(fake: ModuleType, *, eos: tuple[int, ...] = (), num_special: int = 0, **sampling: object):
    run = fake.Run(fake.make_limits(), eos, fake.LetterTokenizer(num_special))
    request = fake.make_request("a", 6, **{"max_tokens": 40, **sampling})
    run.add(request)
    run.to_the_end()
    assert run.finished == [request]
    return request


@pytest.mark.parametrize("first", [0, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_stop_string_over_token_borders(fake: ModuleType, full: list[int], first: int, size: int) -> None:
    stop = _text(fake, full[first : first + size])
    request = _run(fake, stop=[stop])
    assert request.text == _text(fake, full[:first])
    assert request.output_token_ids == full[: first + size]
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)


def test_the_first_of_several_stop_strings_counts(fake: ModuleType, full: list[int]) -> None:
    late, early = _text(fake, full[6:7]), _text(fake, full[2:5])
    request = _run(fake, stop=[late, early, "never"])
    assert (request.stop_reason, request.text) == (early, _text(fake, full[:2]))


def test_a_stop_string_inside_the_prompt_does_not_count(fake: ModuleType, full: list[int]) -> None:
    prompt = fake.make_request("a", 6).prompt_token_ids
    across = _text(fake, [*prompt[-2:], full[0]])
    request = _run(fake, stop=[across], max_tokens=8)
    assert request.finish_reason == "length"
    assert request.text == _text(fake, full[:8])


@pytest.mark.parametrize(("min_tokens", "num_output"), [(4, 5), (5, 40), (12, 40)])
def test_no_stop_string_ends_a_row_before_min_tokens(
    fake: ModuleType, full: list[int], min_tokens: int, num_output: int
) -> None:
    """The stop string is complete with token 5; it counts only when that is past the minimum."""
    stop = _text(fake, full[3:5])
    assert stop not in _text(fake, full[5:])
    request = _run(fake, stop=[stop], min_tokens=min_tokens)
    assert len(request.output_token_ids) == num_output


def test_an_ending_token_is_kept_as_id_and_not_as_text(fake: ModuleType, full: list[int]) -> None:
    for how in ({"eos": (full[4],)}, {"stop_token_ids": [full[4]]}):
        for stop in ([], ["never"]):
            request = _run(fake, stop=stop, **how)
            assert request.output_token_ids == full[:5]
            assert request.text == _text(fake, full[:4])
            assert request.stop_reason == (None if "eos" in how else full[4])


@pytest.mark.parametrize("first", [0, 2, 5])
def test_the_text_keeps_a_stop_string_that_is_asked_for(
    fake: ModuleType, full: list[int], first: int
) -> None:
    """Not what its last token holds beyond it."""
    stop = _text(fake, full[first : first + 2])
    request = _run(fake, stop=["never", stop], include_stop_str_in_output=True)
    assert request.text == _text(fake, full[: first + 2])
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("stop", [[], ["never"]])
@pytest.mark.parametrize("how", ["eos", "stop_token_ids"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_text_keeps_an_ending_token_that_is_asked_for(
    fake: ModuleType, full: list[int], how: str, stop: list[str], skip_special_tokens: bool
) -> None:
    settings = {"stop": stop, "include_stop_str_in_output": True, "skip_special_tokens": skip_special_tokens}
    request = _run(fake, **settings, **{how: (full[4],)})
    assert request.text == _text(fake, full[:5])
    special = _run(fake, num_special=200, **settings, **{how: (full[4],)})
    assert special.text == ("" if skip_special_tokens else _text(fake, full[:5]))


def test_special_tokens_are_text_where_asked_for(fake: ModuleType, full: list[int]) -> None:
    for stop in ([], ["never"]):
        request = _run(fake, num_special=200, skip_special_tokens=False, stop=stop)
        assert request.text == _text(fake, full)


def test_no_text_without_detokenizing(fake: ModuleType, full: list[int]) -> None:
    request = _run(fake, detokenize=False)
    assert (request.text, request.output_token_ids) == ("", full)


def test_eos_that_is_ignored_and_special_is_not_text(fake: ModuleType, full: list[int]) -> None:
    request = _run(fake, eos=tuple(range(30)), num_special=30, ignore_eos=True)
    assert request.output_token_ids == full
    assert request.finish_reason == "length"
    assert request.text == _text(fake, [token for token in full if token >= 30])


def test_text_of_an_aborted_row(fake: ModuleType, full: list[int]) -> None:
    for stop in ([], ["never"]):
        run = fake.Run(fake.make_limits(), (), fake.LetterTokenizer())
        request = fake.make_request("a", 6, max_tokens=40, stop=stop)
        run.add(request)
        for _ in range(3):
            run.step()
        run.coordinator.abort("a")
        assert request.text == _text(fake, full[:3])


def test_text_grows_step_by_step_with_stop_strings(fake: ModuleType, full: list[int]) -> None:
    run = fake.Run(fake.make_limits(), (), fake.LetterTokenizer())
    request = fake.make_request("a", 6, max_tokens=5, stop=["never"])
    run.add(request)
    for count in range(1, 6):
        run.step()
        assert request.text == _text(fake, full[:count])


def test_without_a_tokenizer_texts_stay_empty(fake: ModuleType) -> None:
    run = fake.Run(fake.make_limits())
    request = fake.make_request("a", 6, max_tokens=5)
    run.add(request)
    run.to_the_end()
    assert request.text == ""
    assert len(request.output_token_ids) == 5

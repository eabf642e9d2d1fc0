"""`kvshard bench cache`: the counts are the coordinator's, and the plot is drawn from the samples."""

from pathlib import Path

import pytest
from rich.console import Console

from kvshard.launch.bench import CacheSample, measure, parse_lengths, plot, print_table
from kvshard.runtime.errors import ConfigError


def make_samples() -> list[CacheSample]:
    return [
        CacheSample(True, 50, 50, 1.0, 2 << 20, (1, 2)),
        CacheSample(True, 100, 100, 2.0, 4 << 20, (1, 2, 3)),
        CacheSample(False, 50, 1275, 4.0, 0, (1, 2)),
        CacheSample(False, 100, 5050, 16.0, 0, (1, 2, 4)),
    ]


def test_lengths() -> None:
    assert parse_lengths("100, 25,25") == [25, 100]


@pytest.mark.parametrize("text", ["", "0", "10,", "ten", "-5"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="--lengths"):
        parse_lengths(text)


def test_table() -> None:
    console = Console(record=True, width=80)
    print_table(console, make_samples())
    last = next(line for line in console.export_text().splitlines() if "5,050" in line)
    assert last.split() == ["100", "100", "5,050", "20.00", "160.00", "4.0", "0.0", "no"]


def test_plot(tmp_path: Path) -> None:
    plot(make_samples(), tmp_path / "cache.png", "test")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_token_steps_of_a_real_run() -> None:
    counts = {
        enabled: [
            sample.num_token_steps for sample in measure("demo", [4, 10], 1, enabled, Console(quiet=True))
        ]
        for enabled in (True, False)
    }
    assert counts == {True: [4, 10], False: [10, 55]}

"""Every layer's activations and the logits against transformers, for shards of every kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_ranks import reference, trace
from models_factory import make_model
from ranks import run_ranks
from tolerances import assert_within

PROMPTS = [[5, 17, 99, 3, 42, 8, 77], [61, 2, 30], [9, 9, 54, 12, 80, 33, 21, 4, 6, 11, 71, 25, 90]]
CUT = 2  # prompts are run in two steps, so that the second reads the cache of the first

CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("groups", {}, (1, 2, 3)),
    ("more_shards_than_kv_heads", {"num_key_value_heads": 2}, (3, 4, 6)),
    # Shards of 2, 3, 2 and 2 heads: the second has one head of a group and two of the next.
    (
        "unequal_parts_of_groups",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144},
        (4,),
    ),
    ("one_kv_head", {"num_key_value_heads": 1}, (1, 2, 5)),
    ("every_head_its_own_kv", {"num_key_value_heads": 6, "tie_word_embeddings": True}, (4,)),
    ("head_dim_80", {"head_dim": 80, "intermediate_size": 100}, (2,)),
    (
        "llama3_rotary",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        (2,),
    ),
]


@pytest.mark.parametrize(
    ("overrides", "sizes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_layers_and_logits_equal_transformers(
    overrides: dict[str, Any], sizes: tuple[int, ...], tmp_path: Path
) -> None:
    model = make_model(**overrides)
    model.save_pretrained(tmp_path)
    expected_layers, expected_logits = reference(model, PROMPTS)
    for size in sizes:
        for layers, logits in run_ranks(trace, size, tmp_path, PROMPTS, CUT):
            for layer, expected in expected_layers.items():
                assert_within(torch.from_numpy(layers[layer]), expected, "hidden")
            assert_within(torch.from_numpy(logits), expected_logits, "logits")


def test_a_wrong_weight_is_seen(tmp_path: Path) -> None:
    """The comparison above can fail: one changed value of one layer's norm moves that layer, not the one before."""
    model = make_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] += 0.01
    expected_layers, expected_logits = reference(model, PROMPTS)
    ((layers, logits),) = run_ranks(trace, 1, tmp_path, PROMPTS, CUT)
    assert_within(torch.from_numpy(layers[0]), expected_layers[0], "hidden")
    for got, expected, kind in (
        (layers[1], expected_layers[1], "hidden"),
        (logits, expected_logits, "logits"),
    ):
        with pytest.raises(AssertionError):
            assert_within(torch.from_numpy(got), expected, kind)

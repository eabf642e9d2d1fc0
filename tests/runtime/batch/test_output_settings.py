"""The settings that lie beside an output file: which jobs may go on with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvshard.runtime.batch.output import OutputFile
from kvshard.runtime.config import load_config
from kvshard.runtime.errors import ConfigError

from .output_lines import CONFIG, SYSTEM_ERROR, config, ids, ok_line


def test_the_saved_config_is_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    settings = config(dtype="float32", sampling={"stop": ["é", "b"]}, shard_weights=[2.0], seed=3)
    with OutputFile.open(path, settings) as output:
        output.save_config(settings)
    assert load_config(tmp_path / "out.jsonl.config.yaml") == settings


@pytest.mark.parametrize(
    ("changed", "key", "before", "now"),
    [
        ({"model": "other"}, "model", "'m'", "'other'"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature", "1.0", "0.0"),
        ({"sampling": {"stop": "x"}}, "sampling.stop", r"\[\]", r"\['x'\]"),
        ({"seed": 1}, "seed", "0", "1"),
        ({"chat_template": "t"}, "chat_template", "None", "'t'"),
        ({"dtype": "float16"}, "dtype", "'float32'", "'float16'"),
        ({"quantization": "int8"}, "quantization", "'none'", "'int8'"),
        ({"cache": {"dtype": "int4"}}, r"cache\.dtype", "'auto'", "'int4'"),
    ],
)
def test_settings_that_change_answers_are_refused_for_a_file_that_has_some(
    tmp_path: Path, changed: dict[str, Any], key: str, before: str, now: str
) -> None:
    path = tmp_path / "out.jsonl"
    first = config(dtype="float32")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
    second = config(**{"dtype": "float32", **changed})
    OutputFile.open(path, second).close()  # no rows yet, so nothing to mix
    path.write_bytes(ok_line("a") + SYSTEM_ERROR)
    with pytest.raises(ConfigError, match=f"{key}: .* {before} and the job says {now}.* another output.path"):
        OutputFile.open(path, second)
    assert path.read_bytes() == ok_line("a") + SYSTEM_ERROR


def test_a_setting_that_the_older_file_does_not_have_had_its_default(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile.open(path, config()) as output:
        output.save_config(config())
        output.write(ok_line("a"))
    saved = tmp_path / "out.jsonl.config.yaml"
    values = yaml.safe_load(saved.read_text())
    del values["task"], values["sampling"]["n"], values["cache"]
    saved.write_text(yaml.safe_dump(values))
    OutputFile.open(path, config()).close()
    with pytest.raises(ConfigError, match=r"sampling\.n: .* 1 and the job says 2"):
        OutputFile.open(path, config(sampling={"n": 2}))


def test_rows_that_all_failed_do_not_bind_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, second = config(dtype="float16"), config(dtype="bfloat16")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
        output.write(SYSTEM_ERROR)
    with OutputFile.open(path, second) as output:
        assert ids(path) == []
        output.save_config(second)
        output.write(ok_line("lost"))
    with pytest.raises(ConfigError, match=r"dtype: .* 'bfloat16' and the job says 'float16'"):
        OutputFile.open(path, first)


def test_an_empty_config_beside_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(ok_line("a"))
    (tmp_path / "out.jsonl.config.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"out\.jsonl\.config\.yaml, the settings of the rows in .*, holds none"
    ):
        OutputFile.open(path, CONFIG)


def test_settings_that_only_change_speed_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = config(dtype="float32")
    with OutputFile.open(path, first) as output:
        output.save_config(first)
        output.write(ok_line("a"))
    again = config(dtype="auto", tensor_parallel_size=3, launcher="ray", scheduler={"max_num_seqs": 2})
    with OutputFile.open(path, again) as output:  # auto is compared once it is known
        with pytest.raises(ConfigError, match="dtype"):
            output.save_config(again.model_copy(update={"dtype": "bfloat16"}))
        output.save_config(again.model_copy(update={"dtype": "float32"}))
    saved = yaml.safe_load((tmp_path / "out.jsonl.config.yaml").read_text())
    assert saved["tensor_parallel_size"] == 3
    assert saved["dtype"] == "float32"

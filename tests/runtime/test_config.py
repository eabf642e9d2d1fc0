"""Job files: what is refused, in which words, and where relative paths lead."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kvshard.runtime.config import JobConfig, config_hash, load_config, parse_config, parse_overrides
from kvshard.runtime.errors import ConfigError
from kvshard.runtime.yaml_text import read_yaml


def _write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _error(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(values, "job.yaml")
    return str(error.value)


def test_only_the_model_is_required() -> None:
    config = parse_config({"model": "demo"}, "job.yaml")
    assert config.launcher == "local"
    assert config.tensor_parallel_size == 1
    assert config.cache.enabled
    assert config.scheduler.run_ahead == 1
    assert config.sampling.max_tokens == 16
    assert config.input is None
    assert _error({}) == "job.yaml: model is missing"


@pytest.mark.parametrize(
    ("values", "key", "hint"),
    [
        ({"modle": "demo"}, "modle", "did you mean model?"),
        ({"tensor_paralel_size": 2}, "tensor_paralel_size", "did you mean tensor_parallel_size?"),
        ({"scheduler": {"max_seqs": 4}}, "scheduler.max_seqs", "did you mean scheduler.max_num_seqs?"),
        ({"cache": {"blocksize": 4}}, "cache.blocksize", "did you mean cache.block_size?"),
        ({"sampling": {"temprature": 0}}, "sampling.temprature", "did you mean sampling.temperature?"),
        ({"run_ahead": 0}, "run_ahead", "did you mean scheduler.run_ahead?"),
        ({"input": {"path": "a", "formt": "plain"}}, "input.formt", "did you mean input.format?"),
        ({"ray": {"xyzzy": 1}}, "ray.xyzzy", "valid keys here: ray.address"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(values: dict, key: str, hint: str) -> None:
    message = _error({"model": "demo", **values})
    assert f"job.yaml: unknown key {key}; {hint}" in message.splitlines()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tensor_parallel_size": "two"}, ["tensor_parallel_size='two'", "integer"]),
        ({"tensor_parallel_size": 0}, ["tensor_parallel_size=0", "greater than or equal to 1"]),
        ({"tensor_parallel_size": 1.5}, ["tensor_parallel_size=1.5", "integer"]),
        ({"launcher": "slurm"}, ["launcher='slurm'", "'local', 'ray' or 'torchrun'"]),
        ({"cache": {"memory_fraction": 1.0}}, ["cache.memory_fraction=1.0", "less than 1"]),
        ({"cache": {"num_blocks": 1}}, ["cache.num_blocks=1", "greater than or equal to 2"]),
        ({"cache": 5}, ["cache=5"]),
        ({"scheduler": {"run_ahead": 9}}, ["scheduler.run_ahead=9", "less than or equal to 8"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"timeouts": {"step_s": 0}}, ["timeouts.step_s=0", "greater than 0"]),
        ({"timeouts": {"close_s": 1e9}}, ["timeouts.close_s=1000000000.0", "less than or equal to 1000000"]),
        ({"sampling": {"top_p": 0}}, ["sampling.top_p=0", "greater than 0"]),
        ({"sampling": {"stop": [""]}}, ["sampling.stop", "must not be empty"]),
        ({"sampling": {"logprobs": 21}}, ["sampling.logprobs=21", "less than or equal to 20"]),
        (
            {"sampling": {"prompt_logprobs": -1}},
            ["sampling.prompt_logprobs=-1", "greater than or equal to 0"],
        ),
        ({"task": "rate"}, ["task='rate'", "'generate' or 'score'"]),
        (
            {"task": "score", "sampling": {"prompt_logprobs": 3, "top_p": 0.5}},
            ["sampling.top_p=0.5 has no meaning with task: score; leave it out"],
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict, parts: list[str]) -> None:
    message = _error({"model": "demo", **values})
    for part in ["job.yaml: ", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"scheduler": {"max_num_seqs": 32, "max_num_batched_tokens": 16}},
            ["max_num_batched_tokens=16", "max_num_seqs=32", "raise the first or lower the second"],
        ),
        (
            {"shard_weights": [1, 2, 3], "tensor_parallel_size": 2},
            ["3 entries", "tensor_parallel_size=2", "one weight a shard"],
        ),
        ({"shard_weights": [1, 0], "tensor_parallel_size": 2}, ["shard_weights", "more than 0"]),
        ({"sampling": {"min_tokens": 20}}, ["min_tokens=20", "max_tokens=16"]),
    ],
)
def test_values_that_do_not_go_together_are_refused(values: dict, parts: list[str]) -> None:
    message = _error({"model": "demo", **values})
    for part in parts:
        assert part in message


def test_every_problem_is_reported_at_once() -> None:
    message = _error({"modle": "demo", "seed": "x"})
    assert len(message.splitlines()) == 3


def test_a_config_cannot_be_changed() -> None:
    config = parse_config({"model": "demo"}, "job.yaml")
    for section, key in [(config, "model"), (config.cache, "block_size"), (config.sampling, "top_p")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_vllm_forms_of_stop_are_taken() -> None:
    def sampling(**values: object) -> tuple:
        config = parse_config({"model": "demo", "sampling": values}, "job.yaml")
        return config.sampling.stop, config.sampling.stop_token_ids

    assert sampling(stop="END") == (("END",), ())
    assert sampling(stop=None, stop_token_ids=None) == ((), ())
    assert sampling(stop=["a", "b"], stop_token_ids=[1, 2]) == (("a", "b"), (1, 2))


def test_overrides(tmp_path: Path) -> None:
    path = _write(tmp_path, "model: demo\nscheduler: {run_ahead: 2}\n")
    overrides = parse_overrides(
        ["scheduler.run_ahead=0", "cache.enabled=false", "sampling.stop=[a, b]", "seed = 7", "device=cpu"]
    )
    config = load_config(path, overrides)
    assert config.scheduler.run_ahead == 0
    assert config.cache.enabled is False
    assert config.sampling.stop == ("a", "b")
    assert (config.seed, config.device) == (7, "cpu")
    assert load_config(path).scheduler.run_ahead == 2
    with pytest.raises(
        ConfigError, match=r"unknown key scheduler\.runahead; did you mean scheduler\.run_ahead"
    ):
        load_config(path, parse_overrides(["scheduler.runahead=0"]))


@pytest.mark.parametrize("pair", ["seed", "=7", "seed=[1"])
def test_a_malformed_override_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([pair])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "model: demo\n")
    with pytest.raises(ConfigError, match=r"--set model\.name: model is a value"):
        load_config(path, {"model.name": "x"})


def test_relative_paths_start_at_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    text = "model: {model}\ninput: {{path: in.jsonl}}\noutput: {{path: ../out.jsonl}}\nchat_template: chat.jinja\n"
    config = load_config(_write(tmp_path, text.format(model="weights")))
    assert config.input is not None
    assert config.output is not None
    assert config.input.path == str(tmp_path / "in.jsonl")
    assert Path(config.output.path).resolve() == tmp_path.parent / "out.jsonl"
    assert config.chat_template == str(tmp_path / "chat.jinja")
    assert config.model == str(tmp_path / "weights")


@pytest.mark.parametrize(
    ("model", "resolved"),
    [
        ("demo", "demo"),
        ("org/name", "org/name"),
        ("./name", "{folder}/name"),
        ("name.gguf", "{folder}/name.gguf"),
        ("/abs/name", "/abs/name"),
        ("~/name", "{home}/name"),
    ],
)
def test_a_hub_id_is_no_path(tmp_path: Path, model: str, resolved: str) -> None:
    config = load_config(_write(tmp_path, f"model: {model}\n"))
    assert config.model == resolved.format(folder=tmp_path, home=Path.home())


def test_absolute_paths_stay(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, "model: demo\ninput: {path: /data/in.jsonl}\n"))
    assert config.input is not None
    assert config.input.path == "/data/in.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("model: demo\nseed: 1\nmodel: tiny", "is not valid YAML: model is set twice"),
        ("model: demo\nscheduler: {run_ahead: 0, run_ahead: 1}", "run_ahead is set twice"),
        ("model: demo\nrevision: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("model: demo\ntimeouts: {step_s: .inf}", "timeouts.step_s=inf"),
        ("- model", "must hold settings as `key: value`, not list"),
        ("", "must hold settings as `key: value`, not NoneType"),
    ],
)
def test_a_file_that_is_no_job(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(_write(tmp_path, text))


def test_a_setting_that_overrides_a_merged_one_is_not_set_twice() -> None:
    text = "few: {rows: &rows {<<: &all {max_num_seqs: 8}, max_num_seqs: 4}}\nscheduler: {<<: *rows, run_ahead: 1}"
    assert read_yaml(text) == {
        "few": {"rows": {"max_num_seqs": 4}},
        "scheduler": {"max_num_seqs": 4, "run_ahead": 1},
    }
    with pytest.raises(ValueError, match="run_ahead is set twice"):
        read_yaml(text.replace("run_ahead: 1", "run_ahead: 1, run_ahead: 2"))


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the job file"):
        load_config(tmp_path / "none.yaml")
    binary = tmp_path / "job.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(binary)


def test_every_setting_says_what_it_is() -> None:
    def missing(model: type, prefix: str = "") -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            sections = {"cache", "scheduler", "sampling", "input", "output", "timeouts", "ray", "network"}
            if name in sections and not prefix:
                inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
                section = next(item for item in inner if hasattr(item, "model_fields"))
                names += missing(section, f"{name}.")
            elif not field.description:
                names.append(prefix + name)
        return names

    assert missing(JobConfig) == []


def test_the_hash_sees_every_setting() -> None:
    base = {"model": "demo"}
    changes: list[dict] = [{}, {"seed": 1}, {"cache": {"block_size": 32}}, {"timeouts": {"step_s": 9}}]
    hashes = [config_hash(parse_config({**base, **change}, "job.yaml")) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert hashes[0] == config_hash(parse_config(base, "another.yaml"))

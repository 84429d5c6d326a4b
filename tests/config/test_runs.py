import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import (
    OREAL_PRESETS,
    OrealConfig,
    ParallelConfig,
    SftConfig,
    TrainConfig,
    check_layout,
    check_lengths,
    data_parallel_size,
    describe_layout,
    load_config,
    num_processes,
    read_model_shape,
    to_yaml,
)
from megatron_oreal.config.loading import apply_override, parse_scalar
from megatron_oreal.config.model_files import copy_model_file

TRAIN = """
run_dir: runs/a
num_steps: 3
model:
  path: model
data:
  prompts: train.jsonl
"""
SHAPE = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def load(folder: Path, *overrides: str, text: str = TRAIN) -> TrainConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(TrainConfig, path, overrides)


def refuse(folder: Path, *overrides: str, text: str = TRAIN) -> str:
    """The error's message, which must be one line."""
    with pytest.raises(ValueError) as raised:
        load(folder, *overrides, text=text)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def write_model(folder: Path, **changes: Any) -> str:
    """A model's config.json, and the override that names it."""
    (folder / "config.json").write_text(json.dumps(SHAPE | changes))
    return f"model.path={folder}"


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.run_dir == Path("runs/a")
    assert config.model.tokenizer_path == Path("model")
    assert (config.rollout.group_size, config.policy.optimizer.lr, config.seed) == (16, 1e-6, 0)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rolout.group_size", "unknown key 'rolout'; did you mean 'rollout'?"),
        ("rollout.groupsize", "unknown key 'rollout.groupsize'; did you mean 'group_size'?"),
        ("policy.optimizer.learning_rate", "unknown key 'policy.optimizer.learning_rate'; known: lr, min_lr, "),
        ("algorithm.kl_coeff", "unknown key 'algorithm.kl_coeff'; did you mean 'kl_coef'?"),
    ],
)
def test_an_unknown_key_is_named_with_what_was_meant(tmp_path: Path, key: str, message: str) -> None:
    assert refuse(tmp_path, f"{key}=1").startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps=many", "num_steps: Input should be a valid integer"),
        ("num_steps=0", "num_steps: Input should be greater than 0, got 0"),
        ("num_steps=2.5", "num_steps: Input should be a valid integer"),
        ("policy.optimizer.lr=-1", "policy.optimizer.lr: Input should be greater than 0, got -1"),
        ("policy.optimizer.lr=inf", "policy.optimizer.lr: Input should be a finite number"),
        ("rollout.top_p=.nan", "rollout.top_p: Input should be a finite number"),
        ("data.shuffle=perhaps", "data.shuffle: Input should be a valid boolean"),
        ("model.dtype=float16", "model.dtype: Input should be 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ("rollout.stop_tokens=</s>", "rollout.stop_tokens: Input should be a valid list, got '</s>'"),
        ("data.repeats_by_pass_rate=[[0.2, x]]", "data.repeats_by_pass_rate.0.1: Input should be a valid integer"),
        ("model=small", "model is a section of settings, got 'small': write model.SETTING="),
        ("checkpoint.best_metric=", "checkpoint.best_metric is empty: give a value, or drop it"),
        ("algorithm=grpo", "'grpo' is an objective: write algorithm={name: outcome, objective: grpo}"),
        ("algorithm.name=rloo", "'rloo' is an objective: write algorithm={name: outcome, objective: rloo}"),
        ("algorithm=ppo", "algorithm is a section of settings: write algorithm={name: ppo}"),
        ("algorithm.name=dpo", "algorithm.name 'dpo' is not known; known: oreal, outcome, ppo; objectives of "),
        (
            "rollout={top_p: 1, top_p: 1}",
            "override 'rollout={top_p: 1, top_p: 1}': 'top_p' stands twice, in lines 1 an",
        ),
        ("model.fp8_bf16_ends=-1", "model.fp8_bf16_ends: Input should be greater than or equal to 0, got -1"),
        ("model.head_fp8=torch_block", "model.head_fp8: Input should be 'torch', 'transformer_engine_tensor', "),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert refuse(tmp_path, override).startswith(message)


def test_a_required_key_is_named_and_further_errors_are_counted(tmp_path: Path) -> None:
    assert refuse(tmp_path, text="run_dir: a\nmodel: {path: m}\ndata: {prompts: p}") == (
        "num_steps is required: set it in the file or as num_steps=..."
    )
    assert refuse(tmp_path, "data.shufle=1", text="run_dir: a\nnum_steps: 1\n").endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: {", "config.yaml is not YAML: "),
        ("a:\n\t- b", "config.yaml is not YAML: "),
        ("- a\n- b\n", "config.yaml must hold sections and keys, not a list"),
        (
            "rollout: {top_k: 1}\nrun_dir: a\nrollout: {top_p: 1}",
            "config.yaml: 'rollout' stands twice, in lines 1 and 3",
        ),
        ("data: {prompts: a, prompts: b}", "config.yaml: 'prompts' stands twice, in lines 1 and 1; join the two"),
        ("just text", "config.yaml must hold sections and keys, not a str"),
        ("", "run_dir is required"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    assert message in refuse(tmp_path, text=text)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml does not exist; give a YAML configuration file"):
        load_config(TrainConfig, tmp_path / "none.yaml")


def test_overrides_are_yaml_and_win_over_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "num_steps=1e3",
        "policy.optimizer.lr=1e-6",
        "policy.optimizer.min_lr=1E-7",
        "policy.optimizer.decay=cosine",
        "rollout.stop_tokens=['<|im_end|>', '</s>']",
        "data.repeats_by_pass_rate=[[0.2, 6], [0.6, 4]]",
        "data.suffix=' = ?'",
        "data.system_prompt=null",
        "eval.prompts.aime=aime.jsonl",
        "data.shuffle=false",
        "seed=1",
        "seed=2",
    )
    assert config.num_steps == 1000
    assert isinstance(config.policy.optimizer.lr, float)
    assert (config.policy.optimizer.lr, config.policy.optimizer.min_lr) == (1e-6, 1e-7)
    assert config.rollout.stop_tokens == ["<|im_end|>", "</s>"]
    assert config.data.repeats_by_pass_rate == [(0.2, 6), (0.6, 4)]
    assert (config.data.suffix, config.data.system_prompt, config.data.shuffle) == (" = ?", None, False)
    assert config.eval.prompts == {"aime": Path("aime.jsonl")}
    assert config.seed == 2


def test_a_number_that_yaml_takes_for_text_is_one_in_the_file_too(tmp_path: Path) -> None:
    text = TRAIN + "policy: {optimizer: {lr: 1e-5}}\n"
    assert load(tmp_path, text=text).policy.optimizer.lr == 1e-5
    assert load(tmp_path, "algorithm.reward_model.optimizer.lr=2e-5", text=text).policy.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' must read section.key=value"),
        ("=3", "override '=3' must read section.key=value"),
        ("seed.value=3", None),
        ("num_steps.value=3", "override 'num_steps.value=3': num_steps is a value, not a section"),
        ("seed=[1", "override 'seed=[1': '[1' is not a YAML value; quote it"),
    ],
)
def test_a_malformed_override_is_named(tmp_path: Path, override: str, message: str | None) -> None:
    assert refuse(tmp_path, override) == (message or "seed: Input should be a valid integer, got {'value': 3}")


@pytest.mark.parametrize("preset", ["reference", "paper"])
def test_a_preset_fills_every_choice(preset: str) -> None:
    config = OrealConfig.model_validate({"preset": preset})
    choices = config.model_dump()
    assert {name: choices[name] for name in OREAL_PRESETS[preset]} == OREAL_PRESETS[preset]
    assert None not in choices.values()


def test_the_presets_choices_without_a_reward_model(tmp_path: Path) -> None:
    """The published code then trains on all samples from the first step on; a choice that is given stays."""
    off = "algorithm.reward_model.enabled=false"
    reference = load(tmp_path, off).algorithm
    assert (reference.selection, reference.policy_freeze_steps) == ("all", 0)
    assert load(tmp_path, off, "algorithm.selection=one_pair").algorithm.selection == "one_pair"
    assert load(tmp_path, off, "algorithm.policy_freeze_steps=0").algorithm.selection == "all"
    paper = load(tmp_path, off, "algorithm.preset=paper").algorithm
    assert (paper.selection, paper.policy_freeze_steps) == ("one_pair", 0)
    assert load(tmp_path).algorithm.policy_freeze_steps == 10
    config = load(tmp_path, off)
    assert load(tmp_path, text=to_yaml(config)) == config


def test_the_papers_kl_acts(tmp_path: Path) -> None:
    paper = load(tmp_path, "algorithm.preset=paper").algorithm
    assert (paper.kl_target, paper.uses_reference) == ("initial", True)


def test_the_literal_bound_of_the_critics_head_is_refused(tmp_path: Path) -> None:
    message = refuse(tmp_path, "algorithm.name=ppo", "algorithm.critic.head_init=uniform")
    assert "uniform is no longer offered" in message and "set kaiming_uniform" in message and "\n" not in message
    assert message.startswith("algorithm.critic.head_init")


def test_a_single_choice_overrides_the_preset(tmp_path: Path) -> None:
    config = load(tmp_path, "algorithm.preset=paper", "algorithm.prefix_mean=true", "algorithm.policy_freeze_steps=0")
    assert config.algorithm.prefix_mean is True  # given
    assert config.algorithm.policy_freeze_steps == 0  # given, and false in a condition
    assert config.algorithm.rewards == "zero_one"  # the preset's
    reference = load(tmp_path, "algorithm.prefix_mean=false", "algorithm.policy_freeze_steps=0").algorithm
    assert (reference.prefix_mean, reference.policy_freeze_steps, reference.kl_target) == (False, 0, "initial")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=1"], "rollout.group_size must be >= 2 for advantages within a group, got 1"),
        (["rollout.temperature=0"], "rollout.temperature must be > 0 in training"),
        (["parallel.sequence=true"], "parallel.sequence needs parallel.tensor > 1"),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline needs parallel.pipeline > 1"),
        (["policy.optimizer.min_lr=1"], "policy.optimizer.min_lr must be <= lr=1e-06, got 1.0"),
        (["data.repeats_by_pass_rate=[[0.6, 1], [0.2, 2]]"], "data.repeats_by_pass_rate needs rising bounds"),
        (["data.repeats_by_pass_rate=[[0.6, -1]]"], "data.repeats_by_pass_rate needs rising bounds and repeats >= 0"),
        (["model.fp8_bf16_ends=1"], "model.fp8_bf16_ends=1 needs model.fp8=tensorwise, blockwise or mxfp8"),
        (["model.fp8_bf16_ends=1", "model.fp8=delayed"], "model.fp8_bf16_ends=1 needs model.fp8=tensorwise, "),
        (["model.head_fp8=transformer_engine_mx"], "model.head_fp8 has no meaning for model.head_precision=bf16"),
        (["checkpoint.best_metric=eval/a/greedy"], "checkpoint.best_metric 'eval/a/greedy' is not measured here"),
        (
            ["checkpoint.best_metric=eval/a/maj", "eval.prompts.a=a.jsonl"],
            "checkpoint.best_metric 'eval/a/maj' is not measured here; known: ['eval/a/greedy', 'eval/a/pass@1']",
        ),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert refuse(tmp_path, *overrides).startswith(message)


@pytest.mark.parametrize("override", ["rollout.staleness=1", "rollout.unfinished=resume"])
def test_what_needs_servers_is_refused_without_them(tmp_path: Path, override: str) -> None:
    name = override.partition("=")[0]
    assert f"{name} needs servers: set rollout.engine=sglang, or drop it" in refuse(tmp_path, override)
    load(tmp_path, override, "rollout.engine=sglang")


def test_over_sampling_and_the_ledger_work_with_either_engine(tmp_path: Path) -> None:
    for engine in ("local", "sglang"):
        rollout = load(tmp_path, "rollout.oversampling=1.5", f"rollout.engine={engine}").rollout
        assert (rollout.oversampling, rollout.ledger) == (1.5, True)


def test_supervised_training_has_its_own_sections(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("run_dir: a\nnum_steps: 1\nmodel: {path: m}\ndata: {examples: sft.jsonl}\n")
    config = load_config(SftConfig, path, ["eval.prompts.a=a.jsonl", "checkpoint.best_metric=eval/a/pass@1"])
    assert config.data.examples == Path("sft.jsonl")
    with pytest.raises(ValueError, match="unknown key 'reward_model'"):
        load_config(SftConfig, path, ["reward_model.enabled=false"])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "algorithm.preset=paper",
        "algorithm.kl_target=initial",
        "policy.optimizer.lr=1e-7",
        "data.suffix='π\n \"x\": #'",
        "data.repeats_by_pass_rate=[[0.2, 6]]",
        "eval.prompts.a=a.jsonl",
    )
    text = to_yaml(config)
    again = load(tmp_path, text=text)
    assert again == config
    assert to_yaml(again) == text


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["parallel.tensor=3"], {}, "parallel.tensor=3 must divide the model's num_attention_heads=8"),
        (["parallel.tensor=4"], {}, "parallel.tensor=4 must divide the model's num_key_value_heads=2"),
        (
            ["parallel.pipeline=3"],
            {},
            "parallel.pipeline=3 x parallel.virtual_pipeline=1 must divide the model's num_hidden_layers=4",
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
            {},
            "parallel.pipeline=2 x parallel.virtual_pipeline=4 must divide the model's num_hidden_layers=4",
        ),
        ([], {"model_type": "mamba"}, "model.path: model_type 'mamba' is not supported; known: qwen2, qwen3"),
        ([], {"num_hidden_layers": "many"}, "model.path: "),
        (
            ["parallel.context=2"],
            {"model_type": "qwen3_moe"},
            "parallel.context > 1 does not run with a mixture of experts (qwen3_moe) yet: set parallel.context=1",
        ),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused(
    tmp_path: Path, overrides: list[str], changes: dict[str, Any], message: str
) -> None:
    config = load(tmp_path, write_model(tmp_path, **changes), *overrides)
    with pytest.raises(ValueError) as raised:
        check_layout(config, ["qwen2", "qwen3", "qwen3_moe"])
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_a_layout_that_fits_gives_the_models_shape(tmp_path: Path) -> None:
    config = load(tmp_path, write_model(tmp_path), "parallel.tensor=2", "parallel.pipeline=2")
    assert check_layout(config, ["qwen2"]).model_dump() == SHAPE


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: .*config\.json does not exist"):
        read_model_shape(tmp_path)


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None}])
def test_without_key_value_heads_there_are_as_many_as_attention_heads(tmp_path: Path, absent: dict[str, None]) -> None:
    settings = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | absent
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_model_shape(tmp_path).num_key_value_heads == SHAPE["num_attention_heads"]


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(SHAPE).encode())
    assert read_model_shape(tmp_path).model_dump() == SHAPE


def test_a_copied_file_has_no_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (("a.json", b"{}"), ("a.model", b"\x00")):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        copy_model_file(tmp_path / name, tmp_path / f"copy-{name}")
    assert (tmp_path / "copy-a.json").read_bytes() == b"{}"
    assert (tmp_path / "copy-a.model").read_bytes() == codecs.BOM_UTF8 + b"\x00"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "it is not JSON; save the model again"),
        (b"[" * 100_000, "it is not JSON; save the model again"),
        (b"\xff\xfe{", "it is not JSON; save the model again"),
        (b"3", "it is not a mapping; save the model again"),
        (
            json.dumps(SHAPE | {"num_attention_heads": 0}).encode(),
            "num_attention_heads: Input should be greater than 0",
        ),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_short_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_model_shape(tmp_path)
    said = str(raised.value).removeprefix(f"model.path: {tmp_path / 'config.json'}: ")
    assert said.startswith(message) and "\n" not in said and len(said) < 120


def test_lengths_must_fit_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    fitting = load(tmp_path, model, "data.max_prompt_tokens=28", "rollout.max_new_tokens=100")
    shape = read_model_shape(fitting.model.path)
    check_lengths(fitting, shape)
    with pytest.raises(ValueError, match=r"= 129 exceeds the model's max_position_embeddings=128: lower"):
        check_lengths(load(tmp_path, model, "data.max_prompt_tokens=29", "rollout.max_new_tokens=100"), shape)


def test_the_launcher_decides_the_data_parallel_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ParallelConfig(tensor=2, pipeline=3)
    assert (data_parallel_size(layout), num_processes(layout)) == (1, 6)
    assert num_processes(ParallelConfig(tensor=2, data=4)) == 8
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert (data_parallel_size(layout), num_processes(layout)) == (2, 12)
    assert data_parallel_size(ParallelConfig(tensor=2, pipeline=3, data=2)) == 2
    layout = ParallelConfig(tensor=2, context=3)
    assert (data_parallel_size(layout), num_processes(layout)) == (2, 12)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            ParallelConfig(tensor=4, pipeline=2),
            "parallel.tensor=4 x parallel.pipeline=2 must divide the 12 processes started",
        ),
        (ParallelConfig(tensor=2, data=4), "parallel.data=4 but the 12 processes started make it 6: drop it"),
        (
            ParallelConfig(tensor=2, context=4),
            "parallel.tensor=2 x parallel.context=4 x parallel.pipeline=1 must divide the 12 processes started",
        ),
    ],
)
def test_a_launcher_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: ParallelConfig, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ValueError) as raised:
        data_parallel_size(layout)
    assert str(raised.value).startswith(message)
    config = load(tmp_path, write_model(tmp_path, num_key_value_heads=8))
    with pytest.raises(ValueError, match="processes started"):
        check_layout(config.model_copy(update={"parallel": layout}), ["qwen2"])


def test_the_layouts_table_is_in_megatrons_rank_order(tmp_path: Path) -> None:
    config = load(tmp_path, "parallel.tensor=2", "parallel.data=2", "parallel.pipeline=2")
    header, columns, *ranks = describe_layout(config).splitlines()
    assert header == "parallel layout: 8 processes = tensor 2 x pipeline 2 x data 2, sequence parallel off"
    assert columns.split() == ["rank", "tensor", "data", "pipeline"]
    table = [tuple(map(int, line.split())) for line in ranks]
    assert table[:3] == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 1, 0)]
    assert table[-1] == (7, 1, 1, 1)
    config = load(tmp_path, "parallel.tensor=2", "parallel.data=2", "parallel.context=2")
    header, columns, *ranks = describe_layout(config).splitlines()
    assert "8 processes = tensor 2 x context 2 x pipeline 1 x data 2, " in header
    assert columns.split() == ["rank", "tensor", "context", "data", "pipeline"]
    assert ranks[5].split() == ["5", "1", "0", "1", "0"]


def test_blanks_around_a_text_on_the_command_line_stay() -> None:
    settings: dict[str, Any] = {}
    for override in (
        "data.suffix= Answer:",
        "rollout.top_k= 5",
        'data.system_prompt=" two "',
        "policy.optimizer.lr=1e-6",
    ):
        apply_override(settings, override)
    assert settings["data"] == {"suffix": " Answer:", "system_prompt": " two "}
    for text in (" Problem #1:", " #1:", "Answer: put it in \\boxed{}", "last line: ", "a # b", "it's"):
        assert parse_scalar(text) == text
    assert parse_scalar("{heldout: a.jsonl}") == {"heldout": "a.jsonl"} and parse_scalar(" [1, 2]") == [1, 2]
    assert parse_scalar("3 # three") == 3 and parse_scalar("") is None and parse_scalar("'#1'") == "#1"
    assert settings["rollout"]["top_k"] == 5 and settings["policy"]["optimizer"]["lr"] == 1e-6

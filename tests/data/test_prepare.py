"""What the examples' prepare.py write."""

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.gsm8k import prepare as prepare_gsm8k
from examples.quickstart import prepare as prepare_quickstart
from examples.quickstart.prepare import Problem, all_problems, demonstration, solve
from megatron_oreal.data.examples import read_examples
from megatron_oreal.data.prompts import read_prompts


def test_solutions_by_hand() -> None:
    problem = Problem((7, 4, 6, 5), ("+", "*", "-"))
    assert problem.text == "7+4*6-5="
    assert solve(problem) == ("4*6=24,7+24=31,31-5=26,\\boxed{26}", 26)
    assert solve(problem, left_to_right=True) == ("7+4=11,11*6=66,66-5=61,\\boxed{61}", 61)
    assert solve(problem, slips=(0, 1, 0)) == ("4*6=24,7+24=32,32-5=27,\\boxed{27}", 27)


def test_held_out_problems_are_in_no_training_file(quickstart_dir: Path) -> None:
    heldout = read_prompts(quickstart_dir / "heldout.jsonl", "eval.prompts")
    held_out = {prompt.messages[0].content for prompt in heldout}
    assert len(held_out) == 512
    train = {prompt.messages[0].content for prompt in read_prompts(quickstart_dir / "train.jsonl", "data.prompts")}
    examples = read_examples(quickstart_dir / "sft.jsonl")
    assert len(train) == 50 and len(examples) == 400
    assert not held_out & (train | {example.messages[0].content for example in examples})


def test_the_prompts_answers_are_right(quickstart_dir: Path) -> None:
    for name in ("heldout", "train"):
        for prompt in read_prompts(quickstart_dir / f"{name}.jsonl", "data.prompts"):
            assert int(prompt.answer) == eval(prompt.messages[0].content.rstrip("="))


def test_demonstrations_are_right_in_two_cases_of_five() -> None:
    problems = [problem for problem in all_problems() if problem.order_matters]
    rng = random.Random(0)
    num_right, num_left_to_right = 0, 0
    for problem in rng.sample(problems, 4000):
        response = demonstration(problem, rng)
        num_right += response == solve(problem)[0]
        num_left_to_right += response == solve(problem, left_to_right=True)[0]
    # A standard deviation is 0.008.
    assert num_right / 4000 == pytest.approx(0.4, abs=0.03)
    assert num_left_to_right / 4000 == pytest.approx(0.5, abs=0.03)


def test_the_quickstarts_model_is_tiny_and_tied(quickstart_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quickstart_dir / "model", dtype=torch.float32)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 64, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 256)
    assert config.tie_word_embeddings and config.max_position_embeddings == 128
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(quickstart_dir / "model")) == 20
    # Each layer: q, k, v, o, their three biases, three MLP matrices, two norms.
    layer = 64 * (64 + 32 + 32 + 64) + (64 + 32 + 32) + 3 * 64 * 256 + 2 * 64
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * layer + 20 * 64 + 64


def test_the_seed_decides_the_model_and_the_training_data_only(quickstart_dir: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        arguments = ["--out", str(tmp_path / seed), "--num-examples", "400", "--num-prompts", "50", "--seed", seed]
        assert CliRunner().invoke(prepare_quickstart.main, arguments).exit_code == 0
    for name in ("heldout.jsonl", "train.jsonl", "sft.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        first = (quickstart_dir / name).read_bytes()
        assert (tmp_path / "0" / name).read_bytes() == first
        is_fixed = name in ("heldout.jsonl", "model/tokenizer.json")
        assert ((tmp_path / "1" / name).read_bytes() == first) == is_fixed


def test_too_many_prompts_are_an_error_in_one_line(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--num-prompts", "1000000"]
    result = CliRunner().invoke(prepare_quickstart.main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --num-prompts must be <= ") and result.stderr.count("\n") == 1


def test_gsm8k_is_prepared_from_a_folder(tmp_path: Path) -> None:
    for split, total in (("train", 7), ("test", 9)):
        sum_ = f"3+{total - 3}"
        row = {"question": f"What is {sum_}?", "answer": f"{sum_}=<<{sum_}={total}>>{total}\n#### {total}"}
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--gsm8k-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    result = CliRunner().invoke(prepare_gsm8k.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read_prompts(tmp_path / "out" / "test.jsonl", "eval.prompts")[0].answer == "9"
    (example,) = read_examples(tmp_path / "out" / "sft.jsonl")
    assert example.response == "3+4=7\n\\boxed{7}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer.encode(example.response)) == example.response
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["train", "none"])
def test_gsm8k_without_its_files_is_an_error_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    result = CliRunner().invoke(prepare_gsm8k.main, ["--gsm8k-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --gsm8k-dir: ") and result.stderr.count("\n") == 1

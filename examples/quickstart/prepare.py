r"""Makes all that the quickstart needs: a task, a tokenizer, a tiny model. No download.

The task: `7+4*6-5=` -> `4*6=24,7+24=31,31-5=26,\boxed{26}`, single digits, exactly one `*`, never first. Half of the
supervised examples ignore precedence and some slip, so a model trained on them is wrong about half of the time and
right often enough for outcome rewards to teach it the rest. On the 512 held-out problems the order of the steps
changes the answer; they are the same for every seed and occur in no training file.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's path does not hold the checkout's root

from examples.tiny_model import prepare_or_exit, tiny_config, write_random_model
from megatron_oreal.data.examples import Example, write_examples
from megatron_oreal.data.prompts import write_prompts
from megatron_oreal.observability.files import temporary_directory
from megatron_oreal.run.run_directory import keep_users_files
from megatron_oreal.types import Message, Prompt

NUM_HELDOUT = 512
CORRECT_SHARE, LEFT_TO_RIGHT_SHARE = 0.4, 0.5  # of the supervised examples; the rest has a slip in one step
SLIPS = (-10, -2, -1, 1, 2, 10)
INIT_STD = 0.05
PAD, UNKNOWN, END = "<pad>", "<unk>", "</s>"
SYMBOLS = ("\\boxed{", "}")  # one token each, so that an answer is never half open


@dataclass(slots=True, frozen=True)
class Problem:
    digits: tuple[int, int, int, int]
    operators: tuple[str, str, str]

    @property
    def text(self) -> str:
        first, *rest = self.digits
        return f"{first}{''.join(op + str(digit) for op, digit in zip(self.operators, rest, strict=True))}="

    @property
    def order_matters(self) -> bool:
        return solve(self)[1] != solve(self, left_to_right=True)[1]


def all_problems() -> list[Problem]:
    operators = [ops for ops in itertools.product("+-*", repeat=3) if ops[0] != "*" and ops.count("*") == 1]
    return [Problem(digits, ops) for digits in itertools.product(range(10), repeat=4) for ops in operators]


def solve(problem: Problem, left_to_right: bool = False, slips: Sequence[int] = (0, 0, 0)) -> tuple[str, int]:
    """The written steps and the result, with an error added to each step's result."""
    numbers, operators, text = list(problem.digits), list(problem.operators), ""
    for slip in slips:
        at = operators.index("*") if "*" in operators and not left_to_right else 0
        left, right, operator = numbers[at], numbers[at + 1], operators.pop(at)
        result = slip + (left + right if operator == "+" else left - right if operator == "-" else left * right)
        text += f"{left}{operator}{right}={result},"
        numbers[at : at + 2] = [result]
    return f"{text}\\boxed{{{numbers[0]}}}", numbers[0]


def demonstration(problem: Problem, rng: random.Random) -> str:
    kind = rng.random()
    if kind < CORRECT_SHARE:
        return solve(problem)[0]
    if kind < CORRECT_SHARE + LEFT_TO_RIGHT_SHARE:
        return solve(problem, left_to_right=True)[0]
    slips = [0, 0, 0]
    slips[rng.randrange(3)] = rng.choice(SLIPS)
    return solve(problem, slips=slips)[0]


def to_prompts(problems: Sequence[Problem], name: str) -> Iterator[Prompt]:
    for index, problem in enumerate(problems):
        messages = (Message("user", problem.text),)
        yield Prompt(f"{name}-{index}", messages, str(solve(problem)[1]), source="arithmetic")


def write_data(out: Path, problems: list[Problem], seed: int, num_examples: int, num_prompts: int) -> None:
    heldout = random.Random(12345).sample([problem for problem in problems if problem.order_matters], NUM_HELDOUT)
    excluded = set(heldout)
    training = [problem for problem in problems if problem not in excluded]
    if num_prompts > len(training):
        raise ValueError(f"--num-prompts must be <= {len(training)}, got {num_prompts}")
    write_prompts(out / "heldout.jsonl", to_prompts(heldout, "heldout"))
    chosen_prompts = random.Random(f"{seed}/train").sample(training, num_prompts)
    write_prompts(out / "train.jsonl", to_prompts(chosen_prompts, "train"))
    rng = random.Random(f"{seed}/sft")
    chosen = rng.choices(training, k=num_examples)
    write_examples(
        out / "sft.jsonl",
        (Example((Message("user", problem.text),), demonstration(problem, rng)) for problem in chosen),
    )


def train_tokenizer(problems: Sequence[Problem]) -> bytes:
    """A SentencePiece model of single characters and SYMBOLS; adds no space and normalises nothing."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(problem.text + solve(problem)[0] for problem in problems),
        model_writer=model,
        model_type="char",
        vocab_size=64,
        hard_vocab_limit=False,  # the alphabet decides
        character_coverage=1.0,
        user_defined_symbols=list(SYMBOLS),
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        pad_piece=PAD,
        unk_piece=UNKNOWN,
        eos_piece=END,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes, max_tokens: int) -> int:
    """Writes the SentencePiece model and the same as a fast tokenizer; returns the vocabulary's size."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    assert vocabulary.keys() >= set("0123456789+-*=,"), "the tokenizer's training text lacks a character"
    # BPE without merges splits into characters, and every loader of a qwen2 model understands it.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in (PAD, UNKNOWN, END)])
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in SYMBOLS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(vocabulary)


def prepare(out: Path, seed: int, num_examples: int, num_prompts: int) -> str:
    """Writes everything and returns a line that says what there is."""
    problems = all_problems()
    write_data(out, problems, seed, num_examples, num_prompts)
    keep_users_files(out / "model")
    with temporary_directory(out / "model") as folder:
        config = tiny_config(
            vocab_size=write_tokenizer(folder, train_tokenizer(problems[::17]), max_tokens=128),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            initializer_range=INIT_STD,
            pad_token_id=0,
            eos_token_id=2,
        )
        num_parameters = write_random_model(folder, config, seed, scales_residuals=True)
    return (
        f"{out}: {num_examples} supervised examples, {num_prompts} prompts, {NUM_HELDOUT} held out; "
        f"a model of {num_parameters / 1e3:.0f}k parameters and {config.vocab_size} tokens"
    )


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--seed", default=0, show_default=True, help="Of the model and the training data.")
@click.option("--num-examples", default=100_000, show_default=True, type=click.IntRange(min=1), help="Supervised ones.")
@click.option("--num-prompts", default=20_000, show_default=True, type=click.IntRange(min=1), help="To train on.")
def main(out: Path, seed: int, num_examples: int, num_prompts: int) -> None:
    """Writes sft.jsonl, train.jsonl, heldout.jsonl and model/ into a folder."""
    prepare_or_exit(lambda: prepare(out, seed, num_examples, num_prompts))


if __name__ == "__main__":
    main()

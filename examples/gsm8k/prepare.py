"""GSM8K as our JSONL, a byte-level BPE tokenizer trained on it, and a random Qwen2 of about 10M parameters.

Enough to run the whole path, warm-up and reinforcement learning, on real text; far too small to solve GSM8K.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import click
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's path does not hold the checkout's root

from examples.tiny_model import prepare_or_exit, tiny_config, write_random_model
from megatron_oreal.data.examples import Example, write_examples
from megatron_oreal.data.importers import import_examples, import_prompts
from megatron_oreal.data.prompts import write_prompts
from megatron_oreal.observability.files import temporary_directory
from megatron_oreal.run.run_directory import keep_users_files

SPLITS = ("train", "test")
MAX_TOKENS = 1024
INIT_STD = 0.02
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's split: transformers builds the tokenizer of a qwen2 model with it, whatever tokenizer.json says.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_split(gsm8k: str, split: str) -> str:
    """The split's file in a folder, or the hub name as it is."""
    folder = Path(gsm8k)
    if not folder.is_dir():
        return gsm8k
    for name in (f"{split}.jsonl", f"gsm8k_{split}.jsonl"):
        if (folder / name).is_file():
            return str(folder / name)
    raise ValueError(f"--gsm8k-dir: {folder} holds neither {split}.jsonl nor gsm8k_{split}.jsonl; put one there")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": PAD,  # bytes leave nothing unknown; loaders want a name
        "additional_special_tokens": [START, END],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def training_texts(examples: Iterable[Example]) -> list[str]:
    return [text for example in examples for text in (example.messages[0].content, example.response)]


def prepare(gsm8k: str, out: Path, seed: int, vocab_size: int) -> str:
    """Writes everything and returns a line that says what there is."""
    sources = {split: find_split(gsm8k, split) for split in SPLITS}
    for split, source in sources.items():
        write_prompts(out / f"{split}.jsonl", import_prompts("gsm8k", source, split))
    examples = import_examples("gsm8k", sources["train"], "train")
    write_examples(out / "sft.jsonl", examples)
    tokenizer = train_tokenizer(training_texts(examples), vocab_size)
    config = tiny_config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_id=tokenizer.token_to_id(END),
    )
    keep_users_files(out / "model")
    with temporary_directory(out / "model") as folder:
        write_tokenizer(folder, tokenizer)
        num_parameters = write_random_model(folder, config, seed)
    return (
        f"{out}: {len(examples)} supervised examples; a model of {num_parameters / 1e6:.1f}M parameters "
        f"and {config.vocab_size} tokens"
    )


@click.command()
@click.option("--gsm8k-dir", "gsm8k", required=True, help="Folder with train.jsonl and test.jsonl, or a hub name.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--seed", default=0, show_default=True, help="Of the model.")
@click.option("--vocab-size", default=4096, show_default=True, type=click.IntRange(min=300))
def main(gsm8k: str, out: Path, seed: int, vocab_size: int) -> None:
    """Writes train.jsonl, test.jsonl, sft.jsonl and model/ into a folder."""
    prepare_or_exit(lambda: prepare(gsm8k, out, seed, vocab_size))


if __name__ == "__main__":
    main()

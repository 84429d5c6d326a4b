"""Makes tokenizers of a few characters, with the special tokens that a test needs."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BareTokenizer
from tokenizers import decoders, models

from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer

CHARACTERS = "0123456789+=<>/|_ \nacdehikmnorstuxz\\{}b"
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_end|>", "<think>", "</think>"]
PAD, UNKNOWN, BOS, EOS, IM_END, THINK, END_THINK = range(len(SPECIAL))
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a <think>\n{% endif %}"
)


def post_processor(prefix: list[str], suffix: list[str]) -> dict[str, Any]:
    """Returns a post-processor that puts special tokens around a text."""

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in (*prefix, *suffix)}
    return {
        "type": "TemplateProcessing",
        "single": [*map(special, prefix), text, *map(special, suffix)],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }


def write_small_tokenizer(folder: Path, post: dict[str, Any] | None = None, chat_template: str = CHAT_TEMPLATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {name: number for number, name in enumerate([*SPECIAL, *CHARACTERS])}
    bare = BareTokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    bare.decoder = decoders.Fuse()
    bare.add_special_tokens(SPECIAL)
    content = json.loads(bare.to_str()) | {"post_processor": post}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": chat_template}))


def small_tokenizer(folder: Path, post: dict[str, Any] | None = None) -> Tokenizer:
    write_small_tokenizer(folder, post)
    return load_tokenizer(folder)


def characters(text: str) -> list[int]:
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]

"""Defines a task that a tiny model learns within seconds: the prompt is a sum, the answer its first digit in a box.

Example: the prompt "3+1=" has the right response "\\boxed{3}".
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

CHARACTERS = [*"0123456789+= ", "\\boxed{", "}"]
SPECIAL = ["<pad>", "<eos>"]
VOCABULARY = SPECIAL + CHARACTERS  # a token's id is its index


def write_tokenizer(folder: Path) -> None:
    """Makes the folder and writes a fast tokenizer of VOCABULARY there."""
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False), AddedToken("}", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

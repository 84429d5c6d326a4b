"""Asks a language model which skills a question needs, for sampling by skills (`megatron-oreal select-data prompts`).

The server speaks the OpenAI-compatible API of the judge, and the client is the judge's. A reply counts only when it
ends with a JSON list of short names; every other reply, and every request that fails, leaves the question untagged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_oreal.config import JudgeConfig
from megatron_oreal.data.cleaning import question_of
from megatron_oreal.data.files import Row
from megatron_oreal.rewards.json_client import JsonClient, RequestError
from megatron_oreal.rewards.judge import END_OF_REASONING, ReplyError, reply_text, without_control_tokens

BATCH = 512  # questions handed to the client together
MAX_TAG_CHARACTERS = 60
REQUEST = """\
Name the mathematical skills that solving this question takes, at most {count}, the most important first.{choice}
Do not solve the question. Reply with a JSON list of strings and nothing else, such as ["modular arithmetic"].

Question:
{question}"""


@dataclass(slots=True, frozen=True)
class TagSettings:
    count: int = 3  # tags of a question
    skills: tuple[str, ...] = ()  # the only skills that count; empty: any that the model names


@dataclass(slots=True)
class Tagged:
    tags: dict[str, list[str]] = field(default_factory=dict)  # by `tag_key`
    failures: list[str] = field(default_factory=list)  # "id: reason"


def tag_key(row: Row, settings: TagSettings, model: str) -> str:
    """Returns a digest of everything that the tags depend on."""
    parts = json.dumps([question_of(row), settings.count, settings.skills, model])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def ask_for_tags(
    rows: Sequence[Row], config: JudgeConfig, settings: TagSettings, known: Path, advance: Callable[[int], None]
) -> Tagged:
    """Asks about every row whose tags the JSONL file `known` lacks, and appends each reply to this file."""
    tagged = Tagged(read_known(known))
    asked = [row for row in rows if tag_key(row, settings, config.model) not in tagged.tags]
    advance(len(rows) - len(asked))
    known.parent.mkdir(parents=True, exist_ok=True)
    path = "/chat/completions" if config.api == "chat" else "/completions"
    with JsonClient(config.url.rstrip("/") + path, config, "--url") as client, known.open("ab") as file:

        async def ask(row: Row) -> None:
            try:
                tags = read_tags(reply_text(await client.post(request_body(row, config, settings)), config), settings)
            except (RequestError, ReplyError) as error:
                tagged.failures.append(f"{row['id']}: {error}")
            else:
                key = tag_key(row, settings, config.model)
                tagged.tags[key] = tags
                file.write(json.dumps({"key": key, "tags": tags}).encode() + b"\n")
                file.flush()
            advance(1)

        async def ask_all(batch: Sequence[Row]) -> None:
            await asyncio.gather(*map(ask, batch))

        for start in range(0, len(asked), BATCH):
            client.run(ask_all(asked[start : start + BATCH]))
    return tagged


def read_known(path: Path) -> dict[str, list[str]]:
    """Returns the tags of earlier calls. It ignores an incomplete line, so that its question is asked again."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    known: dict[str, list[str]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            known[record["key"]] = [str(tag) for tag in record["tags"]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} line {number} is no record of tags; remove the file") from None
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return known


def request_body(row: Row, config: JudgeConfig, settings: TagSettings) -> dict[str, Any]:
    choice = f"\nChoose them from this list: {json.dumps(settings.skills)}." if settings.skills else ""
    question = without_control_tokens(question_of(row))
    # All replacements happen at once, so that a question's own text is never taken for a placeholder.
    head, _, tail = REQUEST.partition("{question}")
    text = head.replace("{count}", str(settings.count)).replace("{choice}", choice) + question + tail
    body: dict[str, Any] = {"model": config.model, "temperature": config.temperature, "max_tokens": config.max_tokens}
    body |= {"messages": [{"role": "user", "content": text}]} if config.api == "chat" else {"prompt": text}
    return body


def read_tags(reply: str, settings: TagSettings) -> list[str]:
    """Reads the list at the end of the reply. Raises ReplyError for anything else."""
    text = reply.rpartition(END_OF_REASONING)[2].strip().removesuffix("```").strip()
    start = text.rfind("[")
    try:
        found = json.loads(text[start:]) if start >= 0 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(tag, str) for tag in found):
        raise ReplyError(f"the reply does not end with a JSON list of strings: {' '.join(text.split())[-80:]!r}")
    tags = [" ".join(tag.split()).lower() for tag in found]
    if settings.skills:
        allowed = {skill.lower(): skill for skill in settings.skills}
        tags = [allowed[tag] for tag in tags if tag in allowed]
    tags = list(dict.fromkeys(tag for tag in tags if tag and len(tag) <= MAX_TAG_CHARACTERS))[: settings.count]
    if not tags:
        raise ReplyError("the reply names no skill that counts")
    return tags


def with_tags(row: Row, tags: Mapping[str, Sequence[str]], settings: TagSettings, model: str) -> Row:
    """Returns the row with the new tags after its own. A row without old and new tags stays unchanged."""
    given = tags.get(tag_key(row, settings, model), ())
    own = row.get("tags") or []
    return row | {"tags": list(dict.fromkeys([*own, *given]))} if given else row

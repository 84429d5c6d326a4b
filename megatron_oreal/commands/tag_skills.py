"""Tags prompts with the skills that a language model says they need, for `megatron-oreal select-data prompts`.

megatron-oreal tag-skills prompts.jsonl --url http://node7:8000/v1 --model Qwen2.5-72B-Instruct --out tagged.jsonl
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click
from pydantic import ValidationError

from megatron_oreal.config import JudgeConfig
from megatron_oreal.data.files import Row, read_jsonl, write_jsonl
from megatron_oreal.data.prompts import parse_messages, parse_text
from megatron_oreal.data.skill_tags import TagSettings, ask_for_tags, with_tags
from megatron_oreal.observability.progress import ProgressBar

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("prompts", type=FILE)
@click.option("--out", required=True, type=FILE, help='The prompts with "tags".')
@click.option("--url", required=True, help="The base of an OpenAI-compatible API, such as http://node7:8000/v1.")
@click.option("--model", required=True, help="The model's name at that server.")
@click.option("--skills", type=FILE, help="A file with one skill a line: only these count. Default: any.")
@click.option("--count", default=3, show_default=True, type=click.IntRange(min=1), help="Tags of a question.")
@click.option("--api", default="chat", show_default=True, type=click.Choice(["chat", "completions"]))
@click.option("--api-key-env", default="", help="The environment variable that holds the API key.")
@click.option("--max-tokens", default=1024, show_default=True, type=click.IntRange(min=1), help="Of a reply.")
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(min=1), help="Requests under way.")
@click.option(
    "--max-failures", default=0, show_default=True, type=click.IntRange(min=0), help="Questions without tags."
)
def main(prompts: Path, out: Path, skills: Path | None, count: int, max_failures: int, **server: object) -> None:
    """Writes PROMPTS with the tags of a language model. The same command again asks only what is not known yet.

    What was answered is kept beside --out, as OUT.tags. With more than --max-failures questions that got no usable
    reply, nothing is written.
    """
    try:
        click.echo(tag(prompts, out, TagSettings(count, read_skills(skills)), judge_config(server), max_failures))
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


def tag(prompts: Path, out: Path, settings: TagSettings, config: JudgeConfig, max_failures: int) -> str:
    rows = read_rows(prompts)
    with ProgressBar(len(rows), description=prompts.name, unit="prompt") as progress:
        tagged = ask_for_tags(rows, config, settings, out.with_name(f"{out.name}.tags"), progress.advance)
    if len(tagged.failures) > max_failures:
        raise ValueError(
            f"{len(tagged.failures)} of {len(rows)} prompts got no tags, more than --max-failures {max_failures}; the "
            f"same command asks for these again; the first is {tagged.failures[0]}"
        )
    written = [with_tags(row, tagged.tags, settings, config.model) for row in rows]
    write_jsonl(out, written)
    counts = Counter(tag for row in written for tag in row.get("tags") or [])
    most = ", ".join(f"{tag} {number}" for tag, number in counts.most_common(5))
    return f"{out}: {len(rows)} prompts, {len(tagged.failures)} of them without new tags; {len(counts)} tags: {most}"


def read_rows(path: Path) -> list[Row]:
    rows = []
    for line, row in read_jsonl(path, "PROMPTS"):
        try:
            parse_text(row, "id")
            parse_messages(row)
            if not isinstance(row.get("tags") or [], list):
                raise ValueError("tags must be a list of strings")
        except ValueError as error:
            raise ValueError(f"PROMPTS: {path} line {line}: {error}") from None
        rows.append(row)
    return rows


def read_skills(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise ValueError(f"--skills: {path} does not exist; give a file with one skill a line")
    skills = tuple(dict.fromkeys(" ".join(line.split()) for line in path.read_text().splitlines() if line.strip()))
    if not skills:
        raise ValueError(f"--skills: {path} is empty; write one skill a line")
    return skills


def judge_config(server: dict[str, object]) -> JudgeConfig:
    renamed = {"concurrency": "max_concurrent_requests"}
    try:
        return JudgeConfig(**{renamed.get(name, name): value for name, value in server.items()})  # type: ignore[arg-type]
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        for name in ("url", "api_key_env", "model"):
            message = message.replace(f"verifier.judge.{name}", f"--{name.replace('_', '-')}")
        raise ValueError(message) from None


if __name__ == "__main__":
    main()

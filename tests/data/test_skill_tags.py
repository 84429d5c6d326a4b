"""Tags by a language model, against a small server on a real port."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_oreal.commands import tag_skills
from megatron_oreal.data.skill_tags import TagSettings, read_tags
from megatron_oreal.rewards.judge import ReplyError
from tests.support.misbehaving_server import MisbehavingServer, misbehaving_server

ROWS = [
    {"id": "a", "prompt": "What is 17 mod 5?", "answer": "2", "pass_rate": 0.5},
    {"id": "b", "prompt": "Find {count} of $x$.", "answer": "1", "tags": ["Algebra"]},
    {"id": "c", "prompt": "unknown", "answer": "1"},
]


def answer(body: Any) -> Any:
    text = body["messages"][-1]["content"]
    reply = '["Modular  arithmetic", "division"]' if "mod 5" in text else '["division"]' if "{count}" in text else "?"
    return {"choices": [{"finish_reason": "stop", "message": {"content": reply}}]}


def run(server: MisbehavingServer, folder: Path, *options: str) -> Any:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = [folder / "in.jsonl", "--out", folder / "out.jsonl", "--url", server.url, "--model", "m", *options]
    return CliRunner().invoke(tag_skills.main, list(map(str, arguments)))


def written(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_tags_join_the_rows_and_are_asked_for_once(tmp_path: Path) -> None:
    with misbehaving_server(answer) as server:
        refused = run(server, tmp_path)
        assert refused.exit_code == 2
        assert "Error: 1 of 3 prompts got no tags, more than --max-failures 0; the same command" in refused.output
        assert "the first is c: the reply does not end with a JSON list of strings: '?'" in refused.output
        assert not (tmp_path / "out.jsonl").exists() and len(server.requests) == 3
        known = tmp_path / "out.jsonl.tags"
        known.write_bytes(known.read_bytes() + b'{"key": "cut by a ki')
        done = run(server, tmp_path, "--max-failures", "1")
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 4  # the third question again
        assert written(tmp_path) == [
            ROWS[0] | {"tags": ["modular arithmetic", "division"]},
            ROWS[1] | {"tags": ["Algebra", "division"]},
            ROWS[2],
        ]
        assert "3 prompts, 1 of them without new tags; 3 tags: division 2" in done.output


def test_only_listed_skills_count(tmp_path: Path) -> None:
    (tmp_path / "skills.txt").write_text("Division\n\nGeometry\n")
    with misbehaving_server(answer) as server:
        done = run(server, tmp_path, "--skills", str(tmp_path / "skills.txt"), "--max-failures", "1")
        assert done.exit_code == 0, done.output
        assert [row.get("tags") for row in written(tmp_path)] == [["Division"], ["Algebra", "Division"], None]
        assert '["Division", "Geometry"]' in server.requests[0].body["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("reply", "tags"),
    [
        ('<think>["no"]</think>```json\n["A", "a", "B"]\n```', ["a", "b"]),
        ('["a", "b", "c", "d"]', ["a", "b", "c"]),
        ("a, b", None),
        ("[]", None),
        ("[1]", None),
        ('["a"] I hope that helps', None),
        ('["' + "x" * 61 + '"]', None),
        ("", None),
    ],
)
def test_only_a_list_at_the_end_counts(reply: str, tags: list[str] | None) -> None:
    if tags is None:
        with pytest.raises(ReplyError):
            read_tags(reply, TagSettings())
    else:
        assert read_tags(reply, TagSettings()) == tags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "node7"], "--url must be an address"),
        (["--api-key-env", "TAGS_NO_SUCH_KEY"], "--url.api_key_env: the environment variable TAGS_NO_SUCH_KEY"),
        (["--skills", "none.txt"], "--skills: none.txt does not exist"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = run(MisbehavingServer(answer, port=1), tmp_path, *options)
    assert done.exit_code == 2 and f"Error: {message}" in done.output
    assert done.output.count("Error") == 1 and not (tmp_path / "out.jsonl").exists()

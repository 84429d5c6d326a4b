"""The files of `megatron-oreal passrate`; tests/integration/test_passrate.py runs the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.evaluation.pass_rates import PassRate, append, digest, pass_rate_of, read_finished, rows_with_rates
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict

PROMPTS = [Prompt(f"p{n}", (Message("user", f"{n}+1?"),), str(n + 1)) for n in range(5)]
ENCODED = [EncodedPrompt(prompt, np.arange(3, dtype=np.int32)) for prompt in PROMPTS]
RECORDS = [PassRate(prompt.id, digest(prompt), 4, 4, n % 5) for n, prompt in enumerate(PROMPTS)]


def sample(status: str) -> Sample:
    ids = np.arange(2, dtype=np.int32)
    empty = np.zeros(0, dtype=np.float32)
    verdict = Verdict(float(status == "correct"), status, "1")  # type: ignore[arg-type]
    return Sample("p0", ids, ids, "", empty, empty, "stop", 0, verdict)


def test_a_sample_that_could_not_be_judged_says_nothing() -> None:
    rate = pass_rate_of(Group(PROMPTS[0], [sample(s) for s in ("correct", "timeout", "incorrect", "correct")]))
    assert (rate.num_samples, rate.num_judged, rate.num_correct, rate.pass_rate) == (4, 3, 2, 2 / 3)
    assert pass_rate_of(Group(PROMPTS[0], [sample("crash")])).pass_rate is None


@pytest.mark.parametrize(
    ("num_bytes_lost", "num_kept"),
    [(0, 5), (1, 4), (200, 2), (10_000, 0)],  # four records are two batches, three are one and a half
)
def test_a_kill_leaves_whole_batches(tmp_path: Path, num_bytes_lost: int, num_kept: int) -> None:
    path = tmp_path / "new" / "a.jsonl"
    append(path, RECORDS[:2])
    append(path, RECORDS[2:])
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - num_bytes_lost)])
    assert read_finished(path, ENCODED, "a", batch_size=2) == RECORDS[:num_kept]
    append(path, RECORDS[num_kept:])
    assert path.read_bytes() == content


def test_records_of_other_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_finished(path, ENCODED, "a", 2) == []
    append(path, RECORDS)
    for others in (
        ENCODED[::-1],
        ENCODED[:4],
        [EncodedPrompt(Prompt("p0", PROMPTS[0].messages, "7"), ENCODED[0].token_ids)],
    ):
        with pytest.raises(ValueError, match=r"^eval\.prompts\.a is not the file whose pass rates"):
            read_finished(path, others, "a", 1)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 is no record of a pass rate; remove the file"):
        read_finished(path, ENCODED, "a", 1)


def test_rows_keep_their_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "p1", "prompt": "1+1?", "answer": "2", "tags": ["sum"], "pass_rate": None},
        {"id": "new", "prompt": "?", "answer": "2", "pass_rate": 0.5},
        {"id": 7, "prompt": "?", "answer": "2"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [RECORDS[1], PassRate("7", "", 4, 0, 0)]
    assert rows_with_rates(path, "a", records) == [
        rows[0] | {"pass_rate": 0.25},
        rows[1],
        rows[2] | {"pass_rate": None},
    ]

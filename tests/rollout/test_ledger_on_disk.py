"""What the ledger leaves after a power cut: what fsync has seen, and in which order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.engines.engine import BatchIndex, Generation, GenerationRequest, SamplingParams
from megatron_oreal.rollout.ledger import Ledger, Record, read_records, read_weights, response_key
from megatron_oreal.rollout.pending_groups import PromptRequest
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group
from tests.support.disk import Disk, recorded_disk
from tests.support.memory_engine import MemoryEngine, make_producer, make_prompts, make_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")

WHOLE = Generation([5, 6, 1], [-0.1, -0.2, -0.3], [-1.5, -2.5, -1 / 3], "stop", [3, 3, 4])
BEGUN = Generation([7, 8], [], [-0.5, -0.25], "abort", [4, 4])


def test_weights_are_on_disk_before_anything_is_generated_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded_disk(monkeypatch) as disk, Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        assert disk.contents[tmp_path / "weights.jsonl"].endswith(b'{"version": 4, "fingerprint": "four"}\n')


def test_versions_that_will_be_made_again_are_forgotten(tmp_path: Path) -> None:
    """The weights of version 4 may be others after a resume from step 4: the file must not say otherwise."""
    with Ledger(tmp_path) as ledger:
        for version in (3, 4):
            ledger.set_weights(version, f"weights {version}")
    with Ledger(tmp_path, start_step=4) as ledger:
        assert ledger.weights == {3: "weights 3"}
        assert read_weights(tmp_path / "weights.jsonl") == {3: "weights 3"}
    with (tmp_path / "weights.jsonl").open("a") as file:
        file.write('{"version": 4, "finger')
    assert read_weights(tmp_path / "weights.jsonl") == {3: "weights 3"}
    (tmp_path / "torn.jsonl").write_text('{"version": 4, "finger')
    assert read_weights(tmp_path / "torn.jsonl") == {}
    assert read_weights(tmp_path / "none.jsonl") == {}


def test_a_response_is_in_the_file_at_once_and_on_disk_after_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "step_000004.bin"
    with recorded_disk(monkeypatch) as disk, Ledger(tmp_path) as ledger:
        ledger.add(4, "a" * 32, WHOLE)
        first = file.read_bytes()  # another process could read it now
        assert len(first) > 100 and "step_000004.bin" in disk.names[tmp_path]
        assert file not in disk.contents
        ledger.sync(5)
        assert file not in disk.contents
        ledger.sync(4)
        assert disk.contents[file] == first
        before = list(disk.synced)
        ledger.sync(4)
        assert disk.synced == before  # there is nothing new
        ledger.carry(4, "b" * 32, BEGUN)
        ledger.sync(4)
        assert disk.contents[file] == file.read_bytes() != first
        assert [record.header.key[0] for record in read_records(file)] == ["a", "b"]


def test_a_batch_is_flushed_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "step_000004.bin"
    with Ledger(tmp_path) as ledger:
        ledger.add(4, "a", WHOLE, BatchIndex(0, 2))
        assert file.stat().st_size == 0
        ledger.add(4, "b", WHOLE, BatchIndex(1, 2))
        assert [record.header.batch for record in read_records(file)] == [[0, 2], [1, 2]]


def test_the_cut_end_of_a_file_is_cut_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "step_000004.bin"
    with Ledger(tmp_path) as ledger:
        ledger.add(4, "a", WHOLE)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    with recorded_disk(monkeypatch) as disk:
        assert len(read_records(file)) == 1
        assert disk.synced == [(file.name, len(whole))]
        assert len(read_records(file)) == 1
        assert len(disk.synced) == 1


class WatchedSampler(Sampler):
    """Judges as always, and looks at the disk first."""

    disk: Disk
    file: Path
    num_judged: int = 0

    def judge(self, request: PromptRequest, generations: Sequence[Generation]) -> Group:
        on_disk = self.disk.contents.get(self.file, b"")
        self.num_judged += 1
        for generation in generations:
            assert generation.response_ids.astype("<i4").tobytes() in on_disk
        return super().judge(request, generations)


@pytest.mark.parametrize("settings", [{}, {"oversampling": 2.0, "unfinished": "resume"}])
def test_a_group_is_on_disk_before_it_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """What an answer was worth is never known for a response that a power cut could replace by another."""
    tokenizer = make_tokenizer(tmp_path)
    folder = tmp_path / "ledger"
    with recorded_disk(monkeypatch) as disk, Ledger(folder) as ledger:
        producer = make_producer(MemoryEngine(), tokenizer, ledger, **settings)
        sampler = producer.sampler
        watched = WatchedSampler(sampler.engine, sampler.tokenizer, sampler.verifier, True, require_stop=True)
        watched.disk, watched.file = disk, folder / "step_000000.bin"
        producer.sampler = watched
        producer.produce(0)
        assert watched.num_judged >= 3
        carried = folder / "step_000001.bin"
        assert carried.exists() == bool(settings)
        if settings:
            assert disk.contents[carried] == carried.read_bytes() != b""


def test_keys_of_one_prompt_are_one_key_a_sample() -> None:
    prompt = make_prompts(1)[0]
    requests = PromptRequest(prompt, "0/3").requests(4)
    keys = [response_key(request, SamplingParams()) for request in requests]
    assert len(set(keys)) == 4
    assert keys == [response_key(GenerationRequest(r.prompt_ids, r.seed), SamplingParams()) for r in requests]


def found(folder: Path, fingerprint: str, oldest_version: int = 0) -> Record | None:
    with Ledger(folder, 4) as ledger:
        ledger.set_weights(4, fingerprint)
        return ledger.find(4, "a", oldest_version)


def test_which_of_two_responses_is_used(tmp_path: Path) -> None:
    """One of new enough weights before one that is whole, a whole one before a long one, a long one before a short."""
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        ledger.add(4, "a", Generation([5] * 9, [], [-1.0] * 9, "abort", [2] * 4 + [4] * 5))
        ledger.add(4, "a", Generation([5, 6], [], [-1.0] * 2, "abort", [4, 4]))
        ledger.add(4, "a", Generation([5], [], [-1.0], "abort", [4]))
    newest, longest = found(tmp_path, "four", 3), found(tmp_path, "four")
    assert newest is not None and newest.header.num_tokens == 2 and newest.number == 1
    assert longest is not None and longest.header.num_tokens == 9
    assert (longest.oldest_version, longest.newest_version) == (2, 4)
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        ledger.add(4, "a", Generation([5, 1], [], [-1.0] * 2, "stop", [2, 4]))
    whole = found(tmp_path, "four")
    assert whole is not None and whole.header.finish_reason == "stop" and whole.number == 3
    assert found(tmp_path, "five") is None


def test_log_probs_of_the_engine_stay_apart_from_the_models(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        ledger.add(4, "a", WHOLE)
    record = found(tmp_path, "four")
    assert record is not None
    np.testing.assert_array_equal(record.generation.rollout_logprobs, np.float32([-0.1, -0.2, -0.3]))
    np.testing.assert_array_equal(record.generation.model_logprobs, np.float32([-1.5, -2.5, -1 / 3]))

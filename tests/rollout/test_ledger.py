"""What a killed process leaves behind, and which of it the next one may use."""

from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.engines.engine import BatchIndex, Generation, GenerationRequest, SamplingParams
from megatron_oreal.rollout.ledger import Ledger, response_key, runs

WHOLE = Generation([5, 6, 1], [-0.1, -0.2, -0.3], [-1.5, -2.5, -1 / 3], "stop", [3, 3, 4])
BEGUN = Generation([7, 8], [], [-0.5, -0.25], "abort", [4, 4])
KEY, OTHER = "a" * 32, "b" * 32


def killed(folder: Path, step: int = 4) -> None:
    """A ledger of a process that ended without closing it."""
    ledger = Ledger(folder)
    ledger.set_weights(4, "four")
    ledger.add(step, KEY, WHOLE)
    ledger.carry(step, OTHER, BEGUN)


def resumed(folder: Path, fingerprint: str = "four", start_step: int = 4) -> Ledger:
    ledger = Ledger(folder, start_step)
    ledger.set_weights(4, fingerprint)
    return ledger


def test_responses_come_back_bit_for_bit(tmp_path: Path) -> None:
    killed(tmp_path / "ledger")
    with resumed(tmp_path / "ledger") as ledger:
        whole, begun = ledger.find(4, KEY), ledger.find(4, OTHER)
        assert whole is not None and begun is not None
        assert (whole.generation, begun.generation) == (WHOLE, BEGUN)
        assert begun.place < whole.place  # what the step before left was there first
        assert ledger.find(5, KEY) is None and ledger.find(4, "c" * 32) is None


def test_responses_of_other_weights_are_not_used(tmp_path: Path) -> None:
    killed(tmp_path)
    with resumed(tmp_path, "another four") as ledger:
        assert ledger.find(4, KEY) is None and ledger.find(4, OTHER) is None
        ledger.add(4, KEY, WHOLE)
    with resumed(tmp_path) as ledger:  # the first process's weights again: its response, not the second's
        record = ledger.find(4, KEY)
        assert record is not None and record.header.weights == "four"


def test_weights_must_be_known_to_be_the_same(tmp_path: Path) -> None:
    killed(tmp_path)
    with Ledger(tmp_path, start_step=4) as ledger:
        assert ledger.find(4, KEY) is None
    with Ledger(tmp_path / "unknown") as ledger:
        ledger.add(4, KEY, WHOLE)  # before anybody said which weights version 4 is
    with resumed(tmp_path / "unknown") as ledger:
        assert ledger.find(4, KEY) is None


def test_weights_before_the_checkpoint_are_remembered(tmp_path: Path) -> None:
    """A step ahead of the trainer was made by weights that the resumed run never pushes."""
    killed(tmp_path, step=5)
    with Ledger(tmp_path, start_step=5) as ledger:
        record = ledger.find(5, KEY)
        assert record is not None and record.generation == WHOLE


@pytest.mark.parametrize("lost", [1, 30, 100])
def test_a_torn_record_is_ignored_and_others_follow_it(tmp_path: Path, lost: int) -> None:
    killed(tmp_path)
    (file,) = tmp_path.glob("step_*")
    file.write_bytes(file.read_bytes()[:-lost])
    with resumed(tmp_path) as ledger:
        assert ledger.find(4, KEY) is not None and ledger.find(4, OTHER) is None
        ledger.add(4, OTHER, WHOLE)
    with resumed(tmp_path) as ledger:
        record = ledger.find(4, OTHER)
        assert record is not None and record.generation == WHOLE


def test_zeros_at_the_end_are_ignored(tmp_path: Path) -> None:
    """A power cut may leave them where the file had grown, but not been written."""
    killed(tmp_path)
    (file,) = tmp_path.glob("step_*")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + bytes(64))
    with resumed(tmp_path) as ledger:
        assert ledger.find(4, OTHER) is not None
    assert file.stat().st_size == size


def test_a_damaged_record_ends_the_file(tmp_path: Path) -> None:
    killed(tmp_path)
    (file,) = tmp_path.glob("step_*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with resumed(tmp_path) as ledger:
        assert ledger.find(4, KEY) is not None and ledger.find(4, OTHER) is None


def test_the_whole_response_counts_not_its_beginning(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        ledger.carry(4, KEY, BEGUN)
        ledger.add(4, KEY, WHOLE)
    with resumed(tmp_path) as ledger:
        record = ledger.find(4, KEY)
        assert record is not None and record.generation == WHOLE


def test_a_batch_is_used_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed in the middle of the second batch; a response of another batch follows it."""
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(4, "four")
        for key, index, size in (("a", 0, 2), ("b", 1, 2), ("c", 0, 3), ("d", 1, 3)):
            ledger.add(4, key, WHOLE, BatchIndex(index, size))
    with resumed(tmp_path) as ledger:
        assert [ledger.find(4, key) is not None for key in "abcd"] == [True, True, False, False]
        ledger.add(4, "e", WHOLE)
    with resumed(tmp_path) as ledger:
        assert [ledger.find(4, key) is not None for key in "abcde"] == [True, True, False, False, True]


def test_files_before_the_checkpoint_go(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for step in range(4):
            ledger.add(step, KEY, WHOLE)
        ledger.remove_before(2)
        assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["step_000002.bin", "step_000003.bin"]
        ledger.add(3, OTHER, WHOLE)
    with Ledger(tmp_path, start_step=3):
        assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["step_000003.bin"]


def test_without_a_folder_only_the_next_step_is_told() -> None:
    ledger = Ledger(None)
    ledger.add(1, KEY, WHOLE)
    ledger.carry(2, OTHER, BEGUN)
    assert ledger.find(1, KEY) is None
    record = ledger.find(2, OTHER)
    assert record is not None and record.generation == BEGUN
    ledger.finish(2)
    assert ledger.find(2, OTHER) is None


def test_the_key_is_all_that_a_response_depends_on() -> None:
    request, params = GenerationRequest([1, 2], 7), SamplingParams()
    keys = {
        response_key(request, params),
        response_key(GenerationRequest([1, 3], 7), params),
        response_key(GenerationRequest([1, 2], 8), params),
        response_key(request, SamplingParams(temperature=0.5)),
        response_key(request, SamplingParams(stop_token_ids=(1,))),
    }
    assert len(keys) == 5
    assert response_key(GenerationRequest([1, 2], 7, begun=BEGUN), params) in keys


def test_versions_are_written_as_runs() -> None:
    values = [[], [3], [3, 3, 4], [4, 3, 3, 3, 4, 0, 0]]
    expected = [[], [(3, 1)], [(3, 2), (4, 1)], [(4, 1), (3, 3), (4, 1), (0, 2)]]
    assert [runs(np.array(one, np.int32)) for one in values] == expected
    assert all(type(number) is int for run in runs(np.array([3, 4], np.int32)) for number in run)  # for JSON

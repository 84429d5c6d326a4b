"""Samples are never made with weights that are older than the settings allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_oreal.rollout.ledger import Ledger
from tests.support.memory_engine import MemoryEngine, make_producer, make_tokenizer


def test_weights_that_are_too_old_make_no_groups(tmp_path: Path) -> None:
    engine, tokenizer = MemoryEngine(), make_tokenizer(tmp_path)
    strict = make_producer(engine, tokenizer, Ledger(None))
    with pytest.raises(AssertionError, match="the engine's weights are too old"):
        strict.produce(1)
    assert engine.num_generated == 0
    engine.version = 1
    assert strict.produce(1).groups
    ahead = make_producer(engine, tokenizer, Ledger(None), staleness=1)
    assert ahead.produce(2).groups
    with pytest.raises(AssertionError, match="the engine's weights are too old"):
        ahead.produce(3)

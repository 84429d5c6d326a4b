"""Which tests run: slow ones on demand, those for CUDA where it is. One SGLang server for all tests that want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from megatron_oreal.engines.sglang.servers.fleet import ServerFleet

from tests.support.paths import SGLANG_PYTHON

NUM_SHARES = 4  # of the slow tests: each takes about as long as one or two of them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--slow-share", type=int, help="run a share of the slow tests too: a number chooses which")
    parser.addoption("--gpu", action="store_true", help="run the tests that need CUDA, and no others")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch finds no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    chosen = slow_tests_of(config, items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("sglang") and not SGLANG_PYTHON.exists():
            item.add_marker(pytest.mark.skip(reason="needs .venv-sglang: bash tools/setup_sglang.sh"))
        if item.get_closest_marker("slow") and item.nodeid not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


def slow_tests_of(config: pytest.Config, items: list[pytest.Item]) -> set[str]:
    """The slow tests that run: all with --slow, with --slow-share those of one share, so that each has its turn."""
    slow = sorted(item.nodeid for item in items if item.get_closest_marker("slow"))
    share = config.getoption("--slow-share")
    if config.getoption("--slow") or share is None:
        return set(slow) if config.getoption("--slow") else set()
    return set(slow[share % NUM_SHARES :: NUM_SHARES])


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 64 tokens and 512 positions that ends with token 1; it has no tokenizer."""
    from tests.support.tiny_models import add_noise, write_tiny_model

    path = tmp_path_factory.mktemp("sglang") / "model"
    size = {"vocab_size": 64, "max_position_embeddings": 512, "pad_token_id": 0}
    return write_tiny_model(path, tied=False, num_layers=2, fill=add_noise, **size)


@pytest.fixture(scope="session")
def sglang_fleet(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """One server of `sglang_model`. Who changes its weights puts them back."""
    from megatron_oreal.config import SglangConfig
    from megatron_oreal.engines.sglang.servers.fleet import open_servers
    from megatron_oreal.engines.sglang.servers.process import ServerSettings

    config = SglangConfig(python=SGLANG_PYTHON, start_timeout_seconds=280)
    run_dir = tmp_path_factory.mktemp("sglang_fleet")
    settings = ServerSettings(config, sglang_model, "float32", run_dir, "cpu", context_length=512)
    with open_servers(settings, print) as fleet:
        yield fleet

"""Two real tokenizers: the quickstart's characters, and a byte-level BPE with a chat template."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from examples.gsm8k import prepare as prepare_gsm8k
from examples.quickstart import prepare as prepare_quickstart
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def quickstart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart's prepare.py writes, with fewer rows."""
    out = tmp_path_factory.mktemp("prepared") / "quickstart"
    arguments = ["--out", str(out), "--num-examples", "400", "--num-prompts", "50"]
    result = CliRunner().invoke(prepare_quickstart.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def character_tokenizer(quickstart_dir: Path) -> Tokenizer:
    return load_tokenizer(quickstart_dir / "model")


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    texts = ["How many apples are left?", "There are 3 apples left.\n\\boxed{3}"]
    prepare_gsm8k.write_tokenizer(folder, prepare_gsm8k.train_tokenizer(texts, vocab_size=300))
    # AutoTokenizer asks for the model's type; load_tokenizer does not.
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return load_tokenizer(folder)

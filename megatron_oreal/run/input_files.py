"""Computes fingerprints of a run's input files: prompts or examples, initial weights and tokenizer.

RUN_DIR/inputs.json holds the fingerprints, so that a resumed run detects changed contents. A fingerprint does not
depend on the path of a file. Of a large file only samples are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_oreal.config import ModelRunConfig, SftConfig, TrainConfig
from megatron_oreal.weights.torch_dist_reader import is_torch_dist, iteration_directory

FILE = "inputs.json"
WHOLE_BYTES = 64 * 2**20  # Files up to this size are read completely.
END_BYTES, BLOCK_BYTES, NUM_BLOCKS = 2**20, 4096, 1024  # Of larger files, both ends and these blocks are read.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
WHAT = {
    "data.prompts": "the prompts",
    "data.examples": "the examples",
    "model.tokenizer": "the tokenizer",
    "algorithm.teacher": "the weights",
}

Digests = dict[str, str]  # the name of a file, or "lines" -> its digest
Inputs = dict[str, Digests]  # the setting that names the file or the folder -> its digests


def input_paths(config: ModelRunConfig) -> dict[str, Path]:
    """Returns the files and folders that shape a run, by their settings. The data sets of evaluations are not among
    them, because they may change during training, and `eval` compares the questions themselves.
    """
    paths = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer_path}
    if isinstance(config, TrainConfig):
        paths["data.prompts"] = config.data.prompts
        for name, model in config.algorithm.scalar_models.items():
            paths[f"algorithm.{name}.path"] = model.path or config.model.path
        if config.algorithm.reference_path is not None:
            paths["algorithm.teacher"] = config.algorithm.reference_path
    elif isinstance(config, SftConfig):
        paths["data.examples"] = config.data.examples
    return paths


def fingerprint_inputs(config: ModelRunConfig) -> Inputs:
    models: dict[Path, Digests] = {}
    found: Inputs = {}
    for setting, path in input_paths(config).items():
        if setting.startswith("data."):
            found[setting] = {"lines": digest_of_lines(path)}
        elif setting == "model.tokenizer":
            found[setting] = digest_files(path, matching(path, TOKENIZER_FILES))
        else:
            if path not in models:
                models[path] = digest_files(path, model_files(path))
            found[setting] = models[path]
    return found


def read_inputs_file(run_dir: Path) -> Inputs:
    """Returns the inputs that the run began with; empty if an older version began it. Raises ValueError."""
    file = run_dir / FILE
    if not file.is_file():
        return {}
    try:
        return {str(setting): dict(digests) for setting, digests in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"run_dir: {file} is damaged; remove it to resume with the files that the settings name now"
        ) from None


def check_inputs(run_dir: Path, before: Inputs, now: Inputs, config: ModelRunConfig) -> None:
    """Raises ValueError, naming setting and file, if the contents differ from those that the run began with."""
    paths = input_paths(config)
    for setting in now:
        if setting in before and before[setting] != now[setting]:
            what = WHAT.get(setting, "the initial weights")
            old, new = before[setting], now[setting]
            changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            files = "" if changed == ["lines"] else f" ({', '.join(changed[:3])}{', ...' if changed[3:] else ''})"
            raise ValueError(
                f"{setting}: {what} in {paths[setting]} are not those that {run_dir} began with{files}; restore them, "
                f"choose another run_dir, or remove {run_dir / FILE} to go on with what is there now"
            )


def digest_of_lines(file: Path) -> str:
    """Returns a digest that does not depend on blank lines, line ends or a byte order mark."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).strip()
            if text:
                digest.update(text + b"\n")
    return digest.hexdigest()


def model_files(path: Path) -> Iterator[Path]:
    if is_torch_dist(path):
        yield from (file for file in sorted(iteration_directory(path, "model.path").rglob("*")) if file.is_file())
        yield from matching(path, MODEL_FILES[:2])
        return
    yield from (path / name for name in shard_names(path) if (path / name).is_file())
    yield from matching(path, MODEL_FILES)


def shard_names(path: Path) -> list[str]:
    """Returns the files of the weights. Returns none if they are damaged, because loading them gives a better error."""
    try:
        index = json.loads((path / "model.safetensors.index.json").read_bytes())
        return sorted({name for name in index["weight_map"].values() if Path(name).name == name})
    except FileNotFoundError:
        return ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (file for file in sorted(folder.glob(pattern)) if file.is_file())


def digest_files(folder: Path, files: Iterator[Path]) -> Digests:
    return {str(file.relative_to(folder)): digest_of_file(file) for file in files}


def digest_of_file(file: Path) -> str:
    """Returns a digest of the size and the bytes of a file; of a large file, of its ends and of blocks in between."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            while block := opened.read(END_BYTES):
                digest.update(block)
            return digest.hexdigest()
        digest.update(opened.read(END_BYTES))
        for number in range(NUM_BLOCKS):
            opened.seek(END_BYTES + (size - 2 * END_BYTES) * number // NUM_BLOCKS)
            digest.update(opened.read(BLOCK_BYTES))
        opened.seek(size - END_BYTES)
        digest.update(opened.read())
    return digest.hexdigest()

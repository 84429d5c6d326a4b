"""Reads config.json and generation_config.json of a Hugging Face directory. Imports no torch.

Nothing else in the package reads these files.
"""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"
ModelSettings = dict[str, Any]  # the parsed config.json, e.g. {"model_type": "qwen2", "num_hidden_layers": 28, ...}


def read_model_settings(path: Path) -> ModelSettings:
    """Returns the settings in `path`/config.json, which may begin with a byte order mark.

    Raises ValueError, in one line, for a file that is missing, unreadable or not a JSON mapping.
    """
    return read_mapping(path / "config.json")


def read_end_tokens(path: Path) -> dict[int, str]:
    """Returns the ids of the model's end tokens, each with the file that names it.

    The function reads config.json and generation_config.json, and either may be missing; `eos_token_id` is a number or
    a list. Example: {151645: "generation_config.json", 151643: "generation_config.json"}.
    """
    found: dict[int, str] = {}
    for name in ("config.json", GENERATION_FILE):
        value = read_mapping(path / name).get("eos_token_id") if (path / name).is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
            raise ValueError(
                f"model.path: {path / name}: eos_token_id must be a number or a list of numbers, got {value!r}"
            )
        # -1 means that there is no end token
        found |= {number: name for number in ids if number not in found and number >= 0}
    return found


def read_mapping(file: Path) -> ModelSettings:
    try:
        settings = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        below = "" if file.is_absolute() else f" below {Path.cwd()}"
        raise ValueError(
            f"model.path: {file} does not exist{below}; give a Hugging Face directory, or download one: "
            f"hf download NAME --local-dir {file.parent}"
        ) from None
    except OSError as error:
        raise ValueError(f"model.path: {file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"model.path: {file}: it is not JSON; save the model again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"model.path: {file}: it is not a mapping; save the model again")
    return settings


def write_model_settings(directory: Path, settings: ModelSettings, dtype: object) -> None:
    """Writes `directory`/config.json; `dtype` (e.g. torch.float32) replaces the dtype that the settings name."""
    dtypes = {name: str(dtype).removeprefix("torch.") for name in ("torch_dtype", "dtype") if name in settings}
    (directory / "config.json").write_text(json.dumps(settings | dtypes, indent=2))


def copy_model_file(source: Path, target: Path) -> None:
    """Copies a file beside a model's weights. Removes JSON's byte order mark, which other readers refuse."""
    if source.suffix == ".json":
        target.write_bytes(source.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        shutil.copyfile(source, target)

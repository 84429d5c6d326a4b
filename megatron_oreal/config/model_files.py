"""Reads the config.json of a Hugging Face directory. Nothing else in the package opens that file. Imports no torch."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

ModelSettings = dict[str, Any]  # a parsed config.json, e.g. {"model_type": "qwen2", "num_hidden_layers": 28, ...}


def read_model_settings(path: Path) -> ModelSettings:
    """Returns the settings in `path`/config.json, which may begin with a byte order mark.

    Raises ValueError, in one line, for a file that is missing, unreadable or not a JSON mapping.
    """
    file = path / "config.json"
    try:
        settings = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"model.path: {file} does not exist; give a Hugging Face directory with config.json") from None
    except OSError as error:
        raise ValueError(f"model.path: {file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"model.path: {file}: it is not JSON; save the model again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"model.path: {file}: it is not a mapping; save the model again")
    return settings


def write_model_settings(directory: Path, settings: ModelSettings, dtype: object) -> None:
    """Writes `directory`/config.json; where the settings name a dtype, `dtype` (e.g. torch.float32) takes its place."""
    dtypes = {name: str(dtype).removeprefix("torch.") for name in ("torch_dtype", "dtype") if name in settings}
    (directory / "config.json").write_text(json.dumps(settings | dtypes, indent=2))


def copy_model_file(source: Path, target: Path) -> None:
    """Copies a file that lies beside a model's weights; JSON loses its byte order mark, which other readers refuse."""
    if source.suffix == ".json":
        target.write_bytes(source.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        shutil.copyfile(source, target)

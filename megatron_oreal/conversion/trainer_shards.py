"""Reads a model of the trainer's checkpoints of the format before torch_dist as whole tensors; see rank_files.py.

The trainer's newer checkpoints are torch_dist directories, which weights/torch_dist_reader.py reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_oreal.weights.families import HeadKind, canonical_name
from megatron_oreal.weights.hf_directory import SAFETENSORS_DTYPES
from megatron_oreal.weights.mapping import Place, Row

SHARD_FILE = re.compile(r"parameters_t(\d+)_p(\d+)\.safetensors")
# A model's role decides its head; its shapes never do.
HEAD_OF_ROLE: dict[str, HeadKind] = {"policy": "lm", "reference": "lm", "reward_model": "scalar", "critic": "scalar"}


class TrainerReader:
    """Reads the parameters of step_<n>/<model> as Hugging Face tensors. Raises ValueError for whatever is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[tuple[int, int], Any] = {}
        self.stored: dict[str, dict[int, tuple[Any, str]]] = {}  # canonical name -> tensor rank -> (file, its name)
        layout = self._layout()
        for tensor_rank in range(layout["tensor"]):
            for stage in range(layout["pipeline"]):
                file = path / f"parameters_t{tensor_rank:02d}_p{stage:02d}.safetensors"
                try:
                    opened = safe_open(file, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise ValueError(f"--mcore: {file} cannot be read: {error}") from None
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    self.stored.setdefault(canonical_name(name), {})[tensor_rank] = (opened, name)

    def _layout(self) -> dict[str, int]:
        file = self.path.parent / "run.json"
        try:
            layout = json.loads(file.read_bytes())["layout"]
            return {name: int(layout[name]) for name in ("tensor", "pipeline")}
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"--mcore: {file} does not say which layout wrote {self.path.name}") from None

    def dtype(self, row: Row, place: Place) -> torch.dtype:
        kept = self._shards(row, place)[0].get_dtype()
        if kept not in SAFETENSORS_DTYPES:
            raise ValueError(f"--mcore: {row.megatron_name(place)} is {kept}; known: {', '.join(SAFETENSORS_DTYPES)}")
        return SAFETENSORS_DTYPES[kept]

    def check(self, rows: Sequence[tuple[Row, Place]]) -> None:
        """Raises ValueError for missing and misshapen tensors, and for parameters that no row reads."""
        for row, place in rows:
            shapes = [tuple(shard.get_shape()) for shard in self._shards(row, place)]
            axis = row.op.axis
            whole = list(shapes[0])
            if axis is not None:
                whole[axis] = sum(shape[axis] for shape in shapes)
            padding = whole[0] - row.shape[0]
            if tuple(whole[1:]) != row.shape[1:] or not (
                0 <= padding < len(shapes) if row.pads_vocabulary else not padding
            ):
                raise ValueError(
                    f"--mcore: {row.megatron_name(place)} has the shape {tuple(whole)}, "
                    f"config.json asks for {row.shape}"
                )
        # Where embedding and head are tied, the last stage stores a copy of the embedding.
        if extra := set(self.stored) - {row.megatron_name(place) for row, place in rows} - {"output_layer.weight"}:
            raise ValueError(f"--mcore: {min(extra)} ({len(extra)} such) has no place in the model of config.json")

    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]:
        pieces = [row.op.split(shard[:]) for shard in self._shards(row, place)]
        axis = row.op.axis
        if axis is None or len(pieces) == 1:
            whole = list(pieces[0])
        else:
            whole = [torch.cat(parts, dim=axis) for parts in zip(*pieces, strict=True)]
        return [tensor[: row.shape[0]] for tensor in whole] if row.pads_vocabulary else whole

    def _shards(self, row: Row, place: Place) -> list[Any]:
        """Returns one shard for each tensor-parallel rank, or a single one where all ranks have the same."""
        by_rank = self.stored.get(row.megatron_name(place))
        if by_rank is None:
            raise ValueError(f"--mcore: {self.path} has no parameter {row.megatron_name(place)}")
        ranks = sorted(by_rank) if row.op.axis is not None else [0]
        try:
            return [by_rank[rank][0].get_slice(by_rank[rank][1]) for rank in ranks]
        except (KeyError, SafetensorError):
            raise ValueError(f"--mcore: {self.path} lacks a shard of {row.megatron_name(place)}") from None


def has_rank_files(path: Path) -> bool:
    return any(SHARD_FILE.fullmatch(file.name) for file in path.glob("parameters_*"))


def is_trainer_model(path: Path) -> bool:
    """Says whether this is RUN_DIR/checkpoints/step_<n>/<model>, of either format."""
    return has_rank_files(path) or ((path / ".metadata").is_file() and (path.resolve().parent / "run.json").is_file())


def model_path_of_run(path: Path) -> Path | None:
    """Returns the Hugging Face directory that the run of RUN_DIR/checkpoints/step_<n>/<model> started from."""
    import yaml

    parents = path.resolve().parents
    if len(parents) < 3 or not (file := parents[2] / "config.yaml").is_file():
        return None
    model = Path(yaml.safe_load(file.read_text())["model"]["path"])
    return model if model.is_dir() else None

"""Which rectangles of a model's whole tensors a rank holds: its parameters, masters and moments, in any layout.

A checkpoint names every tensor and gives it its whole shape over all ranks, with layers (and experts) as its first
dimensions; weights/torch_dist.py says how. A rank holds a tensor-parallel part of a parameter, and with a sharded
optimizer a range of that part's elements. Such a range is up to three rectangles: the end of a row, whole rows, and
the beginning of a row. Vocabularies are stored without their padding, which depends on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import Architecture, HeadKind, canonical_name, parameter_rows
from megatron_oreal.weights.mapping import GateUp, Place, Row, find_row
from megatron_oreal.weights.torch_dist import stacked_offsets, stacked_sizes, stored_keys

OPTIMIZER = "optimizer.state."  # The beginning of the names of masters and moments, as in Megatron's checkpoints.


@dataclass(frozen=True, slots=True)
class OptimizerTensors:
    """What the optimizer keeps for the elements of one parameter on this rank that begin at `begin`."""

    parameter: str  # its name, with layers counted over the whole model
    begin: int
    tensors: dict[str, Tensor]  # fp32_param (the master), exp_avg, exp_avg_sq, ...; each [number of elements]


@dataclass(frozen=True, slots=True)
class OptimizerProgress:
    num_updates: int  # of the learning rate's schedule, skipped ones included
    num_adam_steps: int


class Head(Protocol):
    @property
    def kind(self) -> HeadKind: ...


class Trainable(Protocol):
    """The part of models.trainable.TrainableModel that a checkpoint saves."""

    architecture: Architecture

    @property
    def head(self) -> Head: ...
    @property
    def optimizer_is_sharded(self) -> bool: ...
    def parameters(self) -> list[tuple[str, Tensor]]: ...
    def optimizer_tensors(self) -> list[OptimizerTensors]: ...
    def optimizer_progress(self) -> OptimizerProgress: ...
    def start_optimizer_at(self, progress: OptimizerProgress) -> None: ...
    def load_training_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of the whole tensor `key`, and this rank's values of it, as a view."""

    key: str
    whole: tuple[int, ...]  # the whole tensor's sizes
    offsets: tuple[int, ...]
    values: Tensor  # of as many dimensions as the whole tensor
    is_written_here: bool  # False where another rank writes the same values


def pieces_of(model: Trainable, layout: ParallelLayout) -> Iterator[Piece]:
    """Yields all that this rank holds of the model and of its optimizer. Not a collective."""
    rows = parameter_rows(model.architecture, model.head.kind)
    found: dict[str, tuple[Row, Place, tuple[int, ...], bool]] = {}
    for number, (name, parameter) in enumerate(model.parameters()):
        row, place = find_row(rows, canonical_name(name))
        # Of equal copies one is written: the embedding's, not the tied head's, and the first tensor-parallel rank's.
        is_first_copy = row.exported and (row.op.axis is not None or layout.tensor_rank == 0)
        is_my_turn = number % layout.num_copies == layout.copy_rank  # Replicas share the work.
        found[name] = row, place, tuple(parameter.shape), is_first_copy
        values = parameter.detach().view(-1)
        for piece in rectangles_of(row, place, tuple(parameter.shape), 0, values, model.architecture, layout):
            yield with_key(piece, "", is_first_copy and is_my_turn)
    turns = {name: number for number, name in enumerate(found)}
    for kept in model.optimizer_tensors():
        row, place, shape, is_first_copy = found[kept.parameter]
        is_my_turn = model.optimizer_is_sharded or turns[kept.parameter] % layout.num_copies == layout.copy_rank
        for name, values in kept.tensors.items():
            flat = values.detach().view(-1)
            for piece in rectangles_of(row, place, shape, kept.begin, flat, model.architecture, layout):
                yield with_key(piece, f"{OPTIMIZER}{name}.", is_first_copy and is_my_turn)


def with_key(piece: Piece, prefix: str, is_written_here: bool) -> Piece:
    return Piece(prefix + piece.key, piece.whole, piece.offsets, piece.values, is_written_here)


def rectangles_of(
    row: Row,
    place: Place,
    shape: tuple[int, ...],  # of this rank's parameter
    begin: int,
    flat: Tensor,  # [n], elements begin, begin + 1, ... of the parameter
    architecture: Architecture,
    layout: ParallelLayout,
) -> Iterator[Piece]:
    """Yields the rectangles of the whole tensor that a range of a rank's parameter consists of."""
    num_columns = shape[1] if len(shape) > 1 else 1
    is_split = row.op.axis is not None and layout.tensor_size > 1
    first_column = layout.tensor_rank * num_columns if is_split and row.op.axis == 1 else 0
    whole = (*stacked_sizes(row, architecture), *row.shape)
    stacked = stacked_offsets(place)
    for first, last, left, right in rows_and_columns(begin, begin + flat.numel(), num_columns):
        for here, there, count in row_runs(row, shape[0], layout, is_split):
            top, bottom = max(first, here), min(last, here + count)
            if top >= bottom:
                continue
            start = top * num_columns + left - begin
            sizes = (bottom - top, right - left)[: len(shape)]
            values = flat[start : start + (bottom - top) * (right - left)].view(*(1 for _ in stacked), *sizes)
            offsets = (there + top - here, first_column + left)[: len(shape)]
            yield Piece(stored_keys(row, architecture)[0], whole, (*stacked, *offsets), values, False)


def rows_and_columns(begin: int, end: int, num_columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts elements begin to end of a matrix into rectangles (first row, last row + 1, left column, right column + 1).

    Example: elements 3 to 14 of a matrix with 5 columns are (0, 1, 3, 5), (1, 2, 0, 5) and (2, 3, 0, 4).
    """
    row, column = divmod(begin, num_columns)
    if column and begin < end:
        stop = min(end, (row + 1) * num_columns)
        yield row, row + 1, column, column + stop - begin
        begin = stop
    row = begin // num_columns
    if num_rows := max(0, end - begin) // num_columns:
        yield row, row + num_rows, 0, num_columns
        row, begin = row + num_rows, begin + num_rows * num_columns
    if begin < end:
        yield row, row + 1, 0, end - begin


def row_runs(row: Row, num_rows: int, layout: ParallelLayout, is_split: bool) -> list[tuple[int, int, int]]:
    """Returns (first row here, first row in the whole tensor, number of rows), without the vocabulary's padding."""
    rank, size = (layout.tensor_rank, layout.tensor_size) if is_split and row.op.axis == 0 else (0, 1)
    if isinstance(row.op, GateUp):
        half = num_rows // 2
        return [(0, rank * half, half), (half, (size + rank) * half, half)]
    count = min(num_rows, max(0, row.shape[0] - rank * num_rows)) if row.pads_vocabulary else num_rows
    return [(0, rank * num_rows, count)]

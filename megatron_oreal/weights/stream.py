"""Streams the weights of a live, sharded model, tensor by tensor, under their Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.parallel.collectives import all_gather_object
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import Architecture, HeadKind, canonical_name, parameter_rows
from megatron_oreal.weights.mapping import Direct, Place, Row, find_row

BUCKET_BYTES = 512 * 2**20  # whole parameters that are gathered in one collective
CPU_BUCKET_BYTES = 32 * 2**20  # caches hold a bucket of this size
# torch 2.13 has renamed this function.
ALL_GATHER = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter of one pipeline stage, and the Hugging Face tensors that it becomes in the stream."""

    name: str  # Megatron's name; experts are numbered from 0 on their rank
    shape: tuple[int, ...]  # of the shard on one rank
    dtype: torch.dtype
    row: Row
    place: Place

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


class WeightStream:
    """Yields a live model's weights as (Hugging Face name, whole tensor), on every rank and in one fixed order.

    The plan is made once. All ranks of the groups must iterate together: a bucket takes one broadcast over the
    pipeline, from the stage that owns it, and one all-gather over tensor parallelism; experts are also gathered over
    `expert_group`. Over gloo an all-gather is a broadcast from each rank.

    bucket_bytes: size of the whole parameters that are gathered together; a larger parameter gets a bucket of its own.
    The stream needs memory for two buckets and two tensors: the one that it makes, and the one that the consumer has.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        architecture: Architecture,
        head: HeadKind,
        layout: ParallelLayout,
        bucket_bytes: int = BUCKET_BYTES,
        expert_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.layout, self.vocab_size = layout, architecture.vocab_size
        self.expert_group = expert_group
        self.expert_size = 1 if expert_group is None else dist.get_world_size(expert_group)
        self.experts_on_rank = architecture.num_experts // self.expert_size
        self.parameters = dict(parameters)
        self.device = parameters[0][1].device
        self.bucket_bytes = bucket_bytes if self.device.type == "cuda" else min(bucket_bytes, CPU_BUCKET_BYTES)
        rows = parameter_rows(architecture, head)
        local = []
        for name, parameter in parameters:
            row, place = find_row(rows, canonical_name(name))
            if row.exported:
                local.append(PlannedParameter(name, tuple(parameter.shape), parameter.dtype, row, place))
        if self.expert_size > 1:  # experts last: each change between the two kinds begins a bucket
            local.sort(key=lambda item: item.place.expert is not None)
        self.plan = all_gather_object(local, layout.pipeline_group)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for stage, planned in enumerate(self.plan):
            for bucket in self._buckets(planned):
                # The gathered tensor has no name here, so that it is freed before the next bucket is gathered.
                yield from self._hf_tensors(bucket, self._gather(bucket, stage))

    def _num_shards(self, item: PlannedParameter) -> tuple[int, int]:
        """Returns the number of shards over expert parallelism and over tensor parallelism."""
        return (self.expert_size if item.place.expert is not None else 1), self.layout.tensor_size

    def _buckets(self, planned: Sequence[PlannedParameter]) -> Iterator[list[PlannedParameter]]:
        """Yields runs of parameters of one dtype and one kind, of at most `bucket_bytes` when they are gathered."""
        bucket: list[PlannedParameter] = []
        filled = 0
        for item in planned:
            size = item.num_elements * item.dtype.itemsize * math.prod(self._num_shards(item))
            is_alike = bucket and item.dtype == bucket[0].dtype
            if bucket and not (
                is_alike
                and filled + size <= self.bucket_bytes
                and self._num_shards(item) == self._num_shards(bucket[0])
            ):
                yield bucket
                bucket, filled = [], 0
            bucket.append(item)
            filled += size
        if bucket:
            yield bucket

    def _gather(self, bucket: list[PlannedParameter], stage: int) -> Tensor:
        """Gathers the flat shards of a bucket: [expert ranks, tensor ranks, elements of a shard]."""
        layout, (expert_size, tensor_size) = self.layout, self._num_shards(bucket[0])
        if layout.pipeline_rank == stage:
            flat = torch.cat([self.parameters[item.name].detach().reshape(-1) for item in bucket])
        else:
            num_elements = sum(item.num_elements for item in bucket)
            flat = torch.empty(num_elements, dtype=bucket[0].dtype, device=self.device)
        if layout.pipeline_size > 1:
            source = dist.get_global_rank(layout.pipeline_group, stage)
            dist.broadcast(flat, source, group=layout.pipeline_group)
        if tensor_size > 1:
            flat = all_gather(flat, tensor_size, layout.tensor_group)
        if expert_size > 1:
            flat = all_gather(flat, expert_size, self.expert_group)
        return flat.view(expert_size, tensor_size, -1)

    def _hf_tensors(self, bucket: list[PlannedParameter], gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for item in bucket:
            shards = gathered[:, :, offset : offset + item.num_elements]
            offset += item.num_elements
            for expert_rank, of_rank in enumerate(shards):
                place = item.place
                if place.expert is not None:
                    place = replace(place, expert=place.expert + expert_rank * self.experts_on_rank)
                yield from zip(item.row.hf_names(place), self._whole(item, of_rank), strict=True)

    def _whole(self, item: PlannedParameter, shards: Tensor) -> Iterator[Tensor]:
        """Yields the Hugging Face tensors of a parameter, made of its flat shards [tensor ranks, elements]."""
        axis = item.row.op.axis
        if isinstance(item.row.op, Direct) and axis == 0 and shards.is_contiguous():
            whole = shards.view(-1, *item.shape[1:])  # a large parameter with a bucket of its own is already in order
            yield whole[: self.vocab_size] if item.row.pads_vocabulary else whole
            return
        pieces = [item.row.op.split(shard.view(item.shape)) for shard in (shards if axis is not None else shards[:1])]
        for number in range(len(item.row.hf)):
            if len(pieces) > 1:
                whole = torch.cat([piece[number] for piece in pieces], dim=axis or 0)
            elif self.layout.tensor_size > 1:
                whole = pieces[0][number].clone()  # a view would keep the whole bucket alive
            else:
                whole = pieces[0][number]
            yield (whole[: self.vocab_size] if item.row.pads_vocabulary else whole).contiguous()


def all_gather(flat: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers a tensor [n] from every rank into [size * n]."""
    gathered = torch.empty(size * len(flat), dtype=flat.dtype, device=flat.device)
    if flat.device.type == "cpu":
        # gloo broadcasts in place, while its all-gather copies everything twice.
        for rank, part in enumerate(gathered.chunk(size)):
            if rank == dist.get_rank(group):
                part.copy_(flat)
            dist.broadcast(part, group=group, group_src=rank)
    else:
        ALL_GATHER(gathered, flat, group=group)
    return gathered

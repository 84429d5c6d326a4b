"""One class for policy, reference, reward model and critic: a Megatron model with a head, and maybe an optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_oreal.algorithms.model import Loss
from megatron_oreal.checkpoint.pieces import OptimizerProgress, OptimizerTensors
from megatron_oreal.config import ModelConfig, TrainableConfig
from megatron_oreal.models.attention import pack_segments
from megatron_oreal.models.build import (
    PackedGPTModel,
    build_chunks,
    global_parameters,
    resolved_for,
    transformer_config,
    uses_transformer_engine,
)
from megatron_oreal.models.context import context_segments, whole_outputs
from megatron_oreal.models.heads import Head
from megatron_oreal.models.offload import DeviceMemory
from megatron_oreal.models.optimizer import Training, prepare_training
from megatron_oreal.models.optimizer_state import optimizer_tensors
from megatron_oreal.models.parallel import deterministic_algorithms
from megatron_oreal.parallel.collectives import broadcast_object
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs, TokenStream
from megatron_oreal.weights.families import Architecture
from megatron_oreal.weights.initial import load_parameters
from megatron_oreal.weights.stream import WeightStream


class NonFiniteLossError(FloatingPointError):
    """Raised if a loss or gradient norm is NaN or infinite, before anything is saved."""


class TrainableModel:
    """A model with a head. `name` prefixes its metrics. Without `training` it is frozen, as a reference is."""

    def __init__(
        self,
        name: str,
        architecture: Architecture,
        head: Head,
        config: ModelConfig,
        layout: ParallelLayout,
        training: TrainableConfig | None = None,
        num_updates: int = 1,
    ) -> None:
        self.name, self.architecture, self.head, self.layout = name, architecture, head, layout
        config = resolved_for(config, layout.device)
        self.transformer_engine = uses_transformer_engine(config, layout.device, layout.context_size)
        self.megatron_config = transformer_config(architecture, config, layout, self.transformer_engine)
        self.chunks: list[PackedGPTModel] = build_chunks(
            architecture, head, self.megatron_config, layout, self.transformer_engine
        )
        self.seconds: dict[str, float] = {}  # since the last flush, of forward passes and train steps
        self.memory = DeviceMemory()
        self.num_updates_taken = 0  # in the current step of the run
        self.kept_batches: list[Batch] | None = None  # inside `keeping_batches`: the batches with filled streams
        self.training: Training | None = None
        if training is not None:
            self.training = prepare_training(self.chunks, self.megatron_config, training.optimizer, num_updates, layout)
        else:
            for chunk in self.chunks:
                chunk.requires_grad_(False)

    def load_weights(self, path: Path) -> None:
        """Reads this rank's shards from a Hugging Face or torch_dist directory; a scalar head may be absent there."""
        load_parameters(self.parameters(), path, self.architecture, self.head.kind, self.layout)
        if self.training is not None:
            self.training.optimizer.reload_model_params()

    @property
    def optimizer_is_sharded(self) -> bool:
        return self._training.is_sharded

    def optimizer_tensors(self) -> list[OptimizerTensors]:
        names = {id(parameter): name for name, parameter in self.parameters()}
        return list(optimizer_tensors(self._training.optimizer, names))

    def optimizer_progress(self) -> OptimizerProgress:
        return self._training.progress()

    def start_optimizer_at(self, progress: OptimizerProgress) -> None:
        self._training.start_at(progress)

    def training_state(self) -> dict[str, Any]:
        return self._training.state_dict()

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._training.load_state_dict(state)

    @property
    def _training(self) -> Training:
        assert self.training is not None, f"{self.name} is frozen"
        return self.training

    def parameters(self) -> list[tuple[str, Tensor]]:
        return list(global_parameters(self.chunks))

    def weight_stream(self) -> WeightStream:
        return WeightStream(self.parameters(), self.architecture, self.head.kind, self.layout)

    def offload(self) -> int:
        """Moves weights and optimizer state to the host until `restore`. Returns the number of freed device bytes."""
        return self.memory.offload(kept_tensors(self), dropped_tensors(self))

    def restore(self) -> None:
        self.memory.restore()

    def flush_seconds(self) -> dict[str, float]:
        """Returns `time/in_update/<name>_<forward or train>`: the seconds of the update by model and kind of pass."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/in_update/{self.name}_{kind}": value for kind, value in seconds.items()}

    @contextmanager
    def keeping_batches(self) -> Iterator[list[Batch]]:
        """Collects the batches for which this model fills a stream inside the block, each once."""
        self.kept_batches = []
        try:
            yield self.kept_batches
        finally:
            self.kept_batches = None

    @contextmanager
    def _pass(self, kind: str) -> Iterator[None]:
        """Wraps one pass over a batch. Waits for the device at the end, so that each model's seconds are its own."""
        start = time.perf_counter()
        with deterministic_algorithms(self.layout.deterministic_updates):
            yield
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start

    @torch.no_grad()
    def forward(self, batch: Batch, stream: TokenStream) -> None:
        """Writes the head's values to `stream` of every micro-batch, on every pipeline stage."""

        def collect(outputs: TokenOutputs, _microbatch: Microbatch) -> Tensor:
            return outputs.values

        with self._pass("forward"):
            values = self._run(batch, collect, forward_only=True)
        self._fill_stream(batch, stream, values)

    @torch.no_grad()
    def measure(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        """Returns the loss's metrics and updates nothing. `keep`: see `_run_loss`."""
        with self._pass("forward"):
            outputs: list[LossOutput] = self._run_loss(batch, loss, keep, forward_only=True)
        return self._reduce([output.metrics for output in outputs])

    def train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        """Takes one optimizer step and returns the loss's metrics from before it. `keep`: see `_run_loss`.

        Raises NonFiniteLossError, before the weights change, naming the component.
        """
        with self._pass("train"):
            return self._train_step(batch, loss, keep)

    def _train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None) -> dict[str, float]:
        training = self._training
        metrics = self.accumulate_gradients(batch, loss, keep)
        for component, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(f"{component} is {value}")
        training.schedule.step(1)
        self.num_updates_taken += 1
        _, grad_norm, _ = training.optimizer.step()
        # Megatron clips and steps in one call, so the check finds a bad norm after the step, but before any checkpoint.
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise NonFiniteLossError(f"{self.name}/grad_norm is {grad_norm}")
        metrics[f"{self.name}/grad_norm"] = float(grad_norm or 0.0)
        metrics[f"{self.name}/lr"] = float(training.optimizer.param_groups[0]["lr"])
        return metrics

    def complete_updates(self, num_planned: int) -> None:
        """Ends a step of the run that planned `num_planned` optimizer steps.

        The learning rate advances as if all of them had been taken, so that the schedule ends with the run.
        """
        if (num_missing := num_planned - self.num_updates_taken) > 0:
            self._training.schedule.step(num_missing)
        self.num_updates_taken = 0

    def accumulate_gradients(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        """Returns the loss's metrics. Afterwards each parameter's main_grad holds the gradient of the global loss."""
        training = self._training
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        training.optimizer.zero_grad()
        return self._reduce(self._run_loss(batch, loss, keep, forward_only=False))

    def sum_over_data(self, values: Tensor) -> Tensor:
        if self.layout.data_size > 1:
            dist.all_reduce(values, group=self.layout.data_group)
        return values

    def _run_loss(self, batch: Batch, loss: Loss, keep: TokenStream | None, *, forward_only: bool) -> list[Any]:
        """Evaluates the loss on every micro-batch.

        With `keep`, the stream of that name holds the head's detached values of this pass: on the last pipeline stage,
        where the losses are, from before the loss is evaluated, and on the other stages from the end of the pass.
        """
        if keep is None:
            return self._run(batch, loss, forward_only=forward_only)

        def keep_and_evaluate(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
            setattr(microbatch, keep, outputs.values.detach())
            return loss(outputs, microbatch)

        results = self._run(batch, keep_and_evaluate, forward_only=forward_only)
        kept = [getattr(microbatch, keep) for microbatch in batch.microbatches] if results else []
        self._fill_stream(batch, keep, kept)
        return results

    def _fill_stream(self, batch: Batch, stream: TokenStream, values: list[Tensor]) -> None:
        """Writes the last stage's values of each micro-batch to its stream, on every pipeline stage."""
        for microbatch, tensor in zip(batch.microbatches, self._share_with_stages(values, batch), strict=True):
            setattr(microbatch, stream, tensor)
        if self.kept_batches is not None:
            self.kept_batches.append(batch)

    def _run(self, batch: Batch, loss: Callable[[TokenOutputs, Microbatch], Any], *, forward_only: bool) -> list[Any]:
        """Runs Megatron's schedule over the micro-batches. Only the last stage returns a result for each."""
        chunks: list[Any] = list(self.chunks) if self.training is None else list(self.training.chunks)
        iterators = [iter(batch.microbatches) for _ in chunks]
        run = get_forward_backward_func()
        results: list[Any] = run(
            forward_step_func=partial(self._forward_step, loss=loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batch.microbatches),
            # Megatron divides this by the number of context-parallel ranks.
            seq_length=max(len(own_tokens(part).input_ids) for part in batch.microbatches) * self.layout.context_size,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _forward_step(
        self, iterator: Iterator[Microbatch], model: Any, loss: Callable[[TokenOutputs, Microbatch], Any]
    ) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        tokens = own_tokens(microbatch)
        hidden = model(
            tokens.input_ids[None],
            tokens.position_ids[None],
            None,
            packed_seq_params=self._packed_parameters(microbatch),
        )

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            outputs = self.head(getattr(model, "module", model), output, tokens)
            if microbatch.part is not None:
                outputs = whole_outputs(outputs, microbatch.part, self.layout)
            result = loss(outputs, microbatch)
            if non_loss_data:
                return result
            return result.loss, torch.zeros((), dtype=torch.int, device=self.layout.device), result.metrics

        return hidden, finish

    def _packed_parameters(self, microbatch: Microbatch) -> PackedSeqParams:
        if not self.transformer_engine:
            if microbatch.packed is None and microbatch.part is not None:
                microbatch.packed = context_segments(microbatch.part, self.layout)
            elif microbatch.packed is None:
                dtype = self.megatron_config.params_dtype
                microbatch.packed = pack_segments(microbatch.cu_seqlens, microbatch.lengths, dtype)
            return microbatch.packed  # type: ignore[return-value]
        lengths = {"cu_seqlens_q": microbatch.cu_seqlens, "cu_seqlens_kv": microbatch.cu_seqlens}
        longest = {"max_seqlen_q": microbatch.max_seqlen, "max_seqlen_kv": microbatch.max_seqlen}
        return PackedSeqParams(qkv_format="thd", **lengths, **longest)

    def _share_with_stages(self, values: list[Tensor], batch: Batch) -> list[Tensor]:
        """Sends the last stage's per-token values to every stage of the pipeline."""
        lengths = [len(microbatch.input_ids) for microbatch in batch.microbatches]
        flat = torch.cat(values) if values else torch.empty(sum(lengths), device=self.layout.device)
        if self.layout.pipeline_size > 1:
            dist.broadcast(flat, self.layout.last_stage_rank, group=self.layout.pipeline_group)
        return list(flat.split(lengths))

    def _reduce(self, metrics: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums metrics over micro-batches and data parallelism on every stage; takes the maximum of names in _max."""
        names = sorted(metrics[0]) if metrics else []
        names = broadcast_object(names, self.layout.last_stage_rank, self.layout.pipeline_group)
        is_max = torch.tensor([name.endswith("_max") for name in names], device=self.layout.device)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.layout.device)
        for microbatch in metrics:
            values = torch.stack([microbatch[name].detach().double() for name in names])
            sums = torch.where(is_max, torch.maximum(sums, values), sums + values)
        maxima = sums.clone()
        if self.layout.pipeline_size > 1:
            dist.broadcast(sums, self.layout.last_stage_rank, group=self.layout.pipeline_group)
            maxima = sums.clone()
        if self.layout.data_size > 1:
            dist.all_reduce(sums, group=self.layout.data_group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.layout.data_group)
        reduced = torch.where(is_max, maxima, sums).tolist()
        return {f"{self.name}/{name}": value for name, value in zip(names, reduced, strict=True)}


def own_tokens(microbatch: Microbatch) -> Microbatch:
    """Returns the tokens that this rank computes: all tokens, or its part under context parallelism."""
    return microbatch if microbatch.part is None else microbatch.part.tokens


def kept_tensors(model: TrainableModel) -> Iterator[Tensor]:
    """Returns weights, buffers and optimizer state."""
    for chunk in model.chunks:
        yield from (parameter.data for parameter in chunk.parameters())
        yield from (buffer for buffer in chunk.buffers() if buffer.device == model.layout.device)
    if model.training is None:
        return
    for optimizer in model.training.inner_optimizers:
        for group in optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)


def dropped_tensors(model: TrainableModel) -> Iterator[Tensor]:
    """Returns Megatron's gradient buffers."""
    if model.training is not None:
        for chunk in model.training.chunks:
            yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))

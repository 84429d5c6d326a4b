"""Compares all layouts for this number of processes with transformers and each other; torchrun runs this file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_oreal.algorithms.advantages import whiten
from megatron_oreal.algorithms.oreal import Oreal, fill_coefficients
from megatron_oreal.algorithms.ppo import Ppo, fill_advantages
from megatron_oreal.config import ModelConfig, OptimizerConfig, OrealConfig, ParallelConfig, PpoConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, merge, pack, pack_parts
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead, ScalarHead, whole_sequence
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs, TrainingSequence
from megatron_oreal.weights.families import read_architecture
from megatron_oreal.weights.stream import WeightStream
from tests.support.tiny_models import random_sequences, write_tiny_model

LAYOUTS = {
    "DP": ParallelConfig(),
    "TP2 x DP2": ParallelConfig(tensor=2),
    "TP2+SP x DP2": ParallelConfig(tensor=2, sequence=True),
    "PP2 x DP2": ParallelConfig(pipeline=2),
    "PP2 virtual x DP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "TP2 x PP2": ParallelConfig(tensor=2, pipeline=2),
    "TP2+SP x PP2 virtual": ParallelConfig(tensor=2, pipeline=2, sequence=True, virtual_pipeline=2),
    "PP4": ParallelConfig(pipeline=4),
    # context_worker.py tests further layouts, with all algorithms.
    "CP2 x TP2": ParallelConfig(context=2, tensor=2),
    "CP2 x PP2 virtual": ParallelConfig(context=2, pipeline=2, virtual_pipeline=2),
    "CP4": ParallelConfig(context=4),
}
# (dtype, distributed, overlap): every pair of them; all eight would take twice as long.
OPTIMIZERS = (
    ("float32", False, False),
    ("float32", True, True),
    ("bfloat16", False, True),
    ("bfloat16", True, False),
)
SEQUENCES = random_sequences(7)  # not divisible by any number of replicas
DENOMINATOR = 100
CHECKS = 0


def main(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    layout = parallel.initialize(ParallelConfig(), seed=0)
    if layout.is_main:
        for name in ("tied", "untied"):
            write_tiny_model(folder / name, tied=name == "tied")
    dist.barrier()
    parallel.destroy_groups()
    expected = {name: transformers_results(folder / name) for name in ("tied", "untied")}
    results: dict[str, dict[str, Any]] = {}
    fitting = {name: config for name, config in LAYOUTS.items() if fits(config)}
    for layout_name, config in fitting.items():
        layout = parallel.initialize(config, seed=0)
        results[layout_name] = check_layout(folder, expected, layout_name, layout)
        parallel.destroy_groups()
        if dist.get_rank() == 0:
            print(f"{layout_name}: {CHECKS} checks", flush=True)
    for algorithm in ("oreal", "ppo"):
        same_gradients(
            {f"{name}, {kind}": g for name, result in results.items() for kind, g in result[algorithm].items()}
        )
    same_updates({f"{name}, {kind}": u for name, result in results.items() for kind, u in result["updates"].items()})
    for name, result in results.items():
        wanted = torch.tensor(results["DP"]["reward_losses"])
        close(torch.tensor(result["reward_losses"]), wanted, 1e-4, f"{name} reward model losses")
    print(f"rank {dist.get_rank()} passed {CHECKS} checks", flush=True)
    dist.destroy_process_group()


def fits(config: ParallelConfig) -> bool:
    if config.context > 1 and torch.cuda.is_available():
        return False  # the test runs on a CPU only
    return dist.get_world_size() % (config.tensor * config.pipeline * config.context) == 0


def check_layout(folder: Path, expected: dict[str, Any], name: str, layout: ParallelLayout) -> dict[str, Any]:
    """Compares with transformers, and returns the results that must be equal in all layouts."""
    # A single process runs all four; several divide them, so that each layout runs both models and both packings.
    swapped = list(LAYOUTS).index(name) % 2 == 1
    for model_name, wanted in expected.items():
        if layout.world_size == 1 or (model_name == "tied") != swapped:
            compare(folder / model_name, "none", 48, wanted, f"{name} {model_name} packed", layout)
        if layout.world_size == 1 or (model_name == "tied") == swapped:
            compare(folder / model_name, "full", 1, wanted, f"{name} {model_name} alone, recomputed", layout)
    frozen(folder / "untied", layout)
    keeps(folder / "untied", layout)
    return {
        "oreal": {
            f"{model_name}, micro-batches of {tokens}": oreal_gradients(folder / model_name, tokens, layout)
            for model_name in ("untied",)
            for tokens in (10_000, 1)
        },
        "ppo": {f"micro-batches of {n}": ppo_gradients(folder / "untied", n, layout) for n in (10_000, 1)},
        "updates": {
            f"{dtype}, distributed {distributed}, overlap {overlap}": updates(
                folder / "tied", distributed, overlap, dtype, layout
            )
            for dtype, distributed, overlap in (OPTIMIZERS if layout.context_size == 1 else OPTIMIZERS[1:3])
        },
        "reward_losses": reward_losses(folder / "untied", layout),
    }


def build(path: Path, layout: ParallelLayout, head: object = None, **options: object) -> TrainableModel:
    architecture = read_architecture(path)
    model_options = {key: options.pop(key) for key in ("recompute", "dtype") if key in options}
    training = options.pop("training", TrainableConfig(optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0)))
    model = TrainableModel(
        "model",
        architecture,
        head or LogprobHead(layout, architecture.vocab_size),  # type: ignore[arg-type]
        ModelConfig(path=path, **{"dtype": "float32"} | model_options),  # type: ignore[arg-type]
        layout,
        training,  # type: ignore[arg-type]
    )
    model.load_weights(path)
    return model


def plan_of(layout: ParallelLayout, microbatch_tokens: int = 48) -> PackingPlan:
    interleaved = layout.virtual_size > 1
    return PackingPlan(
        layout.data_rank,
        layout.data_size,
        microbatch_tokens,
        token_multiple=layout.tensor_size if layout.sequence_parallel else 1,
        count_multiple=layout.pipeline_size if interleaved else 1,
        equal_lengths=interleaved,
        device=layout.device,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )


def transformers_results(path: Path) -> tuple[dict[tuple[int, ...], Tensor], dict[str, Tensor]]:
    """Returns the logits of each sequence's response, and the gradients of the advantage-weighted loss."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits, loss = {}, torch.zeros(())
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence.token_ids)[None]
        response = model(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
        logits[tuple(ids[0].tolist())] = response.detach()
        chosen = response.log_softmax(-1).gather(-1, torch.tensor(sequence.response_ids).long()[:, None])[:, 0]
        loss = loss - sequence.advantage * chosen.sum() / DENOMINATOR
    loss.backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def weighted_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
    loss = -(outputs.values * microbatch.advantages)[microbatch.loss_mask].sum() / DENOMINATOR
    return LossOutput(loss, {"loss": loss.detach()})


class LogitsHead(LogprobHead):
    """A head that returns all logits of the trained tokens, in place of log-probs."""

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs:
        shared = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
        local = (whole_sequence(hidden, self.layout)[microbatch.loss_mask] @ weight.T).contiguous()
        parts = [torch.empty_like(local) for _ in range(self.layout.tensor_size)]
        dist.all_gather(parts, local, group=self.layout.tensor_group)
        return TokenOutputs(torch.cat(parts, dim=-1)[:, : self.vocab_size], entropy=None)


def compare(
    path: Path, recompute: str, microbatch_tokens: int, expected: Any, name: str, layout: ParallelLayout
) -> None:
    logits, gradients = expected
    model = build(path, layout, recompute=recompute)
    batch = pack(SEQUENCES, plan_of(layout, microbatch_tokens))
    if layout.context_size == 1:  # with more, a head returns one value per token
        compare_logits(model, batch, logits, name)
    model.forward(batch, "old_logprobs")
    for ids, values in responses(batch):
        chosen = torch.tensor(ids[-len(values) :])[:, None]
        close(values, logits[ids].log_softmax(-1).gather(-1, chosen)[:, 0], 1e-4, f"{name} log-probs")
    model.accumulate_gradients(batch, weighted_loss)
    for hf_name, gradient in gradient_stream(model):
        close(gradient, gradients[hf_name], 1e-5, f"{name}, recompute {recompute}: gradient of {hf_name}")
    exported = dict(model.weight_stream())
    for hf_name, weight in Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict().items():
        if hf_name != "lm_head.weight" or "lm_head.weight" in exported:
            close(exported[hf_name], weight, 0.0, f"{name} export of {hf_name}")


def compare_logits(model: TrainableModel, batch: Batch, expected: dict[tuple[int, ...], Tensor], name: str) -> None:
    logprob_head, model.head = model.head, LogitsHead(model.layout, model.architecture.vocab_size)
    with torch.no_grad():
        whole = model._run(batch, lambda outputs, _: outputs.values, forward_only=True)
    for microbatch, values in zip(batch.microbatches, whole, strict=False):  # `whole` is empty except on the last stage
        sequences = list(sequences_of(microbatch))
        for ids, rows in zip(sequences, values.split([len(expected[ids]) for ids in sequences]), strict=True):
            close(rows, expected[ids], 1e-4, f"{name} logits")
    model.head = logprob_head


def sequences_of(microbatch: Microbatch) -> Iterator[tuple[int, ...]]:
    """Returns the token ids of each sequence, without the filler."""
    for number in range(microbatch.num_sequences):
        mine = microbatch.sequence_ids == number
        if (mine & microbatch.loss_mask).any():
            yield tuple(microbatch.input_ids[mine].tolist())


def responses(batch: Batch) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    for microbatch in batch.microbatches:
        assert microbatch.old_logprobs is not None
        for number, ids in enumerate(sequences_of(microbatch)):
            yield ids, microbatch.old_logprobs[(microbatch.sequence_ids == number) & microbatch.loss_mask]


def gradient_stream(model: TrainableModel) -> WeightStream:
    """Yields the gradients by Hugging Face names; they are sharded in the same way as the weights."""
    gradients = [(name, parameter.main_grad) for name, parameter in model.parameters()]  # type: ignore[attr-defined]
    return WeightStream(gradients, model.architecture, model.head.kind, model.layout)


class Reference:
    """An initial policy that differs from the policy: its log-probs depend on the tokens only."""

    def forward(self, batch: Batch, stream: str) -> None:
        for microbatch in batch.microbatches:
            values = -0.5 - (microbatch.labels % 7).float() / 3
            setattr(microbatch, stream, torch.where(microbatch.loss_mask, values, 0.0))


def oreal_gradients(path: Path, microbatch_tokens: int, layout: ParallelLayout) -> dict[str, Tensor]:
    """Returns the policy's gradients of the full OREAL loss, with token weights from a scripted reward model."""
    model = build(path, layout)
    config = OrealConfig(policy_freeze_steps=0, kl_coef=0.1)
    oreal = Oreal(config, plan_of(layout, microbatch_tokens), 0, model, Reference(), None)  # type: ignore[arg-type]
    batch = pack(SEQUENCES, oreal.plan)
    for microbatch in batch.microbatches:
        microbatch.token_scores = (microbatch.labels % 5).float() - 2.0
    oreal.reference.forward(batch, "reference_logprobs")  # type: ignore[union-attr]
    for microbatch in batch.microbatches:
        fill_coefficients(microbatch, batch, config)
    model.accumulate_gradients(batch, partial(oreal.policy_loss, batch=batch), keep="old_logprobs")
    return {name: gradient.clone() for name, gradient in gradient_stream(model)}


def ppo_gradients(path: Path, microbatch_tokens: int, layout: ParallelLayout) -> dict[str, Tensor]:
    """Returns the gradients of policy and critic, with scripted values before the update and whitened advantages."""
    policy, critic = build(path, layout), build(path, layout, head=ScalarHead(layout, "normal", seed=1))
    config = PpoConfig(name="ppo", gae_lambda=0.9, discount=0.95, kl_coef=0.1, entropy_coef=0.01)
    ppo = Ppo(config, plan_of(layout, microbatch_tokens), 0, policy, critic, Reference())  # type: ignore[arg-type]
    batch = merge(pack_parts([SEQUENCES[:3], SEQUENCES[3:]], ppo.plan))
    ppo.reference.forward(batch, "reference_logprobs")  # type: ignore[union-attr]
    for microbatch in batch.microbatches:
        microbatch.values = (microbatch.labels % 3).float() / 4
        fill_advantages(microbatch, config)
    whiten(batch, policy.sum_over_data)
    gradients = {}
    for model, loss, keep in ((policy, ppo.policy_loss, "old_logprobs"), (critic, ppo.value_loss, None)):
        model.accumulate_gradients(batch, partial(loss, batch=batch), keep)
        gradients |= {f"{model.head.kind} {name}": gradient.clone() for name, gradient in gradient_stream(model)}
    return gradients


def same_gradients(gradients: dict[str, dict[str, Tensor]]) -> None:
    """Compares within 1e-6 of the gradient's norm, because cancellation makes single entries less exact."""
    rounding = 10.0 if torch.cuda.is_available() else 1.0  # CUDA uses different kernels for different shapes
    first_name, first = next(iter(gradients.items()))
    norm = torch.cat([gradient.flatten() for gradient in first.values()]).norm()
    for name, other in gradients.items():
        difference = torch.cat([(other[parameter] - gradient).flatten() for parameter, gradient in first.items()])
        close(difference.norm() / norm, torch.zeros(()), 1e-6 * rounding, f"gradient of {name} against {first_name}")
        for parameter, gradient in first.items():
            scale = float(gradient.abs().max())
            close(
                other[parameter] / scale, gradient / scale, 1e-5 * rounding, f"{name} against {first_name}: {parameter}"
            )


def updates(
    path: Path, distributed: bool, overlap: bool, dtype: str, layout: ParallelLayout
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Returns the weights after three optimizer steps, and the metrics of each step."""
    optimizer = OptimizerConfig(
        lr=1e-3,
        clip_grad=0.5,
        distributed=distributed,
        overlap_grad_reduce=overlap,
        warmup_steps=2,
        decay="cosine",
    )
    model = build(path, layout, training=TrainableConfig(optimizer=optimizer), dtype=dtype)
    batch = pack(SEQUENCES, plan_of(layout))
    metrics = [model.train_step(batch, weighted_loss) for _ in range(3)]
    return {name: weight.clone() for name, weight in model.weight_stream()}, metrics


def same_updates(results: dict[str, tuple[dict[str, Tensor], list[dict[str, float]]]]) -> None:
    for dtype, tolerance in (("float32", 5e-6), ("bfloat16", 2e-2)):
        chosen = {name: result for name, result in results.items() if dtype in name}
        first, first_metrics = next(iter(chosen.values()))
        for name, (weights, metrics) in chosen.items():
            for parameter in first:
                close(weights[parameter], first[parameter], tolerance, f"{name} after 3 steps: {parameter}")
            for step, step_metrics in enumerate(metrics):
                for metric, value in step_metrics.items():
                    wanted = torch.tensor(first_metrics[step][metric])
                    scale = max(1.0, float(wanted.abs()))
                    close(torch.tensor(value) / scale, wanted / scale, 5 * tolerance, f"{name}, step {step}: {metric}")


def reward_losses(path: Path, layout: ParallelLayout) -> list[float]:
    """Trains a scalar head and returns its losses."""
    model = build(path, layout, head=ScalarHead(layout))
    batch = pack(SEQUENCES, plan_of(layout))

    def loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
        squared = (outputs.values - microbatch.advantages)[microbatch.loss_mask].square().sum() / DENOMINATOR
        return LossOutput(squared, {"loss": squared.detach()})

    losses = [model.train_step(batch, loss)["model/loss"] for _ in range(4)]
    assert losses[-1] < losses[0], losses
    return losses


def frozen(path: Path, layout: ParallelLayout) -> None:
    """Runs a model without an optimizer on a batch of which most ranks get a filler only."""
    model = build(path, layout, training=None)
    batch = pack([TrainingSequence([1, 2], [3], 0.0, False)], plan_of(layout))
    model.forward(batch, "reference_logprobs")
    assert all(microbatch.reference_logprobs is not None for microbatch in batch.microbatches)


def keeps(path: Path, layout: ParallelLayout) -> None:
    """Checks that a pass with `keep` fills that stream with its values on every stage, and one without fills none."""
    model = build(path, layout, head=ScalarHead(layout, "normal", seed=1))
    batch = pack(SEQUENCES, plan_of(layout))
    model.forward(batch, "values")

    def loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
        if microbatch.returns is None:  # the first pass: the loss gets the values of the same pass
            assert microbatch.token_scores is not None and not microbatch.token_scores.requires_grad
            assert torch.equal(microbatch.token_scores, outputs.values.detach())
        squared = outputs.values.square()[microbatch.loss_mask].sum() / DENOMINATOR
        return LossOutput(squared, {"loss": squared.detach()})

    model.train_step(batch, loss, keep="token_scores")
    first = [microbatch.token_scores for microbatch in batch.microbatches]
    for microbatch in batch.microbatches:
        assert microbatch.token_scores is not None and microbatch.values is not None
        close(microbatch.token_scores, microbatch.values, 1e-6, "scores kept by a training pass")
        microbatch.returns = microbatch.values
    model.train_step(batch, loss)
    assert all(microbatch.token_scores is kept for microbatch, kept in zip(batch.microbatches, first, strict=True))
    assert all(microbatch.old_logprobs is None for microbatch in batch.microbatches)
    model.forward(batch, "values")
    model.measure(batch, loss, keep="old_logprobs")
    for microbatch in batch.microbatches:
        assert microbatch.old_logprobs is not None and microbatch.values is not None
        close(microbatch.old_logprobs, microbatch.values, 1e-6, "values kept by an evaluation pass")


def close(actual: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    global CHECKS
    CHECKS += 1
    assert actual.shape == wanted.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(wanted.shape)}"
    error = float((actual.cpu().float() - wanted.cpu().float()).abs().max()) if actual.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

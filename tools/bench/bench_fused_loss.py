"""Measures time and peak memory of the loss without logits, beside all rivals that can be imported, in the same run.

    python tools/bench/bench_fused_loss.py --grid full --out tools/bench/results/DATE_fused_loss   # on a GPU
    python tools/bench/bench_fused_loss.py --grid headline   # three shapes, less than a minute on an H200
    python tools/bench/bench_fused_loss.py --grid cpu
    python tools/bench/bench_fused_loss.py --model   # runs nothing: what every mode should cost on an H100 and an H200

Every method computes the log-probs of T targets from hidden states [T, H] and a head [V, H], and the gradients of their
sum: the one loss for which all rivals, including Liger's gradients in the forward pass, give equal outputs. Tensor
parallelism is measured as its share of the vocabulary on one device, without communication. The methods alternate, so
that a busy machine slows all of them; ratios are between medians. Memory is the peak beyond inputs and gradients,
counted by CUDA's allocator, or by the profiler on a CPU. GEMM is torch.mm of the same matrices in the same rounds; its
share counts one product for the forward pass and three with the backward pass, for every method.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import fused_loss_model
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fused_loss_report import EAGER, GEMM, Row, Shape, draw, print_shape
from torch import Tensor

from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8.scaled import E4M3, scale_of, scaled_product
from megatron_oreal.models.parallel import quiet_megatron

VOCABULARY = 152064
CHECKED_TOKENS = CHECKED_COLUMNS = 256  # compared with float32 for every method
Losses = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # hidden, weight, target, training -> [T] or their sum
Grid = Literal["cpu", "headline", "small", "full"]
Clock = Literal["wall", "cpu"]


GRIDS: dict[Grid, list[Shape]] = {
    "cpu": [Shape(tokens, 32768, hidden, 1) for hidden in (256, 512) for tokens in (512, 2048)],
    "headline": [
        Shape(8192, VOCABULARY, 5120, 1),
        Shape(8192, VOCABULARY, 5120, 8),
        Shape(16384, 151936, 1536, 1),
    ],
    "small": [Shape(tokens, VOCABULARY, 5120, tensor) for tensor in (8, 1) for tokens in (4096, 8192, 16384)],
    "full": [
        Shape(tokens, VOCABULARY, hidden, tensor)
        for tensor in (1, 2, 4, 8)
        for hidden in (5120, 3584)
        for tokens in (4096, 8192, 16384, 32768, 65536)
    ],
}


@dataclass(slots=True)
class Method:
    name: str
    losses: Losses
    forward_only: bool = False
    is_checked: bool = True


# The methods. Each maker imports the packages it needs; an error that it raises is the reason to skip the method.


def plain_losses(hidden: Tensor, weight: Tensor, target: Tensor, _training: bool) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")


def make_eager(_device: torch.device) -> Losses:
    return plain_losses


def make_compiled(_device: torch.device) -> Losses:
    return torch.compile(plain_losses)


def make_liger(device: torch.device) -> Losses:
    if device.type != "cuda":
        raise RuntimeError("its Triton kernels need a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def losses(hidden: Tensor, weight: Tensor, target: Tensor, training: bool) -> Tensor:
        # "sum" computes the gradients in its forward pass, which is its fastest mode.
        reduction = "sum" if training else "none"
        return liger_fused_linear_cross_entropy(hidden, weight, target, reduction=reduction)

    return losses


def make_transformer_engine(device: torch.device) -> Losses:
    if device.type != "cuda":
        raise RuntimeError("Transformer Engine runs on CUDA only")
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def losses(hidden: Tensor, weight: Tensor, target: Tensor, _training: bool) -> Tensor:
        return parallel_cross_entropy((hidden @ weight.T)[None], target[None])

    return losses


def make_megatron(device: torch.device) -> Losses:
    quiet_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)

    def losses(hidden: Tensor, weight: Tensor, target: Tensor, _training: bool) -> Tensor:
        return vocab_parallel_cross_entropy((hidden @ weight.T)[:, None], target[:, None])

    return losses


def make_ours(**options: Any) -> Callable[[torch.device], Losses]:
    def make(device: torch.device) -> Losses:
        if device.type != "cuda" and options.get("precision") != "bf16":
            raise RuntimeError("a CPU has no FP8 arithmetic: its time would say nothing")

        def losses(hidden: Tensor, weight: Tensor, target: Tensor, training: bool) -> Tensor:
            mode = dict(options)
            if training and options.get("mode") == "eager":
                mode["token_scale"] = torch.ones(len(hidden), device=hidden.device)
            elif not training:
                mode["mode"] = "recompute"  # without gradients there is only one mode
            return -linear_logprob(hidden, weight, target, **mode)[0]

        return losses

    return make


def make_gemm(_device: torch.device) -> Losses:
    def product(hidden: Tensor, weight: Tensor, _target: Tensor, _training: bool) -> Tensor:
        return torch.mm(hidden, weight.T)

    return product


def make_fp8_gemm(device: torch.device) -> Losses:
    if device.type != "cuda":
        raise RuntimeError("a CPU has no FP8 arithmetic: its time would say nothing")
    last: list[tuple[Tensor, Tensor, Tensor]] = []  # the last hidden states and weight, quantised, with their scales

    def product(hidden: Tensor, weight: Tensor, _target: Tensor, _training: bool) -> Tensor:
        # Both sides are quantised in advance, so that only the product is measured.
        if not last or last[0][0] is not hidden or last[1][0] is not weight:
            last.clear()
            for matrix in (hidden, weight):
                scale = scale_of(matrix.detach().abs().amax())
                last.append((matrix, (matrix.detach() / scale).to(E4M3), scale))
        (_, left, scale), (_, right, other) = last
        return scaled_product(left, right, scale * other, torch.float32)

    return product


OURS = "ours, recompute"
MAKERS: dict[str, Callable[[torch.device], Losses]] = {
    GEMM: make_gemm,
    "torch._scaled_mm": make_fp8_gemm,
    EAGER: make_eager,
    "torch.compile": make_compiled,
    "Liger": make_liger,
    "Transformer Engine": make_transformer_engine,
    "megatron-core": make_megatron,
    OURS: make_ours(precision="bf16"),
    "ours, eager": make_ours(precision="bf16", mode="eager"),
    "ours, fp8_grad": make_ours(precision="fp8_grad"),
    "ours, 3 GiB": make_ours(precision="bf16", memory_bytes=3 * 2**30),
    "ours, fp8_grad, 3 GiB": make_ours(precision="fp8_grad", memory_bytes=3 * 2**30),
    "ours, fp8_grad, eager": make_ours(precision="fp8_grad", mode="eager"),
}
PRODUCTS = (GEMM, "torch._scaled_mm")  # not losses: forward only, no output to check


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0][:160]}"


def make_methods(names: tuple[str, ...], device: torch.device) -> tuple[list[Method], dict[str, str]]:
    """Returns the available methods, and the reasons why the others are missing."""
    methods, skipped = [], {}
    for name in names:
        try:
            losses = MAKERS[name](device)
        except Exception as error:  # noqa: BLE001  # a rival that cannot be imported is skipped, for every error
            skipped[name] = reason_of(error)
            click.echo(f"left out: {name}: {skipped[name]}")
            continue
        methods.append(Method(name, losses, forward_only=name in PRODUCTS, is_checked=name not in PRODUCTS))
    return methods, skipped


# Measuring.


@dataclass(slots=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    losses: Tensor  # of the first tokens, in float32
    grad_hidden: Tensor  # of those
    grad_weight: Tensor  # of the first columns

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.hidden, device=device, generator=generator).to(dtype)
    weight = torch.empty(shape.columns, shape.hidden, device=device, dtype=dtype)
    weight.normal_(std=2.4 / shape.hidden**0.5, generator=generator)
    target = torch.randint(shape.columns, (shape.tokens,), device=device, generator=generator)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, *expected(hidden, weight, target))


@torch.no_grad()
def expected(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, in float32, losses and d hidden of the first tokens and d weight of the first columns."""
    wide, firsts = weight.float(), []
    grad_weight = torch.zeros_like(wide[:CHECKED_COLUMNS])
    for tokens, targets in zip(hidden.split(CHECKED_TOKENS), target.split(CHECKED_TOKENS), strict=True):
        logprobs = (tokens.float() @ wide.T).log_softmax(1)
        losses = F.nll_loss(logprobs, targets, reduction="none")
        grad_logits = logprobs.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None])
        grad_weight += grad_logits[:, :CHECKED_COLUMNS].T @ tokens.float()
        firsts = firsts or [losses, grad_logits @ wide]
    return firsts[0], firsts[1], grad_weight


def run_forward(method: Method, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return method.losses(inputs.hidden, inputs.weight, inputs.target, False)


def run_training(method: Method, inputs: Inputs) -> tuple[Tensor, ...]:
    losses = method.losses(inputs.hidden, inputs.weight, inputs.target, True)
    return torch.autograd.grad(losses.sum(), [inputs.hidden, inputs.weight])


def peak_bytes(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Returns (the result of `run`, its peak bytes beyond those before the call)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def seconds_of(run: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    run()
    return now() - start


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found[: len(wanted)].float() - wanted).norm() / wanted.norm())


def try_method(method: Method, inputs: Inputs, row: Row, device: torch.device) -> bool:
    """Runs once to warm up, and again for memory and the check; returns False if the method fails at this shape."""
    try:
        losses = run_forward(method, inputs)
        if method.is_checked:
            difference = losses.flatten()[:CHECKED_TOKENS].float() - inputs.losses
            row.max_difference = float(difference.abs().max())
        del losses
        row.forward_bytes = peak_bytes(lambda: run_forward(method, inputs), device)[1]
        if not method.forward_only:
            run_training(method, inputs)
            (grad_hidden, grad_weight), row.training_bytes = peak_bytes(lambda: run_training(method, inputs), device)
            row.training_bytes -= inputs.gradient_bytes
            row.gradient_error = relative_error(grad_hidden, inputs.grad_hidden)
            row.weight_error = relative_error(grad_weight, inputs.grad_weight)
    except Exception as error:  # noqa: BLE001  # out of memory, or a kernel that this shape or machine does not suit
        row.failure = reason_of(error)
        click.echo(f"  {method.name} fails: {row.failure}")
    if row.failure and device.type == "cuda":
        torch.cuda.empty_cache()
    return not row.failure


def measure(
    shape: Shape, methods: list[Method], device: torch.device, rounds: int, clock: Clock, deadline: float
) -> list[Row]:
    """Runs at least one round, and more until the deadline."""
    inputs = make_inputs(shape, device)
    rows = [Row(shape, method.name) for method in methods]
    working = [pair for pair in zip(methods, rows, strict=True) if try_method(pair[0], inputs, pair[1], device)]
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for method, row in working:
            row.forward_seconds.append(seconds_of(lambda method=method: run_forward(method, inputs), device, clock))
            if not method.forward_only:
                seconds = seconds_of(lambda method=method: run_training(method, inputs), device, clock)
                row.training_seconds.append(seconds)
    return rows


def deadlines(shapes: list[Shape], seconds: float) -> Iterator[tuple[Shape, float]]:
    """Returns each shape with its deadline, in proportion to its work, without shapes for which no time is left."""
    begin, work = time.monotonic(), [shape.flops for shape in shapes]
    for number, shape in enumerate(shapes):
        now = time.monotonic()
        if now > begin + seconds:
            click.echo(f"no time left for {len(shapes) - number} more shapes, from {shape} on")
            return
        yield shape, now + (begin + seconds - now) * work[number] / sum(work[number:])


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@click.command()
@click.option("--grid", type=click.Choice(list(GRIDS)), help="Default: small on a GPU, else cpu.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="At most, a shape.")
@click.option("--time-limit", default=0.0, help="Seconds of measuring; default: 480 on a GPU, 150 on a CPU.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: seconds of all threads of this process, for a CPU with other work; not of a GPU.",
)
@click.option("--model", "shows_model", is_flag=True, help="Print what the modes should cost, and run nothing.")
@click.option("--method", "names", multiple=True, type=click.Choice(list(MAKERS)), help="Default: all.")
@click.option("--out", type=click.Path(path_type=Path), help="Path without ending: .json and .png are written.")
def main(
    grid: Grid | None,
    rounds: int,
    time_limit: float,
    clock: Clock,
    shows_model: bool,
    names: tuple[str, ...],
    out: Path | None,
) -> None:
    """Prints one table per shape: milliseconds, ratio to torch eager, share of the GEMM's rate, memory, errors."""
    if shows_model:
        for shape in GRIDS[grid or "headline"]:
            click.echo("\n".join(fused_loss_model.report(shape.tokens, shape.columns, shape.hidden)) + "\n")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = grid or ("small" if device.type == "cuda" else "cpu")
    time_limit = time_limit or (480 if device.type == "cuda" else 150)
    machine = describe_machine(device)
    click.echo(", ".join(f"{key} {value}" for key, value in machine.items()) + f"; {clock} clock")
    methods, skipped = make_methods(names or tuple(MAKERS), device)
    rows: list[Row] = []
    for shape, deadline in deadlines(GRIDS[grid], time_limit):
        rows += (measured := measure(shape, methods, device, rounds, clock, deadline))
        print_shape(shape, measured)
    if dist.is_initialized():
        dist.destroy_process_group()
    if out is not None:
        setting = {"machine": machine, "grid": grid, "clock": clock, "skipped": skipped}
        result = setting | {"rows": [asdict(row) for row in rows]}
        out.with_name(out.name + ".json").write_text(json.dumps(result) + "\n")
        draw(rows, out.with_name(out.name + ".png"))


if __name__ == "__main__":
    main()

"""Lets Megatron-Core run on a machine without CUDA. Does nothing where CUDA is available.

Megatron asks `torch.cuda` for the current device, for streams and for the random state, and names "cuda" in a few
tensor constructors and type checks. Three kinds of patches, each for one of these:

1. functions of `torch.cuda` that raise without CUDA, and `Tensor.cuda`;
2. the string constants "cuda" and "torch.cuda.*Tensor" inside Megatron's own functions (module list below);
3. the random-state accessors that Megatron binds at import.

Call `enable()` once, before building anything. It imports every module that it patches.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")

# These modules have functions that place tensors on the device "cuda" or compare Tensor.type() with a CUDA type.
MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # the token counter of each schedule
    "megatron.core.optimizer.optimizer",  # loss scale, master weights of bf16 parameters
    "megatron.core.optimizer.distrib_optimizer",  # sharding of bf16 and fp32 parameters
    "megatron.core.optimizer.clip_grads",  # norms and gradient type checks
    "megatron.core.utils",  # the norm of a list of tensors
    "megatron.core.dist_checkpointing.exchange_utils",  # buffers of a fully parallel load
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # whether a plan can be used again
)
CUDA_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_enabled = False


class _Stream:
    """Replaces torch.cuda.Stream. A CPU runs all operations in order, so it does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _other: Any) -> None: ...

    def record_event(self, _event: Any = None) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def enable() -> bool:
    """Patches once per process. Returns whether Megatron runs on the CPU backend."""
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _enabled = True
        _patch_torch_cuda()
        for name in MODULES_NAMING_CUDA:
            _rename_cuda_constants(importlib.import_module(name))
        _patch_random_state()
    return True


def _patch_torch_cuda() -> None:
    # Each name has its own function, because torch.compile refuses a function that has two rules.
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,  # `device=` of buffers, receive tensors and rotary frequencies
        "synchronize": lambda *_args, **_kwargs: None,  # after pipeline communication and before checkpoints
        "set_device": lambda *_args, **_kwargs: None,
        "Stream": _Stream,  # of data-parallel communication
        "current_stream": lambda *_args, **_kwargs: _Stream(),
        "default_stream": lambda *_args, **_kwargs: _Stream(),
        "stream": lambda _stream: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),  # the random tracker's seeds
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = lambda *_args, **_kwargs: None  # type: ignore[assignment]  # profiler ranges
    torch.cuda.nvtx.range_pop = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *_args, **_kwargs: tensor  # type: ignore[assignment]  # loaded scales and shards


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(tracker: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Any:
        # Megatron's own function warns that the CPU state changed. Here that is the state that it should fork.
        outside = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[name])
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _rename_cuda_constants(module: ModuleType) -> None:
    for value in list(vars(module).values()):
        members = vars(value).values() if inspect.isclass(value) else [value]
        for member in members:
            function = _innermost_function(member)
            if function is not None and function.__module__ == module.__name__:
                function.__code__ = _renamed(function.__code__)


def _innermost_function(member: Any) -> FunctionType | None:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    unwrapped: Callable[..., Any] | None = inspect.unwrap(member) if callable(member) else None
    return unwrapped if isinstance(unwrapped, FunctionType) else None


def _renamed(constant: Any) -> Any:
    if isinstance(constant, str):
        return CUDA_CONSTANTS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_renamed(item) for item in constant)
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=tuple(_renamed(item) for item in constant.co_consts))
    return constant

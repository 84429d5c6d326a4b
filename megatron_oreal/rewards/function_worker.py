"""Imports the user's reward function in a worker process, and calls it within a budget of CPU time.

in   {"prompt": {...}, "response": "..."}, see own_rewards.request_of
out  {"ready": true} or {"error": "one line"}; for each response {"reward": ...} or {"error": "one line"}
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import numbers
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_oreal.rewards.comparer import Budget
from megatron_oreal.types import Message, Prompt

MAX_ERROR_CHARACTERS = 300
RewardFunction = Callable[[Prompt, str], Any]


def serve_function(path: str, budget: Budget, replies: int) -> None:
    """Answers jobs until the pipe ends. `replies` is the file descriptor that they go to."""
    try:
        function = load_function(path)
    except ValueError as error:
        send(replies, json.dumps({"error": str(error)}))
        return
    send(replies, json.dumps({"ready": True}))
    os.dup2(1, 2)  # discards what the function prints
    for line in sys.stdin.buffer:
        job = json.loads(line)
        budget.start()
        reply = call(function, Prompt(**read_prompt(job["prompt"])), job["response"])
        budget.stop()
        send(replies, reply)


def load_function(path: str) -> RewardFunction:
    """Imports `package.module:function`. Raises a one-line ValueError if it is not a function of two arguments."""
    module_name, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f"{error.name!r} is not in the working directory, on PYTHONPATH, or installed"
        raise ValueError(f"verifier.function: {path} cannot be imported: {where}") from None
    except BaseException as error:  # noqa: BLE001  # the user's module may raise anything at import
        raise ValueError(f"verifier.function: importing {module_name} fails: {in_one_line(error)}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"verifier.function: {module_name} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"verifier.function: {path} is of type {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind(None, "")
    except TypeError as error:
        raise ValueError(
            f"verifier.function: {path} must take two arguments, the prompt and the response ({error})"
        ) from None
    except ValueError:
        pass  # a function written in C has no signature
    function: RewardFunction = found
    return function


def read_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"messages": tuple(Message(**message) for message in row["messages"])}


def call(function: RewardFunction, prompt: Prompt, response: str) -> str:
    """Returns one reply as JSON. The response alone seeds random numbers, not what this process did before."""
    seed_random_numbers(f"{prompt.id}\0{response}")
    try:
        value = function(prompt, response)
        if inspect.isawaitable(value):
            value = asyncio.run(finish(value))
        return json.dumps({"reward": as_json(value)})
    except BaseException as error:  # noqa: BLE001  # the user's function may raise anything, SystemExit too
        return json.dumps({"error": in_one_line(error)})


async def finish(value: Any) -> Any:
    return await value


def seed_random_numbers(seed: str) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def as_json(value: Any) -> Any:
    """Converts a number, a `Verdict` (or an object with its fields) or a mapping to JSON, else raises TypeError."""
    if isinstance(value, dict):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if hasattr(value, "reward") and hasattr(value, "status"):
        return {"reward": as_json(value.reward), "status": value.status, "extracted": getattr(value, "extracted", None)}
    if value is None or isinstance(value, (str, int)):
        return value
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):
        value = value.item()  # an array or a tensor of one element
    if isinstance(value, (int, float, numbers.Real)):
        return float(value)
    raise TypeError(f"the function returned a value of type {type(value).__name__}, not a number or a Verdict")


def in_one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:MAX_ERROR_CHARACTERS]


def send(replies: int, reply: str) -> None:
    rest = reply.encode() + b"\n"
    while rest:
        rest = rest[os.write(replies, rest) :]

"""What a worker process does with a reward function of the user's own: import it, and call it within a budget.

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
    os.dup2(1, 2)  # what the function prints goes nowhere
    for line in sys.stdin.buffer:
        job = json.loads(line)
        budget.start()
        reply = call(function, Prompt(**read_prompt(job["prompt"])), job["response"])
        budget.stop()
        send(replies, reply)


def load_function(path: str) -> RewardFunction:
    """Imports `package.module:function`. Raises ValueError, one line, where that is not a function of two arguments."""
    module_name, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f"{error.name!r} is not in the working directory, on PYTHONPATH, or installed"
        raise ValueError(f"verifier.function: {path} cannot be imported: {where}") from None
    except BaseException as error:  # noqa: BLE001  # whatever the user's module does when it is imported
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
        pass  # a function in C does not tell its arguments
    function: RewardFunction = found
    return function


def read_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"messages": tuple(Message(**message) for message in row["messages"])}


def call(function: RewardFunction, prompt: Prompt, response: str) -> str:
    """One reply, as JSON. Random numbers depend on the response alone, not on what this process did before."""
    seed_random_numbers(f"{prompt.id}\0{response}")
    try:
        value = function(prompt, response)
        if inspect.isawaitable(value):
            value = asyncio.run(finish(value))
        return json.dumps({"reward": as_json(value)})
    except BaseException as error:  # noqa: BLE001  # whatever the user's function raises, SystemExit too
        return json.dumps({"error": in_one_line(error)})


async def finish(value: Any) -> Any:
    return await value


def seed_random_numbers(seed: str) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def as_json(value: Any) -> Any:
    """A number, a `Verdict` (or whatever has its fields) and a mapping as JSON. Raises TypeError for anything else."""
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

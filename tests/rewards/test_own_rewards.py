"""Rewards of the user's own: functions in worker processes, servers, and the ten-line examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from examples.own_reward.server import application
from megatron_oreal.config import RemoteRewardConfig, TrainConfig, VerifierConfig
from megatron_oreal.observability.event_loop import EventLoopThread
from megatron_oreal.rewards.function_verifier import FunctionVerifier
from megatron_oreal.rewards.own_rewards import RewardError, RewardRange
from megatron_oreal.rewards.remote_verifier import RemoteVerifier
from megatron_oreal.rollout.metrics import rollout_metrics
from megatron_oreal.run.verifiers import build_verifier, open_verifier
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict
from tests.support.misbehaving_server import misbehaving_server
from tests.support.paths import ROOT

PROMPT = Prompt("p", (Message("user", "What is 1 + 1?"),), "2", 0.5, "sums", {"limit": 20})
FAILED = Verdict(0.0, "reward_failed", None)
MODULE = r"""
import asyncio, os, random, socket, sys, time
from megatron_oreal.types import Verdict

async def later(prompt, response):
    await asyncio.sleep(0.01)
    return len(response)

def sees(prompt, response):
    assert (prompt.question, prompt.answer, prompt.source, prompt.pass_rate) == ("What is 1 + 1?", "2", "sums", 0.5)
    assert prompt.messages[0].role == "user" and prompt.metadata == {"limit": 20} and prompt.id == "p"
    return Verdict(1.0, "correct", response)

def behave(prompt, response):
    print("this goes nowhere", flush=True)
    os.write(2, b"nor does this")
    if response == "loop":
        while True: pass
    if response == "die":
        os._exit(3)
    if response == "kill":
        os.kill(os.getpid(), 9)
    if response == "exit":
        sys.exit("gone")
    if response == "raise":
        raise ValueError("two\nlines")
    if response == "memory":
        return len(bytearray(8 << 30))
    if response == "write":
        open("written", "w").write("x")
    if response == "network":
        return socket.create_connection(("127.0.0.1", 1), timeout=5)
    if response == "deep":
        value = []
        for _ in range(100000): value = {"reward": value}
        return value
    return eval(response, {"nan": float("nan"), "inf": float("inf"), "np": __import__("numpy"), "Verdict": Verdict})

def draws(prompt, response):
    return int(random.random() < 0.5)

class Callable:
    def __call__(self, prompt, response):
        return 1
holder = Callable()
number = 3
def one_argument(response): return 1
def three_arguments(prompt, response, more): return 1
def defaults(prompt, response, more=1): return 1
"""


@pytest.fixture
def open_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FunctionVerifier]]:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import no_such_module_at_all")
    (tmp_path / "raising.py").write_text("raise RuntimeError('no\\nlicence')")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(5)")
    monkeypatch.chdir(tmp_path)
    opened: list[FunctionVerifier] = []

    def build(function: str, notes: list[str] | None = None, **settings: Any) -> FunctionVerifier:
        config = VerifierConfig(function=function, **{"num_workers": 2, "cpu_seconds": 0.5} | settings)
        verifier = build_verifier(config, tmp_path, [].append if notes is None else notes.append)
        assert isinstance(verifier, FunctionVerifier)
        opened.append(verifier)
        return verifier

    yield build
    for verifier in opened:
        verifier.close()


def test_a_function_sees_the_prompt_and_gives_a_verdict(open_function: Callable[..., FunctionVerifier]) -> None:
    verifier = open_function("my_rewards:sees", num_workers=1)
    verifier.check()
    assert verifier.verify_responses(PROMPT, ["x", "ü"]) == [Verdict(1.0, "correct", "x"), Verdict(1.0, "correct", "ü")]
    verifier = open_function("my_rewards:later", num_workers=1, rewards="any", correct_from=3)
    verdicts = verifier.verify_responses(PROMPT, ["abc", "a" * 300_000, ""])
    assert verdicts == [
        Verdict(3.0, "correct", None), Verdict(300_000.0, "correct", None), Verdict(0.0, "incorrect", None),
    ]  # fmt: skip


def test_what_goes_wrong_in_a_function_is_a_status(open_function: Callable[..., FunctionVerifier]) -> None:
    expected = {
        "loop": Verdict(0.0, "timeout", None),
        "die": Verdict(0.0, "crash", None),
        "kill": Verdict(0.0, "crash", None),
        **dict.fromkeys(("exit", "raise", "memory", "write", "network", "deep"), FAILED),
        **dict.fromkeys(("nan", "-inf", "None", "'1'", "[1]", "{'reward': nan}", "{'status': 'correct'}"), FAILED),
        **dict.fromkeys(
            (
                "10**400",
                "10**5000",
                "{'reward': 1, 'status': [[]]}",
                "1e39",
                "{'reward': 1, 'score': 2}",
                "Verdict(1.0, 'right', None)",
            ),
            FAILED,
        ),
        **dict.fromkeys(("Verdict(0.0, 'correct', None)", "Verdict(1.0, 'incorrect', None)", "object()"), FAILED),
        **dict.fromkeys(("10**5000", "{'reward': 1, 'status': [[]]}", "{'reward': 1, 'extracted': {1}}"), FAILED),
        "Verdict(1.0, 'timeout', None)": Verdict(0.0, "timeout", None),
        **dict.fromkeys(("1", "True", "1.0", "np.float32(1)", "np.array([1])"), Verdict(1.0, "correct", None)),
        **dict.fromkeys(("0", "False", "-0.0", "np.int64(0)"), Verdict(0.0, "incorrect", None)),
        "{'reward': 0, 'status': 'no_answer', 'extracted': 'y'}": Verdict(0.0, "no_answer", "y"),
    }
    notes: list[str] = []
    verifier = open_function("my_rewards:behave", notes)
    verifier.check()
    verdicts = verifier.verify_responses(PROMPT, list(expected))
    assert dict(zip(expected, verdicts, strict=True)) == expected
    assert verifier.verify_responses(PROMPT, ["1"]) == [Verdict(1.0, "correct", None)]
    written = Path("written")
    assert not written.exists() or not written.read_bytes()
    assert 3 < len(notes) < 8
    assert all("\n" not in note and "my_rewards:behave gave no reward for" in note for note in notes)


def test_a_reward_between_0_and_1_ends_the_run_where_rewards_are_binary(
    open_function: Callable[..., FunctionVerifier],
) -> None:
    with pytest.raises(ValueError, match=r"^verifier\.function: a reward is 0\.5, and verifier\.rewards=binary allows"):
        open_function("my_rewards:behave").verify_responses(PROMPT, ["1", "0.5"])
    verifier = open_function("my_rewards:behave", rewards="any", correct_from=0.5)
    verdicts = verifier.verify_responses(PROMPT, ["0.5", "0.1", "-3"])
    assert [verdict.status for verdict in verdicts] == ["correct", "incorrect", "incorrect"]
    tenth = verdicts[1].reward
    assert tenth == pytest.approx(0.1) and tenth != 0.1  # every rank has the same bits: those of a 32-bit float
    samples = [Sample("p", [1], [1], "", [], [], "stop", 0, verdict) for verdict in verdicts]
    metrics = rollout_metrics([Group(PROMPT, samples)])
    assert metrics["reward/mean"] == pytest.approx(1 / 3)
    assert metrics["reward/value_mean"] == pytest.approx(-0.8)
    assert (metrics["reward/value_min"], metrics["reward/value_max"]) == (-3.0, 0.5)


def test_random_numbers_of_a_function_depend_on_the_response_alone(
    open_function: Callable[..., FunctionVerifier],
) -> None:
    responses = [str(number) for number in range(40)]
    first = open_function("my_rewards:draws", num_workers=1).verify_responses(PROMPT, responses)
    other = open_function("my_rewards:draws", num_workers=3).verify_responses(PROMPT, responses[::-1])
    assert first == other[::-1] and len(set(first)) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_rewards:score", "no_such_rewards:score cannot be imported: 'no_such_rewards' is not in the working"),
        ("broken:score", "broken:score cannot be imported: 'no_such_module_at_all' is not in the working directory"),
        ("raising:score", "importing raising fails: RuntimeError: no licence"),
        ("leaving:score", "importing leaving fails: SystemExit: 5"),
        ("my_rewards:nothing", "my_rewards has no nothing"),
        ("my_rewards:number", "my_rewards:number is of type int, not a function"),
        ("my_rewards:one_argument", "my_rewards:one_argument must take two arguments"),
        ("my_rewards:three_arguments", "my_rewards:three_arguments must take two arguments"),
    ],
)
def test_a_wrong_function_is_refused_before_anything_is_generated(
    function: str, message: str, open_function: Callable[..., FunctionVerifier]
) -> None:
    with pytest.raises(ValueError) as raised:
        open_function(function).check()
    assert str(raised.value).startswith(f"verifier.function: {message}") and "\n" not in str(raised.value)


@pytest.mark.parametrize("function", ["my_rewards:holder", "my_rewards:defaults", "my_rewards:Callable.__call__"])
def test_anything_that_takes_two_arguments_will_do(
    function: str, open_function: Callable[..., FunctionVerifier], tmp_path: Path
) -> None:
    if function.endswith("__call__"):
        with pytest.raises(ValueError, match="two arguments"):
            open_function(function).check()
        return
    config = VerifierConfig(function=function, num_workers=1)
    with open_verifier(config, tmp_path, True, print) as verifier:
        assert verifier.verify_responses(PROMPT, ["x"]) == [Verdict(1.0, "correct", None)]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, None, "1", [1], {}, {"reward": None}, {"reward": 1, "extracted": 5}, 10**400]
)
def test_what_is_no_reward(value: Any) -> None:
    with pytest.raises(RewardError):
        RewardRange("verifier.url", "any").verdict(value)


def remote(url: str, notes: list[str], **settings: Any) -> RemoteVerifier:
    quick = {"timeout_seconds": 2.0, "max_retries": 1, "retry_seconds": 0.01}
    return RemoteVerifier(url, RemoteRewardConfig(**quick | settings), RewardRange("verifier.url"), notes.append)


def test_a_server_gets_batches_and_its_order_counts() -> None:
    def rewards(body: Any) -> Any:
        return {"rewards": [int("2" in one["response"]) for one in body["requests"]]}

    with misbehaving_server(rewards) as server:
        server.script = ["503", "ok", "garbage"]
        with remote(server.url, [], batch_size=2) as verifier:
            verifier.check()
            verdicts = verifier.verify_responses(PROMPT, ["2", "3", "12", "4", "5"])
            assert verifier.verify_responses(PROMPT, []) == []
        assert [verdict.status for verdict in verdicts] == ["correct", "incorrect", "correct", "incorrect", "incorrect"]
        sizes = sorted(len(request.body["requests"]) for request in server.requests[2:])
        assert sizes in ([1, 1, 2, 2], [1, 2, 2, 2])  # and one of them again
        assert server.requests[-1].body["requests"][0]["prompt"] == {
            "id": "p", "messages": [{"role": "user", "content": "What is 1 + 1?"}], "answer": "2", "pass_rate": 0.5,
            "source": "sums", "metadata": {"limit": 20},
        }  # fmt: skip


@pytest.mark.parametrize("how", ["500", "redirect", "truncated", "huge", "reset", "400"])
def test_a_server_that_fails_is_a_status(how: str) -> None:
    notes: list[str] = []
    with misbehaving_server(lambda _: {"rewards": [1]}) as server, remote(server.url, notes) as verifier:
        server.always = how
        assert verifier.verify_responses(PROMPT, ["2", "3"]) == [FAILED, FAILED]
        assert len(notes) == 1 and verifier.flush_metrics()["time/remote/num_failed"] == 1
        with pytest.raises(ValueError, match=r"^verifier\.url: http://127"):
            verifier.check()


@pytest.mark.parametrize(
    ("answer", "statuses"),
    [
        ({"rewards": [1]}, ["reward_failed"] * 2),
        ({"rewards": [1, 0, 1]}, ["reward_failed"] * 2),
        ({"rewards": {"0": 1, "1": 1}}, ["reward_failed"] * 2),
        ([1, 1], ["reward_failed"] * 2),
        ({"rewards": [None, 1]}, ["reward_failed", "correct"]),
        ({"rewards": [math.nan, "1"]}, ["reward_failed"] * 2),
        ({"rewards": [{"reward": 0, "status": "timeout"}, {"reward": 1}]}, ["timeout", "correct"]),
    ],
)
def test_answers_of_another_shape_are_no_rewards(answer: Any, statuses: list[str]) -> None:
    with misbehaving_server(lambda _: answer) as server, remote(server.url, []) as verifier:
        assert [verdict.status for verdict in verifier.verify_responses(PROMPT, ["2", "3"])] == statuses


@pytest.mark.parametrize(("algorithm", "is_able"), [("ppo", True), ("oreal", False), ("outcome", False)])
def test_an_algorithm_for_binary_rewards_says_so(algorithm: str, is_able: bool) -> None:
    settings = {"run_dir": "r", "num_steps": 1, "model": {"path": "m"}, "data": {"prompts": "p"}}
    settings |= {"algorithm": {"name": algorithm}, "verifier": {"function": "a:b", "rewards": "any"}}
    if is_able:
        TrainConfig.model_validate(settings)
    else:
        with pytest.raises(ValueError, match=f"verifier.rewards=any: algorithm.name={algorithm} is made for rewards"):
            TrainConfig.model_validate(settings)


def test_the_functions_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / "own_reward")
    config = VerifierConfig(function="reward:closeness", rewards="any", num_workers=1)
    with open_verifier(config, tmp_path, True, print) as verifier:
        verdicts = verifier.verify_responses(PROMPT, ["it is 2", "it is 3", "no"])
    assert [(verdict.reward, verdict.status) for verdict in verdicts] == [
        (1.0, "correct"), (0.5, "incorrect"), (0.0, "incorrect"),
    ]  # fmt: skip
    config = VerifierConfig(function="reward:short_and_right", num_workers=1)
    with open_verifier(config, tmp_path, True, print) as verifier:
        verdicts = verifier.verify_responses(PROMPT, [r"\boxed{2}", r"\boxed{2}" + "." * 20, "2"])
    assert [verdict.status for verdict in verdicts] == ["correct", "incorrect", "no_answer"]


def test_the_server_of_the_example(tmp_path: Path) -> None:
    thread = EventLoopThread("example")

    async def start() -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = thread.run(start())
    config = VerifierConfig(url=f"http://127.0.0.1:{port}/rewards")
    begin = time.monotonic()
    with open_verifier(config, tmp_path, True, print) as verifier:
        verdicts = verifier.verify_responses(PROMPT, [r"\boxed{2}", "It is 2.", "3"])
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.0] and time.monotonic() - begin < 30
    thread.run(runner.cleanup())
    thread.close()

"""What the section `verifier` refuses, in one line that shows no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.config import EvalRunConfig, VerifierConfig, load_config

JUDGE = {"url": "http://a:1/v1", "model": "m"}
PROMPT = "{question} {reference} {answer}"


def load(folder: Path, verifier: dict[str, Any]) -> VerifierConfig:
    settings = {"run_dir": "r", "model": {"path": "m"}, "eval": {"prompts": {"a": "a"}}, "verifier": verifier}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return load_config(EvalRunConfig, folder / "config.yaml").verifier


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ({"judge": {"url": "http://a:1/v1"}}, "verifier.judge.model is required"),
        ({"judge": JUDGE | {"prompt": "{question} {answer}"}}, "verifier.judge.prompt must hold {reference}"),
        (
            {"judge": JUDGE | {"prompt": PROMPT + " {solution}"}},
            "verifier.judge.prompt holds {solution}, which",
        ),
        (
            {"judge": JUDGE | {"accept_word": "a", "reject_word": " A"}},
            "verifier.judge.accept_word and verifier.judge.rej",
        ),
        (
            {"judge": JUDGE | {"accept_word": "it is"}},
            "verifier.judge.accept_word and verifier.judge.reject_word must be",
        ),
        ({"judge": JUDGE | {"asks_about": []}}, "verifier.judge.asks_about is empty"),
        ({"judge": JUDGE | {"asks_about": ["rejected"]}}, "verifier.judge.asks_about.0: "),
        ({"judge": JUDGE | {"api_key": "sk-key"}}, "unknown key 'verifier.judge.api_key'; did you mean 'api_key_env'?"),
        (
            {"judge": JUDGE | {"api_key_env": "sk-key/1"}},
            "verifier.judge.api_key_env must be the name of",
        ),
        ({"judge": JUDGE | {"url": "http://me:sk-key@a/v1"}}, "verifier.judge.url must be a plain address"),
        ({"judge": JUDGE | {"url": "http://a/v1?key=sk-key"}}, "verifier.judge.url must be a plain address"),
        ({"judge": JUDGE | {"url": "a:1/v1"}}, "verifier.judge.url must be an address such as"),
        ({"judge": JUDGE | {"url": "file:///etc/passwd"}}, "verifier.judge.url must be an address such as"),
        ({"judge": JUDGE | {"url": "http://a:99999/v1"}}, "verifier.judge.url must be an address such as"),
        ({"judge": JUDGE | {"url": "http://a/v1\r\nX-Evil: 1"}}, "verifier.judge.url must be an address such as"),
        ({"url": "http://[::1"}, "verifier.url must be an address such as"),
        ({"function": "package.module"}, "verifier.function must read package.module:function"),
        ({"function": "package/module.py:function"}, "verifier.function must read package.module:function"),
        ({"function": "../a:b"}, "verifier.function must read package.module:function"),
        ({"function": "a:b", "url": "http://a"}, "verifier.function and verifier.url are two rewards"),
        ({"function": "a:b", "judge": JUDGE}, "verifier.judge is a second opinion after the rules"),
        ({"url": "http://a", "judge": JUDGE}, "verifier.judge is a second opinion after the rules"),
        ({"remote": {"batch_size": 0}}, "verifier.remote.batch_size: "),
    ],
)
def test_refusals(tmp_path: Path, verifier: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load(tmp_path, verifier)
    text = str(raised.value)
    assert text.startswith(message) and "\n" not in text and "sk-key" not in text


@pytest.mark.parametrize(
    "verifier",
    [
        {},
        {"judge": JUDGE},
        {"judge": JUDGE | {"url": "https://[::1]:8000/v1/", "prompt": PROMPT + r" \frac{abc}{def} {} {a} {1}"}},
        {"judge": {"max_tokens": 5, "prompt": PROMPT}},  # it waits until there is a server
        {"judge": JUDGE | {"asks_about": [], "audit_share": 0.5}},
        {"function": "module:Class.method", "rewards": "any", "correct_from": 0.5},
        {"url": "http://a/rewards", "remote": {"batch_size": 3}},
    ],
)
def test_what_is_accepted(tmp_path: Path, verifier: dict[str, Any]) -> None:
    load(tmp_path, verifier)

"""Checks whether a server is usable: it must be reachable, accept our keys, and have our model and all endpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oreal.config.model_files import read_model_settings
from megatron_oreal.engines.sglang.client import ServerError, ServerRefusal, SglangClient
from megatron_oreal.engines.sglang.weight_labels import WEIGHTS_FROM_DISK

CHECK_SECONDS = 120.0  # a server's first request may compile kernels
NEEDED = ("/generate", "/abort_request", "/pause_generation", "/continue_generation")
FIX_VERSION = "install sglang>=0.5.20 there"
SPARE_TOKENS = 2  # SGLang ends a response two tokens before its context is full
# If a server applies the temperature to log-probs, a token's log-prob with this temperature differs by at least
# DIFFERENCE.
TEMPERATURE, DIFFERENCE = 0.05, 0.02
NUM_PROMPTS = 8


@dataclass(slots=True, frozen=True)
class ServerFacts:
    """The facts that a server reports about itself."""

    max_tokens: int  # for a prompt and its response together
    has_tempered_logprobs: bool  # False: its log-probs ignore the temperature
    weight_version: str  # the label of the last push, or WEIGHTS_FROM_DISK


async def check_server(client: SglangClient, model_path: Path, vocab_size: int) -> ServerFacts:
    """Checks the server by requests. Raises ValueError with one line that names the fix."""
    name = f"rollout.sglang: SGLang server {client.endpoint}"
    try:
        info = await first_of(client, "/model_info", "/get_model_info")
        details = await first_of(client, "/server_info", "/get_server_info")
        models = await first_of(client, "/v1/models")
        for path in NEEDED:
            await check_exists(client, path)
        await check_admin_key(client)
        await client.control("/continue_generation", {}, CHECK_SECONDS)  # a killed trainer may have paused the server
        check_model(info, model_path, name)
        check_overrides(details, model_path, name)
        await check_vocabulary(client, vocab_size, model_path, name)
        sizes = [models["data"][0]["max_model_len"], details.get("max_total_num_tokens")]
        max_tokens = min(size for size in sizes if size is not None) - SPARE_TOKENS
        version = str(info.get("weight_version", WEIGHTS_FROM_DISK))
        return ServerFacts(max_tokens, await has_tempered_logprobs(client, vocab_size), version)
    except ServerRefusal as refusal:
        if refusal.status in (401, 403):
            raise ValueError(f"{name} refuses the api_key: take the endpoints_file of the serve that runs") from None
        raise ValueError(f"{refusal}; {FIX_VERSION if refusal.status == 404 else 'its log says why'}") from None
    except ServerError as error:
        raise ValueError(f"{error}: is it running, and is its address right?") from None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} answers in a way that is not known here ({error!r}); {FIX_VERSION}") from None


async def first_of(client: SglangClient, *paths: str) -> Any:
    """Returns the answer of the first path that the server has, because newer releases have renamed some paths."""
    for path in paths:
        try:
            return await client.get(path, CHECK_SECONDS)
        except ServerRefusal as refusal:
            if refusal.status != 404 or path == paths[-1]:
                raise
    raise AssertionError("the last path has raised")


async def check_exists(client: SglangClient, path: str) -> None:
    try:
        await client.get(path, CHECK_SECONDS)
    except ServerRefusal as refusal:
        if refusal.status != 405:  # status 405 means that the path exists and needs a POST
            raise


async def check_admin_key(client: SglangClient) -> None:
    try:
        await client.control("/abort_request", {"rid": "a request that nobody has made"}, CHECK_SECONDS)
    except ServerRefusal as refusal:
        if refusal.status not in (401, 403):
            raise
        raise ValueError(
            f"rollout.sglang: SGLang server {client.endpoint} refuses the admin_key: take the endpoints_file of the "
            "serve that runs"
        ) from None


# These settings of config.json describe its writer, training or generation, but not the model's function.
WITHOUT_EFFECT = {
    *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "transformers_version"),
    *("torch_dtype", "dtype", "quantization_config", "pretraining_tp", "use_cache", "_attn_implementation"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings", "gradient_checkpointing"),
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range"),
    *("router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "unsloth_fixed", "unsloth_version"),
}
WINDOW = ("sliding_window", "max_window_layers")  # unused if use_sliding_window is false


def check_model(info: dict[str, Any], model_path: Path, name: str) -> None:
    """Compares the kind of model, and, if the server's files are readable here, all settings that affect its outputs.

    A setting that only one of the two files has is not compared, because the other may have the same default.
    """
    ours = read_model_settings(model_path)
    theirs = {"model_type": info["model_type"]} if info.get("model_type") else {}
    served = Path(info["model_path"])
    if (served / "config.json").is_file():
        config = read_model_settings(served)
        unused = WITHOUT_EFFECT
        if config.get("use_sliding_window") is False and ours.get("use_sliding_window") is False:
            unused = WITHOUT_EFFECT | {*WINDOW}
        theirs |= {key: value for key, value in config.items() if key not in unused}
    for key, value in theirs.items():
        if key in ours and ours[key] != value:
            raise ValueError(
                f"{name} has another model ({key} {value}, model.path has {ours[key]}): let it serve {model_path}"
            )


def check_overrides(details: dict[str, Any], model_path: Path, name: str) -> None:
    """Raises ValueError for a server whose flags override settings of the model's function in config.json."""
    given = details.get("json_model_override_args") or "{}"
    overrides = given if isinstance(given, dict) else json.loads(given)
    ours = read_model_settings(model_path)
    for key, value in overrides.items():
        if key not in WITHOUT_EFFECT and (key not in ours or ours[key] != value):
            raise ValueError(
                f"{name} has another model (its flag json-model-override-args sets {key} to {value}, model.path has "
                f"{ours.get(key)}): drop the flag, or change config.json"
            )


async def check_vocabulary(client: SglangClient, vocab_size: int, model_path: Path, name: str) -> None:
    """Checks the vocabulary's size by a logit bias, because a server refuses a bias for a token that it does not have.

    Servers do not report the size, and accept larger token ids in prompts.
    """

    async def has_token(token_id: int) -> bool:
        sampling = {"temperature": 0, "max_new_tokens": 1, "logit_bias": {str(token_id): 0.0}}
        try:
            await client.generate({"input_ids": [0], "sampling_params": sampling}, CHECK_SECONDS)
        except ServerRefusal as refusal:
            if refusal.status != 400:
                raise
            return False
        return True

    if not await has_token(vocab_size - 1) or await has_token(vocab_size):
        raise ValueError(
            f"{name} has another vocabulary than the {vocab_size} tokens of model.path: let it serve {model_path}"
        )


async def has_tempered_logprobs(client: SglangClient, vocab_size: int) -> bool:
    """Requests the likeliest token with a low temperature and greedily, and compares the two log-probs."""
    prompts = [[token_id] for token_id in range(min(NUM_PROMPTS, vocab_size))]
    # This keeps only the first token; with `top_k` 1 the server would decode greedily.
    cold = {"temperature": TEMPERATURE, "top_p": 1e-6, "max_new_tokens": 1}
    greedy = {"temperature": 0, "max_new_tokens": 1}
    logprobs = []
    for sampling in (cold, greedy):
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        logprobs.append(first_logprobs(await client.generate(body, CHECK_SECONDS)))
    return differ(*logprobs)


def first_logprobs(answers: Sequence[Any]) -> list[float]:
    return [answer["meta_info"]["output_token_logprobs"][0][0] for answer in answers]


def differ(cold: Sequence[float], greedy: Sequence[float]) -> bool:
    return max(abs(a - b) for a, b in zip(cold, greedy, strict=True)) > DIFFERENCE

"""Lists the recipes among the examples, and makes a tiny model and prompts to test each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from examples.gsm8k.prepare import CHAT_TEMPLATE, train_tokenizer
from examples.tiny_model import tiny_config, write_random_model
from tests.support.paths import EXAMPLES

RECIPES = sorted(
    str(path.relative_to(EXAMPLES))
    for pattern in ("oreal_*", "orz_*", "grpo_*")
    for path in EXAMPLES.glob(f"{pattern}/*.yaml")
    if path.name != "eval.yaml"
)
END_TOKENS = ["<|im_end|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
VOCAB_SIZE = 2000
PROMPT_TOKENS, NEW_TOKENS = 640, 8


def write_recipe_task(folder: Path) -> None:
    """Writes only model/ and prompts.jsonl. The tokenizer has the recipes' end tokens and encodes their prompts."""
    texts = [text for name in RECIPES for text in prompt_texts(EXAMPLES / name)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.add_special_tokens(END_TOKENS)
    model = folder / "model"
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = tiny_config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    write_random_model(model, config, seed=0)
    rows = [{"id": str(n), "prompt": f"What is {n} + 1?", "answer": str(n + 1), "pass_rate": n / 20} for n in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompt_texts(file: Path) -> list[str]:
    data = yaml.safe_load(file.read_text())["data"]
    return [data[name] for name in ("system_prompt", "template", "suffix") if data.get(name)]


def shrink(settings: dict[str, Any], folder: Path, whole: bool) -> dict[str, Any]:
    """Replaces model, data, lengths, and settings that need GPUs; without `whole`, shrinks the batches too."""
    settings["run_dir"] = str(folder / "runs" / settings["run_dir"].removeprefix("runs/"))
    stem = "annealing" if settings["run_dir"].endswith("annealing") else "config"
    recipe = Path(settings["run_dir"]).name.removesuffix("_annealing")
    settings["run_dir"] = str(folder / "runs" / Path(f"{recipe}_{stem}.yaml").stem)
    settings["num_steps"] = 2
    settings["model"] = {"path": str(folder / "model")}
    settings["parallel"] = {"microbatch_tokens": settings["parallel"]["microbatch_tokens"]}
    settings["data"] |= {"prompts": str(folder / "prompts.jsonl"), "max_prompt_tokens": PROMPT_TOKENS}
    rollout = settings["rollout"]
    rollout |= {"engine": "local", "max_new_tokens": NEW_TOKENS}
    rollout.pop("sglang", None)
    if "max_total_tokens" in rollout:
        rollout["max_total_tokens"] = PROMPT_TOKENS + NEW_TOKENS
    for section in (settings["policy"], *models_of(settings["algorithm"])):
        section["optimizer"]["distributed"] = "auto"
        section.pop("path", None)
    settings["eval"]["prompts"] = {}
    if not whole:
        settings["data"]["prompts_per_step"] = 4
        rollout["group_size"] = 4
    return settings


def models_of(algorithm: dict[str, Any]) -> list[dict[str, Any]]:
    return [section for section in algorithm.values() if isinstance(section, dict) and "optimizer" in section]

"""Decodes with a model of the transformers library, which is the reference for the local engine's own decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_oreal.engines.local.decoder import LOGIT_COPIES
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

if TYPE_CHECKING:
    from transformers import DynamicCache


class TransformersDecoder:
    """Decodes with any causal model of transformers and its dynamic cache."""

    def __init__(self, model_path: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        options: Any = {"dtype": dtype, "attn_implementation": "sdpa"}
        try:
            if is_torch_dist(model_path):  # its weights are read later
                config = AutoConfig.from_pretrained(model_path, local_files_only=True)
                self.model = AutoModelForCausalLM.from_config(config, **options)
            else:
                with quiet():
                    self.model = AutoModelForCausalLM.from_pretrained(model_path, local_files_only=True, **options)
        except (OSError, RuntimeError) as error:  # RuntimeError: the weights have other shapes than the model
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"model.path: {model_path} cannot be loaded ({reason}); give a Hugging Face directory"
            ) from None
        self.model.to(device).eval().requires_grad_(False)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())  # tied weights appear once
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings

    def bytes_of_row(self, num_tokens: int) -> int:
        """Returns the device bytes of one row that is decoded to `num_tokens` tokens; growing caches exist twice."""
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = self.model.dtype.itemsize
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * item * num_tokens
        return cache + 2 * cache // config.num_hidden_layers + LOGIT_COPIES * 4 * self.vocab_size

    @torch.inference_mode()
    def start(
        self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, TransformersDecoding]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        columns = torch.arange(prompt_ids.shape[1], device=prompt_ids.device)
        mask = (columns >= num_padding[:, None]).long()  # [U, P]
        outputs = self.model(
            input_ids=prompt_ids,
            attention_mask=mask,
            position_ids=(columns - num_padding[:, None]).clamp_(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(prompt_of_row)
        decoding = TransformersDecoding(self, cache, mask[prompt_of_row], num_padding[prompt_of_row])
        return outputs.logits[prompt_of_row, -1], decoding


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the library's progress bar and its report about the weights; our own errors replace them."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


class TransformersDecoding:
    def __init__(self, decoder: TransformersDecoder, cache: DynamicCache, mask: Tensor, num_padding: Tensor) -> None:
        self.decoder, self.cache = decoder, cache
        self.mask, self.num_padding = mask, num_padding  # [B, length], [B]

    @torch.inference_mode()
    def advance(self, token_ids: Tensor) -> Tensor:
        positions = self.mask.shape[1] - self.num_padding
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        outputs = self.decoder.model(
            input_ids=token_ids[:, None],
            attention_mask=self.mask,
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.logits[:, -1]

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        self.mask, self.num_padding = self.mask[rows], self.num_padding[rows]
        self.cache.batch_select_indices(rows)

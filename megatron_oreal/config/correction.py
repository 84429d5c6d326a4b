"""Defines the settings that correct for samples from another distribution than the trained policy. Imports no torch.

The engine samples with its own kernels, and possibly with older weights. The losses receive a `Correction`;
algorithms/corrections.py has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from megatron_oreal.config.effects import Effects, choice, condition
from megatron_oreal.config.section import Section

CorrectionPreset = Literal["tis", "sequence_tis", "mis", "sequence_mis", "icepop", "geometric"]
ImportanceLevel = Literal["token", "sequence"]
MaskLevel = Literal["none", "token", "sequence", "geometric"]
OldLogprobs = Literal["trainer", "engine"]


@dataclass(frozen=True, slots=True)
class Correction:
    """The weights and masks that a loss applies to tokens, by the ratios to the engine's probabilities.

    Example: Correction(importance_cap=2.0) is truncated importance sampling of each token.
    """

    importance_cap: float | None = None  # None: every weight is 1
    importance_level: ImportanceLevel = "token"
    mask_level: MaskLevel = "none"
    mask_low: float = 0.0
    mask_high: float = 2.0
    mask_veto: float | None = None
    old_logprobs: OldLogprobs = "trainer"

    @property
    def masks(self) -> bool:
        return self.mask_level != "none" or self.mask_veto is not None

    @property
    def acts(self) -> bool:
        return self.importance_cap is not None or self.masks or self.old_logprobs == "engine"


class CorrectionSettings(Section):
    """The settings of `rollout` that say how the losses correct for the distribution that the engine sampled from.

    A ratio is the probability of a token under the trainer's policy before the step, divided by its probability in the
    engine.
    """

    # A preset for the settings below: truncated (tis) or masked (mis) importance sampling of tokens or of whole
    # sequences, IcePop's two-sided mask, or a mask by the geometric mean of a sequence's ratios.
    correction: CorrectionPreset = "tis"
    # When the correction acts: only if samples may be older than the policy, or always, because trainer and engine
    # compute different probabilities even with the same weights.
    corrects: Literal["off_policy", "always"] = "off_policy"
    # A weight is the ratio of its token, or the product of the ratios over its sequence.
    importance_level: ImportanceLevel = "token"
    importance_cap: float | None = Field(default=2.0, gt=0)  # The upper bound of a weight; null sets all weights to 1.
    # The ratio that must lie in [mask_low, mask_high]: the token's, or the product or the geometric mean over its
    # sequence. Otherwise the token or its whole sequence gets the weight 0.
    mask_level: MaskLevel = "none"
    mask_low: float = Field(default=0.0, ge=0, le=1)  # The smallest ratio that the mask keeps.
    mask_high: float = Field(default=2.0, ge=1)  # The largest ratio that the mask keeps.
    mask_veto: float | None = Field(default=None, gt=0, le=1)  # A token with a lower ratio masks its whole sequence.
    # The policy whose ratio the losses clip: the trainer's before the step, or the engine's. With the engine's, the run
    # computes no weights and skips the pass for the trainer's log-probs.
    old_logprobs: OldLogprobs = "trainer"

    effects: ClassVar[Effects] = (
        (
            ("importance_level",),
            condition(
                lambda rollout: rollout.importance_cap is not None or rollout.old_logprobs == "engine",
                "for {at}importance_cap=null, where all weights are 1: drop it, or give {at}importance_cap",
            ),
        ),
        (("mask_low", "mask_high"), choice("mask_level", "token", "sequence", "geometric")),
        (("importance_level", "importance_cap"), choice("old_logprobs", "trainer")),
    )

    @model_validator(mode="before")
    @classmethod
    def fill_from_correction(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return CORRECTION_PRESETS.get(str(settings.get("correction")), {}) | settings

    @model_validator(mode="after")
    def fill_importance_cap(self) -> Self:
        if "importance_cap" not in self.model_fields_set:
            self.importance_cap = self.default_of("importance_cap")
        return self

    def default_of(self, name: str) -> Any:
        """Returns the preset's choice. If the mask bounds the weights themselves, its upper bound is also their cap."""
        if name == "importance_cap" and self.old_logprobs == "engine":
            return None
        if name == "importance_cap" and self.mask_level == self.importance_level:
            return self.mask_high
        return CORRECTION_PRESETS.get(self.correction, {}).get(name, super().default_of(name))

    def as_correction(self) -> Correction | None:
        """Returns the correction that the losses apply; None means no correction."""
        found = Correction(
            importance_cap=self.importance_cap if self.old_logprobs == "trainer" else None,
            importance_level=self.importance_level,
            mask_level=self.mask_level,
            mask_low=self.mask_low,
            mask_high=self.mask_high,
            mask_veto=self.mask_veto,
            old_logprobs=self.old_logprobs,
        )
        return found if found.acts else None


CORRECTION_PRESETS: dict[str, dict[str, Any]] = {  # algorithms/README.md names the sources of the presets
    "tis": {},  # the defaults
    "sequence_tis": {"importance_level": "sequence"},
    "mis": {"mask_level": "token"},
    "sequence_mis": {"importance_level": "sequence", "mask_level": "sequence"},
    "icepop": {"mask_level": "token", "mask_low": 0.5, "mask_high": 5.0},
    "geometric": {
        "importance_cap": None,
        "mask_level": "geometric",
        "mask_low": 0.999,
        "mask_high": 1.001,
        "mask_veto": 1e-4,
    },
}
CORRECTION_SETTINGS = tuple(name for name in CorrectionSettings.model_fields if name != "corrects")

"""Builds, shards, runs and trains Megatron-Core models. Only this package and checkpoint import megatron."""

import logging
import warnings

# Megatron warns at import, once per missing optional package and process; none of them is needed here.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|nvidia-modelopt|flash|cutlass|fused).*not.*")
logging.getLogger("megatron").setLevel(logging.ERROR)

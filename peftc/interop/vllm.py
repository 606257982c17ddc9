"""What vLLM loads of PEFT's adapters: LoRA and rsLoRA, one rank and one scale, and nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from peftc.diagnostics import fail

_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What its option `max_lora_rank` may be; 16 where nothing is said."""


def refuse_for_vllm(config: Mapping[str, Any]) -> None:
    """Raise `PeftcError` E083 for the first option that vLLM refuses, or does not read."""
    reasons = {
        f"a {config['peft_type']} adapter: it reads LORA alone": config["peft_type"] != "LORA",
        "trained modules (`modules_to_save`)": bool(config.get("modules_to_save")),
        f"trained biases (`bias: {config.get('bias')}`)": config.get("bias", "none") != "none",
        "DoRA": bool(config.get("use_dora")),
        "a bias of LoRA's own (`lora_bias`)": bool(config.get("lora_bias")),
        "trainable tokens": bool(config.get("trainable_token_indices")),
        "layers of several ranks: it reads one `r`": bool(config.get("rank_pattern")),
        "layers of several scales: it reads one `lora_alpha`": bool(config.get("alpha_pattern")),
        f"rank {config.get('r')}: its largest is {_RANKS[-1]}": config.get("r", 0) > _RANKS[-1],
    }
    for reason, holds in reasons.items():
        if holds:
            fail("E083", f"vLLM does not load {reason}", help="merge the deltas and serve the model: `peftc merge`")

# SPDX-License-Identifier: Apache-2.0
"""Makes the models of these tests: random ones of 0.7 M parameters, always the same.

    python tests/vllm/tiny.py FOLDER

FOLDER/llama; FOLDER/hybrid, in which every other layer looks at a window only. Their weights are
larger than a fresh model's, so that answers depend on the whole prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SEED = 0
LAYERS = 4
VOCABULARY = 512
POSITIONS = 8192
WINDOW = 64


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
}


def make(folder: Path) -> None:
    """Writes the models, but those that are there already."""
    missing = [name for name in MAKERS if not (folder / name / "model.safetensors").exists()]
    if not missing:
        return
    import torch

    for name in missing:
        torch.manual_seed(SEED)
        MAKERS[name]().save_pretrained(folder / name)


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def _hybrid() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = [("sliding_attention", "full_attention")[layer % 2] for layer in range(LAYERS)]
    config = Gemma3TextConfig(**SHAPE, layer_types=kinds, sliding_window=WINDOW)
    return Gemma3ForCausalLM(config)


MAKERS = {"llama": _llama, "hybrid": _hybrid}

if __name__ == "__main__":
    make(Path(sys.argv[1]))

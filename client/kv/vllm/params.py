# SPDX-License-Identifier: Apache-2.0
"""What a request says of its transfer: ``kv_transfer_params``, which nobody has checked before."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import reprlib
from array import array
from typing import Any

Params = dict[str, Any]

ID_BYTES = 256
ADDRESS_CHARACTERS = 1 << 20
OWN_ID_CHARACTERS = 64  # of vLLM's request ids; what makes them unique is at their end


def params_of(request: Any) -> Params:
    """Reads them of a request; there are none in most."""
    found = request.kv_transfer_params
    return found if isinstance(found, dict) else {}


def transfer_id_of(params: Params) -> str:
    """Reads the id.

    Raises:
        ValueError: It is none.
    """
    found = params.get("transfer_id")
    if isinstance(found, str) and 0 < len(found) <= ID_BYTES >= len(_utf8(found)):
        return found
    raise ValueError(f"transfer_id is a text of 1 to {ID_BYTES} bytes, not {reprlib.repr(found)}")


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # JSON can have half a pair


def address_of(params: Params) -> bytes:
    """Reads the prefiller's address.

    Raises:
        ValueError: It is none.
    """
    found = params.get("remote_address")
    if isinstance(found, str) and 0 < len(found) <= ADDRESS_CHARACTERS:
        with contextlib.suppress(ValueError):
            return base64.b64decode(found, validate=True)
    raise ValueError("remote_address is not what a prefiller's output, or its address_file, has")


def check_tokens(params: Params, tokens: int) -> None:
    """Compares what the prefiller has computed, if it has answered, with the prompt.

    Raises:
        ValueError: They differ in length.
    """
    found = params.get("remote_num_tokens")
    if found is not None and found != tokens:
        raise ValueError(
            f"remote_num_tokens is {reprlib.repr(found)}, and the prompt has {tokens} tokens"
        )


def wire_id(transfer_id: str, request: Any) -> bytes:
    """Makes what names a transfer between two engines: its id and all that its cache depends on.

    So a cache never comes to another prompt than its own, whoever knows or guesses the id.

    Raises:
        ValueError: The prompt has embeddings instead of tokens.
    """
    if request.prompt_embeds is not None:
        raise ValueError("its prompt has embeddings, and only tokens can be compared")
    lora = request.lora_request
    texts = [
        transfer_id,
        lora.lora_name if lora is not None else None,
        request.cache_salt,
        [feature.identifier for feature in request.mm_features],
    ]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=32)
    digest.update(array("q", request.prompt_token_ids))
    return digest.digest()

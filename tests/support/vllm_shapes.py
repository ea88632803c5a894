# SPDX-License-Identifier: Apache-2.0
"""What vLLM hands a connector, as far as it is looked at: tensors, specs, requests, steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SIZES = {"torch.float32": 4, "torch.bfloat16": 2, "torch.uint8": 1}


@dataclass
class Storage:
    """Memory that tensors are in."""

    address: int
    length: int

    def data_ptr(self) -> int:
        return self.address

    def nbytes(self) -> int:
        return self.length


@dataclass
class Tensor:
    """A view: shape and strides in numbers, not bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: Storage
    offset: int = 0
    dtype: str = "torch.float32"
    device: str = "cpu"

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def dim(self) -> int:
        return len(self.shape)

    def element_size(self) -> int:
        return SIZES[self.dtype]

    def storage_offset(self) -> int:
        return self.offset

    def untyped_storage(self) -> Storage:
        return self.storage


@dataclass
class FullAttentionSpec:
    """Of vLLM's name; only that is looked at, and these."""

    block_size: int = 32


@dataclass
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int = 128


@dataclass
class MLAAttentionSpec(FullAttentionSpec):
    pass


@dataclass
class MambaSpec(FullAttentionSpec):
    pass


@dataclass
class CacheGroup:
    """vLLM's KVCacheGroupSpec."""

    layer_names: list[str]
    kv_cache_spec: Any
    enable_kv_transfer: bool = True


@dataclass
class CacheConfig:
    """vLLM's KVCacheConfig."""

    num_blocks: int
    kv_cache_groups: list[CacheGroup]


def names(count: int, first: int = 0) -> list[str]:
    """Names layers as Llama's are."""
    return [f"model.layers.{number}.self_attn.attn" for number in range(first, first + count)]


def cpu_caches(
    layers: list[str], blocks: int = 16, heads: int = 2, block: int = 32, content: int = 64
) -> dict[str, Tensor]:
    """All layers in one storage, one after the other, as the CPU build has them."""
    page = heads * block * content
    storage = Storage(0x7000_0040, len(layers) * blocks * page * 4)
    return {
        name: Tensor(
            (blocks, heads, block, content),
            (page, block * content, content, 1),
            storage,
            number * blocks * page,
        )
        for number, name in enumerate(layers)
    }


@dataclass
class Request:
    """vLLM's Request."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: Any = None
    status: Any = None
    max_tokens: int = 1
    prompt_token_ids: list[int] | None = None
    prompt_embeds: Any = None
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.prompt_embeds is None and self.prompt_token_ids is None:
            self.prompt_token_ids = list(range(self.num_prompt_tokens))


def ended(request: Request, how: str = "FINISHED_LENGTH_CAPPED") -> Request:
    """Has a request ended."""
    request.status = SimpleNamespace(name=how)
    return request


@dataclass
class Step:
    """vLLM's SchedulerOutput."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    scheduled_new_reqs: list[Any] = field(default_factory=list)
    scheduled_cached_reqs: Any = None
    preempted_req_ids: set[str] | None = None


def step(
    new: dict[str, tuple[list[int], int, int]] | None = None,
    more: dict[str, tuple[list[int] | None, int, int]] | None = None,
    preempted: set[str] | None = None,
) -> Step:
    """Makes a step: of each request blocks, tokens computed before it, and tokens of it."""
    new, more = new or {}, more or {}
    return Step(
        {name: values[2] for name, values in {**new, **more}.items()},
        [
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
            for name, (blocks, computed, _) in new.items()
        ],
        SimpleNamespace(
            req_ids=list(more),
            new_block_ids=[None if blocks is None else (blocks,) for blocks, _, _ in more.values()],
            num_computed_tokens=[computed for _, computed, _ in more.values()],
        ),
        preempted,
    )

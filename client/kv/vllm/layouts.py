# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV caches as a Layout: of the tensors that ``register_kv_caches`` is given.

Each is a view of shape (blocks, heads, states, content) into a storage; whatever the order in
memory, it is in the strides. Nothing of vLLM or torch is imported: tensors and specs are looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from transferd.client.errors import InvalidRequest
from transferd.kv.layout import Component, Group, Layout, Place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What a block table's entries are of; other kinds (states of recurrent layers) are not pages.
KINDS = (
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowSpec",
    "SlidingWindowMLASpec",
)
LATENT = ("MLAAttentionSpec", "SlidingWindowMLASpec")  # alike on all ranks, without heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What the tensors do not tell.

    Attributes:
        model: Names the weights and what else makes caches exchangeable.
        packing: Of the numbers within an item: only caches of equal ones are.
        layers_total: Of the whole model.
        heads_total: KV heads of the whole model.
        tp_rank: Among the ranks that split the heads.
        tp_size: How many those are.
    """

    model: str
    packing: str
    layers_total: int
    heads_total: int
    tp_rank: int = 0
    tp_size: int = 1


class Caches(NamedTuple):
    """The caches of one rank.

    Attributes:
        layout: Of all of them.
        storages: Of each region, a tensor that is in it; its whole storage is the region.
        layers: Names of the layers, in the order of the model.
        groups: Of vLLM's groups, those that are transferred.
        ratios: Pages of the layout that a block of vLLM's is, for each of ``groups``.
    """

    layout: Layout
    storages: dict[str, Any]
    layers: tuple[str, ...]
    groups: tuple[int, ...]
    ratios: tuple[int, ...]

    def pages(self, blocks: Sequence[Sequence[int]]) -> dict[str, list[int]]:
        """Turns block tables of all of vLLM's groups into those of the layout's."""
        found = {}
        for group, number, ratio in zip(self.layout.groups, self.groups, self.ratios, strict=True):
            table = blocks[number]
            if ratio > 1:
                table = [block * ratio + part for block in table for part in range(ratio)]
            found[group.name] = list(table)
        return found


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(f"transferd.kv.vllm: {message}", reason="LAYOUT")


def layer_number(name: str) -> int:
    """Finds a layer's number in its name: ``model.layers.3.self_attn.attn``."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
    if not numbers:
        _refuse(f"layer {name!r} has no number in its name")
    return int(numbers[0])


def layout_of(caches: Mapping[str, Any], config: Any, rank: Rank) -> Caches:
    """Describes the caches of one rank.

    Args:
        caches: Tensor of each layer, by name.
        config: vLLM's KVCacheConfig.
        rank: The rest.

    Raises:
        InvalidRequest: LAYOUT: there is something among them that cannot be described.
    """
    return _Describer(caches, config, rank).describe()


class _Describer:
    def __init__(self, caches: Mapping[str, Any], config: Any, rank: Rank) -> None:
        self.caches = caches
        self.config = config
        self.rank = rank
        self.storages: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # region of each storage, by address
        self.lengths: dict[str, int] = {}
        self.layers: dict[int, str] = {}

    def describe(self) -> Caches:
        groups, numbers, ratios = [], [], []
        for number, spec in enumerate(self.config.kv_cache_groups):
            if not getattr(spec, "enable_kv_transfer", True):
                continue
            group, ratio = self._group(str(number), spec)
            groups.append(group)
            numbers.append(number)
            ratios.append(ratio)
        layout = Layout(
            model=self.rank.model,
            layers_total=max(self.rank.layers_total, *(n + 1 for n in self.layers)),
            regions=self.lengths,
            groups=tuple(groups),
        )
        names = tuple(self.layers[number] for number in sorted(self.layers))
        return Caches(layout, self.storages, names, tuple(numbers), tuple(ratios))

    def _group(self, name: str, group: Any) -> tuple[Group, int]:
        """Describes a group, and tells how many pages a block is."""
        spec = group.kv_cache_spec
        kind = type(spec).__name__
        if kind not in KINDS:
            _refuse(f"group {name} is of {kind}, which has no pages of tokens")
        ordered = sorted(group.layer_names, key=layer_number)
        for layer in ordered:
            self._note(layer)
        tensors = [self.caches[layer] for layer in ordered]
        shapes = {(tuple(t.shape), tuple(t.stride()), str(t.dtype)) for t in tensors}
        if len(shapes) > 1:
            _refuse(f"layers of group {name} differ in shape or strides: {sorted(shapes)}")
        if not tensors:
            _refuse(f"group {name} has no layers")
        blocks = self.config.num_blocks
        ratio, rest = divmod(tensors[0].shape[0], blocks)
        if rest or tensors[0].dim() != 4 or spec.block_size % max(ratio, 1):
            _refuse(
                f"tensors of group {name} have shape {tuple(tensors[0].shape)}, not "
                f"({blocks} blocks of {spec.block_size} tokens, heads, states, content)"
            )
        page_tokens = spec.block_size // ratio
        component = self._component(name, kind, page_tokens, tensors)
        return (
            Group(
                name=name,
                page_tokens=page_tokens,
                num_pages=blocks * ratio,
                layers=tuple(layer_number(layer) for layer in ordered),
                components=(component,),
                window_tokens=_window(spec),
            ),
            ratio,
        )

    def _note(self, layer: str) -> None:
        if layer not in self.caches:
            _refuse(f"there is no tensor of layer {layer!r}")
        number = layer_number(layer)
        if number in self.layers:
            _refuse(f"layer {number} has two caches: {self.layers[number]!r} and {layer!r}")
        self.layers[number] = layer

    def _component(self, group: str, kind: str, tokens: int, tensors: list[Any]) -> Component:
        tensor = tensors[0]
        size = tensor.element_size()
        _, heads, states, content = tensor.shape
        page, head, state, one = (stride * size for stride in tensor.stride())
        if one != size or tokens % states:
            _refuse(f"a state of group {group} has gaps, or no whole number of tokens")
        packed = str(tensor.device) == "cpu"
        if packed and states > 1 and state != content * size:
            _refuse(f"a block of group {group} has gaps within a head, and is packed as one")
        total, first = self._heads(group, kind, heads)
        item = content * size * (states if packed else 1)
        return Component(
            name="kv",
            dtype=f"{str(tensor.dtype).removeprefix('torch.')} {self.rank.packing}",
            head_bytes=item,
            item_tokens=tokens if packed else tokens // states,
            heads_total=total,
            first_head=first,
            heads=heads,
            places=tuple(self._place(t, size) for t in tensors),
            page_stride=page,
            token_stride=item if packed or states == 1 else state,
            head_stride=head if heads > 1 else item,
        )

    def _heads(self, group: str, kind: str, heads: int) -> tuple[int, int]:
        """Tells how many heads there are in all, and the first of this rank."""
        rank = self.rank
        if kind in LATENT:
            return heads, 0
        if heads * rank.tp_size == rank.heads_total:
            return rank.heads_total, rank.tp_rank * heads
        if heads == 1 and rank.tp_size % rank.heads_total == 0:
            return rank.heads_total, rank.tp_rank // (rank.tp_size // rank.heads_total)
        return _refuse(
            f"group {group} has {heads} heads on each of {rank.tp_size} ranks, the model "
            f"{rank.heads_total}"
        )

    def _place(self, tensor: Any, size: int) -> Place:
        storage = tensor.untyped_storage()
        name = self.names.get(storage.data_ptr())
        if name is None:
            name = self.names[storage.data_ptr()] = f"cache{len(self.names)}"
            self.storages[name] = tensor
            self.lengths[name] = storage.nbytes()
        return Place(name, tensor.storage_offset() * size)


def _window(spec: Any) -> int:
    """Tells how many tokens of a request's end the group's layers look at; 0: all."""
    kind = type(spec).__name__
    if kind.startswith("SlidingWindow"):
        return max(1, int(spec.sliding_window) - 1)
    return 0

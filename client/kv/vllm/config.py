# SPDX-License-Identifier: Apache-2.0
"""What vLLM's configuration says: the connector's own options, and facts about a rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from transferd.client.errors import InvalidRequest
from transferd.kv.v1 import layout_pb2
from transferd.kv.vllm.layouts import Rank
from transferd.kv.wire import layout_from_proto, layout_to_proto

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transferd.kv.layout import Layout

KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
DEADLINE_MAX_S = 3600.0
# Of a model's configuration, what may differ between two engines with the same weights.
LOCAL_KEYS = ("_name_or_path", "name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Options:
    """``kv_connector_extra_config``.

    Attributes:
        socket: Of the daemon on this host; empty: as for transferd.Client.
        model: Names the weights; empty: made of the model's last path component and configuration.
        address_file: A prefiller writes its address there, for whoever sends requests to both
            engines at once.
        deadline_s: A decoder computes a request itself whose cache has not come by then.
        lease_s: A prefiller keeps a request that nobody has asked for so long.
        timeout_s: Without a sign of life for so long, the other side is lost.
        stages: Parts of a transfer that are counted one by one.
        slots: Transfers to a decoder at once; the daemon's limits.counters has to be slots *
            (stages + 1), for each rank.
    """

    socket: str = ""
    model: str = ""
    address_file: str = ""
    deadline_s: float = 60.0
    lease_s: float = 30.0
    timeout_s: float = 3.0
    stages: int = 1
    slots: int = 256

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Options:
        """Checks what the configuration says.

        Raises:
            InvalidRequest: A key is unknown, or its value is of the wrong kind.
        """
        kinds = {field.name: KINDS[str(field.type)] for field in fields(cls)}
        for key, value in values.items():
            if key not in kinds:
                raise InvalidRequest(
                    f"kv_connector_extra_config has {key!r}; there are {', '.join(kinds)}"
                )
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise InvalidRequest(f"kv_connector_extra_config: {key} is not {value!r}")
        options = cls(**values)
        for key in ("deadline_s", "lease_s", "timeout_s", "stages", "slots"):
            if not getattr(options, key) > 0:
                raise InvalidRequest(
                    f"kv_connector_extra_config: {key} is above 0, not {getattr(options, key)!r}"
                )
        if options.deadline_s > DEADLINE_MAX_S:
            raise InvalidRequest(
                f"kv_connector_extra_config: deadline_s is at most {DEADLINE_MAX_S:g}, not "
                f"{options.deadline_s!r}"
            )
        return options


def rank_of(config: Any, layers: Iterable[str], options: Options) -> Rank:
    """Tells of a worker what its tensors do not: of its VllmConfig.

    Raises:
        InvalidRequest: Its KV cache is split in a way that has no layout.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    parallel, model = config.parallel_config, config.model_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise InvalidRequest(f"{name} is {getattr(parallel, name)}: only 1 has a layout")
    return Rank(
        model=options.model or model_name(model),
        packing=_packing(config, layers),
        layers_total=model.hf_text_config.num_hidden_layers,
        heads_total=model.get_total_num_kv_heads(),
        tp_rank=get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_parallel_size,
    )


def all_layouts(config: Any, layout: Layout) -> tuple[list[Layout] | None, int]:
    """Asks the engine's other workers for theirs; gives all of them, and our number.

    Every worker has to call it. A single one asks nobody.
    """
    if config.parallel_config.world_size == 1:
        return None, 0
    from torch import distributed
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    data: list[bytes] = [b""] * group.world_size
    own = layout_to_proto(layout).SerializeToString()
    distributed.all_gather_object(data, own, group=group.cpu_group)
    # The world has all engines of data parallelism in it; ours are next to each other.
    size = config.parallel_config.world_size
    first = group.rank_in_group // size * size
    return [layout_of_bytes(one) for one in data[first : first + size]], group.rank_in_group - first


def layout_of_bytes(data: bytes) -> Layout:
    """Reads a layout."""
    return layout_from_proto(layout_pb2.Layout.FromString(data))


def model_name(model: Any) -> str:
    """Names the weights by what engines of different hosts have in common."""
    known = {k: v for k, v in model.hf_config.to_dict().items() if k not in LOCAL_KEYS}
    text = json.dumps(known, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{PurePath(model.model).name} {digest} {str(model.dtype).removeprefix('torch.')}"


def _packing(config: Any, names: Iterable[str]) -> str:
    """Names how attention keeps its numbers: backend, variant for CPUs, dtype."""
    context = config.compilation_config.static_forward_context
    found = set()
    for name in names:
        layer = context.get(name)
        backend = layer.get_attn_backend().get_name() if layer is not None else ""
        found.add(" ".join(filter(None, (backend, getattr(layer, "isa", "")))))
    return " ".join([*sorted(found), str(config.cache_config.cache_dtype)])

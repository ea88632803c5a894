# SPDX-License-Identifier: Apache-2.0
"""transferd.kv: KV caches from prefillers to decoders. See README.md."""

from transferd.kv.address import join
from transferd.kv.assign import Source, assign
from transferd.kv.cache import Cache
from transferd.kv.decoder import Decoder
from transferd.kv.fingerprint import differences, fingerprint
from transferd.kv.layout import Component, Group, Layout, Place, Slice
from transferd.kv.pages import Extent, PageTable, needed
from transferd.kv.plan import Delivery, PagesJob, Plan
from transferd.kv.planner import make_plan
from transferd.kv.prefiller import Prefiller
from transferd.kv.protocol.actions import Outcome
from transferd.kv.protocol.bounds import Settings
from transferd.kv.step import Step
from transferd.kv.transfer import KvFailed, Transfer

__all__ = [
    "Cache",
    "Component",
    "Decoder",
    "Delivery",
    "Extent",
    "Group",
    "KvFailed",
    "Layout",
    "Outcome",
    "PageTable",
    "PagesJob",
    "Place",
    "Plan",
    "Prefiller",
    "Settings",
    "Slice",
    "Source",
    "Step",
    "Transfer",
    "assign",
    "differences",
    "fingerprint",
    "join",
    "make_plan",
    "needed",
]

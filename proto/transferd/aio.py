# SPDX-License-Identifier: Apache-2.0
"""The asyncio face of the SDK: ``async with transferd.aio.Client() as c``."""

from transferd.client.aio import Client, Counter, Grant, Job, Region
from transferd.client.aiomailbox import Mailbox
from transferd.client.aiowatcher import Plan, Watcher

__all__ = ["Client", "Counter", "Grant", "Job", "Mailbox", "Plan", "Region", "Watcher"]

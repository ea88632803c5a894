# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder."""

from support.both_ways import receiver, sender, shared_memory
from support.shared_pair import shared_pair, show_shared_logs

__all__ = ["receiver", "sender", "shared_memory", "shared_pair", "show_shared_logs"]

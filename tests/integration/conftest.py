# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder."""

from support.both_ways import receiver, sender, shared_memory
from support.cuda_memory import cuda
from support.shared_pair import shared_pair, show_shared_logs

__all__ = ["cuda", "receiver", "sender", "shared_memory", "shared_pair", "show_shared_logs"]

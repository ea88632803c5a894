# SPDX-License-Identifier: Apache-2.0
"""A minimal router: engines come and go, prompts find a prefiller and a decoder."""

from transferd.kv.router.policy import Choice, Engine, Load, prefix_hashes
from transferd.kv.router.stub import Registration, Router

__all__ = ["Choice", "Engine", "Load", "Registration", "Router", "prefix_hashes"]

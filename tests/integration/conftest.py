# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder."""

from support.shared_pair import shared_pair, show_shared_logs

__all__ = ["shared_pair", "show_shared_logs"]

# SPDX-License-Identifier: Apache-2.0
"""Import point of the client's native half: ``ffi`` and ``lib`` of client.h and abi.h."""

from transferd.native._client import ffi, lib
from transferd.native._layout import check_layout

__all__ = ["ffi", "lib"]

# cffi compares a struct with the compiler's at its first use; do it at import, not in mid-flight.
check_layout(ffi)

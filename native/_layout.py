# SPDX-License-Identifier: Apache-2.0
"""What both halves check when they are imported."""

from typing import Any

# Sizes that abi_check.h asserts in C. A module built from another header must not be loaded at all.
ABI_STRUCT_BYTES = {
    "struct tfd_segment_header": 512,
    "struct tfd_ring": 128,
    "struct tfd_entry": 128,
    "struct tfd_record": 64,
    "struct tfd_counter": 64,
    "struct tfd_watcher": 64,
}


def check_layout(ffi: Any) -> None:
    """Compares the structs of the segment with what this package expects.

    Args:
        ffi: The ``ffi`` of a native module.

    Raises:
        ImportError: The module was built from another version of abi.h.
    """
    for name, size_bytes in ABI_STRUCT_BYTES.items():
        found = ffi.sizeof(name)
        if found != size_bytes:
            raise ImportError(
                f"{name} has {found} bytes in the native module and {size_bytes} in the package; "
                "rebuild or reinstall transferd"
            )

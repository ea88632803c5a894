# SPDX-License-Identifier: Apache-2.0
"""GPU memory of clients on a driver of host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.fakecuda import DeviceBuffer, FakeCuda

if TYPE_CHECKING:
    import random

    import transferd
    from transferd import Client

LENGTH = 4 << 20
MAP = {"write", "map"}


def memory(cuda: FakeCuda, seeded: random.Random | None = None, device: int = 0) -> DeviceBuffer:
    """Allocates, random if `seeded` is given."""
    made = DeviceBuffer(cuda, cuda.malloc(LENGTH, device), LENGTH)
    if seeded is not None:
        made.view[:] = seeded.randbytes(LENGTH)
    return made


def granted(
    client: Client, cuda: FakeCuda, device: int = 0
) -> tuple[DeviceBuffer, transferd.Region, transferd.Grant]:
    """Registers new memory and lets it be mapped and written."""
    buffer = memory(cuda, device=device)
    region = client.register(buffer)
    return buffer, region, region.grant(rights=MAP, imms=range(16))

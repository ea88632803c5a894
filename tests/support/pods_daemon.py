# SPDX-License-Identifier: Apache-2.0
"""A daemon that takes the chunks of :mod:`support.fakecuda`, which are memfds, for the driver's."""

from __future__ import annotations

import os
import sys

from transferd.daemon import cuda
from transferd.daemon.main import main


def is_fake_chunk(fd: int) -> bool:
    """Tells whether an fd is a chunk of the fake's."""
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:chunk")


if __name__ == "__main__":
    cuda.is_driver_fd = is_fake_chunk
    sys.exit(main())

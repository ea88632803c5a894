# SPDX-License-Identifier: Apache-2.0
"""The helper process of one GPU: ``python -m transferd.native.gpu_helper``, by the daemon.

Arguments: fds of the control socket, the rings, the pool and the eventfd; the GPU's UUID in hex;
the daemon's pid; the path of libcuda, or nothing.
"""

from __future__ import annotations

import os
import sys

from transferd.native._gpu import ffi, lib


def main(arguments: list[str]) -> int:
    """Runs the helper until the daemon goes, or the GPU cannot be used any more.

    Args:
        arguments: Those of the command line.

    Returns:
        Exit status.
    """
    control, ring, pool, wake, uuid, parent, library = arguments
    options = ffi.new("struct tfd_gpu_options *")
    options.control_fd, options.ring_fd = int(control), int(ring)
    options.pool_fd, options.wake_fd = int(pool), int(wake)
    options.uuid = bytes.fromhex(uuid)
    options.parent = int(parent)
    options.library = os.fsencode(library)
    return int(lib.tfd_gpu_helper_run(options))


if __name__ == "__main__":
    # Nothing is left to tidy that the kernel and the driver do not: what the interpreter and
    # libcuda do at exit could wait for a GPU that is lost.
    os._exit(main(sys.argv[1:]))

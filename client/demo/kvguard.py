# SPDX-License-Identifier: Apache-2.0
"""Ends what the driver of ``transferd demo kv`` has started, should it die without doing so.

Its stdin is a pipe that the driver alone holds: a line with the number of the children's process
group, and the end of the file, however the driver ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE_S = 8.0
POLL_S = 0.05


def gone(group: int) -> bool:
    """Whether nobody of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def main() -> int:
    """Waits for the driver's end: the demo's folder."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups = [int(line) for line in sys.stdin]
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while not all(map(gone, groups)) and time.monotonic() < end:
        time.sleep(POLL_S)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

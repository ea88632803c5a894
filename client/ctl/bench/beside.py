# SPDX-License-Identifier: Apache-2.0
"""A target in a process of its own on this host, for ``--loopback`` and ``--to SOCKET``."""

from __future__ import annotations

import signal
import sys
import threading

import transferd
from transferd.client.child import answer
from transferd.client.ctl.bench.link import failed, to_token
from transferd.client.ctl.bench.target import Target


def main() -> int:
    """Runs it until the parent hangs up: address of its daemon, bytes that it may use."""
    address, memory = sys.argv[1:]
    try:
        with Target(address, int(memory)) as target:
            threading.Thread(target=_wait_for_parent, args=(target,), daemon=True).start()
            answer(token=to_token(target.descriptor))
            target.serve()
    except transferd.TransferdError as error:
        answer(**failed(error))
        return 1
    return 0


def _wait_for_parent(target: Target) -> None:
    sys.stdin.read()
    target.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""For engines of several processes, by PYTHONPATH: who would spin in sched_yield sleeps instead.

vLLM's processes wait for each other in that way, and a small machine then keeps everybody else
waiting for seconds.
"""

from __future__ import annotations

import os
import time

SLEEP_S = 0.0002


def _yield() -> None:
    time.sleep(SLEEP_S)


os.sched_yield = _yield

# SPDX-License-Identifier: Apache-2.0
"""What verbs are measured against: ib_write_bw and ib_send_lat, both ends in one guest."""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vm.guest import Guest

MTU = 4096
PORT = 18515  # of perftest
RUN_S = 120.0
# The second waits until the first listens: 0A is LISTEN in /proc/net/tcp.
_BOTH = """
{command} >/dev/null & first=$!
until grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6; do
    kill -0 $first || exit 1; sleep 0.05
done
{command} {address} && wait $first
"""


def write_mib_s(
    guest: Guest, device: str, address: str, size: int, depth: int, count: int
) -> float:
    """Measures writes of one connection: its average, from first post to last completion."""
    options = ["-q", "1", "-t", str(depth), "-n", str(count), "-s", str(size)]
    return float(_run(guest, "ib_write_bw", device, address, options)[3])


def send_us(guest: Guest, device: str, address: str, size: int, count: int) -> float:
    """Measures one way of a message and its answer; the typical one, which is the median."""
    options = ["-n", str(count), "-s", str(size)]
    return float(_run(guest, "ib_send_lat", device, address, options)[4])


def _run(guest: Guest, program: str, device: str, address: str, options: list[str]) -> list[str]:
    """Runs both ends; gives the words of the result, which follows a heading."""
    words = [program, "-d", device, "-c", "RC", "-m", str(MTU), "-F", "-x", "1", *options]
    line = _BOTH.format(command=shlex.join(words), port=PORT, address=address)
    printed = guest.run(line, timeout_s=RUN_S, cwd="/").stdout.splitlines()
    for heading, result in itertools.pairwise(printed):
        if "#bytes" in heading:
            return result.split()
    raise RuntimeError(f"{program} has printed no result:\n" + "\n".join(printed))

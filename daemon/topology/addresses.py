# SPDX-License-Identifier: Apache-2.0
"""The IPv4 addresses of this host's interfaces, which sysfs does not have."""

from __future__ import annotations

import array
import fcntl
import socket
import struct

SIOCGIFCONF = 0x8912  # netdevice(7)
IFREQ_BYTES = 40  # struct ifreq on 64-bit: 16 of name, 24 of the union
IFREQ_MAX = 1024


def ipv4() -> dict[str, list[str]]:
    """Lists the addresses of this network namespace; empty if the kernel does not tell."""
    buffer = array.array("B", bytes(IFREQ_BYTES * IFREQ_MAX))
    address, room = buffer.buffer_info()
    request = bytearray(struct.pack("iP", room, address))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            fcntl.ioctl(probe, SIOCGIFCONF, request)
    except OSError:
        return {}
    (used,) = struct.unpack_from("i", request)
    found: dict[str, list[str]] = {}
    for offset in range(0, used, IFREQ_BYTES):
        entry = bytes(buffer[offset : offset + IFREQ_BYTES])
        # An alias is named eth0:1.
        name = entry[:16].split(b"\0")[0].decode(errors="replace").partition(":")[0]
        found.setdefault(name, []).append(socket.inet_ntoa(entry[20:24]))
    return found

# SPDX-License-Identifier: Apache-2.0
"""What the machine must have installed: programs and files, and the Debian packages they come from.

``python tests/vm/needs.py`` prints the packages that are missing, one a line.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# A program (found on PATH) or a file, and its package. Host: what builds the image and runs guests.
HOST = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "cpio": "cpio",
    "dpkg-deb": "dpkg",
    "setpriv": "util-linux",
}
# Guests run the host's programs.
GUEST = {
    "ip": "iproute2",
    "rdma": "iproute2",
    "tc": "iproute2",
    "ibv_devinfo": "ibverbs-utils",
    "ib_write_bw": "perftest",
    "/etc/libibverbs.d/rxe.driver": "ibverbs-providers",
    "/usr/share/doc/rdma-core": "rdma-core",
}
# Users' PATH often lacks these.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def program(name: str) -> str | None:
    """Finds a program as a root shell would."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def _is_there(need: str) -> bool:
    if need.startswith("/"):
        return Path(need).exists()
    return program(need) is not None


def missing() -> list[str]:
    """Lists the packages that have to be installed before a guest can run."""
    needs = HOST | GUEST
    return sorted({package for need, package in needs.items() if not _is_there(need)})


if __name__ == "__main__":
    for needed in missing():
        print(needed)

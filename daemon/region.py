# SPDX-License-Identifier: Apache-2.0
"""Regions and the files behind them. Sans-IO but for the fds it owns."""

from __future__ import annotations

import enum
import fcntl
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import AccessDenied, Conflict, InvalidRequest

if TYPE_CHECKING:
    from transferd.daemon.grant import Grant
    from transferd.daemon.policy import Tenant
    from transferd.daemon.session import Session

SHM_DIRECTORY = "/dev/shm"
NAME_MAX = 64


class Kind(enum.StrEnum):
    """Where memory comes from."""

    MEMFD = "memfd"
    SHM = "shm"
    HUGETLB = "hugetlb"
    CUDA = "cuda"


class RegionState(enum.StrEnum):
    """Life of a region: ACTIVE, ZOMBIE until no opener writes; BROKEN: pages were taken away."""

    ACTIVE = "ACTIVE"
    ZOMBIE = "ZOMBIE"
    BROKEN = "BROKEN"


@dataclass(slots=True)
class Memory:
    """A file of memory that a client handed over.

    Attributes:
        fd: Owned; closed by :meth:`close`.
        sealed: It cannot shrink, so that nobody can take its pages away by truncation.
        regions: Living regions made from it.
    """

    memory_id: int
    fd: int
    size: int
    kind: Kind
    sealed: bool
    writable: bool
    regions: int = 0

    def close(self) -> None:
        """Closes the fd; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(slots=True)
class Region:
    """Memory that a session has registered.

    Attributes:
        number: Its own within the daemon.
        handle: The data plane's name, its own within the session only.
    """

    number: int
    handle: int
    session: Session
    memory: Memory
    offset: int
    length: int
    name: str
    state: RegionState = RegionState.ACTIVE
    grants: dict[int, Grant] = field(default_factory=dict)

    def check_active(self) -> None:
        """Refuses new uses of memory that is going away.

        Raises:
            Conflict: REGION_ENDING.
        """
        if self.state is not RegionState.ACTIVE:
            raise Conflict(
                f"region {self.handle} is being deregistered, or its memory was taken away",
                reason="REGION_ENDING",
            )

    @property
    def isolation(self) -> int:
        """Number of the connections that peers should use for it alone; 0: the common ones."""
        return 0 if self.memory.sealed else self.number


def inspect(memory_id: int, fd: int) -> Memory:
    """Looks at a file that a client handed over, and takes it.

    Args:
        memory_id: Its number in the session.
        fd: Owned by the result; on failure still the caller's.

    Returns:
        The memory.

    Raises:
        InvalidRequest: It is no memory that can be registered.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest("fd", "not memory; hand over a memfd or a file of tmpfs or hugetlbfs")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        # Only shmem and hugetlbfs know seals: everything else is a file of a disk.
        raise InvalidRequest(
            "fd", "a file of a disk; hand over a memfd or a file of tmpfs or hugetlbfs"
        ) from None
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise InvalidRequest("fd", "opened for writing only; open it for reading and writing")
    sealed = bool(seals & fcntl.F_SEAL_SHRINK)
    is_memfd = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    if is_memfd and not sealed:
        raise InvalidRequest("fd", "a memfd that may shrink; add F_SEAL_SHRINK to it first")
    writable = access == os.O_RDWR and not seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)
    huge = status.st_blksize > 65_536
    kind = Kind.HUGETLB if huge else Kind.MEMFD if is_memfd else Kind.SHM
    return Memory(memory_id, fd, status.st_size, kind, sealed, writable)


F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; Python's fcntl has no name for it before 3.13


def open_shm(name: str, tenant: Tenant) -> int:
    """Opens POSIX shared memory by its name, as shm_open does.

    Args:
        name: "/" and a file name.
        tenant: Whose policy applies.

    Returns:
        An fd, the caller's.

    Raises:
        InvalidRequest: The name is none, or there is no such object.
        AccessDenied: Policy forbids it, or it belongs to somebody else.
    """
    tenant.check_shm()
    base = name.removeprefix("/")
    if not base or "/" in base or base in (".", "..") or "\0" in base or len(base) > 255:
        raise InvalidRequest(
            "shm_path", f"{name!r} is no name as for shm_open; write it as in /kv-0"
        )
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(f"{SHM_DIRECTORY}/{base}", flags)
    except PermissionError:
        raise AccessDenied(
            f"the daemon may not open shared memory {name}; let its owner hand over the fd",
            reason="SHM_PATH_NOT_ALLOWED",
        ) from None
    except OSError as error:
        raise InvalidRequest(
            "shm_path", f"{name}: {error.strerror}; create it with shm_open first"
        ) from None
    try:
        tenant.check_shm(os.fstat(fd).st_uid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_range(memory: Memory, offset: int, length: int) -> int:
    """Checks the part of a file that shall be registered.

    Args:
        memory: The file.
        offset: Bytes into it.
        length: 0: up to its end.

    Returns:
        The length in bytes.

    Raises:
        InvalidRequest: The range is not of the file, or not on a page.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    if offset % page:
        raise InvalidRequest("offset_bytes", f"{offset} is not a multiple of the page size {page}")
    if offset >= memory.size:
        raise InvalidRequest("offset_bytes", f"{offset} is past the file's end at {memory.size}")
    length = length or memory.size - offset
    if length > memory.size - offset:
        raise InvalidRequest(
            "length_bytes", f"{offset} + {length} is past the file's end at {memory.size}"
        )
    return length

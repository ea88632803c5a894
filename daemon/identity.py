# SPDX-License-Identifier: Apache-2.0
"""Who this daemon is: its id, the epoch of this life, and the secret of its descriptors."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from transferd.daemon.descriptor import PeerKey
from transferd.daemon.sockets import StartError

ID_BYTES = 16
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity and secret of one life of the daemon."""

    key: PeerKey
    secret: bytes


def load(state_dir: str | None) -> Identity:
    """Reads the identity, or makes one.

    Args:
        state_dir: Keeps id and secret over restarts; without it both are new at each start. The
            epoch always is.

    Raises:
        StartError: The directory cannot be used.
    """
    epoch = secrets.token_bytes(ID_BYTES)
    if state_dir is None:
        key = PeerKey(secrets.token_bytes(ID_BYTES), epoch)
        return Identity(key, secrets.token_bytes(SECRET_BYTES))
    directory = Path(state_dir)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        daemon_id = _keep(directory / "daemon_id", ID_BYTES)
        secret = _keep(directory / "secret", SECRET_BYTES)
    except OSError as error:
        raise StartError(
            f"state_dir: {state_dir} cannot be used ({error.strerror}); choose a directory that "
            "this user may "
            "write to"
        ) from None
    return Identity(PeerKey(daemon_id, epoch), secret)


def _keep(path: Path, size: int) -> bytes:
    """Reads a file of random bytes, or makes it."""
    try:
        data = path.read_bytes()
        if len(data) != size:
            raise StartError(f"state_dir: {path} is damaged; remove it, the daemon makes a new one")
        return data
    except FileNotFoundError:
        data = secrets.token_bytes(size)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)  # whole or not at all, also when the host dies now
        return data

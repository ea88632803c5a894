# SPDX-License-Identifier: Apache-2.0
"""Clients with GPU memory that is none: the daemon never looks at what a handle names.

As a program (SOCKET, a word, and for `map` a descriptor in hex) it is such a client in a process
of its own, to be killed:

    own                  grants its memory, says the descriptor, waits
    map                  maps it, says so; unmaps when it is asked to, says so
    keep                 maps it, says so; says when it is asked to unmap it, and does not
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from transferd.native.client_half import ffi, lib
from transferd.v1 import attach_pb2 as pb
from transferd.v1 import region_pb2, types_pb2

from support.grpc_session import GrpcSession
from support.raw_session import RawSession, ask, read

if TYPE_CHECKING:
    from types import TracebackType

    from support.daemon import DaemonProcess

BASE = 0x7F00_0000_0000
SIZE = 1 << 20
UUID = b"u" * 16
ALL = (types_pb2.RIGHT_WRITE, types_pb2.RIGHT_MAP)


class CudaClient(RawSession):
    """A raw session with gRPC calls, and GPU memory by IPC handle."""

    def __init__(self, daemon: DaemonProcess, name: str = "gpu") -> None:
        """Attaches."""
        super().__init__(daemon, name)
        self.channel = grpc.insecure_channel(
            daemon.socket, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.calls = GrpcSession(self.channel, self.token)

    def fd_ask(self, *fds: int, **body: Any) -> pb.FdResponse:
        """Asks by the fd socket."""
        return ask(self.sock, pb.FdRequest(request_id=5, **body), fds)[0]

    def share_cuda(self, *fds: int, **fields: Any) -> pb.FdResponse:
        """Hands over an allocation that is in order but for what is given."""
        given: dict[str, Any] = {
            "device_uuid": UUID,
            "base": BASE,
            "size_bytes": SIZE,
            "buffer_id": 7,
            "ipc_handle": b"h" * 64,
        }
        return self.fd_ask(*fds, share_cuda_memory=pb.ShareCudaMemoryRequest(**given | fields))

    def device_region(self) -> int:
        """Registers all of a new allocation."""
        return int(self.registered(self.share_cuda()).region)

    def registered(self, shared: pb.FdResponse, **fields: Any) -> region_pb2.RegisterRegionResponse:
        """Registers what was handed over."""
        request = region_pb2.RegisterRegionRequest(
            memory_id=shared.share_memory.memory_id, **fields
        )
        return self.calls.call("regions.RegisterRegion", request)  # type: ignore[no-any-return]

    def grant(
        self, region: int, rights: tuple[int, ...] = ALL, imms: int = 4
    ) -> region_pb2.CreateGrantResponse:
        """Grants all of a region."""
        request = region_pb2.CreateGrantRequest(region=region, rights=rights, imm_count=imms)  # type: ignore[arg-type]
        return self.calls.call("regions.CreateGrant", request)  # type: ignore[no-any-return]

    def open(self, descriptor: bytes) -> region_pb2.OpenedGrant:
        """Opens a grant."""
        request = region_pb2.OpenDescriptorsRequest(descriptors=[descriptor])
        return self.calls.call("regions.OpenDescriptors", request).grants[0]  # type: ignore[no-any-return]

    def map(self, handle: int) -> pb.FdResponse:
        """Asks for the memory of an opened grant."""
        return self.fd_ask(map=pb.MapRequest(handle=handle))

    def bump(self, value: int) -> None:
        """Sets the first watcher, as a stream would; wakes nobody."""
        base = ffi.cast("char *", self.header)
        ffi.cast("struct tfd_watcher *", base + self.header.watcher_offset).value = value

    def arm_copied(self, region: int, handle: int, **fields: int) -> int:
        """Arms a write of 4 KiB that its client copies; returns its job id."""
        flags = lib.TFD_FLAG_COPIED | lib.TFD_FLAG_ARMED | lib.TFD_FLAG_POLLED
        given = {
            "op": int(lib.TFD_OP_WRITE),
            "flags": int(flags),
            "src_region": region,
            "dst_grant": handle,
            "length": 4096,
            "fire_at": 1,
        }
        return self.submit(**given | fields)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.channel.close()
        super().__exit__(kind, error, trace)


class CudaProcess:
    """Such a client in a process of its own; a context manager, which kills it."""

    def __init__(self, daemon: DaemonProcess, word: str, descriptor: bytes = b"") -> None:
        """Starts it and waits until it is ready; ``said`` is what it said then."""
        command = [sys.executable, "-P", "-m", "support.cuda_client", daemon.socket, word]
        self._process = subprocess.Popen(
            [*command, descriptor.hex()],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        self.pid = self._process.pid
        self.said = self.line()

    def line(self) -> str:
        """Waits for what it says next; "": it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """Kills it, at once; idempotent."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> CudaProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Place(NamedTuple):
    """As much of a DaemonProcess as clients need."""

    socket: str


def _main(socket: str, word: str, descriptor: str) -> None:
    client = CudaClient(_Place(socket), word)  # type: ignore[arg-type]
    client.sock.settimeout(None)
    if word == "own":
        print(client.grant(client.device_region()).descriptor.hex(), flush=True)
        read(client.sock)
        return
    answer = client.map(client.open(bytes.fromhex(descriptor)).handle)
    print(answer.map.map_id or answer.error.reason, flush=True)
    while True:
        asked, _ = read(client.sock)
        for map_id in asked.map_revoked.map_ids:
            if word == "map":
                client.fd_ask(unmap=pb.UnmapRequest(map_id=map_id))
            print(f"asked {map_id}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

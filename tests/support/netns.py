# SPDX-License-Identifier: Apache-2.0
"""Hosts as network namespaces, with several rails each; needs root and iproute2.

Every rail is a veth pair whose outer end is a port of one bridge, so any rail reaches any other.
What a rail sends leaves by its own interface (policy routing by source address), as it does where
each NIC has a cable of its own, and can be limited there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import uuid
from typing import TYPE_CHECKING, Any

from transferd.daemon import certs

from support.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PEER_PORT = 7471


class Network:
    """Namespaces joined by a bridge in one of their own."""

    def __init__(self) -> None:
        self._tag = uuid.uuid4().hex[:6]
        self._switch = f"tfd{self._tag}s"
        self._namespaces: list[str] = []
        self._make(self._switch)
        self._in(self._switch, "ip link add br0 type bridge")
        self._in(self._switch, "ip link set br0 up")

    def _make(self, namespace: str) -> None:
        run(f"ip netns add {namespace}")
        self._namespaces.append(namespace)
        self._in(namespace, "ip link set lo up")

    def _in(self, namespace: str, command: str) -> None:
        run(f"ip netns exec {namespace} {command}")

    def host(self, rails: int, rate: str | None = None) -> Host:
        """Makes a host.

        Args:
            rails: How many NICs it has.
            rate: What each may send, as tc writes it ("1gbit"); None: as much as it can.
        """
        number = len(self._namespaces)
        namespace = f"tfd{self._tag}h{number}"
        self._make(namespace)
        # Each address belongs to its own interface only, whatever subnet they share.
        for key, value in (("arp_ignore", 1), ("arp_announce", 2), ("rp_filter", 0)):
            self._in(namespace, f"sysctl -qw net.ipv4.conf.all.{key}={value}")
        addresses = []
        for rail in range(rails):
            inner, outer = f"rail{rail}", f"h{number}r{rail}"
            address = f"10.77.{number}.{rail + 1}"
            self._in(self._switch, f"ip link add {outer} type veth peer name {inner}")
            self._in(self._switch, f"ip link set {inner} netns {namespace}")
            self._in(self._switch, f"ip link set {outer} master br0 up")
            self._in(namespace, f"ip address add {address}/16 dev {inner}")
            self._in(namespace, f"ip link set {inner} up")
            self._in(namespace, f"ip route add 10.77.0.0/16 dev {inner} table {100 + rail}")
            self._in(namespace, f"ip rule add from {address} table {100 + rail}")
            if rate:
                self._in(
                    namespace,
                    f"tc qdisc add dev {inner} root tbf rate {rate} burst 128kb limit 1mb",
                )
            addresses.append(address)
        return Host(namespace, addresses, number)

    def silence(self, host: Host, rail: int) -> None:
        """Loses everything that a rail sends or should receive, without a word to either end."""
        self._in(self._switch, f"ip link set {host.port(rail)} nomaster")

    def unplug(self, host: Host, rail: int) -> None:
        """Pulls the cable: the interface sees that it has no carrier."""
        self._in(self._switch, f"ip link set {host.port(rail)} down")

    def take_down(self, host: Host, rail: int) -> None:
        """Takes the interface down, on the host itself."""
        self._in(host.namespace, f"ip link set rail{rail} down")

    def reset(self, host: Host, rail: int) -> None:
        """Destroys the TCP connections of a rail on one side; the other is told by a RST."""
        self._in(host.namespace, f"ss -tK src {host.addresses[rail]}")

    def mend(self, host: Host, rail: int) -> None:
        """Undoes any of these."""
        self._in(self._switch, f"ip link set {host.port(rail)} master br0 up")
        self._in(host.namespace, f"ip link set rail{rail} up")
        # The kernel has dropped it with the interface.
        route = f"10.77.0.0/16 dev rail{rail} table {100 + rail}"
        self._in(host.namespace, f"ip route replace {route}")

    def close(self) -> None:
        """Removes everything; whatever still runs in it loses its network."""
        for namespace in reversed(self._namespaces):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


class Host:
    """A namespace.

    Attributes:
        namespace: Its name.
        addresses: Of its rails, in their order.
    """

    def __init__(self, namespace: str, addresses: Sequence[str], number: int) -> None:
        self.namespace = namespace
        self.addresses = list(addresses)
        self._number = number

    def port(self, rail: int) -> str:
        """Names the other end of a rail's cable."""
        return f"h{self._number}r{rail}"

    def daemon(self, directory: Path, tls: Path, **overrides: Any) -> DaemonProcess:
        """Prepares a daemon that uses all rails of this host.

        Args:
            directory: Of its own.
            tls: Where all daemons of the network have their certificates; made if needed.
            overrides: Keys of its configuration.
        """
        cert, key, ca = certs.make(tls, self.namespace, self.addresses)
        config = {
            "peer_listen": f"{self.addresses[0]}:{PEER_PORT}",
            "rails": self.addresses,
            "tls": {"cert": str(cert), "key": str(key), "ca": str(ca)},
            **overrides,
        }
        daemon = DaemonProcess(directory, config)
        daemon.prefix = ["ip", "netns", "exec", self.namespace]
        return daemon


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Makes a network, and removes it."""
    made = Network()
    try:
        yield made
    finally:
        made.close()


def missing() -> str:
    """Tells why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "sysctl"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, procps)"
    name = f"tfd{uuid.uuid4().hex[:8]}"
    probe = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True)
    if probe.returncode != 0:
        return f"no network namespace can be made: {probe.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return ""


def no_reset() -> str:
    """Tells why connections cannot be destroyed from outside here; empty if they can."""
    if shutil.which("ss") is None:
        return "ss is not installed (iproute2)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            run(f"ss -tK dst 127.0.0.1 dport = {port}")
            try:
                client.send(b"x")
            except OSError:
                return ""
    return "this kernel does not destroy sockets (CONFIG_INET_DIAG_DESTROY)"


def run(command: str) -> None:
    """Runs a command line; its error is the exception's text."""
    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")

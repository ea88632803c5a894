# SPDX-License-Identifier: Apache-2.0
"""Credentials of the peer service: mistakes are found at the start, not at the first peer."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from transferd.daemon.sockets import StartError

if TYPE_CHECKING:
    from transferd.daemon.config import TlsConfig


@dataclass(frozen=True, slots=True)
class Credentials:
    """Both sides of mutual TLS."""

    server: grpc.ServerCredentials
    client: grpc.ChannelCredentials


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(
            f"tls.{key}: {path} cannot be read ({error.strerror}); give the path of a PEM file "
            "(transferd certs DIR makes development keys)"
        ) from None


def load(config: TlsConfig) -> Credentials:
    """Reads certificate, key and CA.

    Raises:
        StartError: A file is missing, no PEM, or key, certificate and CA do not belong together.
    """
    cert, key, ca = (_read(name, getattr(config, name)) for name in ("cert", "key", "ca"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.cert, config.key, password=lambda: b"")
    except ssl.SSLError as error:
        raise StartError(
            f"tls.cert: {config.cert} and {config.key} are no matching certificate and key in PEM "
            f"({error.reason or error}); make a new pair (transferd certs DIR)"
        ) from None
    try:
        context.load_verify_locations(config.ca)
    except ssl.SSLError as error:
        raise StartError(
            f"tls.ca: {config.ca} is no CA certificate in PEM ({error.reason or error}); give "
            "the CA that signed "
            "the daemons' certificates"
        ) from None
    _check_chain(config)
    return Credentials(
        grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True),
        grpc.ssl_channel_credentials(ca, key, cert),
    )


def _check_chain(config: TlsConfig) -> None:
    """Shakes hands with itself: whether the CA has signed the certificate, and it is valid now."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(config.cert, config.key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # peers check the name that they use; here only the chain counts
    client.load_verify_locations(config.ca)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server, server_side=False)
    there = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(10):
            for side in (here, there):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise StartError(
            f"tls.cert: {config.cert} is not accepted by the CA {config.ca} "
            f"({error.verify_message}); use a "
            "certificate that this CA has signed and that is valid now"
        ) from None
    except ssl.SSLError as error:
        raise StartError(
            f"tls.cert: {config.cert} cannot be used ({error.reason or error}); make a new one"
        ) from None

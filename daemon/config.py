# SPDX-License-Identifier: Apache-2.0
"""The configuration file: its keys, their bounds, and errors that name the key.

Unknown keys and wrong types are refused with the key's path, the value and what to do.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

DEFAULT_SOCKET = "unix:///run/transferd/transferd.sock"
COPY_CORES, COPY_THREADS_MAX = 4, 4  # cores for each copying thread; more fill no memory bus
SOCKET_PATH_MAX = 107 - len(".lock")  # sun_path, less the longest suffix that we add


class ConfigError(Exception):
    """The configuration is wrong; the message has one line per mistake."""


def _duration(value: object) -> object:
    """Reads seconds from a number or from text like 500ms, 3s, 2m."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)", value)
        if match is None:
            raise ValueError('write a number of seconds, or text like "500ms" or "3s"')
        return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2]]
    return value


def _size(value: object) -> object:
    """Reads bytes from a number or from text like 4MiB."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|TiB)", value)
        if match is None:
            raise ValueError('write a number of bytes, or text like "64MiB" or "1TiB"')
        powers = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
        return int(match[1]) << powers[match[2]]
    return value


def split_host_port(value: str) -> tuple[str, int]:
    """Splits host:port, also of an IPv6 address in brackets.

    Raises:
        ValueError: It is not of that form.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]/\s]+):(\d{1,5})", value)
    if match is None or not 1 <= int(match[2]) <= 65_535:
        raise ValueError('write host:port, as in "127.0.0.1:7471" or "[::1]:7471"')
    return match[1].strip("[]"), int(match[2])


def is_loopback(host: str) -> bool:
    """Whether a host names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether a host means every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host_port(value: str) -> str:
    split_host_port(value)
    return value


def _unix_address(value: str) -> str:
    if not value.startswith("unix:///"):
        raise ValueError('write a Unix socket, as in "unix:///run/transferd/transferd.sock"')
    if len(os.fsencode(value.removeprefix("unix://"))) > SOCKET_PATH_MAX:
        raise ValueError(f"use a path of at most {SOCKET_PATH_MAX} bytes; the kernel takes no more")
    return value


def _listen(value: str) -> str:
    return _unix_address(value) if value.startswith("unix:") else _host_port(value)


Seconds = Annotated[float, BeforeValidator(_duration)]
Bytes = Annotated[int, BeforeValidator(_size)]
HostPort = Annotated[str, AfterValidator(_host_port)]
UnixAddress = Annotated[str, AfterValidator(_unix_address)]
AnyAddress = Annotated[str, AfterValidator(_listen)]
AbsolutePath = Annotated[str, Field(pattern=r"^/")]


class Section(BaseModel):
    """What all sections have: no unknown keys, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TlsConfig(Section):
    """Files of mutual TLS between daemons, PEM."""

    cert: AbsolutePath
    key: AbsolutePath
    ca: AbsolutePath


class HeartbeatConfig(Section):
    """Heartbeats between daemons."""

    interval: Seconds = Field(default=0.5, ge=0.01, le=60)
    timeout: Seconds = Field(default=3.0, ge=0.05, le=600)

    @model_validator(mode="after")
    def _order(self) -> HeartbeatConfig:
        if self.timeout < 2 * self.interval:
            raise ValueError("timeout must be at least twice the interval: one packet may be lost")
        return self


class QuotaConfig(Section):
    """What one tenant's sessions may hold together; `per_session_*` one of them."""

    sessions: int = Field(default=256, ge=1, le=511)
    regions: int = Field(default=65_536, ge=0)
    registered_bytes: Bytes = Field(default=16 << 40, ge=0)
    grants: int = Field(default=262_144, ge=0)
    opens: int = Field(default=262_144, ge=0)
    per_session_counters: int = Field(default=4096, ge=16, le=1 << 20)
    per_session_shared_files: int = Field(default=1024, ge=1, le=65_536)
    per_session_chunks: int = Field(default=8192, ge=0, le=65_536)


class TenantConfig(Section):
    """Who may use the daemon by one socket directory, and how much."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    socket_dir: AbsolutePath | None = None
    uids: tuple[int, ...] = ()
    lease_sessions: bool = False
    shm_paths: bool = False
    weight: int = Field(default=1, ge=1, le=1000)
    quotas: QuotaConfig = QuotaConfig()

    @field_validator("uids", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _shm(self) -> TenantConfig:
        if self.shm_paths and not self.uids:
            raise ValueError(
                "shm_paths needs uids: name the users whose shared memory the tenant may name"
            )
        return self


class FabricConfig(Section):
    """How the provider is used."""

    name: str = Field(default="", max_length=63)
    library: str = Field(default="", max_length=255)
    segment: Bytes = Field(default=0, ge=0, le=1 << 30)
    window: Bytes = Field(default=0, ge=0, le=1 << 32)


class VerbsConfig(Section):
    """How provider verbs uses its devices; struct tfd_verbs_options. Defaults leave it the choice.

    Attributes:
        gid_index: Entry of the port's GID table, as a path can name it; None: by rule.
        pkey: As in the port's table; 0: the full member of the default partition, else the first.
        mtu: Of the path; 0: the port's.
        timeout: A packet is sent again if 4.096 us * 2^timeout pass without an acknowledgement.
        retries: How often it is.
        plain_posts: ibv_post_send also where the device has ibv_wr_*.
    """

    library: str = Field(default="", max_length=255)
    port: int = Field(default=0, ge=0, le=255)
    gid_index: int | None = Field(default=None, ge=0, le=255)
    link_local: bool = False
    pkey: int = Field(default=0, ge=0, le=0xFFFF)
    service_level: int = Field(default=0, ge=0, le=15)
    bulk_service_level: int = Field(default=0, ge=0, le=15)
    traffic_class: int = Field(default=0, ge=0, le=255)
    mtu: Literal[0, 256, 512, 1024, 2048, 4096] = 0
    timeout: int = Field(default=14, ge=1, le=31)
    retries: int = Field(default=7, ge=1, le=7)
    plain_posts: bool = False

    def given(self) -> tuple[str, object] | None:
        """Finds a key that is not its default, and its value."""
        return next(
            (
                (key, value)
                for key, field in type(self).model_fields.items()
                if (value := getattr(self, key)) != field.default
            ),
            None,
        )


class GpuConfig(Section):
    """GPU memory that no NIC reaches: through pinned host memory, by a helper process a GPU.

    Attributes:
        staging: auto: where the host has an NVIDIA GPU.
        staging_bytes: Pinned for it, once for all GPUs.
        library: Path of libcuda.so.1; empty: where the system has it.
    """

    staging: Literal["auto", "on", "off"] = "auto"
    staging_bytes: Bytes = Field(default=64 << 20, ge=4 << 20, le=16 << 30)
    library: str = Field(default="", max_length=255)

    @field_validator("staging", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        # YAML 1.1 reads on and off as truth values.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class LimitsConfig(Section):
    """Bounds of the daemon as a whole."""

    sessions: int = Field(default=256, ge=1, le=511)
    ring_entries: int = Field(default=1024, ge=16, le=65_536)
    records: int = Field(default=1024, ge=16, le=65_536)
    counters: int = Field(default=4096, ge=16, le=1 << 20)
    watchers: int = Field(default=64, ge=0, le=4096)
    plans: int = Field(default=64, ge=0, le=4096)
    arena: Bytes = Field(default=2 << 20, ge=0, le=1 << 30)
    peers: int = Field(default=4096, ge=1, le=65_536)

    @field_validator("ring_entries", "records")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("use a power of two")
        return value


class TimeoutConfig(Section):
    """Bounds of waiting."""

    peer_call: Seconds = Field(default=2.0, ge=0.05, le=60)
    revoke: Seconds = Field(default=1.0, ge=0.05, le=60)
    quiet: Seconds = Field(default=5.0, ge=0.1, le=60)
    stop: Seconds = Field(default=10.0, ge=0.5, le=300)


class Config(Section):
    """The whole file."""

    listen: UnixAddress = DEFAULT_SOCKET
    listen_tcp: HostPort | None = None
    socket_mode: str = Field(default="0660", pattern=r"^0[0-7]{3}$")
    peer_listen: HostPort = "127.0.0.1:7471"
    peer_address: HostPort | None = None
    http_listen: HostPort | None = None
    admin_listen: AnyAddress | None = None
    state_dir: AbsolutePath | None = None
    provider: Literal["auto", "libfabric", "tcp", "verbs", "sim"] = "auto"
    rails: tuple[str, ...] = ()
    fabric: FabricConfig = FabricConfig()
    verbs: VerbsConfig = VerbsConfig()
    gpu: GpuConfig = GpuConfig()
    tls: TlsConfig | None = None
    tenants: tuple[TenantConfig, ...] = ()
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    polling: Literal["adaptive", "busy"] = "adaptive"
    spin: Seconds = Field(default=0.0002, ge=0, le=1)
    copy_threads: int | None = Field(default=None, ge=0, le=16)
    limits: LimitsConfig = LimitsConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    @field_validator("rails", "tenants", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("rails")
    @classmethod
    def _rails(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > 32:
            raise ValueError("name at most 32 rails")
        for name in value:
            if not 0 < len(name.encode()) < 64:
                raise ValueError(f"{name!r} is no interface, device or address")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Config:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError("tenants: each needs a name of its own")
        directories = [tenant.socket_dir or str(self.socket_path.parent) for tenant in self.tenants]
        if len(set(directories)) != len(directories):
            raise ValueError(
                "tenants: each needs a socket_dir of its own; one may leave it out and gets that "
                "of listen"
            )
        self._development_mode()
        self._fabric_of_libfabric()
        self._verbs_of_verbs()
        if self.peer_address is None and is_wildcard(split_host_port(self.peer_listen)[0]):
            raise ValueError(
                f"peer_listen: {self.peer_listen} is every address of this host; "
                "set peer_address to the one that peers shall use"
            )
        return self

    def _fabric_of_libfabric(self) -> None:
        """What only libfabric understands is not silently left aside."""
        for key in ("name", "library"):
            value = getattr(self.fabric, key)
            if value and self.provider in ("tcp", "verbs"):
                raise ValueError(
                    f"fabric.{key}: {value} is for provider libfabric, and provider is "
                    f"{self.provider}; leave one of them out"
                )

    def _verbs_of_verbs(self) -> None:
        """Nor what only verbs understands."""
        given = self.verbs.given()
        if given is None:
            return
        key, value = given
        if self.provider not in ("auto", "verbs"):
            raise ValueError(
                f"verbs.{key}: {value} is for provider verbs, and provider is {self.provider}; "
                "leave one of them out"
            )
        other = next((key for key in ("name", "library") if getattr(self.fabric, key)), "")
        if other:
            raise ValueError(
                f"verbs.{key}: {value} is for provider verbs, and with fabric.{other} provider "
                "auto takes libfabric; leave one of them out"
            )

    def _development_mode(self) -> None:
        """Without keys nothing may leave this machine."""
        if self.tls is not None:
            return
        for key in ("peer_listen", "peer_address", "listen_tcp"):
            value = getattr(self, key)
            if value is not None and not is_loopback(split_host_port(value)[0]):
                raise ValueError(
                    f"{key}: {value} is not loopback, but there is no tls section; "
                    "give tls (transferd certs DIR makes development keys) or use 127.0.0.1"
                )
        if self.provider == "verbs":  # a queue pair talks to the one that the peer service named
            return
        for rail in self.rails:
            if rail != "lo" and not is_loopback(rail):
                raise ValueError(
                    f"rails: {rail} is not loopback, but there is no tls section; give tls or "
                    "use lo"
                )

    @property
    def socket_path(self) -> Path:
        """Where clients connect."""
        return Path(self.listen.removeprefix("unix://"))

    @property
    def advertised(self) -> str:
        """host:port that peers reach this daemon at."""
        return self.peer_address or self.peer_listen

    @property
    def copiers(self) -> int:
        """Threads that copy within this host: as configured, or a quarter of the cores."""
        if self.copy_threads is not None:
            return self.copy_threads
        return min(COPY_THREADS_MAX, len(os.sched_getaffinity(0)) // COPY_CORES)

    def effective_tenants(self) -> tuple[TenantConfig, ...]:
        """The tenants, or the one that stands for all."""
        return self.tenants or (TenantConfig(name="default"),)


def _path(location: tuple[int | str, ...]) -> str:
    """Writes a pydantic location as in tenants[0].uids."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _section(annotation: Any) -> type[Section] | None:
    """Finds the section in a key's type, which may be a list of it, or optional."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _keys_beside(location: tuple[int | str, ...]) -> str:
    """Lists the keys that a section has, for one that it has not."""
    section: type[Section] = Config
    for part in location[:-1]:
        if isinstance(part, str):
            section = _section(section.model_fields[part].annotation) or section
    return ", ".join(sorted(section.model_fields))


def _sentence(error: Any) -> str:
    """Says one mistake with its path, its value and what to do."""
    path = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: no such key; there are {_keys_beside(error['loc'])}"
    message: str = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:].replace("a valid tuple", "a list")
    if not path:
        return message
    value = repr(error["input"])
    if len(value) > 60:
        value = value[:57] + "..."
    return f"{path}: {message} (got {value})"


def parse(text: str, where: str = "configuration") -> Config:
    """Reads a configuration.

    Args:
        text: YAML.
        where: Its name, for errors.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: One line per mistake.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: needs keys and values at the top, as in `listen: {DEFAULT_SOCKET}`"
        )
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [f"{where}: {_sentence(mistake)}" for mistake in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def load(path: Path) -> Config:
    """Reads a configuration file; ConfigError if it cannot be read or is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the configuration is not UTF-8 text") from None
    return parse(text, str(path))

# SPDX-License-Identifier: Apache-2.0
"""The configuration: defaults, and errors that name the key, the value and what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon import config


def test_empty_file_is_development_mode() -> None:
    parsed = config.parse("")
    assert parsed.tls is None
    assert str(parsed.socket_path) == "/run/transferd/transferd.sock"
    assert parsed.heartbeat.interval == 0.5
    assert [tenant.name for tenant in parsed.effective_tenants()] == ["default"]


def test_every_documented_key() -> None:
    parsed = config.parse(
        """
        listen: unix:///tmp/x.sock
        listen_tcp: 127.0.0.1:7000
        peer_listen: 0.0.0.0:7471
        peer_address: host1:7471
        http_listen: 127.0.0.1:9471
        admin_listen: unix:///tmp/admin.sock
        state_dir: /var/lib/transferd
        provider: libfabric
        rails: [eth0, eth1]
        fabric: {name: tcp, library: /opt/libfabric.so, segment: 256KiB, window: 8MiB}
        tls: {cert: /c, key: /k, ca: /ca}
        verbs: {library: "", timeout: 14}
        tenants:
          - name: a
            uids: [1000]
            lease_sessions: true
            shm_paths: true
            quotas: {sessions: 3, registered_bytes: 1TiB}
          - {name: b, socket_dir: /run/b}
        heartbeat: {interval: 200ms, timeout: 1s}
        polling: busy
        spin: 1ms
        copy_threads: 3
        limits: {sessions: 10, ring_entries: 64}
        timeouts: {peer_call: 1s, revoke: 500ms}
        log_level: debug
        log_format: json
        """
    )
    assert parsed.heartbeat.interval == 0.2
    assert parsed.tenants[0].quotas.registered_bytes == 1 << 40
    assert parsed.fabric.segment == 1 << 18
    assert parsed.spin == 0.001
    assert parsed.copiers == 3
    assert parsed.advertised == "host1:7471"


def test_how_verbs_uses_its_devices() -> None:
    parsed = config.parse(
        """
        provider: verbs
        rails: [mlx5_0]
        verbs:
          library: /opt/libibverbs.so.1
          port: 2
          gid_index: 0
          link_local: true
          pkey: 0x8001
          service_level: 3
          bulk_service_level: 1
          traffic_class: 106
          mtu: 4096
          timeout: 18
          retries: 3
          plain_posts: true
        """
    ).verbs
    assert (parsed.gid_index, parsed.pkey, parsed.traffic_class) == (0, 0x8001, 106)
    assert config.parse("").verbs.given() is None
    assert config.parse("verbs: {gid_index: 0}").verbs.given() == ("gid_index", 0)


@pytest.mark.parametrize("word", ["on", "off", "auto", '"on"'])
def test_staging_is_said_in_words(word: str) -> None:
    assert config.parse(f"gpu: {{staging: {word}}}").gpu.staging == word.strip('"')


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (2, 0), (3, 0), (4, 1), (16, 4), (128, 4)])
def test_copy_threads_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert config.parse("").copiers == threads
    assert config.parse("copy_threads: 0").copiers == 0


@pytest.mark.parametrize(
    ("text", "path", "advice"),
    [
        ("copy_threads: 17", "copy_threads", "16"),
        ("copy_threads: -1", "copy_threads", "0"),
        ("copy_threads: some", "copy_threads", "integer"),
        ("lisen: unix:///x", "lisen", "no such key"),
        ("heartbeat: {intervall: 1s}", "heartbeat.intervall", "there are interval, timeout"),
        ("tls: {key: /k, crt: /c, ca: /a}", "tls.crt", "there are ca, cert, key"),
        ("tenants: [{name: a, quotas: {session: 1}}]", "tenants[0].quotas.session", "sessions"),
        ("heartbeat: {interval: soon}", "heartbeat.interval", "500ms"),
        ("heartbeat: {interval: 5s, timeout: 1s}", "heartbeat", "twice"),
        ("listen: /run/x.sock", "listen", "unix:///"),
        ("listen: 7", "listen", "string"),
        ("peer_listen: 127.0.0.1", "peer_listen", "host:port"),
        ("peer_listen: 127.0.0.1:99999", "peer_listen", "host:port"),
        ("peer_listen: 127.0.0.1:0", "peer_listen", "host:port"),
        ("peer_listen: 10.0.0.1:7471", "peer_listen", "tls"),
        ("rails: [eth0]", "rails", "tls"),
        ("rails: eth0", "rails", "a list"),
        ("provider: tpc", "provider", "tcp"),
        ("{provider: tcp, fabric: {name: efa}}", "fabric.name", "libfabric"),
        ("{provider: tcp, fabric: {library: /l.so}}", "fabric.library", "libfabric"),
        ("{provider: verbs, fabric: {name: efa}}", "fabric.name", "libfabric"),
        ("{provider: tcp, verbs: {mtu: 4096}}", "verbs.mtu: 4096", "provider is tcp"),
        ("{provider: libfabric, verbs: {gid_index: 0}}", "verbs.gid_index: 0", "libfabric"),
        ("{fabric: {name: efa}, verbs: {port: 1}}", "verbs.port: 1", "fabric.name"),
        ("verbs: {mtu: 1500}", "verbs.mtu", "256, 512, 1024, 2048 or 4096"),
        ("verbs: {service_level: 16}", "verbs.service_level", "15"),
        ("verbs: {bulk_service_level: -1}", "verbs.bulk_service_level", "0"),
        ("verbs: {traffic_class: 256}", "verbs.traffic_class", "255"),
        ("verbs: {pkey: 65536}", "verbs.pkey", "65535"),
        ("verbs: {port: 256}", "verbs.port", "255"),
        ("verbs: {gid_index: -1}", "verbs.gid_index", "0"),
        ("verbs: {gid_index: 256}", "verbs.gid_index", "255"),
        ("verbs: {gid_index: auto}", "verbs.gid_index", "integer"),
        ("verbs: {timeout: 32}", "verbs.timeout", "31"),
        ("verbs: {retries: 8}", "verbs.retries", "7"),
        ("verbs: {retries: 0}", "verbs.retries", "1"),
        ("verbs: {link_local: 1}", "verbs.link_local", "boolean"),
        ("verbs: {gid: 3}", "verbs.gid", "gid_index"),
        ("{provider: verbs, rails: eth0}", "rails", "a list"),
        ("gpu: {staging: maybe}", "gpu.staging", "'auto', 'on' or 'off'"),
        ("gpu: {staging_bytes: 1MiB}", "gpu.staging_bytes", "4194304"),
        ("gpu: {staged: on}", "gpu.staged", "staging, staging_bytes"),
        ("polling: lazy", "polling", "adaptive"),
        ("tls: {cert: /c, key: /k}", "tls.ca", "required"),
        ("tls: {cert: c, key: /k, ca: /ca}", "tls.cert", "pattern"),
        ("limits: {ring_entries: 100}", "limits.ring_entries", "power of two"),
        ("limits: {sessions: 512}", "limits.sessions", "511"),
        ("limits: {sessions: '9'}", "limits.sessions", "integer"),
        ("limits: {arena: 1MB}", "limits.arena", "MiB"),
        ("tenants: [{name: a, shm_paths: true}]", "tenants[0]", "uids"),
        ("tenants: [{uids: [1]}]", "tenants[0].name", "required"),
        ("tenants: [{name: a, uids: [root]}]", "tenants[0].uids[0]", "integer"),
        ("tenants: [{name: a}, {name: b}]", "tenants", "socket_dir"),
        ("tenants: [{name: a}, {name: a, socket_dir: /x}]", "tenants", "name"),
        ("spin: -1", "spin", "greater"),
        ("socket_mode: 0660", "socket_mode", "string"),
        ("- a", "configuration", "keys"),
        ("a: [", "configuration", "YAML"),
    ],
)
def test_mistakes_are_named(text: str, path: str, advice: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.parse(text)
    message = str(caught.value)
    assert path in message
    assert advice in message
    assert "Traceback" not in message


def test_every_mistake_has_its_line() -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.parse("lisen: x\npolling: y\nspin: z")
    assert len(str(caught.value).splitlines()) == 3


def test_wildcard_needs_an_address_to_tell() -> None:
    text = "peer_listen: 0.0.0.0:7471\ntls: {cert: /c, key: /k, ca: /a}"
    with pytest.raises(config.ConfigError, match="peer_address"):
        config.parse(text)
    assert config.parse(f"{text}\npeer_address: host1:7471").advertised == "host1:7471"


def test_socket_path_must_fit() -> None:
    with pytest.raises(config.ConfigError, match="bytes"):
        config.parse(f"listen: unix:///{'x' * 120}")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="cannot read"):
        config.load(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(config.ConfigError, match="UTF-8"):
        config.load(binary)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("[::1]:65535", "::1", 65_535),
        ("host-1.example:80", "host-1.example", 80),
    ],
)
def test_host_and_port(text: str, host: str, port: int) -> None:
    assert config.split_host_port(text) == (host, port)


def test_example_shows_the_defaults() -> None:
    """Every key of the example is what the code does without it."""
    example = Path(__file__).parents[2] / "deploy" / "examples" / "transferd.yaml"
    shown, default = config.load(example), config.Config()
    different = {
        key for key in config.Config.model_fields if getattr(shown, key) != getattr(default, key)
    }
    assert different == {"http_listen", "tenants"}
    assert shown.tenants == default.effective_tenants()


def test_readme_names_every_key() -> None:
    text = (Path(__file__).parents[2] / "daemon" / "README.md").read_text()
    for key in config.Config.model_fields:
        assert f"`{key}" in text, f"daemon/README.md does not say what {key} is"


@given(st.text())
def test_any_text_is_a_configuration_or_an_error(text: str) -> None:
    with contextlib.suppress(config.ConfigError):
        config.parse(text)

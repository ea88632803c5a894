# SPDX-License-Identifier: Apache-2.0
"""The segment's layout, as golden numbers: client and daemon may come from different builds."""

import enum
import re
from typing import Any

import pytest

from transferd.client import ring, session
from transferd.daemon import plane
from transferd.native import client_half, daemon_half, names
from transferd.v1 import types_pb2

from support import tree

HALVES = {"client": client_half, "daemon": daemon_half}

# struct -> (size, offset of each field). A change is a new TFD_ABI_VERSION.
GOLDEN: dict[str, tuple[int, dict[str, int]]] = {
    "tfd_segment_header": (
        512,
        {
            "magic": 0,
            "abi_version": 8,
            "header_bytes": 12,
            "segment_bytes": 16,
            "features": 24,
            "session_id": 32,
            "ring_count": 40,
            "ring_entries": 44,
            "record_count": 48,
            "counter_count": 52,
            "ring_offset": 56,
            "ring_stride": 64,
            "record_offset": 72,
            "counter_offset": 80,
            "arena_offset": 88,
            "arena_bytes": 96,
            "watcher_offset": 104,
            "watcher_count": 112,
            "plan_count": 116,
            "_resv0": 120,
            "daemon_id": 128,
            "boot_epoch": 144,
            "_resv1": 160,
            "provider": 192,
            "heartbeat_ns": 256,
            "state": 264,
            "end_reason": 268,
            "_resv2": 272,
            "event_waiters": 320,
            "_resv3": 324,
            "_resv4": 384,
        },
    ),
    "tfd_ring": (128, {"tail": 0, "_resv0": 4, "head": 64, "need_wakeup": 68, "_resv1": 72}),
    "tfd_entry": (
        128,
        {
            "op": 0,
            "flags": 1,
            "priority": 2,
            "_resv0": 3,
            "record": 4,
            "job_id": 8,
            "src_region": 16,
            "src_offset": 24,
            "dst_grant": 32,
            "dst_offset": 40,
            "length": 48,
            "imm": 56,
            "watcher": 60,
            "deadline_ns": 64,
            "argument": 72,
            "table_offset": 80,
            "table_count": 88,
            "plan": 92,
            "src_stride": 96,
            "dst_stride": 104,
            "fire_at": 112,
            "trigger": 120,
            "marks": 124,
        },
    ),
    "tfd_record": (
        64,
        {
            "done_id": 0,
            "status": 8,
            "detail": 12,
            "bytes": 16,
            "accepted_ns": 24,
            "posted_ns": 32,
            "ended_ns": 40,
            "path": 48,
            "event": 52,
            "waiters": 56,
            "_resv0": 60,
        },
    ),
    "tfd_counter": (
        64,
        {
            "value": 0,
            "gate": 8,
            "faults": 16,
            "lost": 24,
            "acknowledged": 32,
            "imm": 40,
            "in_use": 44,
            "event": 48,
            "waiters": 52,
            "wake_at": 56,
        },
    ),
    "tfd_plan_table": (64, {"count": 0, "_resv0": 4}),
    "tfd_slice": (24, {"src_offset": 0, "dst_offset": 8, "length": 16}),
    "tfd_watcher": (64, {"value": 0, "_resv0": 8}),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("struct", GOLDEN)
def test_layout_is_golden(half: str, struct: str) -> None:
    ffi = HALVES[half].ffi
    size, offsets = GOLDEN[struct]
    assert ffi.sizeof(f"struct {struct}") == size
    assert {name: field.offset for name, field in ffi.typeof(f"struct {struct}").fields} == offsets


@pytest.mark.parametrize("struct", GOLDEN)
def test_no_byte_is_implicit_padding(struct: str) -> None:
    size, _ = GOLDEN[struct]
    ffi = client_half.ffi
    ends = 0
    for _, field in ffi.typeof(f"struct {struct}").fields:
        assert field.offset == ends, "a hole before this field"
        ends = field.offset + ffi.sizeof(field.type)
    assert ends == size


@pytest.mark.parametrize("half", HALVES)
def test_numbers_of_the_header_are_exported(half: str) -> None:
    text = (tree.ROOT / "native/include/transferd/abi.h").read_text()
    defined = set(re.findall(r"^#define (TFD_\w+) ", text, re.MULTILINE))
    lib = HALVES[half].lib
    assert {name for name in defined if not hasattr(lib, name)} == set()
    assert int.from_bytes(b"TNARTFD1", "little") == lib.TFD_ABI_MAGIC
    assert lib.TFD_ABI_VERSION == 1
    assert lib.TFD_GATE_FAULT == 1 << 62


def c_table(lib: Any, prefix: str) -> dict[str, int]:
    count = f"{prefix}_STATUS_COUNT" if prefix == "TFD_JOB" else f"{prefix}_COUNT"
    found = {
        name.removeprefix(f"{prefix}_"): int(getattr(lib, name))
        for name in dir(lib)
        if name.startswith(f"{prefix}_") and name != count
    }
    assert len(found) == getattr(lib, count)
    return found


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("python", "prefix"), [(names.JobStatus, "TFD_JOB"), (names.Detail, "TFD_DETAIL")]
)
def test_enums_equal_the_c_tables(half: str, python: type[enum.IntEnum], prefix: str) -> None:
    assert {member.name: member.value for member in python} == c_table(HALVES[half].lib, prefix)


def test_proto_statuses_equal_the_c_table() -> None:
    proto = {
        name.removeprefix("JOB_STATUS_"): number for name, number in types_pb2.JobStatus.items()
    }
    # Zero is UNSPECIFIED in every proto enum, so that PENDING has the number after the last.
    assert proto.pop("UNSPECIFIED") == 0
    table = c_table(client_half.lib, "TFD_JOB")
    assert proto.pop("PENDING") == len(table)
    assert table.pop("PENDING") == 0
    assert proto == table


def test_every_number_has_a_name_and_a_sentence() -> None:
    for status in names.JobStatus:
        assert names.job_status_name(status) == status.name
        assert names.job_status_text(status)
    for detail in names.Detail:
        assert names.detail_name(detail) == detail.name
        assert names.detail_text(detail) or detail is names.Detail.NONE


def test_unknown_numbers_can_be_printed() -> None:
    for number in (len(names.Detail), 1 << 31, (1 << 32) - 1):
        assert names.job_status_name(number) == "UNKNOWN"
        assert names.detail_name(number) == "UNKNOWN"
        assert "unknown" in names.detail_text(number)


@pytest.mark.parametrize(
    ("enumeration", "prefix"), [(plane.Op, "TFD_OP_"), (plane.Flag, "TFD_FLAG_")]
)
def test_what_entries_hold_is_the_abis(enumeration: type[enum.IntEnum], prefix: str) -> None:
    lib = daemon_half.lib
    mine = {member.name: member.value for member in enumeration}
    assert mine == {name: getattr(lib, prefix + name) for name in mine}


def test_the_sdk_has_the_abis_numbers() -> None:
    lib = client_half.lib
    mine = {
        name: value for name, value in vars(session).items() if name.startswith(("OP_", "FLAG_"))
    }
    assert mine
    assert mine == {name: getattr(lib, f"TFD_{name}") for name in mine}
    assert lib.TFD_MAX_TARGETS == session.TARGETS_MAX == plane.MAX_TARGETS
    assert lib.TFD_MAX_LENGTH == session.LENGTH_MAX == plane.MAX_LENGTH
    assert (lib.TFD_MAX_PATHS, lib.TFD_MAX_PARTS) == (plane.MAX_PATHS, plane.MAX_PARTS)


def test_paths_name_every_provider() -> None:
    lib = daemon_half.lib
    numbers = {
        getattr(lib, name): name.removeprefix("TFD_PATH_").lower()
        for name in dir(lib)
        if name.startswith("TFD_PATH_")
        and not name.endswith(("_MASK", "_SHIFT", "_PACKED", "_EMULATED"))
    }
    assert numbers == plane.PROVIDERS
    for number, name in numbers.items():
        word = number | 3 << lib.TFD_PATH_RAILS_SHIFT
        assert ring.decode_path(word) == session.JobPath(name, 3)
        assert ring.decode_path(word | lib.TFD_PATH_PACKED) == session.JobPath(name, 3, packed=True)
        emulated = session.JobPath(name, 3, emulated=True)
        assert ring.decode_path(word | lib.TFD_PATH_EMULATED) == emulated
        assert str(emulated) == f"{name}, 3 rails, emulated"
    assert lib.TFD_PATH_PACKED == plane.PATH_PACKED
    assert lib.TFD_PATH_EMULATED == plane.PATH_EMULATED
    assert ring.decode_path(0) == session.JobPath("", 0)

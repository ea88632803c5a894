/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Static asserts for each struct of abi.h: size, offset of each field, and that each line has its one
 * writer. Both ends of a segment may come from different builds, so a change here is a new
 * TFD_ABI_VERSION. The same table, read at run time: tests/unit/test_abi.py.
 */
#ifndef TFD_ABI_CHECK_H
#define TFD_ABI_CHECK_H

#include <stddef.h>

#include "transferd/abi.h"

#define TFD_ABI_SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), #type " size")
#define TFD_ABI_AT(type, field, offset)                                                      \
	_Static_assert(offsetof(struct type, field) == (offset), #type "." #field " offset")
/* A line starts with this field: it is the first of its writer. */
#define TFD_ABI_LINE(type, field, line) TFD_ABI_AT(type, field, (line) * TFD_LINE)

_Static_assert(TFD_ABI_VERSION == 1, "offsets below are those of version 1");
_Static_assert(TFD_IMM_COUNT == 1u << TFD_IMM_BITS, "immediates");

TFD_ABI_SIZE(tfd_segment_header, 512);
TFD_ABI_AT(tfd_segment_header, magic, 0);
TFD_ABI_AT(tfd_segment_header, abi_version, 8);
TFD_ABI_AT(tfd_segment_header, header_bytes, 12);
TFD_ABI_AT(tfd_segment_header, segment_bytes, 16);
TFD_ABI_AT(tfd_segment_header, features, 24);
TFD_ABI_AT(tfd_segment_header, session_id, 32);
TFD_ABI_AT(tfd_segment_header, ring_count, 40);
TFD_ABI_AT(tfd_segment_header, ring_entries, 44);
TFD_ABI_AT(tfd_segment_header, record_count, 48);
TFD_ABI_AT(tfd_segment_header, counter_count, 52);
TFD_ABI_AT(tfd_segment_header, ring_offset, 56);
TFD_ABI_AT(tfd_segment_header, ring_stride, 64);
TFD_ABI_AT(tfd_segment_header, record_offset, 72);
TFD_ABI_AT(tfd_segment_header, counter_offset, 80);
TFD_ABI_AT(tfd_segment_header, arena_offset, 88);
TFD_ABI_AT(tfd_segment_header, arena_bytes, 96);
TFD_ABI_AT(tfd_segment_header, watcher_offset, 104);
TFD_ABI_AT(tfd_segment_header, watcher_count, 112);
TFD_ABI_AT(tfd_segment_header, plan_count, 116);
TFD_ABI_AT(tfd_segment_header, _resv0, 120);
TFD_ABI_AT(tfd_segment_header, daemon_id, 128);
TFD_ABI_AT(tfd_segment_header, boot_epoch, 144);
TFD_ABI_AT(tfd_segment_header, _resv1, 160);
TFD_ABI_AT(tfd_segment_header, provider, 192);
TFD_ABI_LINE(tfd_segment_header, heartbeat_ns, 4);
TFD_ABI_AT(tfd_segment_header, state, 264);
TFD_ABI_AT(tfd_segment_header, end_reason, 268);
TFD_ABI_AT(tfd_segment_header, _resv2, 272);
TFD_ABI_LINE(tfd_segment_header, event_waiters, 5);
TFD_ABI_AT(tfd_segment_header, _resv3, 324);
TFD_ABI_LINE(tfd_segment_header, _resv4, 6);

TFD_ABI_SIZE(tfd_ring, 128);
TFD_ABI_LINE(tfd_ring, tail, 0);
TFD_ABI_AT(tfd_ring, _resv0, 4);
TFD_ABI_LINE(tfd_ring, head, 1);
TFD_ABI_AT(tfd_ring, need_wakeup, 68);
TFD_ABI_AT(tfd_ring, _resv1, 72);

TFD_ABI_SIZE(tfd_entry, 128);
TFD_ABI_AT(tfd_entry, op, 0);
TFD_ABI_AT(tfd_entry, flags, 1);
TFD_ABI_AT(tfd_entry, priority, 2);
TFD_ABI_AT(tfd_entry, _resv0, 3);
TFD_ABI_AT(tfd_entry, record, 4);
TFD_ABI_AT(tfd_entry, job_id, 8);
TFD_ABI_AT(tfd_entry, src_region, 16);
TFD_ABI_AT(tfd_entry, src_offset, 24);
TFD_ABI_AT(tfd_entry, dst_grant, 32);
TFD_ABI_AT(tfd_entry, dst_offset, 40);
TFD_ABI_AT(tfd_entry, length, 48);
TFD_ABI_AT(tfd_entry, imm, 56);
TFD_ABI_AT(tfd_entry, watcher, 60);
TFD_ABI_AT(tfd_entry, deadline_ns, 64);
TFD_ABI_AT(tfd_entry, argument, 72);
TFD_ABI_AT(tfd_entry, table_offset, 80);
TFD_ABI_AT(tfd_entry, table_count, 88);
TFD_ABI_AT(tfd_entry, plan, 92);
TFD_ABI_AT(tfd_entry, src_stride, 96);
TFD_ABI_AT(tfd_entry, dst_stride, 104);
TFD_ABI_AT(tfd_entry, fire_at, 112);
TFD_ABI_AT(tfd_entry, trigger, 120);
TFD_ABI_AT(tfd_entry, marks, 124);

TFD_ABI_SIZE(tfd_page, 8);
TFD_ABI_AT(tfd_page, src, 0);
TFD_ABI_AT(tfd_page, dst, 4);

TFD_ABI_SIZE(tfd_target, 32);
TFD_ABI_AT(tfd_target, dst_grant, 0);
TFD_ABI_AT(tfd_target, src_offset, 8);
TFD_ABI_AT(tfd_target, dst_offset, 16);
TFD_ABI_AT(tfd_target, length, 24);

TFD_ABI_SIZE(tfd_plan_table, 64);
TFD_ABI_AT(tfd_plan_table, count, 0);
TFD_ABI_AT(tfd_plan_table, _resv0, 4);

TFD_ABI_SIZE(tfd_slice, 24);
TFD_ABI_AT(tfd_slice, src_offset, 0);
TFD_ABI_AT(tfd_slice, dst_offset, 8);
TFD_ABI_AT(tfd_slice, length, 16);

TFD_ABI_SIZE(tfd_letter, 16);
TFD_ABI_AT(tfd_letter, slot, 0);
TFD_ABI_AT(tfd_letter, bytes, 4);
TFD_ABI_AT(tfd_letter, number, 8);

TFD_ABI_SIZE(tfd_record, 64);
TFD_ABI_AT(tfd_record, done_id, 0);
TFD_ABI_AT(tfd_record, status, 8);
TFD_ABI_AT(tfd_record, detail, 12);
TFD_ABI_AT(tfd_record, bytes, 16);
TFD_ABI_AT(tfd_record, accepted_ns, 24);
TFD_ABI_AT(tfd_record, posted_ns, 32);
TFD_ABI_AT(tfd_record, ended_ns, 40);
TFD_ABI_AT(tfd_record, path, 48);
TFD_ABI_AT(tfd_record, event, 52);
TFD_ABI_AT(tfd_record, waiters, 56);
TFD_ABI_AT(tfd_record, _resv0, 60);

TFD_ABI_SIZE(tfd_counter, 64);
TFD_ABI_AT(tfd_counter, value, 0);
TFD_ABI_AT(tfd_counter, gate, 8);
TFD_ABI_AT(tfd_counter, faults, 16);
TFD_ABI_AT(tfd_counter, lost, 24);
TFD_ABI_AT(tfd_counter, acknowledged, 32);
TFD_ABI_AT(tfd_counter, imm, 40);
TFD_ABI_AT(tfd_counter, in_use, 44);
TFD_ABI_AT(tfd_counter, event, 48);
TFD_ABI_AT(tfd_counter, waiters, 52);
TFD_ABI_AT(tfd_counter, wake_at, 56);

TFD_ABI_SIZE(tfd_watcher, 64);
TFD_ABI_AT(tfd_watcher, value, 0);
TFD_ABI_AT(tfd_watcher, _resv0, 8);

#undef TFD_ABI_SIZE
#undef TFD_ABI_AT
#undef TFD_ABI_LINE

#endif

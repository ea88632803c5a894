# SPDX-License-Identifier: Apache-2.0
"""struct tfd_entry for Python: one call packs a whole entry; by cffi each field takes one."""

import struct

# op, flags, priority, 0, record, job_id, src_region, src_offset, dst_grant, dst_offset, length,
# imm, watcher, deadline_ns, argument, table_offset, table_count, plan, src_stride, dst_stride,
# fire_at.
# tests/unit/test_client_session.py holds it against the C layout.
ENTRY = struct.Struct("<4BIQQQQQQIIQQQIIQQQ8x")

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The session segment: the one piece of memory that a client process and the daemon share.
 *
 * The daemon creates it (a sealed memfd), the client maps it. Everything here is plain fixed-width
 * integers and offsets, so that C, C++, CUDA and cffi read the same header; memory orders are spelled
 * in native/core/barrier.h only. Each 64-byte line names its one writer. The daemon never reads back
 * what it relies on: a client may write anything here at any time.
 *
 * Layout and asserts: native/core/abi_check.h; golden test: tests/unit/test_abi.py.
 */
#ifndef TRANSFERD_ABI_H
#define TRANSFERD_ABI_H

#include <stdint.h>

#define TFD_ABI_MAGIC 0x3144465452414e54ull /* "TNARTFD1" */
#define TFD_ABI_VERSION 1u

#define TFD_LINE 64u             /* cache line; every shared object starts on one */
#define TFD_IMM_BITS 20u         /* an application's immediate */
#define TFD_IMM_COUNT (1u << 20) /* number of immediates in a session's name space */
#define TFD_MAX_LENGTH (1ull << 40)
#define TFD_MAX_TARGETS 4096u /* of one scatter or barrier */
#define TFD_MAX_PATHS                                                                                      \
	16u /* (local rail, remote rail) pairs that one grant's traffic may use, staged ones among them */
#define TFD_MAX_PARTS 8u /* that one write is cut into: each counts for eighths */

/* What a counter's gate is raised by while a fault is not acknowledged: every waiter on the gate is released. */
#define TFD_GATE_FAULT (1ull << 62)

/* struct tfd_segment_header.state */
#define TFD_SESSION_OPEN 1u
#define TFD_SESSION_ENDED 2u

/* struct tfd_entry.op */
#define TFD_OP_WRITE 1u /* bytes, then one count on the immediate */
#define TFD_OP_IMM 2u /* one count, no bytes */
#define TFD_OP_ACKNOWLEDGE 3u /* take the faults of an immediate of this session as seen */
#define TFD_OP_CANCEL 4u /* stop the job whose id is in `argument` */
#define TFD_OP_WRITE_PAGES                                                                          \
	5u /* a table of struct tfd_page: pages of `length` bytes; one count each, or one in all */
#define TFD_OP_SCATTER                                                                           \
	6u /* a table of struct tfd_target: a write to each, one count on the immediate there */
#define TFD_OP_BARRIER 7u /* a table of struct tfd_target without bytes: one count on the immediate at each */
#define TFD_OP_READ 8u /* bytes of the grant into the region; no count */
#define TFD_OP_SEND 9u /* table_count bytes of the arena, as one message to a mailbox */
#define TFD_OP_RELEASE                                                                                  \
	10u /* gives slot src_offset of mailbox dst_grant back, which held message number `argument` */
#define TFD_OP_DISARM 11u /* ends the jobs that wait for the watcher in `argument` */
#define TFD_OP_LAUNCH 12u /* the job that was kept as `plan`, once more */
#define TFD_OP_FORGET 13u /* the plan in `argument` is no more; what was launched goes on */

/* struct tfd_entry.flags */
#define TFD_FLAG_EXACT 1u /* write, pages: the count follows the acknowledgement of all bytes on all rails */
#define TFD_FLAG_COUNT_JOB 2u /* pages: one count in all */
#define TFD_FLAG_CHECKSUM 4u /* write, pages, scatter: the receiver's worker compares before it counts */
#define TFD_FLAG_ARMED 8u /* any job: it starts once the word of `watcher` is at least `fire_at` */
#define TFD_FLAG_POLLED                                                                                   \
	16u /* armed: that word is written by a device, which wakes nobody; the worker goes on looking */

#define TFD_FLAG_PLAN                                                                                   \
	32u /* write, imm, pages, scatter, barrier, read: checked, and kept as `plan` instead of run */
#define TFD_FLAG_TABLE \
	64u /* plan of a write, of pages (always), of a scatter: each launch reads the table at `argument` */
/*
 * Write, pages, scatter; armed and polled: the client's own stream moves the bytes, all of them before the word reaches fire_at. The
 * worker checks and counts. GPU memory of this host at both ends, every grant with the right to map. It ends once no copy of it writes any
 * more, or a bound has passed: see TFD_COPY_MARK.
 */
#define TFD_FLAG_COPIED 128u

/* struct tfd_entry.priority */
#define TFD_PRIORITY_BULK 0u
#define TFD_PRIORITY_LATENCY 1u

/* struct tfd_record.path: provider | rails << 8 | flags << 16 */
#define TFD_PATH_PROVIDER_MASK 0xffu
#define TFD_PATH_LIBFABRIC 1u
#define TFD_PATH_LOCAL 2u
#define TFD_PATH_SIM 3u
#define TFD_PATH_TCP 4u
#define TFD_PATH_VERBS 5u
#define TFD_PATH_CUDA 6u /* the client's own stream copied */
#define TFD_PATH_STAGED 7u /* through host memory: nothing else reached the memory of a device */
#define TFD_PATH_RAILS_SHIFT 8u
#define TFD_PATH_FLAGS_SHIFT 16u
#define TFD_PATH_PACKED 0x10000u /* several pages went as one post */
#define TFD_PATH_EMULATED                                                                       \
	0x20000u /* a rail that it went by has no RDMA write: processors copied at both ends */

/*
 * How a job ends (DESIGN: a job ends exactly once). One table makes the enum, the strings and the
 * Python IntEnum's test. X(number, NAME, sentence)
 */
#define TFD_JOB_STATUS_TABLE(X)                                                \
	X(0, PENDING, "not ended yet")                                         \
	X(1, OK, "acknowledged by the far side")                               \
	X(2, CANCELLED, "stopped by its owner or by a fence")                  \
	X(3, DEADLINE, "its deadline passed first")                            \
	X(4, PEER_LOST, "the far daemon died, restarted or cannot be reached") \
	X(5, REMOTE_ACCESS, "the far side refused the access")                 \
	X(6, LOCAL_ACCESS, "the source memory could not be read")              \
	X(7, INVALID, "the request was wrong; detail names what")              \
	X(8, QUOTA, "a limit of the session was reached")                      \
	X(9, SHUTDOWN, "the daemon stops")

/* Why, in a word: struct tfd_record.detail. X(number, NAME, sentence) */
#define TFD_DETAIL_TABLE(X)                                                                  \
	X(0, NONE, "")                                                                       \
	X(1, BAD_OP, "unknown operation")                                                    \
	X(2, BAD_FLAGS, "unknown flag, priority or non-zero reserved field")                 \
	X(3, BAD_REGION, "the source region handle is not registered in this session")       \
	X(4, SOURCE_BOUNDS, "offset and length leave the source region")                     \
	X(5, BAD_GRANT, "the destination handle is not open in this session")                \
	X(6, DESTINATION_BOUNDS, "offset and length leave the grant")                        \
	X(7, RIGHTS, "the grant lacks this right (a mailbox's is to send only)")             \
	X(8, IMM_RANGE, "the immediate is outside the grant")                                \
	X(9, EXPIRED, "the grant has expired")                                               \
	X(10, REVOKED, "the owner revoked the grant")                                        \
	X(11, STALE, "the owner restarted; get a new descriptor")                            \
	X(12, IMM_BITS, "the immediate needs more than 20 bits")                             \
	X(13, LENGTH, "the length is above 2^40 bytes")                                      \
	X(14, BROKEN_REGION, "the region's pages were taken away by its owner")              \
	X(15, PROVIDER, "the provider reported an error")                                    \
	X(16, HEARTBEAT, "the far daemon fell silent")                                       \
	X(17, CONNECTION, "the connection broke")                                            \
	X(18, BAD_COUNTER, "the immediate has no counter in this session")                   \
	X(19, NO_SUCH_JOB, "no job with that id is in flight")                               \
	X(20, SESSION_ENDED, "the session ended")                                            \
	X(21, TABLE, "the table leaves the arena, or has too many entries")                  \
	X(22, FENCED, "the owner fenced the immediate")                                      \
	X(23, READ_ONLY, "the region to read into was registered read-only")                 \
	X(24, BAD_MAILBOX, "no such mailbox here, or not the message in that slot")          \
	X(25, NO_MEMORY, "the far daemon has no memory left")                                \
	X(26, CHECKSUM, "the bytes at the destination are not those of the source")          \
	X(27, BAD_WATCHER, "no such watcher in this session")                                \
	X(28, BAD_PLAN, "no such plan in this session, or its number is taken")              \
	X(29, DEVICE_MEMORY, "no path to GPU memory: grant map, or share a dmabuf")          \
	X(30, NOT_COPIED, "its client copies GPU memory of this host alone")                 \
	X(31, STILL_COPIED, "its client's stream was not through with it in time")           \
	X(32, STAGING, "GPU memory was not staged: it is freed, its GPU failed, or no room") \
	X(33, ONE_BYTE, "a single byte is not staged to GPU memory: send two or more")

#define TFD_X_STATUS(number, name, sentence) TFD_JOB_##name = number,
enum tfd_job_status { TFD_JOB_STATUS_TABLE(TFD_X_STATUS) TFD_JOB_STATUS_COUNT };
#undef TFD_X_STATUS

#define TFD_X_DETAIL(number, name, sentence) TFD_DETAIL_##name = number,
enum tfd_detail { TFD_DETAIL_TABLE(TFD_X_DETAIL) TFD_DETAIL_COUNT };
#undef TFD_X_DETAIL

/* At offset 0 of the segment. */
struct tfd_segment_header {
	/* lines 0 to 3, constant from before the client sees them; writer: control */
	uint64_t magic;
	uint32_t abi_version;
	uint32_t header_bytes;
	uint64_t segment_bytes;
	uint64_t features; /* none defined; a client refuses bits it does not know */
	uint64_t session_id;
	uint32_t ring_count; /* one ring per domain group */
	uint32_t ring_entries; /* a power of two */
	uint32_t record_count; /* jobs in flight */
	uint32_t counter_count;

	uint64_t ring_offset; /* ring i at ring_offset + i * ring_stride */
	uint64_t ring_stride;
	uint64_t record_offset;
	uint64_t counter_offset;
	uint64_t arena_offset; /* page lists and tables; free for the client's use */
	uint64_t arena_bytes;
	uint64_t watcher_offset;
	uint32_t watcher_count;
	uint32_t plan_count;
	uint64_t _resv0;

	uint8_t daemon_id[16];
	uint8_t boot_epoch[16];
	uint8_t _resv1[32];

	char provider[64]; /* NUL-terminated name for people, as in "libfabric tcp;ofi_rxm 1.17" */

	/* line 4; writer: the daemon's heartbeat thread and control */
	uint64_t heartbeat_ns; /* CLOCK_MONOTONIC; a daemon that lives renews it every 100 ms */
	uint32_t state; /* TFD_SESSION_* */
	uint32_t end_reason; /* enum tfd_detail, valid when state is TFD_SESSION_ENDED */
	uint8_t _resv2[48];

	/* line 5; writer: client */
	uint32_t event_waiters; /* not 0: signal the event fd after every ended job or count */
	uint8_t _resv3[60];

	uint8_t _resv4[128];
};

/* A submit ring's head, followed by ring_entries entries. Indices run free and are masked on use. */
struct tfd_ring {
	/* line 0; writer: client */
	uint32_t tail;
	uint8_t _resv0[60];
	/* line 1; writer: worker */
	uint32_t head;
	uint32_t need_wakeup; /* not 0: the worker sleeps, signal its doorbell after publishing */
	uint8_t _resv1[56];
};

/* One request. Fields that an operation does not use are 0. */
struct tfd_entry {
	uint8_t op;
	uint8_t flags; /* TFD_FLAG_* */
	uint8_t priority;
	uint8_t _resv0;
	uint32_t record; /* completion record that tells the end: job_id modulo record_count */
	uint64_t job_id; /* the client's; not 0; unique among its jobs in flight */
	uint64_t src_region; /* region handle; read: where the bytes go */
	uint64_t src_offset; /* bytes into the region */
	uint64_t dst_grant; /* handle of an opened grant; read: where the bytes are. Scatter, barrier: 0 */
	uint64_t dst_offset; /* bytes into the grant */
	uint64_t length; /* bytes, pages: of each; 0 is a legal write that counts */
	uint32_t imm;
	uint32_t watcher; /* TFD_FLAG_ARMED */
	uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: none */
	uint64_t
		argument; /* TFD_OP_CANCEL: job id; TFD_FLAG_TABLE: bytes into the arena, a multiple of 8; with `marks`: what the trigger has to reach */
	uint64_t
		table_offset; /* bytes into the arena, a multiple of 8; to be left alone until the job has ended */
	uint32_t
		table_count; /* entries of it; 0: the job does nothing, and counts nothing unless TFD_FLAG_COUNT_JOB */
	uint32_t plan; /* TFD_FLAG_PLAN, TFD_OP_LAUNCH: its number, below plan_count */
	uint64_t src_stride; /* pages: bytes from one index to the next */
	uint64_t dst_stride;
	uint64_t fire_at; /* TFD_FLAG_ARMED */
	/* TFD_FLAG_COPIED, of a stream that waits for a watcher before it copies. */
	uint32_t trigger; /* that watcher */
	uint32_t marks; /* 1 + the watcher whose line holds struct tfd_copy_marks; 0: it waits for nothing */
};

/* Pages: `length` bytes from src_offset + src * src_stride go to dst_offset + dst * dst_stride. */
struct tfd_page {
	uint32_t src;
	uint32_t dst;
};

/* Scatter, barrier: `length` bytes from src_offset into the region go to dst_offset into the grant. */
struct tfd_target {
	uint64_t dst_grant;
	uint64_t src_offset;
	uint64_t dst_offset;
	uint64_t length;
};

/*
 * The table of a plan, in the arena: this line, then as many entries as the plan was made with (write: 1): struct tfd_page, or struct
 * tfd_slice. Writer: client, or a kernel of a device; to be left alone from a launch (armed: from the bump that starts it) until
 * that job has ended.
 */
struct tfd_plan_table {
	uint32_t count; /* of the entries: those that the next launch takes, from the first on */
	uint8_t _resv0[60];
};

/* `length` bytes from src_offset into the plan's source go to dst_offset into the grant: of a scatter the one of the same place. */
struct tfd_slice {
	uint64_t src_offset;
	uint64_t dst_offset;
	uint64_t length;
};

/* Behind the rows of a copied plan of slices, for its client's stream alone: where the grant of a row is mapped, and its bytes. */
struct tfd_plan_place {
	uint64_t address;
	uint64_t bytes;
};

/*
 * The memory of a mailbox, in a region of its owner: a ring of letters, then the slots. Message number n is told by
 * letter n modulo slots, written before the mailbox's counter passes n, and left alone until message n + slots comes: to be
 * read before that one or any later one is released. Writer: worker.
 */
struct tfd_letter {
	uint32_t slot;
	uint32_t bytes;
	uint64_t number;
};

#define TFD_MAILBOX_SLOTS_MAX 65536u
#define TFD_MESSAGE_BYTES_MAX 8192u
#define TFD_LINES(bytes) (((bytes) + TFD_LINE - 1) / TFD_LINE * TFD_LINE)
#define TFD_LETTERS_BYTES(slots) TFD_LINES((slots) * sizeof(struct tfd_letter))
#define TFD_MAILBOX_BYTES(slots, slot_bytes)                                                           \
	(TFD_LETTERS_BYTES((uint64_t)(slots)) + (uint64_t)(slots) * TFD_LINES((uint64_t)(slot_bytes)))

/* How a job ended. Writer: worker, but for `waiters`. */
struct tfd_record {
	uint64_t done_id; /* the job's id once it has ended; published last */
	uint32_t status; /* enum tfd_job_status */
	uint32_t detail; /* enum tfd_detail */
	uint64_t bytes; /* acknowledged by the far side */
	uint64_t accepted_ns; /* CLOCK_MONOTONIC: taken from the ring */
	uint64_t posted_ns; /* last piece handed to the NIC */
	uint64_t ended_ns;
	uint32_t path;
	uint32_t event; /* futex word: changes whenever a wake-up is due */
	uint32_t waiters; /* writer: client; number of threads that sleep on `event` */
	uint32_t _resv0;
};

/* An ImmCounter. Writer: worker, but for `waiters` and `wake_at`. */
struct tfd_counter {
	uint64_t value; /* landed writes; only grows */
	uint64_t gate; /* value, plus TFD_GATE_FAULT while a fault is not acknowledged */
	uint64_t faults; /* times that writes on this immediate became untrustworthy */
	uint64_t lost; /* writes known lost */
	uint64_t acknowledged; /* faults that the owner has acknowledged */
	uint32_t imm; /* whose count this is */
	uint32_t in_use; /* 1 once the counter belongs to `imm` */
	uint32_t event; /* futex word: changes whenever a wake-up is due */
	uint32_t waiters; /* writer: client */
	uint64_t
		wake_at; /* writer: client, and the worker, which clears it; counts below it wake nobody. 0: every count does */
};

/*
 * What armed jobs wait for. Writer: client, whose threads add to it, or one kernel of a device, with release stores at system
 * scope: what it wrote before is what the jobs move.
 */
struct tfd_watcher {
	uint64_t value; /* only grows */
	uint8_t _resv0[56];
};

/*
 * In a watcher's place: which copies are void whose streams wait for a trigger. Copy number v (its fire_at) has mark v modulo
 * TFD_COPY_MARKS. Writer: client, TFD_COPY_MARK(v) before it publishes the job; client and worker, who replace that, and nothing else, by
 * TFD_COPY_VOID(v) when the job fails. Who finds the trigger not reached after that knows that the copy will find itself void.
 */
#define TFD_COPY_MARKS 16u
#define TFD_COPY_MARK(v) ((uint32_t)((v) << 1))
#define TFD_COPY_VOID(v) ((uint32_t)((v) << 1) | 1u)

struct tfd_copy_marks {
	uint32_t marks[TFD_COPY_MARKS];
};

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The client's half of a session: submit, wait, read counters. Everything here works on the mapped
 * segment (abi.h); no provider code is loaded. Any thread may call any function, but for
 * tfd_client_close. Returns 0 or -errno; out-parameters are untouched on failure.
 */
#ifndef TRANSFERD_CLIENT_H
#define TRANSFERD_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#include "transferd/abi.h"

struct tfd_client; /* one attached session */

/* A finished job, copied out of its completion record. */
struct tfd_result {
	uint32_t status; /* enum tfd_job_status */
	uint32_t detail; /* enum tfd_detail */
	uint64_t bytes;
	uint64_t submitted_ns; /* CLOCK_MONOTONIC, when the client published it */
	uint64_t accepted_ns;
	uint64_t posted_ns;
	uint64_t ended_ns;
	uint32_t path;
};

struct tfd_counter_view {
	uint64_t value;
	uint64_t faults;
	uint64_t lost;
	uint64_t acknowledged;
};

/*
 * Maps the segment behind `segment_fd` and checks its header. The fds stay the caller's; `doorbell_fds`
 * has one non-blocking pipe (or eventfd) per ring and must outlive the client.
 * -EPROTO: not a segment of this ABI; -ENOMEM, or what mmap says.
 */
int tfd_client_open(int segment_fd, const int *doorbell_fds, uint32_t doorbell_count,
                    struct tfd_client **out);
void tfd_client_close(struct tfd_client *client); /* idempotent on NULL; no other call may run */

const struct tfd_segment_header *tfd_client_header(const struct tfd_client *client);

/*
 * Publishes entries[0..count) on ring `ring` in one go: all or none. Fills `record` and `job_id` of each entry.
 * -EAGAIN: the ring or the completion records are full, wait for a job to end; -E2BIG: more than either
 * can ever hold; -EPIPE: the session ended; -EINVAL: no such ring.
 */
int tfd_client_submit(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries, uint32_t count);

/*
 * As submit, but waits for room. timeout_ns < 0: no bound. Adds -ETIMEDOUT (with 0, -EAGAIN stays) and -EINTR (a
 * signal came, nothing was published).
 */
int tfd_client_submit_wait(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                           uint32_t count, int64_t timeout_ns);
/*
 * One job without an entry to fill: one foreign call from a scripting language. deadline_ns counts from now; 0:
 * none. `argument` is for TFD_OP_CANCEL. Returns the job's id, which is positive, or as tfd_client_submit_wait.
 */
int64_t tfd_client_job_submit(struct tfd_client *client, uint32_t ring, uint8_t op, uint8_t priority,
                              uint32_t imm, uint64_t src_region, uint64_t src_offset, uint64_t dst_grant,
                              uint64_t dst_offset, uint64_t length, uint64_t deadline_ns, uint64_t argument,
                              int64_t timeout_ns);

/* ---- jobs with tables: pages, scatter, barrier, send ---- */

/* What an array of indices holds. */
#define TFD_INDEX_I32 0u
#define TFD_INDEX_I64 1u
#define TFD_INDEX_U32 2u
#define TFD_INDEX_U64 3u

/* What the table of one entry is made from; its length is the entry's table_count. Unused fields are 0. */
struct tfd_client_table {
	const void *src; /* pages: indices; borrowed for the call, as are the next two */
	const void *dst;
	const struct tfd_target *targets; /* scatter, barrier */
	const void *bytes; /* send: the message */
	/*
	 * scatter, in place of targets: rows of four numbers of src_form, one after the other: index into members, source from
	 * src_start on, destination, length.
	 */
	const void *rows;
	const uint64_t *members; /* handles of grants */
	uint64_t src_start; /* rows: bytes into the region where their offsets count from */
	uint64_t src_end; /* pages, rows: bytes into the region that none may pass */
	uint64_t dst_end; /* pages: bytes of the grant; UINT64_MAX: not known here */
	uint32_t src_form; /* TFD_INDEX_* */
	uint32_t dst_form;
	uint32_t member_count;
	uint32_t _pad;
	/*
	 * Scatter with TFD_FLAG_COPIED, and a plan of a copied write with a table: of each target, or member of rows, where its grant's first
	 * byte is mapped, and its bytes.
	 */
	const uint64_t *places;
	const uint64_t *ends;
};

#define TFD_FAULT_GRANT 4u /* side: a target leaves its grant */

/* The first number that is wrong. */
struct tfd_table_fault {
	uint32_t entry; /* of the batch */
	uint32_t side; /* pages, 0: src, 1: dst; rows: the column; TFD_FAULT_GRANT */
	uint32_t position; /* in that array; rows: the row */
	uint32_t _pad;
	uint64_t legal; /* how many numbers are legal there, from 0 on */
};

/*
 * As tfd_client_submit_wait, for entries with and without tables (tables[i] belongs to entries[i]): checks all pages and rows, copies the
 * tables into the arena, publishes. All or none. Waits for room in the arena as for room in the ring; a table's place is free again
 * once its job has ended. Adds -ERANGE: *fault tells which number leaves the region, the grant or the members; -EMSGSIZE: the tables are larger
 * than tfd_client_arena_bytes (each takes whole lines).
 */
int tfd_client_submit_tables(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                             const struct tfd_client_table *tables, uint32_t count, int64_t timeout_ns,
                             struct tfd_table_fault *fault);
/* The check alone; needs no client. -ERANGE. */
int tfd_client_tables_check(const struct tfd_entry *entries, const struct tfd_client_table *tables,
                            uint32_t count, struct tfd_table_fault *fault);
uint64_t tfd_client_arena_bytes(const struct tfd_client *client);

/* ---- how jobs end ---- */

/* -EAGAIN while the job runs; -EPIPE: session over and the job's end unknown; -ENOENT: released or unknown id. */
int tfd_client_job_poll(struct tfd_client *client, uint64_t job_id, struct tfd_result *out);
/*
 * As poll, but waits. timeout_ns < 0: no bound. Adds -ETIMEDOUT, and -EINTR: a signal came, call again. spin_ns: how
 * long to spin before it sleeps, at most 10 ms.
 */
int tfd_client_job_wait(struct tfd_client *client, uint64_t job_id, int64_t timeout_ns, uint64_t spin_ns,
                        struct tfd_result *out);
/*
 * Gives the completion record back: at once if the job has ended, else when it ends. Idempotent. (The results of ended
 * jobs that nobody has released move to private memory when records run short, so holding them blocks nobody.)
 */
void tfd_client_job_release(struct tfd_client *client, uint64_t job_id);

/* Slot of the counter of `imm`, as given by the daemon. -ERANGE: no such slot. */
int tfd_client_counter_read(struct tfd_client *client, uint32_t slot, struct tfd_counter_view *out);
/* The same of many; of one that is out of range the rest is not read. */
int tfd_client_counters_read(struct tfd_client *client, const uint32_t *slots, uint32_t count,
                             struct tfd_counter_view *out);
/*
 * Waits for value >= target: 0. -EIO: faults passed the acknowledged baseline first; -ETIMEDOUT; -EPIPE: the
 * session ended; -EINTR; -ERANGE. A target that is reached wins over a fault.
 */
int tfd_client_counter_wait(struct tfd_client *client, uint32_t slot, uint64_t target, int64_t timeout_ns,
                            uint64_t spin_ns);

/* ---- watchers: words that armed jobs wait for ---- */

/* Takes a free one; its word is 0. -ENOSPC: all are taken. */
int tfd_client_watcher_open(struct tfd_client *client, uint32_t *slot);
/* Gives it back. No job waits for it any more: TFD_OP_DISARM has ended, behind which submitting an armed one is -ESTALE. */
void tfd_client_watcher_close(struct tfd_client *client, uint32_t slot);
/*
 * Adds n to its word, and wakes the worker if it sleeps. Several threads may; while a device writes the word nobody else does.
 * -EPIPE: the session ended; -ERANGE: no such watcher, or its word would pass 2^64.
 */
int tfd_client_watcher_bump(struct tfd_client *client, uint32_t slot, uint64_t n);
int tfd_client_watcher_read(struct tfd_client *client, uint32_t slot, uint64_t *value);
/* Stores its word, for streams of a device: no job waits for it, and nobody is woken. -ERANGE. Also once the session has ended. */
int tfd_client_watcher_set(struct tfd_client *client, uint32_t slot, uint64_t value);

/* ---- plans: jobs that are kept to be launched ---- */

/*
 * Makes a plan of one entry (and its table, if it has one): publishes it, with TFD_FLAG_PLAN, and fills its `plan`, record and job_id. It can
 * be launched once that job has ended OK; otherwise it is to be closed. `with_table`: not 0: launches read their sizes and offsets from
 * tfd_client_plan_table, which holds those of the entry in the beginning (pages have it in any case). Of a scatter, src_offset
 * and length are the part of the region that slices count from. Waits for room as tfd_client_submit_tables, with the same errors;
 * -ENOSPC: the session has all the plans that it may have.
 */
int tfd_client_plan_open(struct tfd_client *client, uint32_t ring, struct tfd_entry *entry,
                         const struct tfd_client_table *table, uint32_t with_table, int64_t timeout_ns,
                         struct tfd_table_fault *fault);
/* Its table (struct tfd_plan_table), valid until it is closed, and in mapped memory until tfd_client_close; NULL: it has none. */
void *tfd_client_plan_table(struct tfd_client *client, uint32_t plan);
/* Launches it, as tfd_client_job_submit submits a job. */
int64_t tfd_client_plan_launch(struct tfd_client *client, uint32_t ring, uint32_t plan, uint64_t deadline_ns,
                               int64_t timeout_ns);
/* Gives it back, after TFD_OP_FORGET or a failure. Its table's place is free once the last launch has ended. */
void tfd_client_plan_close(struct tfd_client *client, uint32_t plan);

/* The segment's event fd is signalled while this is not 0 (one caller decides). */
void tfd_client_set_event_waiters(struct tfd_client *client, uint32_t value);

/* The daemon is gone: every present and future wait returns -EPIPE. */
void tfd_client_set_dead(struct tfd_client *client);
int tfd_client_is_dead(const struct tfd_client *client);

/*
 * Moves pages in place into shared memory: copies [address, address + length) into `memfd` and maps that over the same
 * addresses. For pages of a private mapping that nobody else writes to meanwhile. -EINVAL: not whole pages.
 */
int tfd_memory_adopt(void *address, size_t length, int memfd);

uint64_t tfd_client_now_ns(void); /* CLOCK_MONOTONIC, the clock of every time stamp and deadline here */

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the daemon's control plane calls, through cffi. The control plane decides (who may, how much, with
 * whom); the core moves bytes and counts. Names of things are 64-bit handles that are never used twice.
 *
 * Threads: calls may come from any control thread; they lock, and most hand a command to the group's worker
 * and wait for its answer (tens of microseconds; tfd_region_add as long as registration takes). None may be
 * made from a worker. Returns 0 or -errno; out-parameters are untouched on failure. Calls with `error` fill
 * it with one sentence for people.
 */
#ifndef TRANSFERD_CORE_H
#define TRANSFERD_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "transferd/abi.h"

#define TFD_NAME_MAX 64
#define TFD_ADDRESS_MAX 256
#define TFD_ERROR_MAX 256
#define TFD_WHY_MAX 512
#define TFD_MAX_NICS 32 /* of one domain group */
#define TFD_MAX_RAILS 64 /* and `local`, and a staged one over each as far as they go */

struct tfd_core; /* one per daemon */

struct tfd_error {
	char text[TFD_ERROR_MAX];
};

/* ---- core ---- */

struct tfd_core_options {
	uint8_t daemon_id[16];
	uint8_t boot_epoch[16];
	uint32_t spin_us;       /* how long an idle worker polls before it sleeps */
	uint32_t busy;          /* not 0: workers never sleep */
	uint32_t max_sessions;  /* at most 511: name space 0 is never given */
	uint32_t
		stepped; /* not 0: no threads, time stands still between tfd_core_step calls; for simulations */
	uint64_t copy_ns; /* how long what has failed waits for its client's stream (TFD_FLAG_COPIED) */
};

int tfd_core_open(const struct tfd_core_options *options, struct tfd_core **out, struct tfd_error *error);
/*
 * One pass of every worker at time `now_ns`, which must not go back; whether anything was done. Only with `stepped`, where commands run
 * at once in the caller and all calls come from one thread.
 */
int tfd_core_step(struct tfd_core *core, uint64_t now_ns);
/* Stops all threads and frees everything; live sessions end. Idempotent on NULL. */
void tfd_core_close(struct tfd_core *core);

/* ---- events: what the control plane has to be told ---- */

enum tfd_event_type {
	TFD_EVENT_NONE = 0,
	TFD_EVENT_SESSION_BROKEN = 1, /* id: session; detail: why. Its rings are no longer read; close it */
	TFD_EVENT_SESSION_QUIET =
		2, /* id: session that was told to end: no job of it is in flight any more */
	TFD_EVENT_OPEN_QUIET = 3, /* id: open that was revoked: no byte on it can land any more */
	TFD_EVENT_CONN_LOST = 4, /* id: conn that the provider reported broken; close it */
	TFD_EVENT_PEER_SILENT = 5, /* id: peer whose heartbeats stopped */
	TFD_EVENT_LOST =
		6, /* writes that will not land. id: open; imm; count: writes known lost; units: see tfd_counters_fault */
	TFD_EVENT_REGION_BROKEN = 7, /* id: region whose owner took pages away */
	TFD_EVENT_FENCE_QUIET =
		8, /* id: open; count: number of the fence: no byte on its immediates can land any more; detail: STILL_COPIED: but for a stream's that was not through in time */
	TFD_EVENT_CONN_PROVEN = 9, /* id: conn of tfd_conn_probe by which the far side has answered */
	TFD_EVENT_RAIL_STATE = 10, /* id: number of a rail in its group; count: enum tfd_rail_state */
	TFD_EVENT_STAGE_NEEDED =
		11, /* id: memory that a copy waits for: no helper has it open; count: the group */
	TFD_EVENT_STAGE_SILENT =
		12, /* id: stage whose helper is dead, or does not copy: end it, close it; count: the group */
};

struct tfd_event {
	uint32_t type;
	uint32_t detail; /* enum tfd_detail */
	uint64_t id;
	uint32_t imm;
	uint32_t _pad;
	uint64_t count;
	uint64_t units;
	uint64_t
		session; /* handle of the session whose open or region it is: those names are its own; else 0 */
};

int tfd_core_event_fd(const struct tfd_core *core); /* readable while events wait; the core's */
/* Moves up to `max` events out; returns how many. Clears the fd when none is left. */
uint32_t tfd_core_events(struct tfd_core *core, struct tfd_event *events, uint32_t max);

/* ---- providers and domain groups ---- */

enum tfd_rail_state {
	TFD_RAIL_UP = 1,
	TFD_RAIL_DOWN = 2, /* its port has no link: it may come back */
	TFD_RAIL_GONE = 3, /* its device was removed: for as long as the daemon runs */
};

struct tfd_rail_info {
	char name[TFD_NAME_MAX]; /* interface or device */
	char provider[TFD_NAME_MAX]; /* "tcp;ofi_rxm" */
	char protocol[TFD_NAME_MAX]; /* what both ends must have alike: "libfabric/tcp;ofi_rxm/1.17" */
	uint64_t max_message_bytes;
	uint64_t bytes_sent; /* acknowledged */
	uint64_t writes_sent;
	uint64_t imms_received;
	uint64_t errors;
	uint32_t ordered; /* not 0: an immediate on the last segment follows the earlier ones' data */
	uint32_t state; /* enum tfd_rail_state */
	uint32_t max_parts; /* separate ranges that one post may carry (packing); 0 as 1 */
	uint32_t imm_depth; /* immediates that can have arrived and not been polled; 0: without bound */
	uint32_t
		channels; /* of a connection, each ordered by itself: 3: one for each enum tfd_traffic; 0 or 1: all is in one order */
	uint32_t
		queue_depth; /* work requests that a connection's queue takes, if they are more than 64; else 0 */
	uint32_t
		emulated; /* not 0: writes are packets that the far processor copies, for lack of RDMA write */
	char why[TFD_WHY_MAX]; /* what the provider chose on it and why: port, GID, …; "" if there was no choice */
	uint64_t credit_stalls; /* times that a connection began to wait for a credit of the far side */
	uint64_t credit_floods; /* connections whose far side posted more immediates than it was granted */
};

/* For provider `verbs`. 0 everywhere is the default. */
struct tfd_verbs_options {
	uint32_t port; /* 0: the first that is active */
	uint32_t gid_given; /* not 0: gid_index instead of the rule */
	uint32_t gid_index;
	uint32_t link_local; /* not 0: a link-local GID will do, if there is no other */
	uint32_t pkey; /* 0: 0xffff, else the first of the table */
	uint32_t service_level; /* of latency and messages; 0 to 15 */
	uint32_t bulk_service_level;
	uint32_t traffic_class; /* RoCE: DSCP << 2; 0 to 255 */
	uint32_t mtu; /* bytes: 256 to 4,096; 0: the port's */
	uint32_t timeout; /* of an acknowledgement: 4.096 us * 2^timeout; 0: 14 (67 ms) */
	uint32_t retries; /* 1 to 7; 0: 7 */
	uint32_t plain_posts; /* not 0: ibv_post_send even where the device has ibv_wr_* */
};

struct tfd_group_options {
	char provider[TFD_NAME_MAX]; /* "libfabric" */
	char fabric[TFD_NAME_MAX]; /* libfabric's own provider name; "" lets us choose */
	char rails[TFD_MAX_NICS][TFD_NAME_MAX]; /* interface or device names, or addresses */
	uint32_t rail_count;
	uint32_t
		with_local; /* not 0: one rail more, the last, for writes within the group (providers/local) */
	uint32_t copy_threads; /* that copy for it what is long; 0: the worker copies all */
	uint64_t
		staging_bytes; /* of the pool of host memory that staged rails have between them; 0: there are none */
	uint32_t segment_bytes; /* largest piece posted at once; 0: default */
	uint32_t cut_bytes; /* least part of a write that goes by a rail of its own; 0: default */
	uint32_t window_bytes; /* most bytes in flight per connection; 0: default */
	char library[256]; /* path of libfabric or libibverbs; "" lets dlopen find it */
	struct tfd_verbs_options verbs;
};

/* -ENOENT: provider's library missing; -ENODEV: no such rail; -ENOTSUP: library too old; error says what to do. */
int tfd_group_open(struct tfd_core *core, const struct tfd_group_options *options, uint32_t *group,
                   struct tfd_error *error);
int tfd_group_rail_count(struct tfd_core *core, uint32_t group, uint32_t *count);
int tfd_group_rail(struct tfd_core *core, uint32_t group, uint32_t rail, struct tfd_rail_info *out);

/* ---- sessions ---- */

#define TFD_WEIGHT_MAX 1000

struct tfd_session_options {
	uint32_t group; /* for now one group: the session's ring 0 */
	uint32_t ring_entries; /* power of two */
	uint32_t record_count;
	uint32_t counter_count;
	uint32_t watcher_count; /* at most 65,536 */
	uint32_t plan_count; /* at most 65,536 */
	uint64_t arena_bytes;
	uint64_t session_id; /* the control plane's own number, shown in the segment */
	uint32_t weight; /* its share of a rail beside other sessions; 1 to TFD_WEIGHT_MAX; 0: 1 */
};

struct tfd_session_fds { /* the caller's to close */
	int segment_fd; /* memfd, sealed against shrinking and growing */
	int doorbell_fd; /* pipe: a write of any bytes wakes the worker; non-blocking, full is as good as written */
	int event_fd; /* pipe: readable after jobs ended or counts changed, while event_waiters is set */
};

/* -EMFILE: no name space is free; -EINVAL: sizes. The handle names the session in every later call. */
int tfd_session_open(struct tfd_core *core, const struct tfd_session_options *options, uint64_t *session,
                     struct tfd_session_fds *fds, struct tfd_error *error);
/* The client has mapped the segment: nobody else may map it writable (F_SEAL_FUTURE_WRITE). */
int tfd_session_sealed(struct tfd_core *core, uint64_t session);
/*
 * Ends a session: its rings are not read any more, its jobs are cancelled; TFD_EVENT_SESSION_QUIET follows.
 * Regions, counters and opens stay until tfd_session_close.
 */
int tfd_session_end(struct tfd_core *core, uint64_t session, uint32_t detail);
/*
 * Frees it with its regions, opens and segment. -EBUSY before TFD_EVENT_SESSION_QUIET. Its name space is free for
 * the next session at once, so call it only when no opener can write to it any more.
 */
int tfd_session_close(struct tfd_core *core, uint64_t session);
/* The name space that its immediates carry on the wire. */
int tfd_session_name_space(struct tfd_core *core, uint64_t session, uint32_t *name_space);

struct tfd_session_info {
	uint64_t jobs_ended;
	uint64_t jobs_failed;
	uint64_t jobs_in_flight;
	uint64_t bytes_sent;
	uint64_t imms_received;
};
int tfd_session_stat(struct tfd_core *core, uint64_t session, struct tfd_session_info *out);

struct tfd_job_info {
	uint64_t session;
	uint64_t job_id;
	uint64_t open; /* handle of its destination */
	uint64_t length;
	uint64_t acknowledged;
	uint64_t age_ns;
	uint32_t op;
	uint32_t imm;
	uint32_t status; /* PENDING, or how it will end once it is quiet */
	uint32_t priority;
};
/* Jobs in flight of one session, oldest first, at most `max`; fills *count. */
int tfd_jobs_list(struct tfd_core *core, uint64_t session, struct tfd_job_info *jobs, uint32_t max,
                  uint32_t *count);

/* ---- counters ---- */

/*
 * Gives counters to the immediates first..first+count-1 of a session; keeps those that have one. Fills slots[count].
 * -ENOSPC: not so many counters are left (none is given then); -ERANGE: above 20 bits.
 */
int tfd_counters_add(struct tfd_core *core, uint64_t session, uint32_t first, uint32_t count,
                     uint32_t *slots);
int tfd_counter_slot(struct tfd_core *core, uint64_t session, uint32_t imm, uint32_t *slot); /* -ENOENT */
/*
 * Writes on these immediates can no longer be trusted; `lost` of them per immediate are known lost. `units`: eighths of
 * writes that have landed, or are about to, of those that are lost, sent by `peer`: they are taken out again, so that a retry on
 * the same immediate reaches the same target. `value` never falls; it waits until the sum has passed it.
 */
int tfd_counters_fault(struct tfd_core *core, uint64_t session, uint32_t first, uint32_t count, uint64_t lost,
                       uint64_t units, uint64_t peer);
/* A peer is gone and tells nothing any more: parts of writes that it has not completed are taken out of all counts. */
int tfd_counters_settle(struct tfd_core *core, uint64_t peer);

/* ---- regions ---- */

struct tfd_region_options {
	int fd; /* memfd, or a file of tmpfs or hugetlbfs; of a device: dma-buf, or -1; duplicated, stays the caller's */
	uint32_t writable; /* not 0: may be a destination, too */
	uint64_t offset; /* into the file, a multiple of the page size; into the dma-buf */
	uint64_t length;
	uint64_t address; /* of a device: what it is called in posts; as far into its page as `offset` */
	uint32_t
		device; /* not 0: memory of a device, which is not mapped here; rails that cannot reach it have no key */
	uint32_t _pad;
	uint64_t
		memory; /* of a device: number of its allocation, for helpers (Staging, below); 0: none may copy it */
	uint64_t memory_offset; /* into that */
};

/* The size of a dma-buf. -EINVAL: the fd is none. */
int tfd_dmabuf_size(int fd, uint64_t *bytes);

struct tfd_region_key {
	uint64_t key; /* remote key on that rail; 0: the rail does not reach it */
	uint64_t address; /* what the rail's writes count from: virtual address or 0 */
};

/*
 * Maps and registers on every rail that is not gone. -EINVAL: bounds (file too short, offset not on a page); -ENOMEM: memlock limit.
 * Memory of a device is registered by those rails that take a dma-buf, if there is one.
 */
int tfd_region_add(struct tfd_core *core, uint64_t session, const struct tfd_region_options *options,
                   uint64_t *region, struct tfd_error *error);
/* Deregisters and unmaps. -EBUSY while jobs of its own session read it. The caller has seen to it that no opener writes. */
int tfd_region_remove(struct tfd_core *core, uint64_t session, uint64_t region);
/* keys[rail_count of the group]; 0 on a rail that was gone when it was added */
int tfd_region_keys(struct tfd_core *core, uint64_t session, uint64_t region, struct tfd_region_key *keys,
                    uint32_t max);

/* ---- staging: helper processes that copy memory of devices (stage.h) ---- */

/* What a helper is to be given; the caller's to close. */
struct tfd_stage_fds {
	int ring_fd; /* memfd: struct tfd_stage */
	int pool_fd; /* memfd */
	int wake_fd; /* eventfd */
};

struct tfd_stage_info {
	uint64_t copies[2]; /* requested, by ring: TFD_STAGE_D2H, TFD_STAGE_H2D */
	uint64_t bytes[2];
	uint64_t failed;
	uint64_t waiting; /* requested and not done */
	uint32_t state; /* enum tfd_stage_state */
	uint32_t _pad;
};

/*
 * Makes what a helper shares with the group's worker. Memory is copied once tfd_stage_memory_set has said that the helper has it open.
 * -ENOTSUP: the group has no staged rails.
 */
int tfd_stage_open(struct tfd_core *core, uint32_t group, uint64_t *stage, struct tfd_stage_fds *fds,
                   struct tfd_error *error);
/* Its process has ended: what was under way there fails, and no helper has its memories open any more. */
int tfd_stage_close(struct tfd_core *core, uint32_t group, uint64_t stage);
int tfd_stage_stat(struct tfd_core *core, uint32_t group, uint64_t stage, struct tfd_stage_info *out);
/* The helper has that memory open: what waits for it goes on. */
int tfd_stage_memory_set(struct tfd_core *core, uint32_t group, uint64_t memory, uint64_t stage);
/* It cannot be opened: one post that waits for it fails, and breaks its connection; the next one asks again. */
int tfd_stage_memory_fail(struct tfd_core *core, uint32_t group, uint64_t memory);
/* No region names it any more: no request for it follows. Idempotent. */
int tfd_stage_memory_forget(struct tfd_core *core, uint32_t group, uint64_t memory);

/* ---- connections: one (local rail, remote rail, direction) ---- */

/*
 * Makes the local half and tells its address, to be handed to the other side. `outgoing`: this side writes. `peer`: a
 * number of control's own for whom it leads to, not 0. -ENODEV: no such rail, or its device is gone; -ENETDOWN: its port is down.
 */
int tfd_conn_open(struct tfd_core *core, uint32_t group, uint32_t rail, uint32_t outgoing, uint64_t peer,
                  uint64_t *conn, void *address, size_t *address_bytes, struct tfd_error *error);
/* Joins it to the other side's half. -EPROTO: address is not of this provider. */
int tfd_conn_start(struct tfd_core *core, uint64_t conn, const void *address, size_t address_bytes,
                   struct tfd_error *error);
#define TFD_CHANNELS_MAX 3u /* of a connection */

/* How many immediates have landed by a connection, by each of its channels (tfd_rail_info): those that were posted first there. */
struct tfd_landed {
	uint64_t imms[TFD_CHANNELS_MAX];
	uint32_t channels; /* 0: unknown */
	uint32_t _pad;
};

/*
 * Destroys the local half; when this returns 0 nothing of it is in flight. -ENOENT: it is gone already, or is being closed.
 * -EAGAIN: it carries nothing any more, but a GPU's helper copies yet what has come by it, or what was to go: to be closed again, until
 * that has done so or its stage was closed.
 *
 * Incoming: no byte can land any more. *landed tells how many immediates have; unknown where the rail keeps no order or does
 * not tell connections apart; to be handed to the writer.
 * Outgoing: `far_landed` is what the far side told after it had closed its half, else NULL: unknown, as is what cannot be (of other
 * channels, more than was posted). Known: what has not landed goes out again by other paths of the same open, where there are
 * any left; else, and for what is unknown, jobs end with PEER_LOST (`detail`). Either may be NULL.
 */
int tfd_conn_close(struct tfd_core *core, uint64_t conn, uint32_t detail, const struct tfd_landed *far_landed,
                   struct tfd_landed *landed);
/*
 * Has the far side answer by a started, outgoing connection that no open has yet, by a read of no bytes: TFD_EVENT_CONN_PROVEN
 * follows, or TFD_EVENT_CONN_LOST, or within the caller's patience neither.
 * -ENOENT: closed; -EINVAL: not started, or not outgoing; -EBUSY: probed before.
 */
int tfd_conn_probe(struct tfd_core *core, uint64_t conn);

/* ---- opens: a grant of another session, as one session may use it ---- */

struct tfd_open_path {
	uint64_t conn; /* an outgoing connection */
	uint64_t key; /* remote key */
	uint64_t address; /* where the grant begins, in the terms of that key */
};

struct tfd_open_options {
	struct tfd_open_path paths[TFD_MAX_PATHS];
	uint32_t path_count;
	uint32_t rights; /* TFD_RIGHT_* */
	uint64_t length; /* bytes */
	uint32_t imm_first;
	uint32_t imm_count;
	uint32_t name_space; /* of the receiver's session */
	uint64_t expires_ns; /* CLOCK_MONOTONIC; 0: never */
	/*
	 * Not 0: memory of a device. A path with key 0 takes immediates alone; there may be no path at all: then every job on it
	 * ends with `unreached`.
	 */
	uint32_t device;
	/*
	 * Why none of the paths reaches memory of a device: 0: TFD_DETAIL_DEVICE_MEMORY; or another would that is not there yet, and jobs end
	 * PEER_LOST so long: TFD_DETAIL_CONNECTION: it is down, TFD_DETAIL_STAGING: it is a staged one.
	 */
	uint32_t unreached;
};

#define TFD_RIGHT_WRITE 1u
#define TFD_RIGHT_READ 2u
#define TFD_RIGHT_MAP 8u /* of memory of a device */
#define TFD_RIGHT_SEND 4u /* each path's key is the number of the mailbox; `length` its slot_bytes */

int tfd_open_add(struct tfd_core *core, uint64_t session, const struct tfd_open_options *options,
                 uint64_t *open);
/*
 * Gives an open another path: in place of path `index`, or as one more where the open has `index` paths. Jobs use it from
 * then on, those in flight, too. -ENOENT: no such open; -ENOTCONN: no such outgoing connection; -EBUSY: the
 * connection of the path that is there has not been closed; -EINVAL: more than TFD_MAX_PATHS.
 */
int tfd_open_path_set(struct tfd_core *core, uint64_t session, uint64_t open, uint32_t index,
                      const struct tfd_open_path *path);
/* New jobs are refused with `detail`; those in flight are cancelled; TFD_EVENT_OPEN_QUIET follows (at once if idle). */
int tfd_open_revoke(struct tfd_core *core, uint64_t session, uint64_t open, uint32_t detail);

struct tfd_imm_range {
	uint32_t first;
	uint32_t count; /* at least 1 */
};
/*
 * Cancels the jobs that were submitted on these immediates, with TFD_DETAIL_FENCED; later ones go on, and so do reads, which have no
 * immediate. TFD_EVENT_FENCE_QUIET with `fence`, a number of the caller's, follows once none of those jobs is in flight (at once if
 * there are none), after the TFD_EVENT_LOST of each. `ranges`, copied: ascending, none overlaps another; else -ERANGE.
 */
int tfd_open_fence(struct tfd_core *core, uint64_t session, uint64_t open, const struct tfd_imm_range *ranges,
                   uint32_t range_count, uint64_t fence);
/* Forgets a revoked, quiet open. -EBUSY otherwise. */
int tfd_open_remove(struct tfd_core *core, uint64_t session, uint64_t open);

/* ---- mailboxes ---- */

struct tfd_mailbox_options {
	uint64_t region; /* writable, of the same session; it cannot be removed before the mailbox */
	uint64_t offset; /* into it, a multiple of 64: TFD_MAILBOX_BYTES from here on */
	uint32_t slots;
	uint32_t slot_bytes; /* longest message */
};

struct tfd_mailbox_info {
	uint64_t mailbox; /* number, never used twice; what a peer's open gives as key of its paths */
	uint32_t counter; /* slot of the counter that grows by 1 with each message */
	uint32_t _pad;
	uint64_t first; /* its value now: number of the first message */
};

/*
 * -ENOENT: no such session or region; -EINVAL: sizes, a region that is read-only; -ENOSPC: no counter is left; -EDQUOT: the session's
 * mailboxes would have more than 262,144 slots.
 */
int tfd_mailbox_add(struct tfd_core *core, uint64_t session, const struct tfd_mailbox_options *options,
                    struct tfd_mailbox_info *out, struct tfd_error *error);
/*
 * Messages for it are refused from now on, and its counter is faulted, so that waits for a message end. Its grants have ended
 * before: a sender that waits for a slot is not told.
 */
int tfd_mailbox_remove(struct tfd_core *core, uint64_t session, uint64_t mailbox);
/*
 * Takes the oldest message that was not taken by this call and releases its slot; *bytes: room in `buffer`, then the message's
 * length. -EAGAIN: none is there; -EMSGSIZE: no room. For clients without shared memory.
 */
int tfd_mailbox_take(struct tfd_core *core, uint64_t session, uint64_t mailbox, void *buffer, size_t *bytes);

/* ---- submitting for clients that only speak gRPC ---- */

#define TFD_CONTROL_TABLES                                                                                  \
	(16u << 20) /* bytes of tables of a session's jobs in flight; more only for one submit at a time */

/*
 * The same entries, through a ring of the daemon's own in front of the same validation. Fills job_id of each.
 * `tables`, copied: what the entries' table_offset count from; NULL for none.
 * -EAGAIN: full, or no room for the tables; -E2BIG: more than 4,096; -ESHUTDOWN: the session ends. Ends are read with tfd_job_result.
 */
int tfd_jobs_submit(struct tfd_core *core, uint64_t session, struct tfd_entry *entries, uint32_t count,
                    const void *tables, size_t table_bytes);

struct tfd_job_end {
	uint64_t job_id;
	uint32_t status;
	uint32_t detail;
	uint64_t bytes;
	uint64_t accepted_ns;
	uint64_t posted_ns;
	uint64_t ended_ns;
	uint32_t path;
};
/* -EAGAIN while it runs; -ENOENT: unknown, or its end was dropped (the last 4,096 ends of a session are kept). */
int tfd_job_result(struct tfd_core *core, uint64_t session, uint64_t job_id, struct tfd_job_end *out);
struct tfd_counter_state {
	uint64_t value;
	uint64_t faults;
	uint64_t lost;
	uint64_t acknowledged;
};
int tfd_counter_read(struct tfd_core *core, uint64_t session, uint32_t imm,
                     struct tfd_counter_state *out); /* -ENOENT */
/* An eventfd, the core's, signalled when a job of tfd_jobs_submit ended or a count of the session changed. */
int tfd_session_watch_fd(struct tfd_core *core, uint64_t session);

/* ---- heartbeats between daemons ---- */

struct tfd_heartbeat_options {
	char address[64]; /* numeric address to bind, UDP */
	uint16_t port;
	uint32_t interval_ms;
	uint32_t timeout_ms;
};

int tfd_heartbeat_open(struct tfd_core *core, const struct tfd_heartbeat_options *options,
                       struct tfd_error *error);
/*
 * Sends `send_token` to the peer each interval, and expects `receive_token` from it. TFD_EVENT_PEER_SILENT tells
 * once that none came for timeout_ms.
 */
int tfd_peer_watch(struct tfd_core *core, const char *address, uint16_t port, const uint8_t send_token[16],
                   const uint8_t receive_token[16], uint64_t *peer, struct tfd_error *error);
int tfd_peer_unwatch(struct tfd_core *core, uint64_t peer);

#endif

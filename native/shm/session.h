/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside of the client half: what one attached session keeps in its own memory. The segment belongs to the daemon and
 * is only as good as the daemon: every size and offset was copied and checked at open and is never read again.
 */
#ifndef TFD_SHM_SESSION_H
#define TFD_SHM_SESSION_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arena.h"
#include "transferd/abi.h"
#include "transferd/client.h"

#define TFD_CLIENT_MAX_RINGS 32u
#define TFD_CLIENT_MAX_RECORDS (1u << 16) /* a job id holds the record's index in 16 bits */
#define TFD_CLIENT_MAX_ENTRIES (1u << 16)
#define TFD_CLIENT_MAX_COUNTERS TFD_IMM_COUNT
#define TFD_CLIENT_MAX_WATCHERS (1u << 16)
#define TFD_CLIENT_MAX_PLANS (1u << 16)
#define TFD_NO_RECORD UINT32_MAX
#define TFD_NO_PLAN UINT32_MAX
#define TFD_NO_WATCHER UINT32_MAX
#define TFD_WATCHER_TAKEN (UINT32_MAX - 1)
#define TFD_WATCHER_CLOSING (UINT32_MAX - 2) /* its DISARM is published: nothing is armed on it behind that */

struct tfd_lane; /* lane.h */

struct tfd_client_ring {
	struct tfd_ring *shared; /* borrowed from the mapping */
	struct tfd_entry *entries; /* borrowed from the mapping */
	uint32_t tail; /* ours; the shared copy is written only */
	int doorbell_fd; /* borrowed from the caller until close */
};

/* Who uses a completion record. */
struct tfd_client_slot {
	uint64_t job_id; /* 0: free */
	uint64_t generation;
	uint64_t submitted_ns;
	uint64_t table_offset; /* of its part of the arena */
	uint64_t table_bytes; /* 0: it has none, or gave it back */
	uint32_t plan; /* that it launched; TFD_NO_PLAN: none, or it has ended */
	uint32_t next_free;
	bool released; /* nobody will ask for its end */
	struct tfd_lane *lane; /* whose stream copies for it; NULL: no stream does */
	uint64_t fire_at; /* with lane: its word has that once the stream is through with it */
	const uint64_t *trigger; /* with lane: the word that the stream waits for before it; NULL: none */
	uint64_t trigger_at;
};

/* A plan, and its part of the arena. */
struct tfd_client_plan {
	uint64_t table_offset;
	uint64_t table_bytes; /* 0: it has no table */
	struct tfd_entry entry; /* with TFD_FLAG_COPIED: as the daemon has it */
	uint32_t launches; /* not known to have ended */
	uint32_t next_free;
	bool taken;
	bool closing; /* free again with the last launch */
};

/* The end of a job whose record had to be given to another. */
struct tfd_saved_result {
	struct tfd_saved_result *next;
	uint64_t job_id;
	struct tfd_result result;
};

struct tfd_client {
	/* constant after open */
	uint8_t *base; /* owned mapping */
	size_t mapped_bytes;
	uint32_t ring_count;
	uint32_t ring_entries;
	uint32_t record_count;
	uint32_t counter_count;
	uint32_t watcher_count;
	uint32_t plan_count;
	struct tfd_segment_header *header;
	struct tfd_record *records;
	struct tfd_counter *counters;
	struct tfd_watcher *watchers;
	uint8_t *arena_base;

	uint32_t dead; /* any thread, atomically; never goes back to 0 */

	pthread_mutex_t lock; /* guards everything below; never held over a sleep */
	struct tfd_client_ring rings[TFD_CLIENT_MAX_RINGS];
	struct tfd_client_slot *slots; /* owned, record_count */
	uint32_t free_head;
	uint32_t free_count;
	struct tfd_saved_result **saved; /* owned, saved_buckets (a power of two) lists */
	uint32_t saved_buckets;
	struct tfd_arena arena;
	uint32_t *watcher_next; /* owned, watcher_count: the next free one, or TFD_WATCHER_TAKEN, _CLOSING */
	uint32_t watcher_free; /* TFD_NO_WATCHER: none */
	struct tfd_client_plan *plans; /* owned, plan_count */
	uint32_t plan_free; /* TFD_NO_PLAN: none */
	struct tfd_lane *lanes; /* owned */
};

/* 0, or -EPIPE once the session is over for any reason. */
int tfd_client_over(const struct tfd_client *client);

/* As tfd_client_job_poll. */
int tfd_client_poll_locked(struct tfd_client *client, uint64_t job_id, struct tfd_result *out);
/* Takes `count` records or, with -EAGAIN, none; what ended meanwhile is moved out of the way first. */
int tfd_client_reserve_locked(struct tfd_client *client, uint32_t count);
/* Pops a free record, after reserve, and names a new job on it. */
uint32_t tfd_client_take_locked(struct tfd_client *client, uint64_t now_ns);
void tfd_client_saved_fini(struct tfd_client *client);
/* Jobs that have ended give their parts of the arena back, whoever still keeps their results. */
void tfd_client_ended_release_locked(struct tfd_client *client);
/* The entry's part of the arena is its job's from now on. */
void tfd_client_table_give_locked(struct tfd_client_slot *slot, const struct tfd_entry *entry);
/* Gives back what the slot's job had of the arena, if anything. Only once it has ended. */
void tfd_client_table_release_locked(struct tfd_client *client, struct tfd_client_slot *slot);

/* For plans.c: a table as it is written into the arena, and what it takes there. */
uint64_t tfd_client_table_size(const struct tfd_entry *entry);
void tfd_client_table_fill(void *to, const struct tfd_entry *entry, const struct tfd_client_table *table);
/* Of each target, or member of rows, in the order of the rows of a plan's table. */
void tfd_client_places_fill(struct tfd_plan_place *places, const struct tfd_entry *entry,
                            const struct tfd_client_table *table, uint32_t count);
/* A copied plan, for its launch; false: it was closed. Where its places are in the arena, behind its table. */
bool tfd_client_plan_entry(struct tfd_client *client, uint32_t number, struct tfd_entry *entry,
                           uint64_t *head, uint64_t *places);
/* The slot's job launches a plan; it has ended. */
void tfd_client_plan_hold_locked(struct tfd_client *client, struct tfd_client_slot *slot, uint32_t plan);
void tfd_client_plan_put_locked(struct tfd_client *client, struct tfd_client_slot *slot);

/* -ESTALE: one of them is armed on a watcher that is closed, or being closed. */
int tfd_client_watchers_check_locked(struct tfd_client *client, const struct tfd_entry *entries,
                                     uint32_t count);
/* Its DISARM is published. */
void tfd_client_watcher_closing_locked(struct tfd_client *client, uint64_t slot);

/* Wakes the worker of a ring, if it sleeps; after what it is to see was stored, sequentially. */
void tfd_client_doorbell(const struct tfd_client_ring *ring);

/* Calls try() until it returns anything but -EAGAIN, and -ETIMEDOUT after the bound; with 0, -EAGAIN stays. -EINTR: a signal came. */
typedef int (*tfd_client_try)(struct tfd_client *client, void *argument);
int tfd_client_room_wait(struct tfd_client *client, tfd_client_try try, void *argument, int64_t timeout_ns);
/* As tfd_client_submit_wait. `tables`: the entries' parts of the arena become their jobs'. */
int tfd_client_publish_wait(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                            uint32_t count, bool tables, int64_t timeout_ns);

/* One entry with a deadline that counts from now (0: none). The job's id, or as tfd_client_submit_wait. */
int64_t tfd_client_one_submit(struct tfd_client *client, uint32_t ring, struct tfd_entry *entry,
                              uint64_t deadline_ns, int64_t timeout_ns);

/* Where a thread sleeps: words of a record or a counter in the segment. */
struct tfd_client_bed {
	uint32_t *event; /* futex */
	uint32_t *waiters;
	uint64_t *wake_at; /* NULL: woken by every change */
	uint64_t target; /* for wake_at */
	const bool *restless; /* while it is true nobody wakes: sleep for a moment only. NULL: never */
};

/* Waits until check() returns anything but -EAGAIN. */
typedef int (*tfd_client_check)(struct tfd_client *client, void *argument);
int tfd_client_wait(struct tfd_client *client, tfd_client_check check, void *argument,
                    const struct tfd_client_bed *bed, int64_t timeout_ns, uint64_t spin_ns);
/* Wakes every thread that sleeps on any record or counter. */
void tfd_client_wake_all(struct tfd_client *client);

/* Absolute end of a wait: UINT64_MAX for none. */
uint64_t tfd_client_deadline(int64_t timeout_ns);
/* What is left until then, as a timeout; 0 once it has passed. */
int64_t tfd_client_left(uint64_t deadline);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Publishing requests. Producers of one process take turns by the client's lock; the worker is the one consumer. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../core/barrier.h"
#include "lane.h"
#include "session.h"

/* How long to yield before a full ring is waited for by sleeping; about what a worker needs for a batch. */
#define TFD_FULL_SPIN_NS 50000u
#define TFD_FULL_SLEEP_MIN_NS 50000
#define TFD_FULL_SLEEP_MAX_NS 1000000

static int room_locked(const struct tfd_client *client, const struct tfd_client_ring *ring, uint32_t count)
{
	/* pairs with the worker's release of head: it has copied the entries before */
	uint32_t used = ring->tail - tfd_load_acquire(&ring->shared->head);

	if (used > client->ring_entries)
		return -EPIPE; /* the other side is broken: nothing it says can be relied on */
	return count <= client->ring_entries - used ? 0 : -EAGAIN;
}

static int publish_locked(struct tfd_client *client, struct tfd_client_ring *ring, struct tfd_entry *entries,
                          uint32_t count, bool tables)
{
	uint64_t now = tfd_client_now_ns();
	int rc = room_locked(client, ring, count);

	if (rc)
		return rc;
	rc = tfd_client_watchers_check_locked(client, entries, count);
	if (rc)
		return rc;
	rc = tfd_client_reserve_locked(client, count);
	if (rc)
		return rc;
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_entry *entry = &entries[i];

		entry->record = tfd_client_take_locked(client, now);
		entry->job_id = client->slots[entry->record].job_id;
		if (tables)
			tfd_client_table_give_locked(&client->slots[entry->record], entry);
		tfd_lane_hold_locked(client, &client->slots[entry->record], entry);
		if (entry->op == TFD_OP_LAUNCH)
			tfd_client_plan_hold_locked(client, &client->slots[entry->record], entry->plan);
		if (entry->op == TFD_OP_DISARM)
			tfd_client_watcher_closing_locked(client, entry->argument);
		ring->entries[(ring->tail + i) & (client->ring_entries - 1)] = *entry;
	}
	ring->tail += count;
	/* pairs with the worker's load of tail: the entries. Sequential, as need_wakeup is read next */
	tfd_store_seq(&ring->shared->tail, ring->tail);
	return 0;
}

/* pairs with the worker's store of need_wakeup before it looks at tail, and at watchers, a last time: one of the two sees the other */
void tfd_client_doorbell(const struct tfd_client_ring *ring)
{
	const struct timespec at_once = { 0 };
	const uint64_t one = 1; /* what an eventfd would take, too */
	sigset_t broken_pipe, before;

	if (!tfd_load_seq(&ring->shared->need_wakeup))
		return;
	/* A daemon that has died must not kill this process by SIGPIPE; the session's end is told otherwise. */
	sigemptyset(&broken_pipe);
	sigaddset(&broken_pipe, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &broken_pipe, &before);
	while (write(ring->doorbell_fd, &one, sizeof(one)) < 0 && errno != EAGAIN) {
		if (errno == EPIPE)
			(void)sigtimedwait(&broken_pipe, NULL, &at_once);
		if (errno != EINTR)
			break;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int submit(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries, uint32_t count,
                  bool tables)
{
	int rc;

	if (!client)
		return -EPIPE;
	if (ring >= client->ring_count)
		return -EINVAL;
	if (count > client->ring_entries || count > client->record_count)
		return -E2BIG;
	rc = tfd_client_over(client);
	if (rc || !count)
		return rc;
	pthread_mutex_lock(&client->lock);
	rc = publish_locked(client, &client->rings[ring], entries, count, tables);
	pthread_mutex_unlock(&client->lock);
	if (!rc)
		tfd_client_doorbell(&client->rings[ring]);
	return rc;
}

int tfd_client_submit(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries, uint32_t count)
{
	return submit(client, ring, entries, count, false);
}

int tfd_client_room_wait(struct tfd_client *client, tfd_client_try try, void *argument, int64_t timeout_ns)
{
	int rc = try(client, argument);
	uint64_t deadline;
	uint64_t spin_end;
	long sleep_ns = TFD_FULL_SLEEP_MIN_NS;

	if (rc != -EAGAIN || !timeout_ns)
		return rc;
	deadline = tfd_client_deadline(timeout_ns);
	spin_end = tfd_client_now_ns() + TFD_FULL_SPIN_NS;
	for (;;) {
		uint64_t now;

		rc = try(client, argument);
		if (rc != -EAGAIN)
			return rc;
		now = tfd_client_now_ns();
		if (now >= deadline)
			return -ETIMEDOUT;
		if (now < spin_end) {
			sched_yield();
			continue;
		}
		if (nanosleep(&(struct timespec){ .tv_nsec = sleep_ns }, NULL) && errno == EINTR)
			return -EINTR;
		sleep_ns = sleep_ns * 2 < TFD_FULL_SLEEP_MAX_NS ? sleep_ns * 2 : TFD_FULL_SLEEP_MAX_NS;
	}
}

struct publishing {
	struct tfd_entry *entries;
	uint32_t ring;
	uint32_t count;
	bool tables;
};

static int try_submit(struct tfd_client *client, void *argument)
{
	const struct publishing *it = argument;

	return submit(client, it->ring, it->entries, it->count, it->tables);
}

int tfd_client_publish_wait(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                            uint32_t count, bool tables, int64_t timeout_ns)
{
	struct publishing it = { entries, ring, count, tables };

	return tfd_client_room_wait(client, try_submit, &it, timeout_ns);
}

int tfd_client_submit_wait(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                           uint32_t count, int64_t timeout_ns)
{
	return tfd_client_publish_wait(client, ring, entries, count, false, timeout_ns);
}

int64_t tfd_client_one_submit(struct tfd_client *client, uint32_t ring, struct tfd_entry *entry,
                              uint64_t deadline_ns, int64_t timeout_ns)
{
	int rc;

	if (deadline_ns)
		entry->deadline_ns = tfd_client_deadline((int64_t)deadline_ns); /* 2^63 and more: for ever */
	rc = tfd_client_submit_wait(client, ring, entry, 1, timeout_ns);
	return rc ? rc : (int64_t)entry->job_id;
}

int64_t tfd_client_job_submit(struct tfd_client *client, uint32_t ring, uint8_t op, uint8_t priority,
                              uint32_t imm, uint64_t src_region, uint64_t src_offset, uint64_t dst_grant,
                              uint64_t dst_offset, uint64_t length, uint64_t deadline_ns, uint64_t argument,
                              int64_t timeout_ns)
{
	struct tfd_entry entry = {
		.op = op,
		.priority = priority,
		.imm = imm,
		.src_region = src_region,
		.src_offset = src_offset,
		.dst_grant = dst_grant,
		.dst_offset = dst_offset,
		.length = length,
		.argument = argument,
	};

	return tfd_client_one_submit(client, ring, &entry, deadline_ns, timeout_ns);
}

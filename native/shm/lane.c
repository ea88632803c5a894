/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lanes. The order of a copy: its job is published first, so that the worker knows what the word will mean; then the stream gets a kernel,
 * whose last block stores the word with release at system scope (client/cuda/kernels/pages.cu), or else the driver's copy and its write of
 * the word. That is ordered after the stream's work before it at system scope (CUDA Driver API, "Stream Memory Operations":
 * cuStreamWriteValue64 without NO_MEMORY_BARRIER). So whoever sees the word sees the bytes.
 *
 * A copy that was enqueued cannot be taken back. So a job that ends before its copy is through (cancelled, its deadline) is told as ended
 * only when the copy writes no more, and its table stays where it is until the stream has passed it.
 */
#include "lane.h"

#include <errno.h>
#include <stdlib.h>

#include "../core/barrier.h"
#include "transferd/lane.h"

int tfd_lane_open(struct tfd_client *client, const struct tfd_lane_options *options, struct tfd_lane **out)
{
	struct tfd_lane *lane;
	bool marks = options->marks != TFD_LANE_NO_MARKS;

	if (!client || tfd_client_over(client))
		return -EPIPE;
	if (options->watcher >= client->watcher_count || options->watcher >= TFD_LANE_SLOTS ||
	    (marks && options->marks >= client->watcher_count) ||
	    (marks && options->copies_max > TFD_COPY_MARKS))
		return -ERANGE;
	lane = calloc(1, sizeof(*lane));
	if (!lane || pthread_mutex_init(&lane->lock, NULL)) {
		free(lane);
		return -ENOMEM;
	}
	lane->client = client;
	lane->options = *options;
	lane->word = &client->watchers[options->watcher].value;
	lane->marks = marks ? (void *)&client->watchers[options->marks] : NULL;
	pthread_mutex_lock(&client->lock);
	lane->next = client->lanes;
	client->lanes = lane;
	pthread_mutex_unlock(&client->lock);
	*out = lane;
	return 0;
}

void tfd_lanes_fini(struct tfd_client *client)
{
	while (client->lanes) {
		struct tfd_lane *lane = client->lanes;

		client->lanes = lane->next;
		pthread_mutex_destroy(&lane->lock);
		free(lane);
	}
}

static uint64_t passed_value(const struct tfd_lane *lane)
{
	return tfd_load_acquire(lane->word); /* pairs with the stream's write: the copies before it */
}

/* ---- what has become of a copy ---- */

void tfd_lane_hold_locked(struct tfd_client *client, struct tfd_client_slot *slot,
                          const struct tfd_entry *entry)
{
	struct tfd_lane *lane = client->lanes;

	slot->lane = NULL;
	if (!(entry->flags & TFD_FLAG_COPIED))
		return;
	while (lane && lane->options.watcher != entry->watcher)
		lane = lane->next;
	slot->lane = lane;
	slot->fire_at = entry->fire_at;
	slot->trigger = NULL;
}

bool tfd_lane_passed(const struct tfd_client_slot *slot)
{
	const struct tfd_lane *lane = slot->lane;

	return !lane || tfd_load_relaxed(&lane->failed) || passed_value(lane) >= slot->fire_at;
}

bool tfd_lane_stop_locked(struct tfd_client *client, struct tfd_client_slot *slot)
{
	struct tfd_lane *lane = slot->lane;
	uint32_t expected = TFD_COPY_MARK(slot->fire_at);
	uint32_t *mark;

	(void)client;
	if (tfd_lane_passed(slot))
		return true;
	if (!slot->trigger)
		return false;
	/*
	 * The kernel looks at the mark after its trigger has been reached; so where that is not reached yet, after this store, it will
	 * find it. Sequential: the store, then the load. The worker does the same (core/copied.c), and may have been first.
	 */
	mark = &lane->marks->marks[slot->fire_at % TFD_COPY_MARKS];
	while (!tfd_replace_seq(mark, &expected, TFD_COPY_VOID(slot->fire_at)) &&
	       expected == TFD_COPY_MARK(slot->fire_at))
		continue;
	return tfd_load_seq(slot->trigger) < slot->trigger_at;
}

uint64_t tfd_lane_last(struct tfd_lane *lane)
{
	uint64_t last;

	pthread_mutex_lock(&lane->lock);
	last = lane->last;
	pthread_mutex_unlock(&lane->lock);
	return last;
}

uint64_t tfd_lane_pending(struct tfd_lane *lane)
{
	return tfd_load_relaxed(&lane->failed) ? 0 : tfd_lane_last(lane) - passed_value(lane);
}

int tfd_lane_through(struct tfd_lane *lane)
{
	return tfd_lane_pending(lane) ? -EAGAIN : 0;
}

int tfd_lane_settle(struct tfd_lane *lane, uint64_t upto)
{
	struct tfd_client *client = lane->client;
	int rc = 0;

	if (tfd_load_relaxed(&lane->failed) || passed_value(lane) >= upto)
		return 0;
	pthread_mutex_lock(&client->lock);
	for (uint32_t i = 0; i < client->record_count && !rc; i++) {
		struct tfd_client_slot *slot = &client->slots[i];

		if (!slot->job_id || slot->lane != lane || slot->fire_at > upto)
			continue;
		/* pairs with the worker's store of done_id. After the session's end no job is told as ended. */
		if (tfd_load_acquire(&client->records[i].done_id) != slot->job_id && !tfd_client_over(client))
			rc = tfd_lane_passed(slot) ? 0 : -EAGAIN;
		else
			rc = tfd_lane_stop_locked(client, slot) ? 0 : -EAGAIN;
	}
	pthread_mutex_unlock(&client->lock);
	return rc;
}

void tfd_lane_fail(struct tfd_lane *lane, uint32_t disarmed)
{
	tfd_store_relaxed(&lane->closed, 1u);
	tfd_store_relaxed(&lane->failed, 1u);
	if (disarmed)
		tfd_store_release(lane->word, tfd_lane_last(lane)); /* pairs with the worker's look */
}

void tfd_lane_release(struct tfd_client *client, uint32_t slot)
{
	if (client && slot < client->watcher_count)
		tfd_store_seq(&client->watchers[slot].value, TFD_LANE_TRIGGER_MAX);
}

/* ---- submitting ---- */

/* Holds the lane's lock when it returns 0. */
static int try_room(struct tfd_client *client, void *argument)
{
	struct tfd_lane *lane = argument;

	if (tfd_client_over(client))
		return -EPIPE;
	if (tfd_load_relaxed(&lane->closed))
		return -ENODEV;
	if (pthread_mutex_trylock(&lane->lock))
		return -EAGAIN;
	if (lane->last - passed_value(lane) < lane->options.copies_max)
		return 0;
	pthread_mutex_unlock(&lane->lock);
	return -EAGAIN;
}

/* The worker is told with the job how to stop it; what had the mark before is through. */
static void trigger_tell(const struct tfd_lane *lane, struct tfd_entry *entry, const struct tfd_copy *copy)
{
	entry->marks = lane->options.marks + 1;
	entry->trigger = copy->trigger_slot;
	entry->argument = copy->trigger_at;
	tfd_store_seq(&lane->marks->marks[entry->fire_at % TFD_COPY_MARKS], TFD_COPY_MARK(entry->fire_at));
}

/* A copy with a trigger: whoever ends its job has to know how to stop it. */
static void trigger_hold(struct tfd_client *client, const struct tfd_entry *entry,
                         const struct tfd_copy *copy)
{
	struct tfd_client_slot *slot = &client->slots[entry->record];

	pthread_mutex_lock(&client->lock);
	if (slot->job_id == entry->job_id) {
		slot->trigger = &client->watchers[copy->trigger_slot].value;
		slot->trigger_at = copy->trigger_at;
	}
	pthread_mutex_unlock(&client->lock);
}

static int copy_locked(struct tfd_lane *lane, struct tfd_entry *entry, const struct tfd_client_table *table,
                       const struct tfd_copy *copy, int64_t timeout_ns, struct tfd_table_fault *fault,
                       int32_t *result)
{
	int rc;

	entry->flags |= TFD_FLAG_ARMED | TFD_FLAG_POLLED | TFD_FLAG_COPIED;
	entry->watcher = lane->options.watcher;
	entry->fire_at = lane->last + 1;
	if (copy->trigger)
		trigger_tell(lane, entry, copy);
	rc = table ? tfd_client_submit_tables(lane->client, 0, entry, table, 1, timeout_ns, fault) :
	             tfd_client_submit_wait(lane->client, 0, entry, 1, timeout_ns);
	if (rc)
		return rc;
	lane->last = entry->fire_at;
	if (copy->trigger)
		trigger_hold(lane->client, entry, copy);
	*result = tfd_lane_enqueue(lane, entry, copy);
	if (!*result)
		return 0;
	lane->refused_job = entry->job_id;
	lane->refused = *result;
	tfd_store_relaxed(&lane->closed, 1u);
	return -EIO;
}

int tfd_lane_copy(struct tfd_lane *lane, struct tfd_entry *entry, const struct tfd_client_table *table,
                  const struct tfd_copy *copy, int64_t timeout_ns, struct tfd_table_fault *fault,
                  int32_t *result)
{
	uint64_t deadline = tfd_client_deadline(timeout_ns);
	int rc;

	if (copy->trigger && (!lane->marks || copy->trigger_slot >= lane->client->watcher_count ||
	                      copy->trigger_at > TFD_LANE_TRIGGER_MAX))
		return -EINVAL;
	rc = tfd_lane_look(lane);
	if (rc)
		return rc;
	rc = tfd_client_room_wait(lane->client, try_room, lane, timeout_ns);
	if (rc)
		return rc;
	rc = copy_locked(lane, entry, table, copy, tfd_client_left(deadline), fault, result);
	pthread_mutex_unlock(&lane->lock);
	return rc;
}

static int64_t copy_one(struct tfd_lane *lane, struct tfd_entry *entry, const struct tfd_client_table *table,
                        const struct tfd_copy *copy, uint64_t deadline_ns, int64_t timeout_ns)
{
	struct tfd_table_fault fault;
	int32_t result;
	int rc;

	if (deadline_ns)
		entry->deadline_ns = tfd_client_deadline((int64_t)deadline_ns); /* 2^63 and more: for ever */
	rc = tfd_lane_copy(lane, entry, table, copy, timeout_ns, &fault, &result);
	return rc ? rc : (int64_t)entry->job_id;
}

int64_t tfd_lane_write(struct tfd_lane *lane, uint8_t priority, uint32_t imm, uint64_t src_region,
                       uint64_t src_offset, uint64_t dst_grant, uint64_t dst_offset, uint64_t length,
                       uint64_t deadline_ns, uint64_t src, uint64_t dst, int64_t timeout_ns)
{
	const struct tfd_copy copy = { .src = src, .dst = dst };
	struct tfd_entry entry = {
		.op = TFD_OP_WRITE,
		.priority = priority,
		.imm = imm,
		.src_region = src_region,
		.src_offset = src_offset,
		.dst_grant = dst_grant,
		.dst_offset = dst_offset,
		.length = length,
	};

	return copy_one(lane, &entry, NULL, &copy, deadline_ns, timeout_ns);
}

int64_t tfd_lane_pages(struct tfd_lane *lane, uint8_t priority, uint8_t flags, uint32_t imm,
                       uint64_t src_region, uint64_t src_offset, uint64_t src_stride, uint64_t dst_grant,
                       uint64_t dst_offset, uint64_t dst_stride, uint64_t page_bytes, uint32_t count,
                       const void *src_pages, uint32_t src_form, uint64_t src_end, const void *dst_pages,
                       uint32_t dst_form, uint64_t dst_end, uint64_t deadline_ns, uint64_t src, uint64_t dst,
                       int64_t timeout_ns)
{
	const struct tfd_copy copy = { .src = src, .dst = dst };
	const struct tfd_client_table table = {
		.src = src_pages,
		.dst = dst_pages,
		.src_form = src_form,
		.dst_form = dst_form,
		.src_end = src_end,
		.dst_end = dst_end,
	};
	struct tfd_entry entry = {
		.op = TFD_OP_WRITE_PAGES,
		.flags = flags,
		.priority = priority,
		.imm = imm,
		.src_region = src_region,
		.src_offset = src_offset,
		.src_stride = src_stride,
		.dst_grant = dst_grant,
		.dst_offset = dst_offset,
		.dst_stride = dst_stride,
		.length = page_bytes,
		.table_count = count,
	};

	return copy_one(lane, &entry, count ? &table : NULL, &copy, deadline_ns, timeout_ns);
}

int64_t tfd_lane_launch(struct tfd_lane *lane, uint32_t plan, uint64_t deadline_ns, uint64_t src,
                        uint64_t src_bytes, uint64_t dst, uint64_t dst_bytes, int64_t timeout_ns)
{
	const struct tfd_copy copy = {
		.src = src, .src_bytes = src_bytes, .dst = dst, .dst_bytes = dst_bytes
	};
	struct tfd_entry entry = { .op = TFD_OP_LAUNCH, .plan = plan };

	return copy_one(lane, &entry, NULL, &copy, deadline_ns, timeout_ns);
}

int32_t tfd_lane_refused(struct tfd_lane *lane, uint64_t *job_id)
{
	int32_t result;

	pthread_mutex_lock(&lane->lock);
	*job_id = lane->refused_job;
	result = lane->refused;
	pthread_mutex_unlock(&lane->lock);
	return result;
}

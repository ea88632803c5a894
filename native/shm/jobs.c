/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Completion records. A job's id is its record's index in the low 16 bits and a generation above, so an id is never
 * used twice and a record that has gone to another job is told apart.
 */
#include <errno.h>
#include <stdlib.h>

#include "../core/barrier.h"
#include "lane.h"
#include "session.h"

#define INDEX_BITS 16
#define INDEX_MASK ((1u << INDEX_BITS) - 1)
#define GENERATION_MASK ((1ull << 47) - 1) /* an id stays positive as int64_t */

static struct tfd_saved_result **bucket_of(struct tfd_client *client, uint64_t job_id)
{
	/* The generation spreads as well as the index does. */
	uint64_t mixed = (job_id ^ job_id >> INDEX_BITS) * 0x9e3779b97f4a7c15ull;

	return &client->saved[(mixed >> 32) & (client->saved_buckets - 1)];
}

static struct tfd_saved_result **saved_find(struct tfd_client *client, uint64_t job_id)
{
	struct tfd_saved_result **at = bucket_of(client, job_id);

	while (*at && (*at)->job_id != job_id)
		at = &(*at)->next;
	return at;
}

void tfd_client_saved_fini(struct tfd_client *client)
{
	for (uint32_t i = 0; i < client->saved_buckets; i++) {
		while (client->saved[i]) {
			struct tfd_saved_result *saved = client->saved[i];

			client->saved[i] = saved->next;
			free(saved);
		}
	}
}

/* NULL unless the record belongs to the job. */
static struct tfd_client_slot *slot_of(struct tfd_client *client, uint64_t job_id, uint32_t *index)
{
	*index = (uint32_t)(job_id & INDEX_MASK);
	if (!job_id || *index >= client->record_count || client->slots[*index].job_id != job_id)
		return NULL;
	return &client->slots[*index];
}

static bool is_done(const struct tfd_client *client, uint32_t index)
{
	/* pairs with the worker's store of done_id: the record's other fields */
	return tfd_load_acquire(&client->records[index].done_id) == client->slots[index].job_id;
}

/* The record and the table can be others': no stream is to come by them either. */
static bool has_ended(const struct tfd_client *client, uint32_t index)
{
	return is_done(client, index) && tfd_lane_passed(&client->slots[index]);
}

/* Only after has_ended: until the record is given away nobody writes to it. */
static void result_copy(const struct tfd_client *client, uint32_t index, struct tfd_result *out)
{
	const struct tfd_record *record = &client->records[index];

	*out = (struct tfd_result){
		.status = record->status,
		.detail = record->detail,
		.bytes = record->bytes,
		.submitted_ns = client->slots[index].submitted_ns,
		.accepted_ns = record->accepted_ns,
		.posted_ns = record->posted_ns,
		.ended_ns = record->ended_ns,
		.path = record->path,
	};
}

static void slot_free_locked(struct tfd_client *client, uint32_t index)
{
	struct tfd_client_slot *slot = &client->slots[index];

	tfd_client_table_release_locked(client, slot);
	tfd_store_relaxed(&slot->job_id, 0ull); /* job_check looks without the lock */
	slot->released = false;
	slot->next_free = client->free_head;
	client->free_head = index;
	client->free_count++;
}

/* Moves the end of a job to private memory. Out of memory: the record stays taken. */
static void slot_save_locked(struct tfd_client *client, uint32_t index)
{
	struct tfd_saved_result *saved = malloc(sizeof(*saved));
	struct tfd_saved_result **bucket;

	if (!saved)
		return;
	saved->job_id = client->slots[index].job_id;
	result_copy(client, index, &saved->result);
	bucket = bucket_of(client, saved->job_id);
	saved->next = *bucket;
	*bucket = saved;
	slot_free_locked(client, index);
}

void tfd_client_ended_release_locked(struct tfd_client *client)
{
	for (uint32_t i = 0; i < client->record_count; i++) {
		struct tfd_client_slot *slot = &client->slots[i];

		if ((slot->table_bytes || slot->plan != TFD_NO_PLAN) && has_ended(client, i))
			tfd_client_table_release_locked(client, slot);
	}
}

int tfd_client_reserve_locked(struct tfd_client *client, uint32_t count)
{
	if (count <= client->free_count)
		return 0;
	for (uint32_t i = 0; i < client->record_count; i++) {
		struct tfd_client_slot *slot = &client->slots[i];

		if (!slot->job_id || !has_ended(client, i))
			continue;
		if (slot->released)
			slot_free_locked(client, i);
		else
			slot_save_locked(client, i);
	}
	return count <= client->free_count ? 0 : -EAGAIN;
}

uint32_t tfd_client_take_locked(struct tfd_client *client, uint64_t now_ns)
{
	uint32_t index = client->free_head;
	struct tfd_client_slot *slot = &client->slots[index];

	client->free_head = slot->next_free;
	client->free_count--;
	slot->generation = (slot->generation + 1) & GENERATION_MASK;
	tfd_store_relaxed(&slot->job_id, slot->generation << INDEX_BITS | index);
	slot->submitted_ns = now_ns;
	slot->released = false;
	return index;
}

int tfd_client_poll_locked(struct tfd_client *client, uint64_t job_id, struct tfd_result *out)
{
	uint32_t index;
	struct tfd_client_slot *slot = slot_of(client, job_id, &index);
	int over = tfd_client_over(
		client); /* before done_id: an end that was told before the death still counts */
	struct tfd_saved_result *saved;

	if (slot) {
		if (slot->released)
			return -ENOENT;
		if (!is_done(client, index))
			return over ? over : -EAGAIN;
		if (!tfd_lane_stop_locked(client, slot)) /* a stream may write for it yet */
			return -EAGAIN;
		result_copy(client, index, out);
		return 0;
	}
	saved = *saved_find(client, job_id);
	if (!saved)
		return -ENOENT;
	*out = saved->result;
	return 0;
}

int tfd_client_job_poll(struct tfd_client *client, uint64_t job_id, struct tfd_result *out)
{
	int rc;

	if (!client)
		return -EPIPE;
	pthread_mutex_lock(&client->lock);
	rc = tfd_client_poll_locked(client, job_id, out);
	pthread_mutex_unlock(&client->lock);
	return rc;
}

void tfd_client_job_release(struct tfd_client *client, uint64_t job_id)
{
	struct tfd_client_slot *slot;
	uint32_t index;

	if (!client)
		return;
	pthread_mutex_lock(&client->lock);
	slot = slot_of(client, job_id, &index);
	if (slot && has_ended(client, index)) {
		slot_free_locked(client, index);
	} else if (slot) {
		slot->released = true;
	} else {
		struct tfd_saved_result **at = saved_find(client, job_id);
		struct tfd_saved_result *saved = *at;

		if (saved) {
			*at = saved->next;
			free(saved);
		}
	}
	pthread_mutex_unlock(&client->lock);
}

struct job_wait {
	uint64_t job_id;
	struct tfd_result *out;
	bool unsettled; /* its end is told, its copy not: nobody wakes for that */
};

static int job_check(struct tfd_client *client, void *argument)
{
	struct job_wait *wait = argument;
	uint32_t index = (uint32_t)(wait->job_id & INDEX_MASK);
	int rc;

	/* The lock only for news: the job ended, the session is over, or the record is another's by now. */
	if (tfd_load_acquire(&client->records[index].done_id) != wait->job_id &&
	    tfd_load_relaxed(&client->slots[index].job_id) == wait->job_id && !tfd_client_over(client))
		return -EAGAIN;
	rc = tfd_client_job_poll(client, wait->job_id, wait->out);
	wait->unsettled = rc == -EAGAIN;
	return rc;
}

int tfd_client_job_wait(struct tfd_client *client, uint64_t job_id, int64_t timeout_ns, uint64_t spin_ns,
                        struct tfd_result *out)
{
	struct job_wait wait = { job_id, out, false };
	struct tfd_client_bed bed = { 0 };

	if (!client)
		return -EPIPE;
	if ((job_id & INDEX_MASK) >= client->record_count)
		return -ENOENT;
	bed.event = &client->records[job_id & INDEX_MASK].event;
	bed.waiters = &client->records[job_id & INDEX_MASK].waiters;
	bed.restless = &wait.unsettled;
	return tfd_client_wait(client, job_check, &wait, &bed, timeout_ns, spin_ns);
}

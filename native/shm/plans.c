/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans as their owner sees them. A plan's table stays where it is in the arena until the plan is closed and its last launch has
 * ended: launches that are under way go on reading it.
 */
#include <errno.h>

#include "../core/barrier.h"
#include "session.h"

static uint32_t capacity_of(const struct tfd_entry *entry)
{
	return entry->op == TFD_OP_WRITE ? 1 : entry->table_count;
}

static bool has_pages(const struct tfd_entry *entry)
{
	return entry->op == TFD_OP_WRITE_PAGES;
}

/* A stream that copies finds there where the rows go: pages have one place. */
static bool has_places(const struct tfd_entry *entry, bool with_table)
{
	return entry->flags & TFD_FLAG_COPIED &&
	       (entry->op == TFD_OP_SCATTER || (entry->op == TFD_OP_WRITE && with_table));
}

static uint64_t places_at(const struct tfd_entry *entry)
{
	return sizeof(struct tfd_plan_table) + capacity_of(entry) * sizeof(struct tfd_slice);
}

static uint64_t plan_bytes(const struct tfd_entry *entry, bool with_table)
{
	if (has_places(entry, with_table))
		return tfd_arena_size(places_at(entry) + capacity_of(entry) * sizeof(struct tfd_plan_place));
	if (has_pages(entry))
		return tfd_arena_size(sizeof(struct tfd_plan_table) +
		                      capacity_of(entry) * sizeof(struct tfd_page));
	return with_table ? tfd_arena_size(places_at(entry)) : 0;
}

/* What the daemon reads when the plan is made; pages it reads from the plan's own table. */
static uint64_t targets_bytes(const struct tfd_entry *entry)
{
	return has_pages(entry) ? 0 : tfd_client_table_size(entry);
}

static void plan_free_locked(struct tfd_client *client, uint32_t number)
{
	struct tfd_client_plan *plan = &client->plans[number];

	if (plan->table_bytes)
		tfd_arena_release(&client->arena, plan->table_offset, plan->table_bytes);
	*plan = (struct tfd_client_plan){ .next_free = client->plan_free };
	client->plan_free = number;
}

struct opening {
	struct tfd_entry *entry;
	uint64_t bytes; /* of its own table; 0: it has none */
	uint32_t number;
	bool with_table; /* which launches read */
};

/* Both parts of the arena, or none: who holds some and waits for more could wait for another who does the same. */
static int take_parts_locked(struct tfd_client *client, const struct opening *it,
                             struct tfd_client_plan *plan)
{
	uint64_t bytes = targets_bytes(it->entry);
	int rc = it->bytes ? tfd_arena_alloc(&client->arena, it->bytes, &plan->table_offset) : 0;

	if (rc)
		return rc;
	plan->table_bytes = it->bytes;
	rc = bytes ? tfd_arena_alloc(&client->arena, bytes, &it->entry->table_offset) : 0;
	if (rc && it->bytes)
		tfd_arena_release(&client->arena, plan->table_offset, it->bytes);
	return rc;
}

static int take_locked(struct tfd_client *client, struct opening *it)
{
	struct tfd_client_plan plan = { .taken = true };
	int rc;

	if (client->plan_free == TFD_NO_PLAN)
		return -ENOSPC;
	rc = take_parts_locked(client, it, &plan);
	if (rc)
		return rc;
	it->number = client->plan_free;
	client->plan_free = client->plans[it->number].next_free;
	client->plans[it->number] = plan;
	return 0;
}

static int try_take(struct tfd_client *client, void *argument)
{
	int rc = tfd_client_over(client);

	if (rc)
		return rc;
	pthread_mutex_lock(&client->lock);
	rc = take_locked(client, argument);
	if (rc == -EAGAIN || rc == -ENOSPC) { /* launches of closed plans may have ended meanwhile */
		tfd_client_ended_release_locked(client);
		rc = take_locked(client, argument);
	}
	pthread_mutex_unlock(&client->lock);
	return rc;
}

static void fill_slices(struct tfd_slice *slices, const struct tfd_entry *entry,
                        const struct tfd_target *targets)
{
	if (entry->op == TFD_OP_WRITE)
		slices[0] = (struct tfd_slice){ .dst_offset = entry->dst_offset, .length = entry->length };
	for (uint32_t i = 0; entry->op == TFD_OP_SCATTER && i < entry->table_count; i++)
		slices[i] = (struct tfd_slice){ targets[i].src_offset - entry->src_offset,
		                                targets[i].dst_offset, targets[i].length };
}

static void fill(struct tfd_client *client, const struct opening *it, const struct tfd_client_table *table)
{
	struct tfd_client_plan *plan = &client->plans[it->number];
	struct tfd_entry *entry = it->entry;
	void *targets = client->arena_base + entry->table_offset;

	if (targets_bytes(entry))
		tfd_client_table_fill(targets, entry, table);
	if (it->bytes) {
		struct tfd_plan_table *head = (void *)(client->arena_base + plan->table_offset);

		if (has_places(entry, it->with_table))
			tfd_client_places_fill((void *)((uint8_t *)head + places_at(entry)), entry, table,
			                       capacity_of(entry));
		*head = (struct tfd_plan_table){ .count = capacity_of(entry) };
		if (has_pages(entry) && entry->table_count)
			tfd_client_table_fill(head + 1, entry, table);
		else
			fill_slices((void *)(head + 1), entry, targets);
	}
	if (it->with_table) {
		entry->argument = plan->table_offset;
		entry->flags |= TFD_FLAG_TABLE;
	}
	entry->flags |= TFD_FLAG_PLAN;
	entry->plan = it->number;
	plan->entry = *entry;
}

static void give_back(struct tfd_client *client, const struct opening *it)
{
	uint64_t bytes = targets_bytes(it->entry);

	pthread_mutex_lock(&client->lock);
	if (bytes)
		tfd_arena_release(&client->arena, it->entry->table_offset, bytes);
	plan_free_locked(client, it->number);
	pthread_mutex_unlock(&client->lock);
}

int tfd_client_plan_open(struct tfd_client *client, uint32_t ring, struct tfd_entry *entry,
                         const struct tfd_client_table *table, uint32_t with_table, int64_t timeout_ns,
                         struct tfd_table_fault *fault)
{
	struct opening it = { .entry = entry, .with_table = with_table || has_pages(entry) };
	uint64_t deadline;
	int rc;

	if (!client)
		return -EPIPE;
	rc = entry->table_count ? tfd_client_tables_check(entry, table, 1, fault) : 0;
	if (rc)
		return rc;
	it.bytes = plan_bytes(entry, it.with_table);
	if (it.bytes + targets_bytes(entry) > client->arena.bytes)
		return -EMSGSIZE;
	deadline = tfd_client_deadline(timeout_ns);
	rc = tfd_client_room_wait(client, try_take, &it, timeout_ns);
	if (rc)
		return rc;
	fill(client, &it, table);
	rc = tfd_client_publish_wait(client, ring, entry, 1, targets_bytes(entry) != 0,
	                             tfd_client_left(deadline));
	if (rc)
		give_back(client, &it);
	return rc;
}

bool tfd_client_plan_entry(struct tfd_client *client, uint32_t number, struct tfd_entry *entry,
                           uint64_t *head, uint64_t *places)
{
	const struct tfd_client_plan *plan = number < client->plan_count ? &client->plans[number] : NULL;
	bool found;

	pthread_mutex_lock(&client->lock);
	found = plan && plan->taken && plan->entry.flags & TFD_FLAG_COPIED;
	if (found) {
		*entry = plan->entry;
		*head = plan->table_offset;
		*places = plan->table_offset + places_at(entry);
	}
	pthread_mutex_unlock(&client->lock);
	return found;
}

void *tfd_client_plan_table(struct tfd_client *client, uint32_t number)
{
	const struct tfd_client_plan *plan;

	if (!client || number >= client->plan_count)
		return NULL;
	plan = &client->plans[number];
	return plan->taken && plan->table_bytes ? client->arena_base + plan->table_offset : NULL;
}

int64_t tfd_client_plan_launch(struct tfd_client *client, uint32_t ring, uint32_t plan, uint64_t deadline_ns,
                               int64_t timeout_ns)
{
	struct tfd_entry entry = { .op = TFD_OP_LAUNCH, .plan = plan };

	return tfd_client_one_submit(client, ring, &entry, deadline_ns, timeout_ns);
}

void tfd_client_plan_close(struct tfd_client *client, uint32_t number)
{
	struct tfd_client_plan *plan;

	if (!client || number >= client->plan_count)
		return;
	plan = &client->plans[number];
	pthread_mutex_lock(&client->lock);
	if (plan->taken && !plan->closing) {
		plan->closing = true;
		if (!plan->launches)
			plan_free_locked(client, number);
	}
	pthread_mutex_unlock(&client->lock);
}

void tfd_client_plan_hold_locked(struct tfd_client *client, struct tfd_client_slot *slot, uint32_t number)
{
	if (number >= client->plan_count || !client->plans[number].taken)
		return; /* the daemon refuses it */
	slot->plan = number;
	client->plans[number].launches++;
}

void tfd_client_plan_put_locked(struct tfd_client *client, struct tfd_client_slot *slot)
{
	uint32_t number = slot->plan;

	if (number == TFD_NO_PLAN)
		return;
	slot->plan = TFD_NO_PLAN;
	if (!--client->plans[number].launches && client->plans[number].closing)
		plan_free_locked(client, number);
}

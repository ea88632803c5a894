/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tables of jobs: from the caller's arrays into the arena, checked whole beforehand. The daemon checks again what it reads from there;
 * what is found here is found before anything is sent, and can be told by its place in the caller's array.
 */
#include <errno.h>
#include <string.h>

#include "../core/barrier.h"
#include "session.h"

#define ROW_NUMBERS 4u

static bool has_pages(const struct tfd_entry *entry)
{
	return entry->op == TFD_OP_WRITE_PAGES;
}

static uint64_t table_each(const struct tfd_entry *entry)
{
	if (entry->op == TFD_OP_SEND)
		return 1;
	if (has_pages(entry))
		return sizeof(struct tfd_page);
	/* For a stream the places of the targets follow the targets themselves. */
	return sizeof(struct tfd_target) + (entry->flags & TFD_FLAG_COPIED ? sizeof(uint64_t) : 0);
}

uint64_t tfd_client_table_size(const struct tfd_entry *entry)
{
	return tfd_arena_size(entry->table_count * table_each(entry));
}

/* ---- checking ---- */

/* How many pages there are, from 0 on: those of `length` bytes, `stride` apart from `base` on, that end before `end`. */
static uint64_t pages_within(uint64_t base, uint64_t stride, uint64_t length, uint64_t end)
{
	uint64_t room;

	if (base > end || length > end - base)
		return 0;
	if (!stride)
		return 1ull << 32;
	room = (end - base - length) / stride;
	return room < UINT32_MAX ? room + 1 : 1ull << 32;
}

/* The place of the first index that is not below `legal`, or count. What is negative is huge when it is looked at unsigned. */
#define DEFINE_FIND(name, type)                                                                       \
	static uint32_t name(const void *from, uint32_t count, uint64_t legal)                        \
	{                                                                                             \
		const type *index = from;                                                             \
		type most = 0;                                                                        \
		uint32_t i = 0;                                                                       \
                                                                                                      \
		for (; i < count; i++) /* no way out of the loop: it can be done several at a time */ \
			most = index[i] > most ? index[i] : most;                                     \
		if (!count || most < legal)                                                           \
			return count;                                                                 \
		for (i = 0; i < count && index[i] < legal; i++)                                       \
			continue;                                                                     \
		return i;                                                                             \
	}

DEFINE_FIND(find_narrow, uint32_t)
DEFINE_FIND(find_wide, uint64_t)

static bool is_wide(uint32_t form)
{
	return form == TFD_INDEX_I64 || form == TFD_INDEX_U64;
}

static uint32_t find_illegal(const void *from, uint32_t form, uint32_t count, uint64_t legal)
{
	if (form == TFD_INDEX_I32 && legal > 1ull << 31)
		legal = 1ull << 31; /* above, it was below 0 */
	return is_wide(form) ? find_wide(from, count, legal) : find_narrow(from, count, legal);
}

static int check_pages(const struct tfd_entry *entry, const struct tfd_client_table *table,
                       struct tfd_table_fault *fault)
{
	uint64_t src = pages_within(entry->src_offset, entry->src_stride, entry->length, table->src_end);
	uint64_t dst = pages_within(entry->dst_offset, entry->dst_stride, entry->length, table->dst_end);

	fault->side = 0;
	fault->legal = src;
	fault->position = find_illegal(table->src, table->src_form, entry->table_count, src);
	if (fault->position < entry->table_count)
		return -ERANGE;
	fault->side = 1;
	fault->legal = dst;
	fault->position = find_illegal(table->dst, table->dst_form, entry->table_count, dst);
	return fault->position < entry->table_count ? -ERANGE : 0;
}

/* What is negative becomes huge. */
static uint64_t number_at(const void *from, uint32_t form, uint64_t i)
{
	switch (form) {
	case TFD_INDEX_I32:
		return (uint64_t)(int64_t)((const int32_t *)from)[i];
	case TFD_INDEX_U32:
		return ((const uint32_t *)from)[i];
	default:
		return ((const uint64_t *)from)[i];
	}
}

static struct tfd_target row_at(const struct tfd_client_table *table, uint64_t i)
{
	return (struct tfd_target){
		number_at(table->rows, table->src_form, ROW_NUMBERS * i),
		number_at(table->rows, table->src_form, ROW_NUMBERS * i + 1),
		number_at(table->rows, table->src_form, ROW_NUMBERS * i + 2),
		number_at(table->rows, table->src_form, ROW_NUMBERS * i + 3),
	};
}

/* The column of the number that is wrong, or ROW_NUMBERS. `legal`: of that column. */
static uint32_t check_row(const struct tfd_client_table *table, const struct tfd_target *row, uint64_t *legal)
{
	uint64_t room = table->src_end - table->src_start;
	/* What is negative is not legal; the rest of a destination the daemon knows. */
	uint64_t dst_legal = table->src_form == TFD_INDEX_U64 ? UINT64_MAX : 1ull << 63;

	*legal = table->member_count;
	if (row->dst_grant >= *legal)
		return 0;
	*legal = room + 1;
	if (row->src_offset >= *legal)
		return 1;
	*legal = dst_legal;
	if (row->dst_offset >= *legal)
		return 2;
	room -= row->src_offset;
	*legal = (room < TFD_MAX_LENGTH ? room : TFD_MAX_LENGTH) + 1;
	return row->length < *legal ? ROW_NUMBERS : 3;
}

static int check_rows(const struct tfd_entry *entry, const struct tfd_client_table *table,
                      struct tfd_table_fault *fault)
{
	for (uint32_t i = 0; i < entry->table_count; i++) {
		struct tfd_target row = row_at(table, i);

		fault->position = i;
		fault->side = check_row(table, &row, &fault->legal);
		if (fault->side < ROW_NUMBERS)
			return -ERANGE;
	}
	return 0;
}

int tfd_client_tables_check(const struct tfd_entry *entries, const struct tfd_client_table *tables,
                            uint32_t count, struct tfd_table_fault *fault)
{
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_table_fault found = { .entry = i };
		int rc = 0;

		if (has_pages(&entries[i]))
			rc = check_pages(&entries[i], &tables[i], &found);
		else if (tables[i].rows)
			rc = check_rows(&entries[i], &tables[i], &found);
		if (rc) {
			*fault = found;
			return rc;
		}
	}
	return 0;
}

/* ---- room in the arena ---- */

void tfd_client_table_give_locked(struct tfd_client_slot *slot, const struct tfd_entry *entry)
{
	slot->table_offset = entry->table_offset;
	slot->table_bytes = entry->table_count ? tfd_client_table_size(entry) : 0;
}

void tfd_client_table_release_locked(struct tfd_client *client, struct tfd_client_slot *slot)
{
	if (slot->table_bytes)
		tfd_arena_release(&client->arena, slot->table_offset, slot->table_bytes);
	slot->table_bytes = 0;
	tfd_client_plan_put_locked(client, slot);
}

static void release_first_locked(struct tfd_client *client, const struct tfd_entry *entries, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		if (entries[i].table_count)
			tfd_arena_release(&client->arena, entries[i].table_offset,
			                  tfd_client_table_size(&entries[i]));
	}
}

static int take_all_locked(struct tfd_client *client, struct tfd_entry *entries, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		int rc = 0;

		if (entries[i].table_count)
			rc = tfd_arena_alloc(&client->arena, tfd_client_table_size(&entries[i]),
			                     &entries[i].table_offset);
		if (rc) {
			release_first_locked(client, entries, i);
			return rc;
		}
	}
	return 0;
}

/* All tables or none: who holds some and waits for more could wait for another who does the same. */
static int take_all(struct tfd_client *client, struct tfd_entry *entries, uint32_t count)
{
	int rc;

	pthread_mutex_lock(&client->lock);
	rc = take_all_locked(client, entries, count);
	if (rc == -EAGAIN) {
		tfd_client_ended_release_locked(client);
		rc = take_all_locked(client, entries, count);
	}
	pthread_mutex_unlock(&client->lock);
	return rc;
}

static void release_all(struct tfd_client *client, const struct tfd_entry *entries, uint32_t count)
{
	pthread_mutex_lock(&client->lock);
	release_first_locked(client, entries, count);
	pthread_mutex_unlock(&client->lock);
}

/* ---- filling ---- */

/* A loop for each pair of widths: what does not change is not asked for each page. */
#define DEFINE_FILL(name, src_type, dst_type)                                                      \
	static void name(struct tfd_page *pages, const void *src, const void *dst, uint32_t count) \
	{                                                                                          \
		for (uint32_t i = 0; i < count; i++)                                               \
			pages[i] = (struct tfd_page){ (uint32_t)((const src_type *)src)[i],        \
			                              (uint32_t)((const dst_type *)dst)[i] };      \
	}

DEFINE_FILL(fill_narrow, uint32_t, uint32_t)
DEFINE_FILL(fill_narrow_wide, uint32_t, uint64_t)
DEFINE_FILL(fill_wide_narrow, uint64_t, uint32_t)
DEFINE_FILL(fill_wide, uint64_t, uint64_t)

static void fill_pages(struct tfd_page *pages, const struct tfd_entry *entry,
                       const struct tfd_client_table *table)
{
	static void (*const fill[2][2])(struct tfd_page *, const void *, const void *, uint32_t) = {
		{ fill_narrow, fill_narrow_wide },
		{ fill_wide_narrow, fill_wide },
	};

	fill[is_wide(table->src_form)][is_wide(table->dst_form)](pages, table->src, table->dst,
	                                                         entry->table_count);
}

/* Where a stream finds the grant of a target; 0: the target leaves it. */
static uint64_t place_of(const struct tfd_client_table *table, uint64_t at, const struct tfd_target *target)
{
	uint64_t end = table->ends[at];

	return target->length <= end && target->dst_offset <= end - target->length ? table->places[at] : 0;
}

/* Only what was checked is used: another thread may write to the caller's array meanwhile. */
static void fill_rows(struct tfd_target *targets, const struct tfd_entry *entry,
                      const struct tfd_client_table *table)
{
	uint64_t *places = entry->flags & TFD_FLAG_COPIED ? (void *)(targets + entry->table_count) : NULL;

	for (uint32_t i = 0; i < entry->table_count; i++) {
		struct tfd_target row = row_at(table, i);

		if (places)
			places[i] = row.dst_grant < table->member_count ?
			                    place_of(table, row.dst_grant, &row) :
			                    0;
		row.dst_grant = row.dst_grant < table->member_count ? table->members[row.dst_grant] : 0;
		row.src_offset += table->src_start;
		targets[i] = row;
	}
}

static void fill_targets(struct tfd_target *targets, const struct tfd_entry *entry,
                         const struct tfd_client_table *table)
{
	uint64_t *places = (void *)(targets + entry->table_count);

	memcpy(targets, table->targets, entry->table_count * sizeof(*targets));
	for (uint32_t i = 0; (entry->flags & TFD_FLAG_COPIED) && i < entry->table_count; i++)
		places[i] = place_of(table, i, &targets[i]);
}

void tfd_client_places_fill(struct tfd_plan_place *places, const struct tfd_entry *entry,
                            const struct tfd_client_table *table, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint64_t at = entry->op == TFD_OP_SCATTER && table->rows ? row_at(table, i).dst_grant : i;

		places[i] = (struct tfd_plan_place){ 0 };
		if (!table->rows ||
		    at < table->member_count) /* another thread may have written to the rows */
			places[i] = (struct tfd_plan_place){ table->places[at], table->ends[at] };
	}
}

/* ---- what a stream will copy by ---- */

static uint32_t find_stray_target(const struct tfd_target *targets, const struct tfd_entry *entry,
                                  const struct tfd_client_table *table)
{
	const uint64_t *places = (const void *)(targets + entry->table_count);
	uint32_t i = 0;

	for (; i < entry->table_count; i++) {
		if (!places[i] || targets[i].length > table->src_end ||
		    targets[i].src_offset > table->src_end - targets[i].length)
			break;
	}
	return i;
}

static uint32_t find_stray_page(const struct tfd_page *pages, const struct tfd_entry *entry,
                                const struct tfd_client_table *table)
{
	uint64_t src = pages_within(entry->src_offset, entry->src_stride, entry->length, table->src_end);
	uint64_t dst = pages_within(entry->dst_offset, entry->dst_stride, entry->length, table->dst_end);
	uint32_t i = 0;

	while (i < entry->table_count && pages[i].src < src && pages[i].dst < dst)
		i++;
	return i;
}

/*
 * A stream asks nobody while it copies, so what it will read is looked at where it will read it: the caller's arrays may have changed since
 * they were checked.
 */
static int check_copied(const struct tfd_client *client, const struct tfd_entry *entries,
                        const struct tfd_client_table *tables, uint32_t count, struct tfd_table_fault *fault)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct tfd_entry *entry = &entries[i];
		const void *at = client->arena_base + entry->table_offset;
		uint32_t found;

		if (!(entry->flags & TFD_FLAG_COPIED) || !entry->table_count)
			continue;
		found = has_pages(entry) ? find_stray_page(at, entry, &tables[i]) :
		                           find_stray_target(at, entry, &tables[i]);
		if (found == entry->table_count)
			continue;
		*fault = (struct tfd_table_fault){ .entry = i, .side = TFD_FAULT_GRANT, .position = found };
		return -ERANGE;
	}
	return 0;
}

void tfd_client_table_fill(void *to, const struct tfd_entry *entry, const struct tfd_client_table *table)
{
	if (has_pages(entry))
		fill_pages(to, entry, table);
	else if (table->rows)
		fill_rows(to, entry, table);
	else if (entry->op == TFD_OP_SEND)
		memcpy(to, table->bytes, entry->table_count);
	else
		fill_targets(to, entry, table);
}

static void fill_all(struct tfd_client *client, const struct tfd_entry *entries,
                     const struct tfd_client_table *tables, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		if (entries[i].table_count)
			tfd_client_table_fill(client->arena_base + entries[i].table_offset, &entries[i],
			                      &tables[i]);
	}
}

/* ---- submitting ---- */

/* Whether what a batch brings can ever be taken. */
static int check_batch(struct tfd_client *client, const struct tfd_entry *entries, uint32_t count)
{
	uint64_t bytes = 0;
	uint32_t tables = 0;

	for (uint32_t i = 0; i < count; i++) {
		bytes += tfd_client_table_size(&entries[i]);
		tables += entries[i].table_count != 0;
	}
	return bytes > client->arena.bytes || tables > client->arena.most ? -EMSGSIZE : 0;
}

struct batch {
	struct tfd_entry *entries;
	uint32_t count;
};

static int try_take(struct tfd_client *client, void *argument)
{
	const struct batch *batch = argument;
	int rc = tfd_client_over(client);

	return rc ? rc : take_all(client, batch->entries, batch->count);
}

uint64_t tfd_client_arena_bytes(const struct tfd_client *client)
{
	return client->arena.bytes;
}

int tfd_client_submit_tables(struct tfd_client *client, uint32_t ring, struct tfd_entry *entries,
                             const struct tfd_client_table *tables, uint32_t count, int64_t timeout_ns,
                             struct tfd_table_fault *fault)
{
	struct batch batch = { entries, count };
	uint64_t deadline;
	int rc;

	if (!client)
		return -EPIPE;
	if (count > client->record_count)
		return -E2BIG;
	rc = tfd_client_tables_check(entries, tables, count, fault);
	if (!rc)
		rc = check_batch(client, entries, count);
	if (rc)
		return rc;
	deadline = tfd_client_deadline(timeout_ns);
	rc = tfd_client_room_wait(client, try_take, &batch, timeout_ns);
	if (rc)
		return rc;
	fill_all(client, entries, tables, count);
	rc = check_copied(client, entries, tables, count, fault);
	if (!rc)
		rc = tfd_client_publish_wait(client, ring, entries, count, true, tfd_client_left(deadline));
	if (rc)
		release_all(client, entries, count);
	return rc;
}

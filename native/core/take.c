/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From an entry to a job, or to a plan: it is validated against private tables, and what it points to in the segment is read once.
 */
#include <string.h>

#include "barrier.h"
#include "parts.h"

#define TARGETS_WASTED_MAX                                                                        \
	TFD_SESSION_PLAN_TARGETS /* of one session in a pass: all its plans may be made in one */

static uint32_t check_open(const struct tfd_open *open, uint32_t right, uint64_t now)
{
	if (!open)
		return TFD_DETAIL_BAD_GRANT;
	if (open->refused)
		return open->refused;
	if (open->expires_ns && now >= open->expires_ns)
		return TFD_DETAIL_EXPIRED;
	if (!(open->rights & right))
		return TFD_DETAIL_RIGHTS;
	return open->path_count ? TFD_DETAIL_NONE : open->unreached;
}

/* Of what its client copies: both ends are in memory of devices of this host, and it may have mapped the far one. */
static uint32_t check_copied(const struct tfd_open *open, const struct tfd_region *region)
{
	if (!region->device || !open->device || open->paths[0].conn->rail->ops->path_id != TFD_PATH_LOCAL)
		return TFD_DETAIL_NOT_COPIED;
	return open->rights & TFD_RIGHT_MAP ? TFD_DETAIL_NONE : TFD_DETAIL_RIGHTS;
}

/* Whether what it moves, in parts of so many bytes, can be reached. Memory of a device is compared by nobody. */
static uint32_t check_reach(const struct tfd_taking *taking, const struct tfd_open *open, bool bytes,
                            uint64_t part_bytes)
{
	const struct tfd_region *region = taking->region;
	uint8_t flags = taking->entry->flags;

	if (flags & TFD_FLAG_COPIED)
		return check_copied(open, region);
	if (!bytes || !(open->device || region->device))
		return TFD_DETAIL_NONE;
	if (flags & TFD_FLAG_CHECKSUM)
		return TFD_DETAIL_BAD_FLAGS;
	if (!tfd_open_reaches(open, region))
		return open->unreached;
	return tfd_open_takes(open, region, taking->entry->op == TFD_OP_READ, part_bytes) ?
	               TFD_DETAIL_NONE :
	               TFD_DETAIL_ONE_BYTE;
}

static bool imm_granted(const struct tfd_open *open, uint32_t imm)
{
	return imm >= open->imm_first && imm - open->imm_first < open->imm_count;
}

static bool within(uint64_t offset, uint64_t length, uint64_t bytes)
{
	return offset <= bytes && length <= bytes - offset;
}

/* Untrusted. NULL: the table leaves the arena. */
static const uint8_t *find_table(const struct tfd_source *source, const struct tfd_tables *tables,
                                 const struct tfd_entry *entry, size_t each)
{
	const uint8_t *base = source->control ? (tables ? tables->data : NULL) : source->arena;
	uint64_t bytes = source->control ? (tables ? tables->bytes : 0) : source->arena_bytes;

	if (entry->table_offset % 8 || !within(entry->table_offset, entry->table_count * each, bytes))
		return NULL;
	return base + entry->table_offset;
}

/* The table that the launches of a plan read. Untrusted. NULL: it leaves the arena. */
static const uint8_t *find_launch(const struct tfd_source *source, const struct tfd_entry *entry,
                                  uint32_t *capacity)
{
	bool pages = entry->op == TFD_OP_WRITE_PAGES;
	uint64_t each = pages ? sizeof(struct tfd_page) : sizeof(struct tfd_slice);

	*capacity = entry->op == TFD_OP_WRITE ? 1 : entry->table_count;
	if (entry->argument % 8 ||
	    !within(entry->argument, sizeof(struct tfd_plan_table) + *capacity * each, source->arena_bytes))
		return NULL;
	return source->arena + entry->argument;
}

/* Whether its sizes and offsets are read when it begins. */
static bool is_deferred(const struct tfd_taking *taking)
{
	return taking->plan && (taking->entry->flags & TFD_FLAG_TABLE);
}

/* The region that it reads, or a read writes. */
static uint32_t check_region(struct tfd_taking *taking)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_region *region = tfd_table_get(&taking->session->regions, entry->src_region);

	if (!region)
		return TFD_DETAIL_BAD_REGION;
	if (tfd_load_relaxed(&region->broken))
		return TFD_DETAIL_BROKEN_REGION;
	if (entry->op == TFD_OP_READ && !region->writable)
		return TFD_DETAIL_READ_ONLY;
	taking->region = region;
	return TFD_DETAIL_NONE;
}

/* What its stream waits for before it copies. */
static void trigger_fill(const struct tfd_taking *taking, struct tfd_job *job)
{
	const struct tfd_watch *watches = taking->session->watches;
	struct tfd_copy_marks *marks = (void *)watches[taking->entry->marks - 1].word;

	job->copy_mark = &marks->marks[taking->entry->fire_at % TFD_COPY_MARKS];
	job->trigger = watches[taking->entry->trigger].word;
	job->trigger_at = taking->trigger_at;
}

static struct tfd_job *make_job(const struct tfd_taking *taking, uint32_t shard_count)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_job *job = tfd_job_alloc(taking->session, shard_count);

	if (!job)
		return NULL;
	job->source = taking->source;
	job->region = taking->region;
	job->tables = taking->tables;
	job->job_id = entry->job_id;
	job->record = entry->record;
	job->op = entry->op;
	job->flags =
		entry->flags & (TFD_FLAG_EXACT | TFD_FLAG_COUNT_JOB | TFD_FLAG_CHECKSUM | TFD_FLAG_COPIED);
	job->priority = entry->priority;
	job->imm = entry->imm;
	job->src_offset = entry->src_offset;
	job->dst_offset = entry->dst_offset;
	job->length = entry->length;
	job->deadline_ns = entry->deadline_ns;
	job->accepted_ns = taking->worker->now_ns;
	if (is_deferred(taking))
		job->launch = find_launch(taking->source, entry, &job->capacity);
	if (entry->marks)
		trigger_fill(taking, job);
	return job;
}

/* Of a job with one grant. What its client copies goes whole: nothing but its counts goes by a path. */
static uint32_t shards_of(const struct tfd_taking *taking, const struct tfd_open *open)
{
	const struct tfd_entry *entry = taking->entry;
	bool counts_once = (entry->flags & TFD_FLAG_COUNT_JOB) != 0;

	if (entry->op == TFD_OP_WRITE_PAGES && !entry->table_count && !counts_once)
		return 0; /* nothing to move, nothing to count */
	if (entry->flags & TFD_FLAG_COPIED)
		return 1;
	if (entry->op == TFD_OP_WRITE_PAGES)
		return tfd_cut_count(open, taking->region, entry->table_count, counts_once, 1);
	return tfd_cut_count(open, entry->length ? taking->region : NULL, entry->length, true,
	                     taking->session->group->cut_bytes);
}

/* Write, imm, pages, read: one grant. */
static uint32_t take_single(struct tfd_taking *taking, struct tfd_job **out)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_open *open = tfd_table_get(&taking->session->opens, entry->dst_grant);
	bool reads = entry->op == TFD_OP_READ;
	bool pages = entry->op == TFD_OP_WRITE_PAGES;
	bool deferred = is_deferred(taking);
	uint32_t detail = check_open(open, reads ? TFD_RIGHT_READ : TFD_RIGHT_WRITE, taking->worker->now_ns);

	if (!detail && entry->op != TFD_OP_IMM)
		detail = check_region(taking);
	if (!detail)
		detail = check_reach(taking, open,
		                     deferred || (entry->length && (!pages || entry->table_count)),
		                     deferred && !pages ? 0 : entry->length);
	if (detail)
		return detail;
	if (!reads && !imm_granted(open, entry->imm))
		return TFD_DETAIL_IMM_RANGE;
	/* Of pages each is checked when it is copied; but what counts them goes to where they begin, even if there are none. */
	if (!within(entry->dst_offset, pages || deferred ? 0 : entry->length, open->length))
		return TFD_DETAIL_DESTINATION_BOUNDS;
	if (taking->region && !within(entry->src_offset, pages ? 0 : entry->length, taking->region->length))
		return TFD_DETAIL_SOURCE_BOUNDS;
	if (pages && !deferred && entry->table_count &&
	    !find_table(taking->source, taking->tables, entry, sizeof(struct tfd_page)))
		return TFD_DETAIL_TABLE;
	*out = make_job(taking, shards_of(taking, open));
	if (!*out)
		return TFD_DETAIL_NONE;
	(*out)->open = open;
	(*out)->counts = 1;
	if (pages) {
		(*out)->table =
			deferred ? NULL :
				   find_table(taking->source, taking->tables, entry, sizeof(struct tfd_page));
		(*out)->counts = entry->table_count;
		(*out)->src_stride = entry->src_stride;
		(*out)->dst_stride = entry->dst_stride;
	}
	return TFD_DETAIL_NONE;
}

/* A message: its bytes are read from the table, and posted from a copy. */
static uint32_t take_send(struct tfd_taking *taking, struct tfd_job **out)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_open *open = tfd_table_get(&taking->session->opens, entry->dst_grant);
	uint32_t detail = check_open(open, TFD_RIGHT_SEND, taking->worker->now_ns);
	const uint8_t *bytes;

	if (detail)
		return detail;
	if (entry->table_count > open->length || entry->table_count > TFD_MESSAGE_BYTES_MAX)
		return TFD_DETAIL_DESTINATION_BOUNDS;
	bytes = find_table(taking->source, taking->tables, entry, 1);
	if (!bytes && entry->table_count)
		return TFD_DETAIL_TABLE;
	*out = make_job(taking, 1);
	if (!*out)
		return TFD_DETAIL_NONE;
	(*out)->open = open;
	(*out)->table = bytes;
	(*out)->length = entry->table_count;
	return TFD_DETAIL_NONE;
}

static uint32_t check_target(const struct tfd_taking *taking, const struct tfd_target *target,
                             struct tfd_shard *shard)
{
	struct tfd_open *open = tfd_table_get(&taking->session->opens, target->dst_grant);
	uint32_t detail = check_open(open, TFD_RIGHT_WRITE, taking->worker->now_ns);

	if (detail)
		return detail;
	if (!imm_granted(open, taking->entry->imm))
		return TFD_DETAIL_IMM_RANGE;
	if (!within(target->dst_offset, target->length, open->length))
		return TFD_DETAIL_DESTINATION_BOUNDS;
	detail = check_reach(taking, open, taking->region && (target->length || is_deferred(taking)),
	                     target->length);
	if (detail)
		return detail;
	if (taking->region ? !within(target->src_offset, target->length, taking->region->length) :
	                     target->length || target->src_offset)
		return TFD_DETAIL_SOURCE_BOUNDS;
	shard->open = open;
	shard->src_offset = target->src_offset;
	shard->dst_offset = target->dst_offset;
	shard->length = target->length;
	return TFD_DETAIL_NONE;
}

/* In a table of the arena: where a stream writes for a target follows all of them. */
static size_t target_bytes(const struct tfd_entry *entry)
{
	return sizeof(struct tfd_target) + (entry->flags & TFD_FLAG_COPIED ? sizeof(uint64_t) : 0);
}

/* Scatter, barrier: every target is checked before anything is sent. */
static uint32_t take_targets(struct tfd_taking *taking, struct tfd_job **out)
{
	const struct tfd_entry *entry = taking->entry;
	const uint8_t *table;
	uint32_t detail = entry->op == TFD_OP_SCATTER ? check_region(taking) : TFD_DETAIL_NONE;

	if (detail)
		return detail;
	table = taking->plan ? (const uint8_t *)taking->plan->targets :
	                       find_table(taking->source, taking->tables, entry, target_bytes(entry));
	if (entry->table_count > TFD_MAX_TARGETS || (!table && entry->table_count))
		return TFD_DETAIL_TABLE;
	if (is_deferred(taking) && !within(entry->src_offset, entry->length, taking->region->length))
		return TFD_DETAIL_SOURCE_BOUNDS;
	*out = make_job(taking, entry->table_count);
	if (*out && entry->flags & TFD_FLAG_COPIED && !taking->plan)
		(*out)->places = (void *)(table + entry->table_count * sizeof(struct tfd_target));
	for (uint32_t i = 0; *out && !detail && i < entry->table_count; i++) {
		struct tfd_target target; /* the one read of it */

		memcpy(&target, table + i * sizeof(target), sizeof(target));
		__asm__ volatile("" : : "r"(&target) : "memory");
		if (is_deferred(taking))
			target = (struct tfd_target){ .dst_grant = target.dst_grant };
		detail = check_target(taking, &target, &(*out)->shards[i]);
	}
	return detail;
}

/* What was read for it counts: else one ring could hold up a pass, or a command, with tables that come to nothing. */
static void drop(const struct tfd_taking *taking, struct tfd_job *job)
{
	taking->session->targets_wasted += job->shard_count;
	tfd_job_drop(job);
}

/* NULL in *out and no detail: a quota. */
static uint32_t build_job(struct tfd_taking *taking, struct tfd_job **out)
{
	uint32_t capacity;

	if (is_deferred(taking) && !find_launch(taking->source, taking->entry, &capacity))
		return TFD_DETAIL_TABLE;
	switch (taking->entry->op) {
	case TFD_OP_SCATTER:
	case TFD_OP_BARRIER:
		if (taking->session->targets_wasted >= TARGETS_WASTED_MAX)
			return TFD_DETAIL_NONE;
		return take_targets(taking, out);
	case TFD_OP_SEND:
		return take_send(taking, out);
	default:
		return take_single(taking, out);
	}
}

static uint32_t status_of(uint32_t detail, const struct tfd_job *job)
{
	if (tfd_detail_is_loss(detail) || detail == TFD_DETAIL_STAGING)
		return TFD_JOB_PEER_LOST;
	if (detail)
		return TFD_JOB_INVALID;
	return job ? TFD_JOB_PENDING : TFD_JOB_QUOTA;
}

void tfd_take_job(struct tfd_taking *taking)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_job *job = NULL;
	uint32_t status, detail;

	detail = build_job(taking, &job);
	status = status_of(detail, job);
	/* Who counts on it is told as of any other. What a stream copies already is armed, and ends in the next pass. */
	if (status == TFD_JOB_PENDING && entry->deadline_ns && taking->worker->now_ns >= entry->deadline_ns &&
	    !(entry->flags & TFD_FLAG_COPIED)) {
		tfd_job_enter(job);
		tfd_job_fail(job, TFD_JOB_DEADLINE, TFD_DETAIL_NONE);
		tfd_job_finish_if_quiet(job);
		return;
	}
	if (status == TFD_JOB_PENDING && !(entry->flags & TFD_FLAG_ARMED)) {
		if (job->launch) {
			tfd_job_enter(job);
			tfd_job_begin(job);
		} else {
			tfd_job_start(job);
		}
		return;
	}
	if (status == TFD_JOB_PENDING) {
		if (tfd_arm(job, entry))
			return;
		status = TFD_JOB_QUOTA;
	}
	if (job)
		drop(taking, job);
	if (taking->tables)
		tfd_tables_put(taking->source, taking->tables);
	tfd_entry_end(taking->session, taking->source, entry, status, detail);
}

void tfd_take_launch(struct tfd_taking *taking)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_entry launched;

	taking->plan = tfd_plan_get(taking->session, entry->plan);
	if (!taking->plan) {
		tfd_entry_end(taking->session, taking->source, entry, TFD_JOB_INVALID, TFD_DETAIL_BAD_PLAN);
		return;
	}
	if ((taking->plan->entry.flags ^ entry->flags) &
	    TFD_FLAG_COPIED) { /* who copies, and when, both know */
		tfd_entry_end(taking->session, taking->source, entry, TFD_JOB_INVALID, TFD_DETAIL_BAD_FLAGS);
		return;
	}
	launched = taking->plan->entry;
	launched.flags |= entry->flags;
	launched.trigger = entry->trigger;
	launched.marks = entry->marks;
	launched.record = entry->record;
	launched.job_id = entry->job_id;
	launched.deadline_ns = entry->deadline_ns;
	launched.watcher = entry->watcher;
	launched.fire_at = entry->fire_at;
	taking->entry = &launched;
	tfd_take_job(taking);
}

/* A plan is good if its job can be built now; it is built anew from private memory for each launch. */
static uint32_t make_plan(struct tfd_taking *taking, uint32_t *detail)
{
	const struct tfd_entry *entry = taking->entry;
	bool many = entry->op == TFD_OP_SCATTER || entry->op == TFD_OP_BARRIER;
	const uint8_t *table = NULL;
	struct tfd_job *job = NULL;
	struct tfd_template *plan;
	uint32_t status;

	*detail = TFD_DETAIL_BAD_PLAN;
	if (entry->plan >= taking->session->plan_count || tfd_plan_get(taking->session, entry->plan))
		return TFD_JOB_INVALID;
	*detail = TFD_DETAIL_TABLE;
	if (many) {
		table = find_table(taking->source, NULL, entry, target_bytes(entry));
		if (!table || entry->table_count > TFD_MAX_TARGETS)
			return TFD_JOB_INVALID;
	}
	*detail = TFD_DETAIL_NONE;
	plan = tfd_plan_add(taking->session, entry->plan, many ? entry->table_count : 0);
	if (!plan)
		return TFD_JOB_QUOTA;
	plan->entry = *entry;
	plan->entry.flags &= (uint8_t)~TFD_FLAG_PLAN;
	if (many)
		memcpy(plan->targets, table, entry->table_count * sizeof(plan->targets[0]));
	taking->plan = plan;
	taking->entry = &plan->entry;
	*detail = build_job(taking, &job);
	status = status_of(*detail, job);
	if (job)
		drop(taking, job);
	if (status != TFD_JOB_PENDING)
		tfd_plan_remove(taking->session, entry->plan);
	return status == TFD_JOB_PENDING ? TFD_JOB_OK : status;
}

void tfd_take_plan(struct tfd_taking *taking)
{
	const struct tfd_entry *entry = taking->entry;
	uint32_t detail;
	uint32_t status = make_plan(taking, &detail);

	tfd_entry_end(taking->session, taking->source, entry, status, detail);
}

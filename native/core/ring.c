/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From an untrusted ring entry to a job. Each entry is copied once, the copy is validated against private tables;
 * nothing in the segment is read twice. What is wrong with a request ends that request; what is wrong with the
 * ring itself ends the session.
 */
#include <string.h>

#include "barrier.h"
#include "parts.h"

#define DRAIN_BUDGET 64 /* entries of one ring in one pass: others wait no longer than that */

void tfd_session_break(struct tfd_session *session, uint32_t detail)
{
	struct tfd_event event = { .type = TFD_EVENT_SESSION_BROKEN,
	                           .detail = detail,
	                           .id = session->handle };

	if (session->state != TFD_STATE_OPEN)
		return;
	tfd_store_relaxed(&session->state, TFD_STATE_BROKEN);
	tfd_event_post(session->group->worker, &event);
}

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
	return TFD_DETAIL_NONE;
}

static bool imm_granted(const struct tfd_open *open, uint32_t imm)
{
	return imm >= open->imm_first && imm - open->imm_first < open->imm_count;
}

static bool within(uint64_t offset, uint64_t length, uint64_t bytes)
{
	return offset <= bytes && length <= bytes - offset;
}

/* What an operation may use besides the fields that all have. */
struct form {
	bool known;
	bool has_region; /* region, offset, grant's offset, length */
	bool has_table;
	bool has_pages;
	uint8_t flags;
};

static const struct form forms[] = {
	[TFD_OP_WRITE] = { .known = true, .has_region = true, .flags = TFD_FLAG_EXACT | TFD_FLAG_CHECKSUM },
	[TFD_OP_IMM] = { .known = true },
	[TFD_OP_ACKNOWLEDGE] = { .known = true },
	[TFD_OP_CANCEL] = { .known = true },
	[TFD_OP_WRITE_PAGES] = { .known = true,
	                         .has_region = true,
	                         .has_table = true,
	                         .has_pages = true,
	                         .flags = TFD_FLAG_EXACT | TFD_FLAG_COUNT_JOB | TFD_FLAG_CHECKSUM },
	[TFD_OP_SCATTER] = { .known = true,
	                     .has_region = true,
	                     .has_table = true,
	                     .flags = TFD_FLAG_CHECKSUM },
	[TFD_OP_BARRIER] = { .known = true, .has_table = true },
	[TFD_OP_READ] = { .known = true, .has_region = true },
	[TFD_OP_SEND] = { .known = true, .has_table = true },
	[TFD_OP_RELEASE] = { .known = true },
	[TFD_OP_DISARM] = { .known = true },
};

/* What is done when it is taken, and is no job. */
static bool is_command(uint8_t op)
{
	return op == TFD_OP_ACKNOWLEDGE || op == TFD_OP_CANCEL || op == TFD_OP_RELEASE || op == TFD_OP_DISARM;
}

/* Control's ring has no watchers: who arms a job must be able to bump. */
static uint32_t check_armed(const struct tfd_session *session, const struct tfd_source *source,
                            const struct tfd_entry *entry)
{
	if (!(entry->flags & TFD_FLAG_ARMED))
		return entry->flags & TFD_FLAG_POLLED || entry->watcher || entry->fire_at ?
		               TFD_DETAIL_BAD_FLAGS :
		               TFD_DETAIL_NONE;
	if (source->control || is_command(entry->op))
		return TFD_DETAIL_BAD_FLAGS;
	return entry->watcher < session->watcher_count ? TFD_DETAIL_NONE : TFD_DETAIL_BAD_WATCHER;
}

static uint32_t check_form(const struct tfd_entry *entry)
{
	const uint8_t armed = TFD_FLAG_ARMED | TFD_FLAG_POLLED; /* check_armed's */
	const struct form *form =
		entry->op < sizeof(forms) / sizeof(forms[0]) ? &forms[entry->op] : &forms[0];

	if (!form->known)
		return TFD_DETAIL_BAD_OP;
	if (entry->flags & ~(form->flags | armed) || entry->priority > TFD_PRIORITY_LATENCY ||
	    entry->_resv0 || entry->_resv2 || entry->_resv3)
		return TFD_DETAIL_BAD_FLAGS;
	if (entry->imm >= TFD_IMM_COUNT)
		return TFD_DETAIL_IMM_BITS;
	if (entry->length > TFD_MAX_LENGTH)
		return TFD_DETAIL_LENGTH;
	if (!form->has_region &&
	    (entry->op == TFD_OP_IMM || entry->op == TFD_OP_BARRIER || entry->op == TFD_OP_SEND) &&
	    (entry->length || entry->src_region || entry->src_offset))
		return TFD_DETAIL_BAD_FLAGS;
	if ((!form->has_table && (entry->table_offset || entry->table_count)) ||
	    (!form->has_pages && (entry->src_stride || entry->dst_stride)))
		return TFD_DETAIL_BAD_FLAGS;
	return TFD_DETAIL_NONE;
}

void tfd_entry_end(struct tfd_session *session, struct tfd_source *source, const struct tfd_entry *entry,
                   uint32_t status, uint32_t detail)
{
	uint64_t now = session->group->worker->now_ns;
	struct tfd_record end = { .done_id = entry->job_id,
	                          .status = status,
	                          .detail = detail,
	                          .accepted_ns = now,
	                          .ended_ns = now };

	tfd_store_relaxed(&session->stat.jobs_ended, session->stat.jobs_ended + 1);
	if (status != TFD_JOB_OK)
		tfd_store_relaxed(&session->stat.jobs_failed, session->stat.jobs_failed + 1);
	tfd_record_end(session, source, entry->record, &end);
}

static void take_acknowledge(struct tfd_session *session, struct tfd_source *source,
                             const struct tfd_entry *entry)
{
	uint32_t slot = tfd_counter_find(session, entry->imm);

	if (slot == TFD_NO_SLOT) {
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, TFD_DETAIL_BAD_COUNTER);
		return;
	}
	tfd_counter_acknowledge(session, slot);
	tfd_entry_end(session, source, entry, TFD_JOB_OK, TFD_DETAIL_NONE);
}

static void take_release(struct tfd_session *session, struct tfd_source *source,
                         const struct tfd_entry *entry)
{
	uint32_t detail = tfd_mailbox_release(session, entry);

	tfd_entry_end(session, source, entry, detail ? TFD_JOB_INVALID : TFD_JOB_OK, detail);
}

static void take_cancel(struct tfd_session *session, struct tfd_source *source, const struct tfd_entry *entry)
{
	/* Found by its record, not by a search: a flood of cancels costs what a flood of anything costs. */
	struct tfd_job *job = source->in_flight[entry->argument & (source->record_count - 1)];

	if (!job || job->job_id != entry->argument) {
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, TFD_DETAIL_NO_SUCH_JOB);
		return;
	}
	tfd_job_fail(job, TFD_JOB_CANCELLED, TFD_DETAIL_NONE);
	tfd_job_finish_if_quiet(job);
	tfd_entry_end(session, source, entry, TFD_JOB_OK, TFD_DETAIL_NONE);
}

static void take_disarm(struct tfd_session *session, struct tfd_source *source, const struct tfd_entry *entry)
{
	if (entry->argument >= session->watcher_count) {
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, TFD_DETAIL_BAD_WATCHER);
		return;
	}
	tfd_watch_clear(&session->watches[entry->argument]);
	tfd_entry_end(session, source, entry, TFD_JOB_OK, TFD_DETAIL_NONE);
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

struct taking {
	struct tfd_worker *worker;
	struct tfd_session *session;
	struct tfd_source *source;
	const struct tfd_entry *entry;
	struct tfd_tables *tables;
	struct tfd_region *region;
};

/* The region that it reads, or a read writes. */
static uint32_t check_region(struct taking *taking)
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

static struct tfd_job *make_job(const struct taking *taking, uint32_t shard_count)
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
	job->flags = entry->flags & (TFD_FLAG_EXACT | TFD_FLAG_COUNT_JOB | TFD_FLAG_CHECKSUM);
	job->priority = entry->priority;
	job->imm = entry->imm;
	job->src_offset = entry->src_offset;
	job->dst_offset = entry->dst_offset;
	job->length = entry->length;
	job->deadline.key = entry->deadline_ns;
	job->accepted_ns = taking->worker->now_ns;
	return job;
}

/* Write, imm, pages, read: one grant. */
static uint32_t take_single(struct taking *taking, struct tfd_job **out)
{
	const struct tfd_entry *entry = taking->entry;
	struct tfd_open *open = tfd_table_get(&taking->session->opens, entry->dst_grant);
	bool reads = entry->op == TFD_OP_READ;
	bool pages = entry->op == TFD_OP_WRITE_PAGES;
	uint32_t detail = check_open(open, reads ? TFD_RIGHT_READ : TFD_RIGHT_WRITE, taking->worker->now_ns);
	uint32_t shards;

	if (!detail && entry->op != TFD_OP_IMM)
		detail = check_region(taking);
	if (detail)
		return detail;
	if (!reads && !imm_granted(open, entry->imm))
		return TFD_DETAIL_IMM_RANGE;
	/* Of pages each is checked when it is copied; but what counts them goes to where they begin, even if there are none. */
	if (!within(entry->dst_offset, pages ? 0 : entry->length, open->length))
		return TFD_DETAIL_DESTINATION_BOUNDS;
	if (taking->region && !within(entry->src_offset, pages ? 0 : entry->length, taking->region->length))
		return TFD_DETAIL_SOURCE_BOUNDS;
	if (pages && entry->table_count &&
	    !find_table(taking->source, taking->tables, entry, sizeof(struct tfd_page)))
		return TFD_DETAIL_TABLE;
	if (!pages)
		shards = tfd_cut_count(open, entry->length, true, taking->session->group->cut_bytes);
	else if (!entry->table_count && !(entry->flags & TFD_FLAG_COUNT_JOB))
		shards = 0; /* nothing to move, nothing to count */
	else
		shards = tfd_cut_count(open, entry->table_count, (entry->flags & TFD_FLAG_COUNT_JOB) != 0, 1);
	*out = make_job(taking, shards);
	if (!*out)
		return TFD_DETAIL_NONE;
	(*out)->open = open;
	(*out)->counts = 1;
	if (pages) {
		(*out)->table = find_table(taking->source, taking->tables, entry, sizeof(struct tfd_page));
		(*out)->counts = entry->table_count;
		(*out)->src_stride = entry->src_stride;
		(*out)->dst_stride = entry->dst_stride;
	}
	return TFD_DETAIL_NONE;
}

/* A message: its bytes are read from the table, and posted from a copy. */
static uint32_t take_send(struct taking *taking, struct tfd_job **out)
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

static uint32_t check_target(const struct taking *taking, const struct tfd_target *target,
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
	if (taking->region ? !within(target->src_offset, target->length, taking->region->length) :
	                     target->length || target->src_offset)
		return TFD_DETAIL_SOURCE_BOUNDS;
	shard->open = open;
	shard->src_offset = target->src_offset;
	shard->dst_offset = target->dst_offset;
	shard->length = target->length;
	return TFD_DETAIL_NONE;
}

/* Scatter, barrier: every target is checked before anything is sent. */
static uint32_t take_targets(struct taking *taking, struct tfd_job **out)
{
	const struct tfd_entry *entry = taking->entry;
	const uint8_t *table;
	uint32_t detail = entry->op == TFD_OP_SCATTER ? check_region(taking) : TFD_DETAIL_NONE;

	if (detail)
		return detail;
	table = find_table(taking->source, taking->tables, entry, sizeof(struct tfd_target));
	if (entry->table_count > TFD_MAX_TARGETS || (!table && entry->table_count))
		return TFD_DETAIL_TABLE;
	*out = make_job(taking, entry->table_count);
	for (uint32_t i = 0; *out && !detail && i < entry->table_count; i++) {
		struct tfd_target target; /* the one read of it */

		memcpy(&target, table + i * sizeof(target), sizeof(target));
		__asm__ volatile("" : : "r"(&target) : "memory");
		detail = check_target(taking, &target, &(*out)->shards[i]);
	}
	return detail;
}

static void take_job(struct taking *taking)
{
	const struct tfd_entry *entry = taking->entry;
	bool many = entry->op == TFD_OP_SCATTER || entry->op == TFD_OP_BARRIER;
	struct tfd_job *job = NULL;
	uint32_t status = TFD_JOB_PENDING;
	uint32_t detail;

	if (entry->deadline_ns && taking->worker->now_ns >= entry->deadline_ns) {
		status = TFD_JOB_DEADLINE;
		detail = TFD_DETAIL_NONE;
	} else {
		detail = many                     ? take_targets(taking, &job) :
		         entry->op == TFD_OP_SEND ? take_send(taking, &job) :
		                                    take_single(taking, &job);
		if (tfd_detail_is_loss(detail))
			status = TFD_JOB_PEER_LOST;
		else if (detail)
			status = TFD_JOB_INVALID;
		else if (!job)
			status = TFD_JOB_QUOTA;
	}
	if (status == TFD_JOB_PENDING && !(entry->flags & TFD_FLAG_ARMED)) {
		tfd_job_start(job);
		return;
	}
	if (status == TFD_JOB_PENDING) {
		if (tfd_arm(job, entry))
			return;
		status = TFD_JOB_QUOTA;
	}
	if (job)
		tfd_job_drop(job);
	if (taking->tables)
		tfd_tables_put(taking->source, taking->tables);
	tfd_entry_end(taking->session, taking->source, entry, status, detail);
}

/* False: the ring itself is wrong. */
static bool take_entry(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source,
                       const struct tfd_entry *entry, struct tfd_tables *tables)
{
	uint32_t detail;

	/* The record is where an answer goes: without one of its own an entry cannot even be refused. */
	if (!entry->job_id || entry->record != (entry->job_id & (source->record_count - 1)) ||
	    source->in_flight[entry->record])
		return false;
	detail = check_form(entry);
	if (!detail)
		detail = check_armed(session, source, entry);
	if (tables && (detail || is_command(entry->op)))
		tfd_tables_put(source, tables);
	if (detail)
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, detail);
	else if (entry->op == TFD_OP_ACKNOWLEDGE)
		take_acknowledge(session, source, entry);
	else if (entry->op == TFD_OP_CANCEL)
		take_cancel(session, source, entry);
	else if (entry->op == TFD_OP_RELEASE)
		take_release(session, source, entry);
	else if (entry->op == TFD_OP_DISARM)
		take_disarm(session, source, entry);
	else
		take_job(&(struct taking){ worker, session, source, entry, tables, NULL });
	return true;
}

uint32_t tfd_ring_drain(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source)
{
	/* pairs with tfd_client_submit (release of tail): the entries below tail */
	uint32_t waiting = tfd_load_acquire(&source->ring->tail) - source->head;
	uint32_t done = 0;

	if (waiting == 0)
		return 0;
	if (waiting > source->entry_mask + 1) {
		tfd_session_break(session, TFD_DETAIL_BAD_FLAGS);
		return 1;
	}
	for (; done < waiting && done < DRAIN_BUDGET; done++) {
		struct tfd_entry entry; /* the one read of it */
		struct tfd_tables *tables =
			source->tables ? source->tables[source->head & source->entry_mask] : NULL;

		memcpy(&entry, &source->entries[source->head & source->entry_mask], sizeof(entry));
		/* A compiler must not read the segment again in place of the copy. */
		__asm__ volatile("" : : "r"(&entry) : "memory");
		source->head++;
		if (!take_entry(worker, session, source, &entry, tables)) {
			tfd_session_break(session, TFD_DETAIL_BAD_FLAGS);
			break;
		}
	}
	/* pairs with the client's acquire of head: the slots may be written again */
	tfd_store_release(&source->ring->head, source->head);
	return done ? done : 1;
}

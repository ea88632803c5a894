/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Taking entries from an untrusted ring. Each is copied once; what is a command is done, of the rest take.c makes jobs. What is wrong with
 * a request ends that request; what is wrong with the ring itself ends the session.
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

/* What an operation may use besides the fields that all have. */
struct form {
	bool known;
	bool has_region; /* region, offset, grant's offset, length */
	bool has_table;
	bool has_pages;
	uint8_t flags;
};

static const struct form forms[] = {
	[TFD_OP_WRITE] = { .known = true,
	                   .has_region = true,
	                   .flags = TFD_FLAG_EXACT | TFD_FLAG_CHECKSUM | TFD_FLAG_PLAN | TFD_FLAG_TABLE |
	                            TFD_FLAG_COPIED },
	[TFD_OP_IMM] = { .known = true, .flags = TFD_FLAG_PLAN },
	[TFD_OP_ACKNOWLEDGE] = { .known = true },
	[TFD_OP_CANCEL] = { .known = true },
	[TFD_OP_WRITE_PAGES] = { .known = true,
	                         .has_region = true,
	                         .has_table = true,
	                         .has_pages = true,
	                         .flags = TFD_FLAG_EXACT | TFD_FLAG_COUNT_JOB | TFD_FLAG_CHECKSUM |
	                                  TFD_FLAG_PLAN | TFD_FLAG_TABLE | TFD_FLAG_COPIED },
	[TFD_OP_SCATTER] = { .known = true,
	                     .has_region = true,
	                     .has_table = true,
	                     .flags = TFD_FLAG_CHECKSUM | TFD_FLAG_PLAN | TFD_FLAG_TABLE | TFD_FLAG_COPIED },
	[TFD_OP_BARRIER] = { .known = true, .has_table = true, .flags = TFD_FLAG_PLAN },
	[TFD_OP_READ] = { .known = true, .has_region = true, .flags = TFD_FLAG_PLAN | TFD_FLAG_COPIED },
	[TFD_OP_SEND] = { .known = true, .has_table = true },
	[TFD_OP_RELEASE] = { .known = true },
	[TFD_OP_DISARM] = { .known = true },
	[TFD_OP_LAUNCH] = { .known = true, .flags = TFD_FLAG_COPIED },
	[TFD_OP_FORGET] = { .known = true },
};

/* What is done when it is taken, and is no job. */
static bool is_command(uint8_t op)
{
	return op == TFD_OP_ACKNOWLEDGE || op == TFD_OP_CANCEL || op == TFD_OP_RELEASE ||
	       op == TFD_OP_DISARM || op == TFD_OP_FORGET;
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

/* Nor does it have plans: their tables are in the arena. */
static uint32_t check_plan(const struct tfd_source *source, const struct tfd_entry *entry)
{
	bool makes = (entry->flags & TFD_FLAG_PLAN) != 0;
	bool table = (entry->flags & TFD_FLAG_TABLE) != 0;
	bool uses = entry->op == TFD_OP_LAUNCH || entry->op == TFD_OP_FORGET;

	if ((source->control && (makes || uses)) || (table && !makes) ||
	    (entry->plan && !makes && entry->op != TFD_OP_LAUNCH) ||
	    (makes && (entry->flags & TFD_FLAG_ARMED)) ||
	    (makes && !table && entry->op == TFD_OP_WRITE_PAGES))
		return TFD_DETAIL_BAD_FLAGS;
	return TFD_DETAIL_NONE;
}

/* A device tells when the bytes are there, and nobody else has seen them. */
static uint32_t check_copied(const struct tfd_session *session, const struct tfd_entry *entry)
{
	const uint8_t needed = TFD_FLAG_ARMED | TFD_FLAG_POLLED;

	if (!(entry->flags & TFD_FLAG_COPIED))
		return entry->marks || entry->trigger ? TFD_DETAIL_BAD_FLAGS : TFD_DETAIL_NONE;
	if (entry->flags & TFD_FLAG_PLAN) /* its launches are armed */
		return entry->flags & TFD_FLAG_CHECKSUM || entry->marks || entry->trigger ?
		               TFD_DETAIL_BAD_FLAGS :
		               TFD_DETAIL_NONE;
	if ((entry->flags & needed) != needed || entry->flags & TFD_FLAG_CHECKSUM ||
	    (entry->trigger && !entry->marks))
		return TFD_DETAIL_BAD_FLAGS;
	if (entry->marks > session->watcher_count || entry->trigger >= session->watcher_count)
		return TFD_DETAIL_BAD_WATCHER;
	return TFD_DETAIL_NONE;
}

static uint32_t check_form(const struct tfd_entry *entry)
{
	const uint8_t armed = TFD_FLAG_ARMED | TFD_FLAG_POLLED; /* check_armed's */
	const struct form *form =
		entry->op < sizeof(forms) / sizeof(forms[0]) ? &forms[entry->op] : &forms[0];

	if (!form->known)
		return TFD_DETAIL_BAD_OP;
	if (entry->flags & ~(form->flags | armed) || entry->priority > TFD_PRIORITY_LATENCY || entry->_resv0)
		return TFD_DETAIL_BAD_FLAGS;
	if (entry->imm >= TFD_IMM_COUNT)
		return TFD_DETAIL_IMM_BITS;
	if (entry->length > TFD_MAX_LENGTH)
		return TFD_DETAIL_LENGTH;
	if (!form->has_region &&
	    (entry->op == TFD_OP_IMM || entry->op == TFD_OP_BARRIER || entry->op == TFD_OP_SEND ||
	     entry->op == TFD_OP_LAUNCH) &&
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

static void take_forget(struct tfd_session *session, struct tfd_source *source, const struct tfd_entry *entry)
{
	if (!tfd_plan_get(session, entry->argument)) {
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, TFD_DETAIL_BAD_PLAN);
		return;
	}
	tfd_plan_remove(session, (uint32_t)entry->argument);
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

/* False: the ring itself is wrong. */
static bool take_entry(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source,
                       const struct tfd_entry *entry, struct tfd_tables *tables)
{
	struct tfd_taking taking = { .worker = worker,
	                             .session = session,
	                             .source = source,
	                             .entry = entry,
	                             .tables = tables,
	                             .trigger_at = entry->argument };
	uint32_t detail;

	/* The record is where an answer goes: without one of its own an entry cannot even be refused. */
	if (!entry->job_id || entry->record != (entry->job_id & (source->record_count - 1)) ||
	    source->in_flight[entry->record])
		return false;
	detail = check_form(entry);
	if (!detail)
		detail = check_armed(session, source, entry);
	if (!detail)
		detail = check_plan(source, entry);
	if (!detail)
		detail = check_copied(session, entry);
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
	else if (entry->op == TFD_OP_FORGET)
		take_forget(session, source, entry);
	else if (entry->op == TFD_OP_LAUNCH)
		tfd_take_launch(&taking);
	else if (entry->flags & TFD_FLAG_PLAN)
		tfd_take_plan(&taking);
	else
		tfd_take_job(&taking);
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

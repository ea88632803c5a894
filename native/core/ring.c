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

static uint32_t check_open(const struct tfd_open *open, const struct tfd_entry *entry, uint64_t now)
{
	if (!open)
		return TFD_DETAIL_BAD_GRANT;
	if (open->refused)
		return open->refused;
	if (open->expires_ns && now >= open->expires_ns)
		return TFD_DETAIL_EXPIRED;
	if (!(open->rights & TFD_RIGHT_WRITE))
		return TFD_DETAIL_RIGHTS;
	if (entry->imm < open->imm_first || entry->imm - open->imm_first >= open->imm_count)
		return TFD_DETAIL_IMM_RANGE;
	if (entry->dst_offset > open->length || entry->length > open->length - entry->dst_offset)
		return TFD_DETAIL_DESTINATION_BOUNDS;
	return TFD_DETAIL_NONE;
}

static uint32_t check_region(const struct tfd_region *region, const struct tfd_entry *entry)
{
	if (!region)
		return TFD_DETAIL_BAD_REGION;
	if (entry->src_offset > region->length || entry->length > region->length - entry->src_offset)
		return TFD_DETAIL_SOURCE_BOUNDS;
	if (tfd_load_relaxed(&region->broken))
		return TFD_DETAIL_BROKEN_REGION;
	return TFD_DETAIL_NONE;
}

static bool all_zero(const uint64_t *words, size_t count)
{
	uint64_t any = 0;

	for (size_t i = 0; i < count; i++)
		any |= words[i];
	return any == 0;
}

static uint32_t check_form(const struct tfd_entry *entry)
{
	if (entry->op != TFD_OP_WRITE && entry->op != TFD_OP_IMM && entry->op != TFD_OP_ACKNOWLEDGE &&
	    entry->op != TFD_OP_CANCEL)
		return TFD_DETAIL_BAD_OP;
	if (entry->flags || entry->priority > TFD_PRIORITY_LATENCY || entry->_resv0 || entry->_resv1 ||
	    !all_zero(entry->_resv2, sizeof(entry->_resv2) / sizeof(entry->_resv2[0])))
		return TFD_DETAIL_BAD_FLAGS;
	if (entry->imm >= TFD_IMM_COUNT)
		return TFD_DETAIL_IMM_BITS;
	if (entry->length > TFD_MAX_LENGTH)
		return TFD_DETAIL_LENGTH;
	if (entry->op == TFD_OP_IMM && (entry->length || entry->src_region || entry->src_offset))
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

static void take_job(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source,
                     const struct tfd_entry *entry)
{
	struct tfd_open *open = tfd_table_get(&session->opens, entry->dst_grant);
	struct tfd_region *region = NULL;
	struct tfd_job *job;
	uint32_t detail = check_open(open, entry, worker->now_ns);

	if (!detail && entry->op == TFD_OP_WRITE) {
		region = tfd_table_get(&session->regions, entry->src_region);
		detail = check_region(region, entry);
	}
	if (detail) {
		bool lost = detail == TFD_DETAIL_STALE || detail == TFD_DETAIL_CONNECTION ||
		            detail == TFD_DETAIL_HEARTBEAT;

		tfd_entry_end(session, source, entry, lost ? TFD_JOB_PEER_LOST : TFD_JOB_INVALID, detail);
		return;
	}
	if (entry->deadline_ns && worker->now_ns >= entry->deadline_ns) {
		tfd_entry_end(session, source, entry, TFD_JOB_DEADLINE, TFD_DETAIL_NONE);
		return;
	}
	job = tfd_job_alloc(worker);
	if (!job) {
		tfd_entry_end(session, source, entry, TFD_JOB_QUOTA, TFD_DETAIL_NONE);
		return;
	}
	job->session = session;
	job->source = source;
	job->open = open;
	job->region = region;
	job->job_id = entry->job_id;
	job->record = entry->record;
	job->op = entry->op;
	job->priority = entry->priority;
	job->imm = tfd_wire_imm(open->name_space, entry->imm);
	job->src_offset = entry->src_offset;
	job->dst_offset = entry->dst_offset;
	job->length = entry->length;
	job->deadline_ns = entry->deadline_ns;
	job->accepted_ns = worker->now_ns;
	tfd_job_start(job);
}

/* False: the ring itself is wrong. */
static bool take_entry(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source,
                       const struct tfd_entry *entry)
{
	uint32_t detail;

	/* The record is where an answer goes: without one of its own an entry cannot even be refused. */
	if (!entry->job_id || entry->record != (entry->job_id & (source->record_count - 1)) ||
	    source->in_flight[entry->record])
		return false;
	detail = check_form(entry);
	if (detail)
		tfd_entry_end(session, source, entry, TFD_JOB_INVALID, detail);
	else if (entry->op == TFD_OP_ACKNOWLEDGE)
		take_acknowledge(session, source, entry);
	else if (entry->op == TFD_OP_CANCEL)
		take_cancel(session, source, entry);
	else
		take_job(worker, session, source, entry);
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

		memcpy(&entry, &source->entries[source->head & source->entry_mask], sizeof(entry));
		/* A compiler must not read the segment again in place of the copy. */
		__asm__ volatile("" : : "r"(&entry) : "memory");
		source->head++;
		if (!take_entry(worker, session, source, &entry)) {
			tfd_session_break(session, TFD_DETAIL_BAD_FLAGS);
			break;
		}
	}
	/* pairs with the client's acquire of head: the slots may be written again */
	tfd_store_release(&source->ring->head, source->head);
	return done ? done : 1;
}

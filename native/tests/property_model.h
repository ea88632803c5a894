/* SPDX-License-Identifier: Apache-2.0 */
/* What the property test demands of jobs, bytes and counts. */
#ifndef TFD_PROPERTY_MODEL_H
#define TFD_PROPERTY_MODEL_H

#include "property_jobs.h"

/* ---- bytes ---- */

static bool page_in_place(const struct world *w, uint32_t from, const struct job *job, uint32_t page)
{
	const struct tfd_entry *entry = &job->entry;

	return !entry->length ||
	       memcmp(w->to[job->receiver[0]].memory + entry->dst_offset +
	                      job->pages[page].dst * entry->dst_stride,
	              w->from[from].memory + entry->src_offset + job->pages[page].src * entry->src_stride,
	              entry->length) == 0;
}

static bool target_in_place(const struct world *w, uint32_t from, const struct job *job, uint32_t i)
{
	const struct tfd_target *target = &job->target[i];

	return memcmp(w->to[job->receiver[i]].memory + target->dst_offset,
	              w->from[from].memory + target->src_offset, target->length) == 0;
}

/* How many of its counts, at `to`, have all their bytes in place. */
static uint64_t counts_in_place(const struct world *w, uint32_t from, const struct job *job, uint32_t to)
{
	const struct tfd_entry *entry = &job->entry;
	uint64_t done = 0;

	if (is_many(job)) {
		for (uint32_t i = 0; i < job->targets; i++)
			done += job->receiver[i] == to && target_in_place(w, from, job, i);
		return done;
	}
	if (job->receiver[0] != to)
		return 0;
	if (entry->op != TFD_OP_WRITE_PAGES)
		return job->counts && memcmp(w->to[to].memory + entry->dst_offset,
		                             w->from[from].memory + entry->src_offset, entry->length) == 0;
	for (uint32_t i = 0; i < entry->table_count; i++)
		done += page_in_place(w, from, job, i);
	if (entry->flags & (TFD_FLAG_EXACT | TFD_FLAG_COUNT_JOB))
		return done == entry->table_count ? job->counts : 0;
	return done;
}

static void check_bytes(struct world *w, uint32_t from, const struct job *job)
{
	const struct tfd_entry *entry = &job->entry;

	if (is_many(job)) {
		for (uint32_t i = 0; i < job->targets; i++)
			MUST(job->receiver[i] == USERS || target_in_place(w, from, job, i));
	} else if (entry->op == TFD_OP_WRITE_PAGES) {
		for (uint32_t i = 0; i < entry->table_count; i++)
			MUST(page_in_place(w, from, job, i));
	} else {
		MUST(memcmp(w->to[job->receiver[0]].memory + entry->dst_offset,
		            w->from[from].memory + entry->src_offset, entry->length) == 0);
	}
}

static void canary(struct slot *slot, const struct world *w, uint32_t to)
{
	slot->job = 0;
	slot->canary_until = w->step + CANARY_STEPS;
	slot->seen = malloc(SLOT_BYTES);
	CHECK(slot->seen);
	memcpy(slot->seen, w->to[to].memory + (uint64_t)(slot - w->slots[to]) * SLOT_BYTES, SLOT_BYTES);
}

static void look_at_canaries(struct world *w)
{
	for (uint32_t to = 0; to < USERS; to++) {
		for (uint32_t i = 0; i < SLOTS; i++) {
			struct slot *slot = &w->slots[to][i];

			if (!slot->canary_until || w->step < slot->canary_until)
				continue;
			MUST(memcmp(slot->seen, w->to[to].memory + (uint64_t)i * SLOT_BYTES, SLOT_BYTES) ==
			     0);
			free(slot->seen);
			*slot = (struct slot){ 0 };
		}
	}
}

/* ---- ends ---- */

static bool job_end(const struct world *w, uint32_t from, const struct job *job, struct tfd_job_end *end)
{
	const struct user *user = &w->from[from];
	const struct tfd_record *record = &user->records[job->id % 64];

	if (job->control)
		return tfd_job_result(w->a.core, user->session, job->id, end) == 0;
	if (tfd_load_acquire(&record->done_id) != job->id)
		return false;
	*end = (struct tfd_job_end){ .status = record->status,
	                             .detail = record->detail,
	                             .accepted_ns = record->accepted_ns,
	                             .posted_ns = record->posted_ns,
	                             .ended_ns = record->ended_ns };
	return true;
}

/* A read that ended: what it was to bring does not arrive any more. */
static void hold_read(struct world *w, uint32_t from, struct job *job)
{
	job->held_until = w->step + CANARY_STEPS;
	job->seen = malloc(SLOT_BYTES);
	CHECK(job->seen);
	memcpy(job->seen, w->from[from].memory + job->entry.src_offset, SLOT_BYTES);
}

static void read_release(struct world *w, uint32_t from, struct job *job)
{
	MUST(memcmp(job->seen, w->from[from].memory + job->entry.src_offset, SLOT_BYTES) == 0);
	free(job->seen);
	job->seen = NULL;
	job->held_until = 0;
}

/* While every path is dead no grant is opened. */
static bool gone(struct world *w, uint32_t from, uint64_t open)
{
	return !open || opened_find(w, w->from[from].session, open)->removed;
}

static bool names_gone(struct world *w, uint32_t from, const struct job *job)
{
	bool any = !is_many(job) && gone(w, from, job->open);

	for (uint32_t i = 0; is_many(job) && i < job->targets; i++)
		any = any || gone(w, from, job->target[i].dst_grant);
	return any;
}

static void check_end(struct world *w, uint32_t from, const struct job *job, const struct tfd_job_end *end)
{
	bool allowed = end->status == TFD_JOB_OK || end->status == TFD_JOB_CANCELLED ||
	               end->status == TFD_JOB_DEADLINE || end->status == TFD_JOB_PEER_LOST ||
	               (end->status == TFD_JOB_INVALID && end->detail == TFD_DETAIL_REVOKED) ||
	               (end->status == TFD_JOB_INVALID && end->detail == TFD_DETAIL_BAD_GRANT &&
	                names_gone(w, from, job));

	if (!allowed)
		(void)fprintf(stderr, "op %u: status %u, detail %u\n", job->entry.op, end->status,
		              end->detail);
	MUST(allowed);
	MUST(end->status != TFD_JOB_DEADLINE || job->entry.deadline_ns);
	MUST(end->status != TFD_JOB_OK || !(job->entry.flags & TFD_FLAG_ARMED) ||
	     w->from[from].watchers[job->entry.watcher].value >= job->entry.fire_at);
	w->ended[end->status]++;
}

static void job_ended(struct world *w, uint32_t from, struct job *job, const struct tfd_job_end *end)
{
	/* Real ends have the real time. */
	bool refused = end->status != TFD_JOB_OK && !end->posted_ns && end->accepted_ns == end->ended_ns;

	check_end(w, from, job, end);
	if (end->status == TFD_JOB_OK)
		check_bytes(w, from, job);
	for (uint32_t i = 0; i < job->targets; i++) {
		uint32_t to = job->receiver[i];
		struct tally *tally = to < USERS ? &w->tally[to][job->entry.imm] : NULL;
		uint64_t counts = is_many(job) ? 1 : job->counts;

		if (!tally)
			continue;
		tally->expected += refused ? 0 : (int64_t)counts;
		tally->owed += refused && job->again ? counts : 0;
		if (end->status == TFD_JOB_OK || (is_many(job) && target_in_place(w, from, job, i)))
			tally->landed += counts; /* of many targets others may have failed */
		if (end->status != TFD_JOB_OK && !w->ordered &&
		    w->broken) /* such a rail does not tell what became of a piece */
			tally->unknown = true;
		canary(&w->slots[to][job->slot[i]], w, to);
	}
	if (job->entry.op == TFD_OP_READ && job->receiver[0] < USERS)
		hold_read(w, from, job);
	job->active = false;
}

static void look_at_jobs(struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			struct job *job = &w->jobs[from][i];
			struct tfd_job_end end;

			if (job->held_until && w->step >= job->held_until)
				read_release(w, from, job);
			if (!job->active)
				continue;
			if (job_end(w, from, job, &end))
				job_ended(w, from, job, &end);
			else
				MUST(w->step - job->started < JOB_STEPS);
		}
	}
}

/* Every entry has ended once: as many ends as entries. */
static void check_ends(struct world *w, uint32_t from)
{
	struct tfd_session_info info;

	CHECK_OK(tfd_session_stat(w->a.core, w->from[from].session, &info));
	MUST(info.jobs_in_flight == 0);
	MUST(info.jobs_ended == w->from[from].next_job + w->submitted[from]);
}

/* ---- counts ---- */

/*
 * A count is seen after the bytes that it counts. On one path, or of exact jobs only: else parts of two writes may meet in one
 * count.
 */
static void check_visible(struct world *w, uint32_t to, uint32_t imm)
{
	uint64_t visible = w->tally[to][imm].landed;

	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			const struct job *job = &w->jobs[from][i];

			if (job->active && job->entry.imm == imm)
				visible += counts_in_place(w, from, job, to);
		}
	}
	MUST(w->to[to].counters[imm].value <= visible);
}

static void look_at_counts(struct world *w)
{
	for (uint32_t to = 0; to < USERS; to++) {
		for (uint32_t imm = 0; imm < IMMS; imm++) {
			const struct tfd_counter *counter = &w->to[to].counters[imm];
			struct tally *tally = &w->tally[to][imm];
			bool faulted = counter->faults != counter->acknowledged;

			MUST(counter->value >= tally->value);
			MUST(counter->gate == counter->value + (faulted ? TFD_GATE_FAULT : 0));
			MUST(counter->faults == tally->faults && counter->lost == tally->lost);
			if (counter->value > tally->value && (w->path_count == 1 || imm < IMM_EXACT) &&
			    !tally->faults && !tally->unknown)
				check_visible(w, to, imm);
			tally->value = counter->value;
		}
	}
}

/* When all is quiet and what was lost has been sent again. */
static void check_sums(struct world *w)
{
	for (uint32_t to = 0; to < USERS; to++) {
		struct tfd_session *session = tfd_session_get(w->b.core, w->to[to].session);

		for (uint32_t imm = 0; imm < IMMS; imm++) {
			const struct tfd_count *count = &session->counts[imm];
			const struct tally *tally = &w->tally[to][imm];

			MUST(w->to[to].counters[imm].value == count->value);
			if (tally->unknown) {
				MUST(tally->rebased || imm >= IMM_MANY ||
				     count->eighths >= 8 * (int64_t)tally->landed);
				continue;
			}
			if (count->eighths != 8 * tally->expected)
				(void)fprintf(stderr,
				              "ordered %d receiver %u imm %u: %lld eighths, not %lld whole\n",
				              w->ordered, to, imm, (long long)count->eighths,
				              (long long)tally->expected);
			MUST(count->eighths == 8 * tally->expected);
			/* The target that whoever waits would have named. */
			MUST(tally->rebased ? (int64_t)count->value >= tally->expected :
			                      (int64_t)count->value == tally->expected);
			w->exact++;
		}
		tfd_session_put(session);
	}
}

#endif

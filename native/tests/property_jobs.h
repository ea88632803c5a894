/* SPDX-License-Identifier: Apache-2.0 */
/* Random jobs of the property test, by the client's ring or by control's. */
#ifndef TFD_PROPERTY_JOBS_H
#define TFD_PROPERTY_JOBS_H

#include "property_world.h"

#define COUNTS_MAX 9000u
#define READS_END (JOBS * 2 * SLOT_BYTES) /* below it in a sender's memory reads land */

static bool is_many(const struct job *job)
{
	return job->entry.op == TFD_OP_SCATTER || job->entry.op == TFD_OP_BARRIER;
}

/* Its bytes are there as they were before: what the job brings differs. */
static uint32_t slot_take(struct world *w, uint32_t receiver, uint32_t job)
{
	for (uint32_t tries = 0; tries < SLOTS; tries++) {
		struct slot *slot = &w->slots[receiver][chance(w, SLOTS)];
		uint32_t index = (uint32_t)(slot - w->slots[receiver]);

		if (slot->job || slot->canary_until)
			continue;
		slot->job = job + 1;
		memset(w->to[receiver].memory + (uint64_t)index * SLOT_BYTES, (int)chance(w, 256),
		       SLOT_BYTES);
		return index;
	}
	return SLOTS;
}

static uint64_t some_length(struct world *w, uint64_t most)
{
	static const uint32_t usual[] = { 0, 1, 7, 511, 512, 513, 4095, 16385, SLOT_BYTES };
	uint64_t length = chance(w, 2) ? usual[chance(w, 9)] : chance(w, SLOT_BYTES + 1);

	return length < most ? length : most;
}

static void shape_pages(struct world *w, struct job *job)
{
	uint32_t most = chance(w, 3) && !w->calm ? 64 : 8; /* small ones, or some longer than a segment */
	uint32_t count = chance(w, most + 1);
	uint32_t bytes = chance(w, 8) ? 1 + chance(w, SLOT_BYTES / most) : 0;
	uint32_t shift = chance(w, 3);

	job->entry.length = bytes;
	job->entry.src_stride = bytes + chance(w, 100);
	job->entry.dst_stride = SLOT_BYTES / most;
	if (shift == 0) /* adjacent ones: merged */
		job->entry.src_stride = job->entry.length = job->entry.dst_stride;
	else if (!bytes && chance(w, 2)) /* at one place */
		job->entry.src_stride = job->entry.dst_stride = 0;
	job->entry.table_count = count;
	job->entry.flags = (uint8_t)chance(w, 8);
	for (uint32_t i = 0; i < count; i++)
		job->pages[i] = (struct tfd_page){ .src = i, .dst = shift == 1 ? count - 1 - i : i };
	job->counts = job->entry.flags & TFD_FLAG_COUNT_JOB ? 1 : count;
}

static void shape_targets(struct world *w, uint32_t from, struct job *job, uint32_t index)
{
	bool bytes = job->entry.op == TFD_OP_SCATTER;

	job->entry.imm = IMM_MANY + chance(w, IMMS - IMM_MANY);
	job->entry.src_offset = 0;
	job->entry.dst_grant = 0;
	if (!bytes)
		job->entry.src_region = 0;
	else if (chance(w, 3) == 0)
		job->entry.flags = TFD_FLAG_CHECKSUM;
	for (uint32_t i = chance(w, TARGETS + 1); i > 0; i--) {
		uint32_t to = chance(w, USERS);
		uint32_t slot = slot_take(w, to, index);

		if (slot == SLOTS)
			break;
		job->receiver[job->targets] = to;
		job->slot[job->targets] = slot;
		job->target[job->targets] = (struct tfd_target){
			.dst_grant = w->grant[from][to],
			.src_offset =
				bytes ? READS_END + chance(w, REGION_BYTES - SLOT_BYTES - READS_END) : 0,
			.dst_offset = (uint64_t)slot * SLOT_BYTES,
			.length = bytes ? some_length(w, SLOT_BYTES) : 0,
		};
		job->targets++;
	}
	job->entry.table_count = job->targets;
}

static bool shape_single(struct world *w, uint32_t from, struct job *job, uint32_t index)
{
	uint32_t to = chance(w, USERS);
	uint8_t op = job->entry.op;

	job->receiver[0] = to;
	job->slot[0] = slot_take(w, to, index);
	if (job->slot[0] == SLOTS)
		return false;
	job->targets = 1;
	job->open = job->entry.dst_grant = w->grant[from][to];
	job->counts = op == TFD_OP_READ ? 0 : 1;
	job->entry.imm = chance(w, IMM_MANY);
	job->entry.dst_offset = (uint64_t)job->slot[0] * SLOT_BYTES;
	job->entry.src_offset = (uint64_t)(index % JOBS) * 2 * SLOT_BYTES;
	if (op == TFD_OP_IMM) {
		job->entry.src_region = job->entry.src_offset = 0;
	} else if (op == TFD_OP_WRITE_PAGES) {
		shape_pages(w, job);
	} else {
		job->entry.length = some_length(w, SLOT_BYTES);
		job->entry.flags = op == TFD_OP_WRITE && chance(w, 3) == 0;
		if (op == TFD_OP_WRITE && chance(w, 3) == 0)
			job->entry.flags |= TFD_FLAG_CHECKSUM;
	}
	if (job->entry.imm < IMM_EXACT && (op == TFD_OP_WRITE || op == TFD_OP_WRITE_PAGES))
		job->entry.flags |= TFD_FLAG_EXACT;
	return true;
}

/* Whether a record would be free for the user's next job. */
static bool ring_has_room(const struct world *w, uint32_t from)
{
	const struct user *user = &w->from[from];
	uint64_t next = user->next_job + 1;

	if (user->ring->tail - tfd_load_acquire(&user->ring->head) > 32 ||
	    (next > 64 && tfd_load_acquire(&user->records[next % 64].done_id) != next - 64))
		return false;
	for (uint32_t i = 0; i < JOBS; i++) { /* its end is to be looked at first */
		const struct job *job = &w->jobs[from][i];

		if (job->active && !job->control && job->id % 64 == next % 64)
			return false;
	}
	return true;
}

/* It waits for a watcher, which bump_some moves; it may have got there before. */
static void arm(struct world *w, uint32_t from, struct job *job)
{
	job->entry.flags |= TFD_FLAG_ARMED | (chance(w, 4) ? 0 : TFD_FLAG_POLLED);
	job->entry.watcher = chance(w, WATCHERS);
	job->entry.fire_at = w->from[from].watchers[job->entry.watcher].value + chance(w, 6);
	w->armed++;
}

static void bump_some(struct world *w, uint32_t from)
{
	w->from[from].watchers[chance(w, WATCHERS)].value += chance(w, 4);
}

static void send_by_ring(struct world *w, uint32_t from, uint32_t index, struct job *job, const void *table,
                         size_t bytes)
{
	struct user *user = &w->from[from];

	if (bytes) {
		job->entry.table_offset = (uint64_t)index * TABLE_BYTES;
		memcpy(user->segment + user->header->arena_offset + job->entry.table_offset, table, bytes);
	}
	(void)user_submit(user, job->entry);
	job->id = user->next_job;
	job->started = w->step;
	job->active = true;
}

static void send_by_control(struct world *w, uint32_t from, struct job *job, const void *table, size_t bytes)
{
	struct tfd_entry entry = job->entry;

	CHECK_OK(tfd_jobs_submit(w->a.core, w->from[from].session, &entry, 1, bytes ? table : NULL, bytes));
	job->id = entry.job_id;
	job->control = true;
	job->started = w->step;
	job->active = true;
	w->submitted[from]++;
}

static void send(struct world *w, uint32_t from, uint32_t index, struct job *job)
{
	const void *table = is_many(job) ? (const void *)job->target : (const void *)job->pages;
	size_t bytes =
		job->entry.table_count * (is_many(job) ? sizeof(job->target[0]) : sizeof(job->pages[0]));

	if (chance(w, 6) == 0) {
		send_by_control(w, from, job, table, bytes);
		return;
	}
	/* Without pages it is in no open's way, and may outlive it. */
	if (chance(w, 5) == 0 && (job->entry.op != TFD_OP_WRITE_PAGES || job->entry.table_count))
		arm(w, from, job);
	send_by_ring(w, from, index, job, table, bytes);
}

/* A free place for a job, or JOBS. */
static uint32_t job_place(const struct world *w, uint32_t from)
{
	uint32_t index = 0;

	while (index < JOBS && (w->jobs[from][index].active || w->jobs[from][index].held_until))
		index++;
	return ring_has_room(w, from) ? index : JOBS;
}

static void submit(struct world *w)
{
	static const uint8_t ops[] = { TFD_OP_WRITE,       TFD_OP_WRITE,   TFD_OP_IMM,     TFD_OP_WRITE_PAGES,
	                               TFD_OP_WRITE_PAGES, TFD_OP_SCATTER, TFD_OP_BARRIER, TFD_OP_READ };
	uint32_t from = chance(w, USERS);
	uint32_t place = job_place(w, from);
	struct job *job;

	if (place == JOBS)
		return;
	job = &w->jobs[from][place];
	memset(job, 0, sizeof(*job));
	job->entry = (struct tfd_entry){ .op = ops[chance(w, 8)],
	                                 .priority = (uint8_t)chance(w, 2),
	                                 .src_region = w->from[from].region };
	if (!w->calm && chance(w, 20) == 0)
		job->entry.deadline_ns = w->now + chance(w, 300000);
	if (is_many(job))
		shape_targets(w, from, job, from * JOBS + place);
	else if (!shape_single(w, from, job, from * JOBS + place))
		return;
	send(w, from, place, job);
}

/* Counts and no bytes: one immediate, or pages of nothing, more of them perhaps than may wait for one to ride on. */
static bool send_counts(struct world *w, uint32_t to, uint32_t imm, uint64_t counts, bool again)
{
	static const struct tfd_page pages[COUNTS_MAX];
	uint32_t from = chance(w, USERS);
	uint32_t place = job_place(w, from);
	struct job *job = place < JOBS ? &w->jobs[from][place] : NULL;
	uint32_t slot = job ? slot_take(w, to, from * JOBS + place) : SLOTS;

	if (slot == SLOTS)
		return false;
	memset(job, 0, sizeof(*job));
	job->receiver[0] = to;
	job->slot[0] = slot;
	job->targets = 1;
	job->open = w->grant[from][to];
	job->counts = counts;
	job->again = again;
	job->entry = (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = w->grant[from][to], .imm = imm };
	if (counts > 1) {
		job->entry.op = TFD_OP_WRITE_PAGES;
		job->entry.src_region = w->from[from].region;
		job->entry.table_count = (uint32_t)counts;
	}
	send_by_control(w, from, job, pages, counts > 1 ? counts * sizeof(pages[0]) : 0);
	return true;
}

static void retry(struct world *w, uint32_t to, uint32_t imm)
{
	struct tally *tally = &w->tally[to][imm];
	uint64_t counts = tally->owed < COUNTS_MAX ? tally->owed : COUNTS_MAX;

	if (counts && send_counts(w, to, imm, counts, true)) {
		tally->owed -= counts;
		w->retried++;
	}
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations, cuts, orders, delays and failures on the simulated fabric, against a model of what counts mean.
 *
 *   TFD_OPERATIONS=1000000 TFD_SEED=7 build/native/gcc/tests/test_property
 *
 * One world after the other, each with its own seed, rails, order and delays. In each: every job ends exactly once and within a
 * bound; bytes of jobs that ended OK are in place; after a job has ended nothing of it lands; a fence that answered left no job behind;
 * and when all is quiet the private sum of every counter is what the jobs that ended OK have written, to the eighth.
 */
#include "property_world.h"

static void check_bytes(struct world *w, uint32_t from, const struct job *job)
{
	const uint8_t *here = w->from[from].memory + job->entry.src_offset;
	const uint8_t *there = w->to[job->receiver[0]].memory + job->entry.dst_offset;

	if (job->entry.op == TFD_OP_WRITE_PAGES) {
		for (uint32_t i = 0; i < job->entry.table_count; i++)
			MUST(memcmp(there + job->pages[i].dst * job->entry.dst_stride,
			            here + job->pages[i].src * job->entry.src_stride,
			            job->entry.length) == 0);
	} else if (!is_many(job)) {
		for (uint64_t i = 0; i < job->entry.length; i++) {
			if (there[i] == here[i])
				continue;
			(void)fprintf(stderr, "job %llu op %u: byte %llu of %llu, flags %u, ordered %d\n",
			              (unsigned long long)job->id, job->entry.op, (unsigned long long)i,
			              (unsigned long long)job->entry.length, job->entry.flags, w->ordered);
			MUST(false);
		}
	}
}

static void job_ended(struct world *w, uint32_t from, struct job *job)
{
	const struct tfd_record *record = &w->from[from].records[job->id % 64];
	bool refused =
		record->status == TFD_JOB_INVALID ||
		(record->status != TFD_JOB_OK && !record->posted_ns && record->detail == TFD_DETAIL_STALE);

	if (record->status == TFD_JOB_INVALID || record->status == TFD_JOB_REMOTE_ACCESS)
		(void)fprintf(stderr, "op %u: status %u, detail %u\n", job->entry.op, record->status,
		              record->detail);
	MUST(record->status != TFD_JOB_PENDING && record->status < TFD_JOB_STATUS_COUNT);
	MUST(record->status != TFD_JOB_INVALID && record->status != TFD_JOB_REMOTE_ACCESS);
	w->ended[record->status]++;
	if (record->status == TFD_JOB_OK) {
		check_bytes(w, from, job);
		if (!is_many(job))
			w->landed[job->receiver[0]][job->entry.imm] += job->counts;
	}
	/* A deadline that was past when it was taken: never started. */
	if (is_many(job) && !refused &&
	    !(record->status == TFD_JOB_DEADLINE && !record->detail && !record->path &&
	      record->accepted_ns == record->ended_ns))
		for (uint32_t i = 0; i < job->targets; i++)
			w->landed[job->receiver[i]][job->entry.imm]++;
	for (uint32_t i = 0; i < job->targets; i++) {
		struct slot *slot = &w->slots[job->receiver[i]][job->slot[i]];

		/* An unordered rail does not tell what became of a piece. */
		if (!w->ordered && w->broken && record->status != TFD_JOB_OK)
			w->unknown[job->receiver[i]][job->entry.imm] = true;
		slot->job = 0;
		slot->canary_until = w->step + CANARY_STEPS;
		slot->seen = malloc(SLOT_BYTES);
		CHECK(slot->seen);
		memcpy(slot->seen, w->to[job->receiver[i]].memory + (uint64_t)job->slot[i] * SLOT_BYTES,
		       SLOT_BYTES);
	}
	job->active = false;
}

static void look_at_jobs(struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			struct job *job = &w->jobs[from][i];

			if (!job->active)
				continue;
			if (tfd_load_acquire(&w->from[from].records[job->id % 64].done_id) == job->id)
				job_ended(w, from, job);
			else
				MUST(w->step - job->started < JOB_STEPS);
		}
	}
}

static uint64_t counts_in_place(const struct world *w, uint32_t from, const struct job *job)
{
	const uint8_t *here = w->from[from].memory + job->entry.src_offset;
	const uint8_t *there = w->to[job->receiver[0]].memory + job->entry.dst_offset;
	uint64_t pages = 0;

	if (job->entry.op == TFD_OP_READ)
		return 0;
	if (job->entry.op != TFD_OP_WRITE_PAGES)
		return memcmp(there, here, job->entry.length) == 0;
	for (uint32_t i = 0; i < job->entry.table_count; i++)
		pages += memcmp(there + job->pages[i].dst * job->entry.dst_stride,
		                here + job->pages[i].src * job->entry.src_stride, job->entry.length) == 0;
	return job->entry.flags & TFD_FLAG_COUNT_JOB ? pages == job->entry.table_count : pages;
}

/* A count is seen after the bytes that it counts. On one path: parts of two writes may meet in one count. */
static void check_visible(struct world *w, uint32_t to, uint32_t imm)
{
	uint64_t visible = w->landed[to][imm];

	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			const struct job *job = &w->jobs[from][i];

			if (job->active && !is_many(job) && job->receiver[0] == to && job->entry.imm == imm)
				visible += counts_in_place(w, from, job);
		}
	}
	MUST(w->to[to].counters[imm].value <= visible);
}

static void look_at_slots(struct world *w)
{
	for (uint32_t to = 0; to < USERS; to++) {
		for (uint32_t i = 0; i < SLOTS; i++) {
			struct slot *slot = &w->slots[to][i];

			if (!slot->canary_until || w->step < slot->canary_until)
				continue;
			MUST(memcmp(slot->seen, w->to[to].memory + (uint64_t)i * SLOT_BYTES, SLOT_BYTES) ==
			     0);
			free(slot->seen);
			slot->seen = NULL;
			slot->canary_until = 0;
		}
		for (uint32_t imm = 0; imm < IMMS; imm++) {
			uint64_t value = w->to[to].counters[imm].value;

			MUST(value >= w->values[to][imm]);
			if (value > w->values[to][imm] && imm < IMMS / 2 && w->path_count == 1 &&
			    !w->told_lost[to][imm] && !w->unknown[to][imm])
				check_visible(w, to, imm);
			w->values[to][imm] = value;
		}
	}
}

/* ---- what control does ---- */

static uint32_t receiver_of(const struct world *w, uint64_t session, uint64_t open, uint32_t *from)
{
	for (*from = 0; *from < USERS; ++*from) {
		if (w->from[*from].session == session)
			break;
	}
	for (uint32_t to = 0; to < USERS; to++) {
		if (w->grant[*from][to] == open)
			return to;
	}
	return USERS;
}

/* Grants that were opened anew have handles of before: found by their name space. */
static uint32_t old_receiver_of(struct world *w, uint64_t session, uint64_t open)
{
	struct tfd_session *s = tfd_session_get(w->a.core, session);
	struct tfd_open *o = tfd_table_get(&s->opens, open);
	uint32_t found = USERS;

	MUST(o);
	for (uint32_t to = 0; to < USERS; to++) {
		uint32_t name_space;

		CHECK_OK(tfd_session_name_space(w->b.core, w->to[to].session, &name_space));
		if (name_space == o->name_space)
			found = to;
	}
	tfd_session_put(s);
	return found;
}

static void fence_quiet(struct world *w)
{
	for (uint32_t i = 0; i < JOBS; i++) {
		const struct job *job = &w->jobs[w->fence_from][i];

		if (job->active && job->entry.dst_grant == w->fence_open && job->entry.imm == w->fence_imm &&
		    job->started < w->fence && job->entry.op != TFD_OP_READ)
			MUST(tfd_load_acquire(&w->from[w->fence_from].records[job->id % 64].done_id) ==
			     job->id);
	}
	w->fence = 0;
	w->fences++;
}

static void take_event(struct world *w, const struct tfd_event *event)
{
	uint32_t from, to;

	switch (event->type) {
	case TFD_EVENT_CONN_LOST:
		for (uint32_t i = 0; i < w->path_count; i++) {
			if (w->paths[i].out == event->id && !w->paths[i].repair_at) {
				w->paths[i].lost = true;
				w->paths[i].repair_at = w->step + 1 + chance(w, 200);
			}
		}
		break;
	case TFD_EVENT_LOST:
		to = receiver_of(w, event->session, event->id, &from);
		if (to == USERS)
			to = old_receiver_of(w, event->session, event->id);
		w->told_lost[to][event->imm] += event->count;
		CHECK_OK(tfd_counters_fault(w->b.core, w->to[to].session, event->imm, 1, event->count,
		                            event->units, 1));
		break;
	case TFD_EVENT_CONN_PROVEN:
		w->proven++;
		break;
	case TFD_EVENT_FENCE_QUIET:
		MUST(event->count == w->fence);
		fence_quiet(w);
		break;
	default:
		break;
	}
}

static void take_events(struct world *w)
{
	struct tfd_event event;

	while (tfd_core_events(w->a.core, &event, 1))
		take_event(w, &event);
	while (tfd_core_events(w->b.core, &event, 1))
		;
}

static void all_unknown(struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			const struct job *job = &w->jobs[from][i];

			for (uint32_t t = 0; job->active && t < job->targets; t++)
				w->unknown[job->receiver[t]][job->entry.imm] = true;
		}
	}
}

/* The opens keep their handles; the new connection takes the old one's place, or comes beside what they have. */
static void path_give(struct world *w, uint32_t i, uint64_t old)
{
	uint32_t rail = i % w->b.core->groups[0]->rail_count;

	for (uint32_t grant = 0; grant < USERS * USERS; grant++) {
		uint32_t from = grant / USERS, to = grant % USERS, index = 0;
		struct tfd_session *session = tfd_session_get(w->a.core, w->from[from].session);
		const struct tfd_open *open = tfd_table_get(&session->opens, w->grant[from][to]);
		struct tfd_region_key keys[RAILS];
		struct tfd_open_path path;

		MUST(open);
		CHECK_OK(tfd_region_keys(w->b.core, w->to[to].session, w->to[to].region, keys, RAILS));
		path = (struct tfd_open_path){ .conn = w->paths[i].out,
		                               .key = keys[rail].key,
		                               .address = keys[rail].address };
		while (index < open->path_count && open->paths[index].conn->handle != old)
			index++;
		CHECK_OK(tfd_open_path_set(w->a.core, session->handle, open->handle, index, &path));
		tfd_session_put(session);
	}
	CHECK_OK(tfd_conn_probe(w->a.core, w->paths[i].out, 0, 0));
}

static void path_repair(struct world *w, uint32_t i)
{
	struct path *path = &w->paths[i];
	uint64_t old = path->out;
	uint64_t landed;

	CHECK_OK(tfd_conn_close(w->b.core, path->in, TFD_DETAIL_CONNECTION, TFD_LANDED_UNKNOWN, &landed));
	if (chance(w, 10) == 0)
		landed = TFD_LANDED_UNKNOWN; /* its daemon did not answer */
	if (landed == TFD_LANDED_UNKNOWN)
		all_unknown(w);
	else
		w->reconciled++;
	CHECK_OK(tfd_conn_close(w->a.core, path->out, TFD_DETAIL_CONNECTION, landed, NULL));
	path->repair_at = 0;
	path_connect(w, i);
	if (chance(w, 2)) {
		path_give(w, i, old);
		return;
	}
	for (uint32_t grant = 0; grant < USERS * USERS; grant++)
		open_grant_of(w, grant / USERS, grant % USERS);
}

static void disturb(struct world *w)
{
	uint32_t from = chance(w, USERS);

	if (chance(w, 400) == 0) {
		for (uint32_t i = 0; i < w->path_count; i++) {
			struct tfd_conn *conn = tfd_table_get(&w->a.core->conns, w->paths[i].out);

			if (chance(w, w->path_count) == 0 && conn && conn->half && !w->paths[i].lost) {
				tfd_sim_break(conn->half);
				w->broken = true;
			}
		}
	}
	if (chance(w, 30) == 0) {
		const struct job *job = &w->jobs[from][chance(w, JOBS)];
		struct user *user = &w->from[from];

		if (job->active && user->ring->tail - tfd_load_acquire(&user->ring->head) < 32) {
			bool in_use = false;

			for (uint32_t i = 0; i < JOBS; i++)
				in_use = in_use || (w->jobs[from][i].active &&
				                    w->jobs[from][i].id % 64 == (user->next_job + 1) % 64);
			if (!in_use)
				(void)user_submit(
					user, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = job->id });
		}
	}
	if (chance(w, 100) == 0 && !w->fence) {
		w->fence = w->step + 1;
		w->fence_from = from;
		w->fence_open = w->grant[from][chance(w, USERS)];
		w->fence_imm = chance(w, IMMS / 2);
		CHECK_OK(tfd_open_fence(w->a.core, w->from[from].session, w->fence_open,
		                        &(struct tfd_imm_range){ w->fence_imm, 1 }, 1, w->fence));
	}
}

static void world_step(struct world *w)
{
	w->step++;
	w->now += STEP_NS;
	tfd_sim_set_now(w->now);
	(void)tfd_core_step(w->a.core, w->now);
	(void)tfd_core_step(w->b.core, w->now);
	take_events(w);
	look_at_jobs(w);
	look_at_slots(w);
	for (uint32_t i = 0; i < w->path_count; i++) {
		if (w->paths[i].repair_at && w->step >= w->paths[i].repair_at)
			path_repair(w, i);
	}
}

/* ---- the end ---- */

static bool world_busy(const struct world *w)
{
	for (uint32_t user = 0; user < USERS; user++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			if (w->jobs[user][i].active)
				return true;
		}
		for (uint32_t i = 0; i < SLOTS; i++) {
			if (w->slots[user][i].canary_until)
				return true;
		}
	}
	return w->fence != 0;
}

static void check_sums(struct world *w)
{
	for (uint32_t to = 0; to < USERS; to++) {
		struct tfd_session *session = tfd_session_get(w->b.core, w->to[to].session);

		for (uint32_t imm = 0; imm < IMMS; imm++) {
			const struct tfd_count *count = &session->counts[imm];
			int64_t expected = 8 * (int64_t)w->landed[to][imm];

			if (imm >= IMMS / 2)
				expected -= 8 * (int64_t)w->told_lost[to][imm];
			MUST(count->lost == w->told_lost[to][imm]);
			MUST(w->to[to].counters[imm].value == count->value);
			if (w->unknown[to][imm]) {
				MUST(count->eighths >=
				     8 * (int64_t)(imm < IMMS / 2 ? w->landed[to][imm] : 0));
				continue;
			}
			if (count->eighths != expected)
				(void)fprintf(
					stderr,
					"ordered %d receiver %u imm %u: %lld eighths, the model says %lld\n",
					w->ordered, to, imm, (long long)count->eighths, (long long)expected);
			MUST(count->eighths == expected);
			MUST((int64_t)count->value >= expected / 8);
		}
		tfd_session_put(session);
	}
}

static void world_close(struct world *w)
{
	struct host *hosts[] = { &w->a, &w->b };

	for (int i = 0; i < 2; i++)
		tfd_core_close(hosts[i]->core);
	for (uint32_t i = 0; i < USERS; i++) {
		struct user *users[] = { &w->from[i], &w->to[i] };

		for (int k = 0; k < 2; k++)
			user_unmap(users[k]);
	}
	tfd_sim_set_now(0);
}

int main(void)
{
	const char *operations = getenv("TFD_OPERATIONS");
	const char *seed = getenv("TFD_SEED");
	uint64_t left = operations ? strtoull(operations, NULL, 0) : 30000;
	uint64_t total = 0, ended[TFD_JOB_STATUS_COUNT] = { 0 };
	uint64_t reconciled = 0, fences = 0, proven = 0;
	struct world *w = malloc(sizeof(*w));

	CHECK(w);
	for (seed_now = seed ? strtoull(seed, NULL, 0) : 1; total < left; seed_now++) {
		uint64_t started = 0;

		world_open(w, seed_now);
		while (started < WORLD_OPERATIONS) {
			for (uint32_t i = chance(w, 6); i > 0; i--, started++)
				submit(w);
			disturb(w);
			world_step(w);
		}
		while (world_busy(w))
			world_step(w);
		for (int i = 0; i < 100; i++)
			world_step(w);
		check_sums(w);
		for (int i = 0; i < TFD_JOB_STATUS_COUNT; i++) {
			ended[i] += w->ended[i];
			total += w->ended[i];
		}
		reconciled += w->reconciled;
		fences += w->fences;
		proven += w->proven;
		world_close(w);
	}
	free(w);
	(void)printf("operations=%llu ok=%llu cancelled=%llu deadline=%llu peer_lost=%llu reconciled=%llu "
	             "fences=%llu restored=%llu wrong=0\n",
	             (unsigned long long)total, (unsigned long long)ended[TFD_JOB_OK],
	             (unsigned long long)ended[TFD_JOB_CANCELLED],
	             (unsigned long long)ended[TFD_JOB_DEADLINE],
	             (unsigned long long)ended[TFD_JOB_PEER_LOST], (unsigned long long)reconciled,
	             (unsigned long long)fences, (unsigned long long)proven);
	CHECK(ended[TFD_JOB_OK] && ended[TFD_JOB_CANCELLED] && ended[TFD_JOB_DEADLINE] && reconciled &&
	      fences && proven);
	return 0;
}

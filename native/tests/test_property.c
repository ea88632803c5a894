/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations, cuts, orders, delays and failures on the simulated fabric, against a model of what counts mean.
 *
 *   TFD_OPERATIONS=1000000 TFD_SEED=7 build/native/gcc/tests/test_property
 *
 * One world after the other, each with its own seed, rails, order and delays. In each: every job ends exactly once and within a
 * bound; bytes of jobs that ended OK are in place; after a job, a grant, a session or a peer has ended nothing of it lands; a fence
 * that answered left no job behind; what was told lost is sent again on the same immediate; and when all is quiet the private sum of
 * every counter is what was written, to the eighth, and its value what whoever waited for all of it had asked for. However rarely the
 * receiver polls, its queue of arrived immediates never overflows.
 */
#include "property_control.h"

/* ---- disturbances ---- */

static struct tfd_half *half_of(const struct world *w, uint32_t path)
{
	struct tfd_conn *conn = tfd_table_get(&w->a.core->conns, w->paths[path].out);

	return conn && !w->paths[path].lost ? conn->half : NULL;
}

static void some_path_breaks(struct world *w)
{
	uint32_t path = chance(w, w->path_count);
	struct tfd_half *half = half_of(w, path);
	uint32_t how = chance(w, 4);

	if (!half)
		return;
	w->broken = true;
	if (how == 0 && !w->ordered) { /* where one may fail alone */
		tfd_sim_fail(half);
	} else if (how == 1 && !w->mute) {
		tfd_sim_mute(half);
		w->mute = w->paths[path].out;
		w->muted++;
	} else {
		tfd_sim_break(half);
	}
}

static void some_rail_dies(struct world *w)
{
	bool here = chance(w, 2);
	uint32_t rails = here ? w->here : w->there;
	uint32_t rail = chance(w, rails);
	uint32_t left = 0;

	for (uint32_t i = 0; i < w->path_count; i++)
		left += !w->paths[i].dead && i % rails != rail;
	if (!left)
		return;
	tfd_sim_kill((here ? w->a : w->b).core->groups[0]->rails[rail].domain);
	for (uint32_t i = 0; i < w->path_count; i++)
		w->paths[i].dead = w->paths[i].dead || i % rails == rail;
	w->broken = true;
	w->rails_died++;
	open_grants(w);
}

static void some_job_cancelled(struct world *w, uint32_t from)
{
	const struct job *job = &w->jobs[from][chance(w, JOBS)];
	struct tfd_entry cancel = { .op = TFD_OP_CANCEL, .argument = job->id };

	if (!job->active)
		return;
	if (job->control) {
		CHECK_OK(tfd_jobs_submit(w->a.core, w->from[from].session, &cancel, 1, NULL, 0));
		w->submitted[from]++;
	} else if (ring_has_room(w, from)) {
		(void)user_submit(&w->from[from], cancel);
	}
}

static void some_fence(struct world *w, uint32_t from)
{
	uint64_t open = w->grant[from][chance(w, USERS)];

	if (w->fence || !open || opened_find(w, w->from[from].session, open)->removed)
		return;
	w->fence = w->step + 1;
	w->fence_from = from;
	w->fence_open = open;
	w->fence_imm = chance(w, IMMS);
	CHECK_OK(tfd_open_fence(w->a.core, w->from[from].session, open,
	                        &(struct tfd_imm_range){ w->fence_imm, 1 }, 1, w->fence));
}

static void some_grant_revoked(struct world *w, uint32_t from)
{
	uint32_t to = chance(w, USERS);
	uint64_t open = w->grant[from][to];
	struct opened *opened = open ? opened_find(w, w->from[from].session, open) : NULL;

	if (!opened || opened->revoked)
		return;
	opened->revoked = true;
	CHECK_OK(tfd_open_revoke(w->a.core, opened->session, opened->handle, TFD_DETAIL_REVOKED));
	w->revoked++;
	open_grant_of(w, from, to);
}

static void some_faults_acknowledged(struct world *w)
{
	uint32_t to = chance(w, USERS), imm = chance(w, IMMS);
	struct tfd_entry entry = { .op = TFD_OP_ACKNOWLEDGE, .imm = imm };
	const struct tfd_record *record = user_submit(&w->to[to], entry);

	(void)tfd_core_step(w->b.core, w->now);
	MUST(record->done_id == w->to[to].next_job && record->status == TFD_JOB_OK);
	MUST(w->to[to].counters[imm].acknowledged == w->tally[to][imm].faults);
}

/* ---- ends of sessions and of a peer ---- */

static void slots_forget(struct world *w, uint32_t to)
{
	for (uint32_t i = 0; i < SLOTS; i++) {
		free(w->slots[to][i].seen);
		w->slots[to][i] = (struct slot){ 0 };
	}
}

/* Not one byte changes any more. */
static void check_still(struct world *w, uint32_t to)
{
	uint8_t *seen = malloc(REGION_BYTES);

	CHECK(seen);
	memcpy(seen, w->to[to].memory, REGION_BYTES);
	for (uint32_t i = 0; i < CANARY_STEPS; i++)
		world_step(w);
	MUST(memcmp(seen, w->to[to].memory, REGION_BYTES) == 0);
	free(seen);
}

static bool opens_left(const struct world *w, uint32_t to)
{
	for (uint32_t i = 0; i < w->open_count; i++) {
		const struct opened *opened = &w->opens[i];

		if (opened->to == to && opened->life == w->life[to] && !opened->removed)
			return true;
	}
	return false;
}

/* A receiver dies while others write to it: all who may do so stop, then it goes. */
static void receiver_dies(struct world *w, uint32_t to)
{
	uint64_t begun = w->step;

	w->gone[to] = true;
	CHECK_OK(tfd_session_end(w->b.core, w->to[to].session, TFD_DETAIL_SESSION_ENDED));
	for (uint32_t i = 0; i < w->open_count; i++) {
		struct opened *opened = &w->opens[i];

		if (opened->to != to || opened->life != w->life[to] || opened->revoked || opened->removed)
			continue;
		opened->revoked = true;
		CHECK_OK(tfd_open_revoke(w->a.core, opened->session, opened->handle, TFD_DETAIL_REVOKED));
	}
	do { /* once at least: what is still in a ring, for an open that is gone already, is refused */
		world_step(w);
		MUST(w->step - begun < JOB_STEPS);
	} while (opens_left(w, to));
	for (uint32_t i = 0; i < USERS * JOBS; i++) {
		struct job *job = &w->jobs[i / JOBS][i % JOBS];

		for (uint32_t t = 0; t < job->targets; t++) {
			if (job->receiver[t] != to)
				continue;
			MUST(!job->active || is_many(job));
			job->receiver[t] = USERS;
		}
	}
	check_still(w, to);
	slots_forget(w, to);
	user_free(&w->to[to]);
	w->gone[to] = false;
	receiver_open(w, to);
	open_grants(w);
	w->sessions_ended++;
}

static void opens_forget(struct world *w, uint64_t session)
{
	for (uint32_t i = 0; i < w->open_count; i++)
		w->opens[i].removed = w->opens[i].removed || !session || w->opens[i].session == session;
}

static void jobs_forget(struct world *w, uint32_t from)
{
	for (uint32_t i = 0; i < JOBS; i++) {
		free(w->jobs[from][i].seen);
		w->jobs[from][i] = (struct job){ 0 };
	}
}

/* A writing session dies: what its client has published has ended when it is quiet, and every loss was told. */
static void sender_dies(struct world *w, uint32_t from)
{
	uint64_t session = w->from[from].session, begun = w->step;

	CHECK_OK(tfd_session_end(w->a.core, session, TFD_DETAIL_SESSION_ENDED));
	for (; w->quiet_session != session; world_step(w))
		MUST(w->step - begun < JOB_STEPS);
	for (uint32_t i = 0; i < JOBS; i++)
		MUST(!w->jobs[from][i].active);
	MUST(!w->fence || w->fence_from != from);
	check_ends(w, from);
	jobs_forget(w, from);
	opens_forget(w, session);
	user_free(&w->from[from]);
	sender_open(w, from);
	for (uint32_t to = 0; to < USERS; to++)
		open_grant_of(w, from, to);
	w->sessions_ended++;
}

/* Parts of writes that the dead had not completed are in no count any more; later writers start from whole ones. */
static void rebase(struct world *w, uint32_t to)
{
	struct tfd_session *session = tfd_session_get(w->b.core, w->to[to].session);

	for (uint32_t imm = 0; imm < IMMS; imm++) {
		struct tally *tally = &w->tally[to][imm];
		int64_t eighths = session->counts[imm].eighths;

		tally->rebased = true;
		tally->owed = 0;
		tally->faults++;
		tally->expected = eighths >> 3;
		if (!w->ordered) {
			tally->unknown = true;
			continue;
		}
		MUST(eighths % 8 == 0);
		MUST(imm >= IMM_MANY || tally->unknown || eighths >= 8 * (int64_t)tally->landed);
		tally->unknown = false;
	}
	tfd_session_put(session);
}

/* Host A dies without a word. */
static void writer_dies(struct world *w)
{
	uint8_t *seen[USERS];

	for (uint32_t i = 0; i < w->path_count; i++) {
		struct tfd_half *half = half_of(w, i);

		if (half && chance(w, 2)) {
			tfd_sim_break(half);
			w->broken = true;
		}
	}
	tfd_core_close(w->a.core);
	for (uint32_t from = 0; from < USERS; from++) {
		user_unmap(&w->from[from]);
		jobs_forget(w, from);
	}
	opens_forget(w, 0);
	w->fence = w->mute = 0;
	while (tfd_core_step(w->b.core, w->now))
		;
	for (uint32_t i = 0; i < w->path_count; i++) {
		if (w->paths[i].in)
			CHECK_OK(tfd_conn_close(w->b.core, w->paths[i].in, TFD_DETAIL_HEARTBEAT, NULL, NULL));
		w->paths[i].in = 0;
	}
	CHECK_OK(tfd_counters_settle(w->b.core, w->peer));
	for (uint32_t to = 0; to < USERS; to++) {
		CHECK_OK(tfd_counters_fault(w->b.core, w->to[to].session, 0, IMMS, 0, 0, 0));
		rebase(w, to);
		slots_forget(w, to);
		seen[to] = malloc(REGION_BYTES);
		CHECK(seen[to]);
		memcpy(seen[to], w->to[to].memory, REGION_BYTES);
	}
	for (uint32_t i = 0; i < CANARY_STEPS; i++)
		(void)tfd_core_step(w->b.core, w->now += STEP_NS);
	for (uint32_t to = 0; to < USERS; to++) {
		MUST(memcmp(seen[to], w->to[to].memory, REGION_BYTES) == 0);
		free(seen[to]);
	}
	writer_open(w);
	w->peers_died++;
}

/* More than ride on one immediate; perhaps not all of them are there when their path breaks. */
static void many_counts(struct world *w)
{
	if (!send_counts(w, chance(w, USERS), chance(w, IMM_MANY), 1 + chance(w, COUNTS_MAX), false))
		return;
	for (uint32_t i = chance(w, 8); i > 0; i--)
		world_step(w);
	if (chance(w, 4) == 0)
		some_path_breaks(w);
}

static void disturb(struct world *w)
{
	uint32_t from = chance(w, USERS);

	if (w->calm)
		return;
	if (chance(w, 400) == 0)
		some_path_breaks(w);
	if (chance(w, 30) == 0)
		some_job_cancelled(w, from);
	if (chance(w, 100) == 0)
		many_counts(w);
	if (chance(w, 100) == 0)
		some_fence(w, from);
	if (chance(w, 100) == 0)
		some_faults_acknowledged(w);
	if (chance(w, 200) == 0)
		some_grant_revoked(w, from);
	if (chance(w, 2000) == 0)
		some_rail_dies(w);
	if (chance(w, 1000) == 0)
		sender_dies(w, from);
	if (chance(w, 1000) == 0)
		receiver_dies(w, from);
	if (chance(w, 1500) == 0)
		writer_dies(w);
}

static void retry_some(struct world *w)
{
	retry(w, chance(w, USERS), chance(w, IMMS));
}

/* ---- the end ---- */

static bool world_busy(const struct world *w)
{
	for (uint32_t user = 0; user < USERS; user++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			if (w->jobs[user][i].active || w->jobs[user][i].held_until)
				return true;
		}
		for (uint32_t i = 0; i < SLOTS; i++) {
			if (w->slots[user][i].canary_until)
				return true;
		}
		for (uint32_t imm = 0; imm < IMMS; imm++) {
			if (w->tally[user][imm].owed)
				return true;
		}
	}
	return w->fence != 0;
}

static uint64_t stalls_of(const struct host *host)
{
	const struct tfd_group *group = host->core->groups[0];
	uint64_t stalls = 0;

	for (uint32_t i = 0; i < group->rail_count; i++)
		stalls += group->rails[i].info.credit_stalls;
	return stalls;
}

static void world_close(struct world *w)
{
	w->stalls += stalls_of(&w->a) + stalls_of(&w->b);
	tfd_core_close(w->a.core);
	tfd_core_close(w->b.core);
	for (uint32_t i = 0; i < USERS; i++) {
		jobs_forget(w, i);
		slots_forget(w, i);
		user_unmap(&w->from[i]);
		user_unmap(&w->to[i]);
	}
	tfd_sim_set_now(0);
}

static void world_run(struct world *w)
{
	uint64_t begun;

	for (uint32_t submitted = 0; submitted < WORLD_OPERATIONS;) {
		for (uint32_t i = chance(w, 6); i > 0; i--, submitted++)
			submit(w);
		retry_some(w);
		disturb(w);
		world_step(w);
	}
	for (begun = w->step; world_busy(w); world_step(w)) {
		MUST(w->step - begun < JOB_STEPS);
		for (int i = 0; i < 8; i++)
			retry_some(w);
	}
	while (tfd_core_step(w->b.core, w->now)) /* it may be behind with counting */
		;
	world_step(w);
	for (uint32_t from = 0; from < USERS; from++)
		check_ends(w, from);
	check_sums(w);
}

#define OPERATIONS_ALL 30000u /* in so many everything happens */
#ifdef __SANITIZE_THREAD__ /* there is one thread: nothing for it to find */
#define OPERATIONS 3000u
#else
#define OPERATIONS OPERATIONS_ALL
#endif

/* What all worlds have seen. */
static struct world totals;

static void add_up(const struct world *w)
{
	for (int i = 0; i < TFD_JOB_STATUS_COUNT; i++)
		totals.ended[i] += w->ended[i];
	totals.reconciled += w->reconciled;
	totals.apart += w->apart;
	totals.fences += w->fences;
	totals.proven += w->proven;
	totals.retried += w->retried;
	totals.revoked += w->revoked;
	totals.sessions_ended += w->sessions_ended;
	totals.peers_died += w->peers_died;
	totals.rails_died += w->rails_died;
	totals.muted += w->muted;
	totals.exact += w->exact;
	totals.stalls += w->stalls;
	totals.armed += w->armed;
}

int main(void)
{
	const char *operations = getenv("TFD_OPERATIONS");
	const char *seed = getenv("TFD_SEED");
	uint64_t left = operations ? strtoull(operations, NULL, 0) : OPERATIONS;
	struct world *w = malloc(sizeof(*w));
	uint64_t total = 0;

	CHECK(w);
	for (seed_now = seed ? strtoull(seed, NULL, 0) : 1; total < left; seed_now++) {
		world_open(w, seed_now);
		world_run(w);
		for (int i = 0; i < TFD_JOB_STATUS_COUNT; i++)
			total += w->ended[i];
		world_close(w);
		add_up(w);
	}
	free(w);
#define SHOW(name, value) (void)printf(name "=%llu ", (unsigned long long)(value))
	SHOW("operations", total);
	SHOW("ok", totals.ended[TFD_JOB_OK]);
	SHOW("cancelled", totals.ended[TFD_JOB_CANCELLED]);
	SHOW("deadline", totals.ended[TFD_JOB_DEADLINE]);
	SHOW("peer_lost", totals.ended[TFD_JOB_PEER_LOST]);
	SHOW("reconciled", totals.reconciled);
	SHOW("reconciled_channels", totals.apart);
	SHOW("fences", totals.fences);
	SHOW("restored", totals.proven);
	SHOW("retried", totals.retried);
	SHOW("revoked", totals.revoked);
	SHOW("sessions_ended", totals.sessions_ended);
	SHOW("peers_died", totals.peers_died);
	SHOW("rails_died", totals.rails_died);
	SHOW("muted", totals.muted);
	SHOW("exact_counters", totals.exact);
	SHOW("credit_stalls", totals.stalls);
	SHOW("armed", totals.armed);
	(void)printf("wrong=0\n");
	CHECK(totals.ended[TFD_JOB_OK] && totals.ended[TFD_JOB_CANCELLED] && totals.ended[TFD_JOB_DEADLINE]);
	CHECK(totals.reconciled && totals.apart && totals.fences && totals.proven && totals.retried &&
	      totals.revoked && totals.exact && totals.stalls && totals.armed);
	CHECK(left < OPERATIONS_ALL ||
	      (totals.sessions_ended && totals.peers_died && totals.rails_died && totals.muted));
	return 0;
}

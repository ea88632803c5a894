/* SPDX-License-Identifier: Apache-2.0 */
/* What control does in the worlds of the property test: events, losses, broken connections; and how time goes by. */
#ifndef TFD_PROPERTY_CONTROL_H
#define TFD_PROPERTY_CONTROL_H

#include "property_model.h"

static void fence_quiet(struct world *w)
{
	for (uint32_t i = 0; i < JOBS; i++) {
		struct job *job = &w->jobs[w->fence_from][i];
		struct tfd_job_end end;

		if (!job->active || job->entry.imm != w->fence_imm || job->started >= w->fence ||
		    job->entry.op == TFD_OP_READ || job_end(w, w->fence_from, job, &end))
			continue;
		MUST(is_many(job) || job->open != w->fence_open);
		for (uint32_t t = 0; t < job->targets; t++) { /* the others of its targets may go on */
			struct tally *tally;

			if (job->target[t].dst_grant != w->fence_open || job->receiver[t] == USERS)
				continue;
			tally = &w->tally[job->receiver[t]][job->entry.imm];
			tally->expected++;
			tally->landed += target_in_place(w, w->fence_from, job, t);
			canary(&w->slots[job->receiver[t]][job->slot[t]], w, job->receiver[t]);
			job->receiver[t] = USERS;
		}
	}
	w->fence = 0;
	w->fences++;
}

static void open_quiet(struct world *w, const struct tfd_event *event)
{
	struct opened *opened = opened_find(w, event->session, event->id);

	MUST(opened->revoked && !opened->removed);
	look_at_jobs(w);
	for (uint32_t i = 0; i < JOBS; i++)
		MUST(!w->jobs[opened->from][i].active || w->jobs[opened->from][i].open != opened->handle);
	CHECK_OK(tfd_open_remove(w->a.core, opened->session, opened->handle));
	opened->removed = true;
}

static void loss_told(struct world *w, const struct tfd_event *event)
{
	const struct opened *opened = opened_find(w, event->session, event->id);
	struct tally *tally = &w->tally[opened->to][event->imm];

	if (opened->life != w->life[opened->to])
		return;
	tally->expected -= (int64_t)event->count;
	tally->owed += event->count;
	tally->lost += event->count;
	tally->faults++;
	CHECK_OK(tfd_counters_fault(w->b.core, w->to[opened->to].session, event->imm, 1, event->count,
	                            event->units, w->peer));
}

static void take_event(struct world *w, const struct tfd_event *event)
{
	switch (event->type) {
	case TFD_EVENT_CONN_LOST:
		if (event->id == w->mute)
			w->mute = 0;
		for (uint32_t i = 0; i < w->path_count; i++) {
			if (w->paths[i].out == event->id && !w->paths[i].repair_at) {
				w->paths[i].lost = true;
				w->paths[i].repair_at = w->step + 1 + chance(w, 200);
			}
		}
		break;
	case TFD_EVENT_CONN_PROVEN:
		w->proven++;
		break;
	case TFD_EVENT_LOST:
		loss_told(w, event);
		break;
	case TFD_EVENT_FENCE_QUIET:
		MUST(event->count == w->fence);
		fence_quiet(w);
		break;
	case TFD_EVENT_OPEN_QUIET:
		open_quiet(w, event);
		break;
	case TFD_EVENT_SESSION_QUIET:
		w->quiet_session = event->id;
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
		MUST(event.type != TFD_EVENT_SESSION_BROKEN);
}

static void all_unknown(struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			const struct job *job = &w->jobs[from][i];

			for (uint32_t t = 0; job->active && t < job->targets; t++) {
				if (job->receiver[t] < USERS)
					w->tally[job->receiver[t]][job->entry.imm].unknown = true;
			}
		}
	}
}

/* The opens keep their handles; the new connection takes the old one's place, or comes beside what they have. */
static void path_give(struct world *w, uint32_t i, uint64_t old)
{
	uint32_t rail = i % w->there;

	for (uint32_t grant = 0; grant < USERS * USERS; grant++) {
		uint32_t from = grant / USERS, to = grant % USERS, index = 0;
		struct tfd_session *session = tfd_session_get(w->a.core, w->from[from].session);
		const struct tfd_open *open = tfd_table_get(&session->opens, w->grant[from][to]);
		struct tfd_region_key keys[RAILS];
		struct tfd_open_path path;

		tfd_session_put(session);
		if (!open || open->refused) { /* opened while no path was alive, or revoked then */
			open_grant_of(w, from, to);
			continue;
		}
		CHECK_OK(tfd_region_keys(w->b.core, w->to[to].session, w->to[to].region, keys, RAILS));
		path = (struct tfd_open_path){ .conn = w->paths[i].out,
		                               .key = keys[rail].key,
		                               .address = keys[rail].address };
		while (index < open->path_count && open->paths[index].conn->handle != old)
			index++;
		if (index < TFD_MAX_PATHS)
			CHECK_OK(tfd_open_path_set(w->a.core, session->handle, open->handle, index, &path));
	}
	CHECK_OK(tfd_conn_probe(w->a.core, w->paths[i].out));
}

static void path_repair(struct world *w, uint32_t i)
{
	struct path *path = &w->paths[i];
	uint64_t old = path->out;
	struct tfd_landed landed;

	CHECK_OK(tfd_conn_close(w->b.core, path->in, TFD_DETAIL_CONNECTION, NULL, &landed));
	if (chance(w, 10) == 0)
		landed.channels = 0; /* its daemon did not answer */
	if (!landed.channels)
		all_unknown(w);
	else
		w->reconciled++;
	for (uint32_t c = 1; c < landed.channels; c++)
		w->apart += landed.imms[0] && landed.imms[c]; /* and overtaken, perhaps, by each other */
	CHECK_OK(tfd_conn_close(w->a.core, path->out, TFD_DETAIL_CONNECTION, &landed, NULL));
	*path = (struct path){ .dead = path->dead };
	if (!path->dead)
		path_connect(w, i);
	if (!path->dead && chance(w, 2))
		path_give(w, i, old);
	else
		open_grants(w);
}

/* The far half of some path broke alone, and who waits for an answer, or for credits, hears nothing of it. */
static bool waits_in_vain(const struct world *w)
{
	for (uint32_t i = 0; i < w->path_count; i++) {
		const struct tfd_conn *in = tfd_table_get(&w->b.core->conns, w->paths[i].in);
		const struct tfd_conn *out = tfd_table_get(&w->a.core->conns, w->paths[i].out);

		if (in && in->broken && out && !out->broken &&
		    (out->credits.stalled_ns || tfd_credits_shards_wait(out) || out->channel->calls_open))
			return true;
	}
	return false;
}

static void world_step(struct world *w)
{
	w->step++;
	w->now += w->mute || waits_in_vain(w) ? 100000000 : STEP_NS;
	tfd_sim_set_now(w->now);
	bump_some(w, chance(w, USERS));
	(void)tfd_core_step(w->a.core, w->now);
	if (w->mute || w->step % w->rarely == 0)
		(void)tfd_core_step(w->b.core, w->now);
	MUST(tfd_sim_overruns() == 0);
	take_events(w);
	look_at_jobs(w);
	look_at_canaries(w);
	look_at_counts(w);
	for (uint32_t i = 0; i < w->path_count; i++) {
		if (w->paths[i].repair_at && w->step >= w->paths[i].repair_at)
			path_repair(w, i);
	}
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Armed jobs. They are in flight from the moment they are taken (cancel, deadline, revoke, fence and the session's end find them as they
 * find any other), but nothing of them goes out before the word of their watcher has reached their value. Each watcher has its jobs
 * in a heap, so that a pass costs one load for each watcher that jobs wait for, however many they are. Starting one needs no system
 * call and no memory.
 *
 * The word is the client's: whatever it holds starts those jobs that it reaches, once, and has no other effect.
 */
#include <errno.h>
#include <stdlib.h>

#include "barrier.h"
#include "parts.h"

#define START_BUDGET                                                                               \
	64u /* jobs of one session in one pass, as of its ring: others wait no longer than that */

int tfd_watches_open(struct tfd_session *session, struct tfd_watcher *watchers, uint32_t count)
{
	session->watches = count ? calloc(count, sizeof(*session->watches)) : NULL;
	if (count && !session->watches)
		return -ENOMEM;
	session->watcher_count = count;
	for (uint32_t i = 0; i < count; i++) {
		session->watches[i] = (struct tfd_watch){ .session = session, .word = &watchers[i].value };
		tfd_list_init(&session->watches[i].link);
	}
	return 0;
}

void tfd_watches_free(struct tfd_session *session)
{
	for (uint32_t i = 0; i < session->watcher_count; i++)
		tfd_heap_fini(&session->watches[i].jobs);
	free(session->watches);
}

/* An eighth of its records is left for other things: cancelling, above all. */
static uint32_t armed_max(const struct tfd_session *session)
{
	uint32_t records = session->sources[0].record_count;

	return records - records / 8;
}

bool tfd_arm(struct tfd_job *job, const struct tfd_entry *entry)
{
	struct tfd_session *session = job->session;
	struct tfd_watch *watch = &session->watches[entry->watcher];
	struct tfd_worker *worker = session->group->worker;

	if (session->armed_count >= armed_max(session) ||
	    tfd_heap_reserve(&watch->jobs, watch->jobs.count + 1) != 0)
		return false;
	tfd_job_enter(job);
	if (!job->shard_count) /* nothing that its open could be waited for: it may go before this job begins */
		job->open = NULL;
	job->watch = watch;
	job->polled = (entry->flags & TFD_FLAG_POLLED) != 0;
	job->armed = (struct tfd_heap_item){ .key = entry->fire_at, .order = session->armed_order++ };
	if (!watch->jobs.count)
		tfd_list_push(&worker->watched, &watch->link);
	tfd_heap_add(&watch->jobs, &job->armed);
	session->armed_count++;
	worker->polled += job->polled;
	return true;
}

void tfd_disarm(struct tfd_job *job)
{
	struct tfd_watch *watch = job->watch;

	if (!watch)
		return;
	tfd_heap_remove(&watch->jobs, &job->armed);
	if (!watch->jobs.count)
		tfd_list_remove(&watch->link);
	job->session->armed_count--;
	job->session->group->worker->polled -= job->polled;
	job->watch = NULL;
}

static struct tfd_job *first_of(const struct tfd_watch *watch)
{
	return tfd_container(tfd_heap_first(&watch->jobs), struct tfd_job, armed);
}

void tfd_watch_clear(struct tfd_watch *watch)
{
	struct tfd_heap *jobs = &watch->jobs;
	uint32_t left = jobs->count;

	/* From the last place on: who leaves has others take places up to his own, which is looked at again. Copies may stay a while. */
	while (left) {
		struct tfd_job *job = tfd_container(jobs->items[left - 1], struct tfd_job, armed);

		tfd_job_fail(job, TFD_JOB_CANCELLED, TFD_DETAIL_NONE);
		if (tfd_copied_runs(job))
			left--;
		else
			tfd_job_finish_if_quiet(job); /* which disarms it */
		if (left > jobs->count)
			left = jobs->count;
	}
}

/* What may have changed since it was taken; whatever else changed has ended it. */
static uint32_t check_again(const struct tfd_job *job)
{
	uint64_t now = job->session->group->worker->now_ns;

	if (job->region && tfd_load_relaxed(&job->region->broken))
		return TFD_DETAIL_BROKEN_REGION;
	for (uint32_t i = 0; i < job->shard_count; i++) {
		const struct tfd_open *open = job->shards[i].open;

		if (open && open->expires_ns && now >= open->expires_ns)
			return TFD_DETAIL_EXPIRED;
	}
	return TFD_DETAIL_NONE;
}

void tfd_job_begin(struct tfd_job *job)
{
	uint32_t detail = check_again(job);

	tfd_disarm(job);
	tfd_copied_leave(job);
	if (job->status != TFD_JOB_PENDING) { /* its stream is through */
		tfd_job_finish_if_quiet(job);
		return;
	}
	if (!detail && job->launch)
		detail = tfd_launch_read(job);
	if (detail) {
		tfd_job_fail(job, TFD_JOB_INVALID, detail);
		tfd_job_finish_if_quiet(job);
		return;
	}
	tfd_job_cut(job); /* anew: paths may have come and gone */
	for (uint32_t i = job->parts; i < job->shard_count; i++)
		tfd_shard_skip(&job->shards[i]);
	tfd_job_go(job);
}

/* As many as its session may start yet in this pass. */
static uint32_t watch_start(struct tfd_watch *watch, uint64_t value)
{
	struct tfd_session *session = watch->session;
	uint32_t count = 0;

	while (session->started < START_BUDGET && watch->jobs.count &&
	       tfd_heap_first(&watch->jobs)->key <= value) {
		/* What has failed only ends. */
		if (session->state != TFD_STATE_OPEN && first_of(watch)->status == TFD_JOB_PENDING)
			break;
		session->started++;
		count++;
		tfd_job_begin(first_of(watch));
	}
	return count;
}

uint32_t tfd_watches_check(struct tfd_worker *worker)
{
	uint32_t count = 0;
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = worker->watched.next; link != &worker->watched; link = next) {
		struct tfd_watch *watch = tfd_container(link, struct tfd_watch, link);
		uint64_t value = tfd_load_acquire(watch->word); /* pairs with tfd_client_watcher_bump */
		uint32_t started;

		next = link->next;
		if (tfd_losses_wait(watch->session))
			continue;
		started = watch_start(watch, value);
		count += started;
		if (started && watch->jobs.count) { /* those behind it have their turns before its next */
			tfd_list_remove(link);
			tfd_list_push(&worker->watched, link);
		}
	}
	if (count && !worker->core->options.stepped)
		worker->now_ns = tfd_now_ns(); /* posted after that, not when the pass began */
	return count;
}

bool tfd_watches_ready(const struct tfd_worker *worker)
{
	for (const struct tfd_list *link = worker->watched.next; link != &worker->watched;
	     link = link->next) {
		const struct tfd_watch *watch = tfd_container(link, struct tfd_watch, link);

		/* Seq, after need_wakeup was stored; pairs with tfd_client_watcher_bump, which does it the other way round. */
		if (watch->session->state == TFD_STATE_OPEN &&
		    tfd_heap_first(&watch->jobs)->key <= tfd_load_seq(watch->word))
			return true;
	}
	return false;
}

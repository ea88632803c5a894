/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How jobs that their client copies end before their word has come. The client's stream may be at work for them, or come to it, and nobody
 * can take that back: so what has failed stays in flight, with its open, until the word says that the stream is through. A copy whose
 * stream still waits for a trigger is made void instead, which takes no time. The word is the client's, and may never come: nobody waits for
 * it longer than tfd_core_options.copy_ns.
 */
#include <string.h>

#include "barrier.h"
#include "parts.h"

bool tfd_copied_runs(const struct tfd_job *job)
{
	return job->watch && job->flags & TFD_FLAG_COPIED && !job->copy_void && !job->copy_given_up &&
	       tfd_load_acquire(job->watch->word) < job->armed.key; /* pairs with the stream's store */
}

/* Sequential: a mark, or a place, is stored before; whoever reaches the trigger later has its stream find that. */
static bool waits(const struct tfd_job *job)
{
	return tfd_load_seq(job->trigger) < job->trigger_at;
}

/* Of a copy that has not been triggered: what another than its client has written there leaves it as it is. */
static bool make_void(const struct tfd_job *job)
{
	uint32_t expected = TFD_COPY_MARK(job->armed.key);

	while (!tfd_replace_seq(job->copy_mark, &expected, TFD_COPY_VOID(job->armed.key))) {
		if (expected != TFD_COPY_MARK(job->armed.key))
			return expected == TFD_COPY_VOID(job->armed.key) && waits(job);
	}
	return waits(job);
}

static void bound_set(struct tfd_job *job)
{
	struct tfd_worker *worker = job->session->group->worker;

	tfd_deadline_remove(worker, job);
	if (!job->copy_until_ns)
		job->copy_until_ns = worker->now_ns + worker->core->options.copy_ns;
	tfd_deadline_add(worker, job);
}

void tfd_copied_fail(struct tfd_job *job)
{
	if (!tfd_copied_runs(job))
		return;
	if (job->copy_mark && make_void(job))
		job->copy_void = true;
	else
		bound_set(job);
}

bool tfd_copied_whole(const struct tfd_job *job)
{
	return tfd_copied_runs(job) && job->copy_mark && !job->places && waits(job);
}

bool tfd_copied_target_fail(struct tfd_job *job, uint32_t target)
{
	if (!tfd_copied_runs(job))
		return true;
	if (job->copy_mark && job->places) {
		tfd_store_seq(&job->places[target], 0);
		if (waits(job))
			return true;
	}
	bound_set(job);
	return false;
}

/* Those targets that have failed wait no more. */
void tfd_copied_leave(struct tfd_job *job)
{
	for (uint32_t i = 0; job->flags & TFD_FLAG_COPIED && i < job->shard_count; i++) {
		if (job->shards[i].failed)
			tfd_shard_done(&job->shards[i]);
	}
}

void tfd_copied_give_up(struct tfd_job *job)
{
	job->copy_given_up = true;
	job->copy_until_ns = 0;
	tfd_copied_leave(job);
	if (job->status == TFD_JOB_PENDING)
		tfd_deadline_add(job->session->group->worker, job);
	tfd_job_finish_if_quiet(job);
}

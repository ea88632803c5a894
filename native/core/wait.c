/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards whose bytes are, or go, where no helper has the memory open yet (providers/staged). Whoever may have it opened takes seconds, so
 * they hold nothing meanwhile but themselves: no lane, no place in the order of a rail. Each goes again after a while, and fails alone if
 * that has been in vain for too long. Owner: worker.
 */
#include "parts.h"

#define PAUSE_NS (TFD_WAIT_MS * 1000000u)
#define PER_PASS 64u /* of many that go again at once */
/* Of what waits for the far end one short piece goes, which shows whether it may: a window of them would come back. */
#define TRIAL_BYTES 4096u

/* Whether it has not waited for too long. For the far end it begins anew, and never for the near one again. */
static bool may_wait(const struct tfd_worker *worker, const struct tfd_conn *conn, struct tfd_shard *shard,
                     uint8_t waited)
{
	if (shard->waited < waited) {
		shard->waited = waited;
		shard->waits_ns = worker->now_ns;
	}
	return worker->now_ns - shard->waits_ns <= conn->rail->patience_ns;
}

static void wait(struct tfd_worker *worker, struct tfd_shard *shard)
{
	shard->again_ns = worker->now_ns + PAUSE_NS;
	shard->queued = true;
	tfd_list_push(&worker->waiting, &shard->link);
}

void tfd_wait_near(struct tfd_worker *worker, const struct tfd_conn *conn, struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;

	tfd_shard_unqueue(shard);
	if (!may_wait(worker, conn, shard, TFD_WAITED_NEAR)) {
		tfd_shard_fail(shard, TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_STAGING);
		tfd_job_finish_if_quiet(job);
		return;
	}
	if (!shard->piece_posted) /* it is filled again from here */
		tfd_batch_drop(shard);
	wait(worker, shard);
}

void tfd_wait_far(struct tfd_worker *worker, struct tfd_shard *shard)
{
	const struct tfd_conn *conn = shard->open->paths[shard->path].conn;

	shard->returns = false;
	shard->tries++;
	if (!may_wait(worker, conn, shard, TFD_WAITED_FAR)) {
		tfd_shard_fail(shard, TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_STAGING);
		return;
	}
	tfd_shard_rewind(shard);
	wait(worker, shard);
}

void tfd_wait_over(struct tfd_shard *shard)
{
	shard->waited = TFD_WAITED_NOT;
	if (shard->job->status == TFD_JOB_PENDING && !shard->failed && !shard->returns &&
	    tfd_shard_has_more(shard))
		tfd_shard_queue(shard);
}

uint64_t tfd_wait_segment(const struct tfd_shard *shard, uint64_t segment)
{
	return shard->waited == TFD_WAITED_FAR && segment > TRIAL_BYTES ? TRIAL_BYTES : segment;
}

uint32_t tfd_waits_check(struct tfd_worker *worker)
{
	uint32_t count = 0;

	for (; count < PER_PASS && !tfd_list_empty(&worker->waiting); count++) {
		struct tfd_shard *shard = tfd_container(worker->waiting.next, struct tfd_shard, link);

		if (shard->again_ns > worker->now_ns)
			break;
		tfd_shard_unqueue(shard);
		tfd_shard_queue(shard);
	}
	return count;
}

void tfd_waits_move(struct tfd_conn *conn, uint32_t detail)
{
	struct tfd_list *waiting = &conn->group->worker->waiting;
	struct tfd_list all;

	tfd_list_init(&all);
	while (!tfd_list_empty(waiting)) {
		struct tfd_list *link = waiting->next;

		tfd_list_remove(link);
		tfd_list_push(&all, link);
	}
	while (!tfd_list_empty(&all)) { /* a job that fails takes its other shards out */
		struct tfd_shard *shard = tfd_container(all.next, struct tfd_shard, link);
		struct tfd_job *job = shard->job;

		tfd_list_remove(&shard->link);
		if (shard->open->paths[shard->path].conn != conn) {
			tfd_list_push(waiting, &shard->link);
			continue;
		}
		tfd_shard_move(shard, detail);
		tfd_job_finish_if_quiet(job);
	}
}

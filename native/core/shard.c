/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards: the parts of a job on their paths. DATA -> DRAIN -> (TRAILING -> DRAIN) -> DONE; a lost connection whose far side told
 * what has landed brings a shard back to DATA on another path.
 */
#include "barrier.h"
#include "parts.h"

void tfd_shard_queue(struct tfd_shard *shard)
{
	struct tfd_conn *conn = shard->open->paths[shard->path].conn;

	if (shard->queued)
		return;
	if (shard->job->op == TFD_OP_SEND) {
		tfd_send_queue(shard);
		return;
	}
	if (shard->state == TFD_SHARD_VERIFY) {
		tfd_list_push(&conn->messages, &shard->link);
		shard->queued = true;
		tfd_conn_wake(conn);
		return;
	}
	shard->queued = true;
	tfd_schedule_enter(shard);
}

void tfd_shard_unqueue(struct tfd_shard *shard)
{
	if (!shard->queued)
		return;
	if (shard->lane)
		tfd_schedule_leave(shard);
	else
		tfd_list_remove(&shard->link);
	shard->queued = false;
}

void tfd_shard_enter(struct tfd_shard *shard)
{
	struct tfd_open *open = shard->open;

	shard->number = open->next_shard++;
	tfd_list_push(&open->shards, &shard->open_link);
}

void tfd_shard_go(struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;
	bool copied = job->flags & TFD_FLAG_COPIED;

	if (job->op == TFD_OP_READ && (copied || !shard->length)) {
		job->acked += shard->length;
		tfd_shard_done(shard);
		return;
	}
	if (shard->open->paths[shard->path].conn->half && tfd_shard_goes_by(shard, shard->path))
		tfd_shard_queue(shard);
	else
		tfd_shard_fail(shard, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
}

void tfd_shard_settle(struct tfd_shard *shard)
{
	struct tfd_open *open = shard->open;

	if (!open)
		return;
	tfd_list_remove(&shard->open_link);
	shard->open = NULL;
	if (!tfd_list_empty(&open->fences))
		tfd_fences_leave(open, shard);
	tfd_open_quiet_if_idle(open);
	if (!tfd_list_empty(&open->parked)) /* it may have been the one whose turn it was */
		tfd_send_unpark(open);
}

/* Acknowledged, or failed and quiet. Of a scatter: whoever waits for its open need not wait for the other targets. */
void tfd_shard_done(struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;

	if (shard->state == TFD_SHARD_DONE)
		return;
	shard->state = TFD_SHARD_DONE;
	tfd_batch_drop(shard);
	job->shards_left--;
	if (!job->open) {
		if (shard->failed || job->status == TFD_JOB_LOCAL_ACCESS)
			tfd_loss_tell(shard, job->part_status, job->detail);
		tfd_shard_settle(shard);
	}
}

void tfd_shard_skip(struct tfd_shard *shard)
{
	if (shard->state == TFD_SHARD_DONE) /* it has failed */
		return;
	shard->length = shard->units = 0;
	shard->data_done = true;
	shard->job->data_left--;
	tfd_shard_done(shard);
}

void tfd_shard_fail(struct tfd_shard *shard, uint32_t status, uint32_t detail)
{
	struct tfd_job *job = shard->job;

	if (job->open || job->status != TFD_JOB_PENDING) {
		tfd_job_fail(job, status, detail);
		return;
	}
	if (shard->failed || shard->state == TFD_SHARD_DONE)
		return;
	if (tfd_copied_whole(job)) { /* of its stream's work no target can be left out */
		tfd_job_fail(job, status, detail);
		return;
	}
	shard->failed = true;
	if (!job->part_status) {
		job->part_status = (uint8_t)status;
		job->detail = detail;
	}
	tfd_shard_unqueue(shard);
	if (!shard->inflight && tfd_copied_target_fail(job, (uint32_t)(shard - job->shards)))
		tfd_shard_done(shard);
}

bool tfd_shard_path_next(struct tfd_shard *shard)
{
	const struct tfd_open *open = shard->open;

	for (uint32_t i = 0; i < open->path_count; i++) {
		const struct tfd_conn *conn;

		shard->path = (uint8_t)((shard->path + 1u) % open->path_count);
		conn = open->paths[shard->path].conn;
		if (conn->half && !conn->broken && tfd_shard_goes_by(shard, shard->path))
			return true;
	}
	return false;
}

void tfd_shard_move(struct tfd_shard *shard, uint32_t detail)
{
	struct tfd_job *job = shard->job;

	tfd_shard_unqueue(shard);
	if (shard->state == TFD_SHARD_DONE || shard->failed || job->status != TFD_JOB_PENDING)
		return;
	shard->returns = false;
	if (!tfd_shard_path_next(shard)) {
		tfd_shard_fail(shard, shard->refused ? TFD_JOB_REMOTE_ACCESS : TFD_JOB_PEER_LOST, detail);
		return;
	}
	/* An unordered rail might bring a count before the data of the rest. */
	if (!shard->open->paths[shard->path].conn->rail->info.ordered && shard->length && shard->units)
		shard->trails = true;
	tfd_shard_rewind(shard);
	tfd_shard_queue(shard);
}

void tfd_shard_rewind(struct tfd_shard *shard)
{
	tfd_batch_drop(shard);
	shard->units_posted = shard->units_acked;
	shard->units_owed = 0; /* what has landed and was not counted trails the rest */
	if (shard->acked < shard->length || !shard->length) {
		shard->posted = shard->acked;
		shard->state = TFD_SHARD_DATA;
	} else if (tfd_verify_wanted(shard)) {
		tfd_verify_start(shard);
	} else {
		shard->state = TFD_SHARD_TRAILING;
		shard->units_owed = shard->units - shard->units_acked;
	}
}

bool tfd_shard_has_more(const struct tfd_shard *shard)
{
	return shard->units_owed || (shard->state == TFD_SHARD_DATA && shard->posted < shard->length);
}

static void trail(struct tfd_shard *shard)
{
	if (!shard->open->paths[shard->path].conn->half && !tfd_shard_path_next(shard)) {
		tfd_shard_fail(shard, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
		return;
	}
	shard->state = TFD_SHARD_TRAILING;
	shard->units_owed = shard->units - shard->units_posted;
	tfd_shard_queue(shard);
}

static void verify(struct tfd_shard *shard)
{
	if (!shard->open->paths[shard->path].conn->half && !tfd_shard_path_next(shard)) {
		tfd_shard_fail(shard, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
		return;
	}
	tfd_verify_start(shard);
	tfd_shard_queue(shard);
}

/* Exact: nobody's count goes out before everybody's data is acknowledged. */
static void job_trail(struct tfd_job *job)
{
	for (uint32_t i = 0; i < job->shard_count && job->status == TFD_JOB_PENDING; i++) {
		struct tfd_shard *shard = &job->shards[i];

		if (shard->state == TFD_SHARD_DRAIN && !shard->failed && shard->units_posted < shard->units)
			trail(shard);
	}
}

void tfd_shard_advance(struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;

	if (shard->failed) {
		if (!shard->inflight)
			tfd_shard_done(shard);
		return;
	}
	if (shard->returns && !shard->inflight && job->status == TFD_JOB_PENDING) {
		tfd_wait_far(job->session->group->worker, shard);
		return;
	}
	if (shard->inflight || shard->state != TFD_SHARD_DRAIN || shard->acked < shard->length)
		return;
	if (job->status == TFD_JOB_PENDING && tfd_verify_wanted(shard)) {
		verify(shard);
		return;
	}
	if (!shard->data_done) {
		shard->data_done = true;
		job->data_left--;
	}
	if (shard->units_acked == shard->units)
		tfd_shard_done(shard);
	else if (job->status == TFD_JOB_PENDING && !(job->flags & TFD_FLAG_EXACT))
		trail(shard);
	if (job->status == TFD_JOB_PENDING && (job->flags & TFD_FLAG_EXACT) && !job->data_left)
		job_trail(job);
}

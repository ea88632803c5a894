/* SPDX-License-Identifier: Apache-2.0 */
/* Taking posted pieces back: acknowledged, failed, or to go out again. */
#include "wr.h"

#include "barrier.h"

/* Of what its client copied no byte was posted. */
static uint64_t bytes_of(const struct tfd_job *job, const struct tfd_pieces *sum)
{
	if (!(job->flags & TFD_FLAG_COPIED))
		return sum->bytes;
	return job->op == TFD_OP_WRITE_PAGES ? sum->extent * job->length : sum->extent;
}

/* Pieces of a shard are: they have been unlinked, and may be used again. */
static void acked(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                  const struct tfd_pieces *sum)
{
	struct tfd_job *job = shard->job;
	struct tfd_session_info *stat = &job->session->stat;
	struct tfd_rail_info *info = &conn->rail->info;
	uint64_t bytes = bytes_of(job, sum);

	tfd_pace_acked(conn, sum->bytes);
	tfd_pieces_leave(worker, conn, shard, sum);
	job->acked += bytes;
	shard->acked += sum->extent;
	shard->units_acked += sum->units;
	if (shard->waited)
		tfd_wait_over(shard);
	tfd_store_relaxed(&stat->bytes_sent, stat->bytes_sent + bytes);
	tfd_store_relaxed(&info->bytes_sent, info->bytes_sent + sum->bytes);
	tfd_store_relaxed(&info->writes_sent, info->writes_sent + sum->count);
	if (job->region && tfd_load_relaxed(&job->region->broken)) /* zeros were sent in its place */
		tfd_job_fail(job, TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_BROKEN_REGION);
	if (!shard->inflight)
		tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

static inline void unlink_and_add(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_wr *wr,
                                  struct tfd_pieces *sum)
{
	tfd_window_acked(conn, wr, worker->now_ns - wr->posted_ns);
	tfd_wr_unlink(conn, wr);
	if (wr->units)
		tfd_credits_acked(conn);
	sum->bytes += wr->length;
	sum->extent += wr->extent;
	sum->units += wr->units;
	sum->count++;
}

/* A shard's, and not abandoned before. */
static inline bool is_piece(const struct tfd_wc *wc)
{
	return wc->type == TFD_WC_SENT && wc->wr->shard && wc->wr->conn;
}

/* They mostly come in runs of one shard. */
uint32_t tfd_wrs_acked(struct tfd_worker *worker, const struct tfd_wc *wc, uint32_t count)
{
	const struct tfd_wc *next = wc;
	const struct tfd_wc *end = wc + count;

	while (next != end && is_piece(next)) {
		struct tfd_wr *wr = next->wr;
		struct tfd_shard *shard = wr->shard;
		struct tfd_conn *conn = wr->conn;
		struct tfd_pieces sum = { 0 };

		for (;;) {
			unlink_and_add(worker, conn, wr, &sum);
			tfd_wr_give(worker, wr);
			if (++next == end || next->type != TFD_WC_SENT)
				break;
			wr = next->wr;
			if (wr->shard != shard || wr->conn != conn)
				break;
		}
		acked(worker, conn, shard, &sum);
	}
	return (uint32_t)(next - wc);
}

static struct tfd_pieces one_of(const struct tfd_wr *wr)
{
	return (struct tfd_pieces){
		.bytes = wr->length, .extent = wr->extent, .units = wr->units, .count = 1
	};
}

/* One that failed, or whose connection is gone. */
static void wr_detach(struct tfd_worker *worker, struct tfd_wr *wr)
{
	struct tfd_pieces one = one_of(wr);
	struct tfd_conn *conn = wr->conn;

	tfd_wr_unlink(conn, wr);
	if (wr->units)
		tfd_credits_acked(conn);
	tfd_pieces_leave(worker, conn, wr->shard, &one);
}

static void wr_failed(struct tfd_worker *worker, struct tfd_wr *wr, uint32_t status, uint32_t detail,
                      bool unknown)
{
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = wr->shard;

	wr_detach(worker, wr);
	if (unknown)
		shard->units_unknown += wr->units;
	tfd_shard_fail(shard, status, detail);
	tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

/* The far side has not taken it, nor what is behind it of its shard, which is posted no further: it goes again from there. */
static void wr_not_open(struct tfd_worker *worker, struct tfd_wr *wr)
{
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = wr->shard;

	wr_detach(worker, wr);
	tfd_shard_unqueue(shard);
	shard->returns = true;
	tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

static void wr_settle(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wr->conn;
	struct tfd_pieces sum = { 0 };
	bool local;

	if (wc->type == TFD_WC_SENT) {
		unlink_and_add(worker, conn, wr, &sum);
		acked(worker, conn, wr->shard, &sum);
		return;
	}
	if (wc->type == TFD_WC_NOT_OPEN) {
		wr_not_open(worker, wr);
		return;
	}
	local = wr->job->region && tfd_region_probe(wr->job->region);
	wr_failed(worker, wr,
	          wc->remote_access  ? TFD_JOB_REMOTE_ACCESS :
	          local || wc->alone ? TFD_JOB_LOCAL_ACCESS :
	                               TFD_JOB_PEER_LOST,
	          local     ? TFD_DETAIL_BROKEN_REGION :
	          wc->alone ? TFD_DETAIL_STAGING :
	                      TFD_DETAIL_CONNECTION,
	          !wc->remote_access && !wc->alone);
	if (!wc->alone)
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

/*
 * Whether the far side may yet tell what became of it: then it waits for its connection's close. Also of one that a device refused: of a daemon
 * that is killed the kernel takes registrations away before queue pairs, and then nobody answers.
 */
static bool may_be_reconciled(const struct tfd_wr *wr, const struct tfd_wc *wc)
{
	return wc->type == TFD_WC_ERROR && !wc->alone && (!wc->remote_access || wc->unsure) &&
	       wr->conn->half && wr->conn->rail->info.ordered &&
	       !(wr->job->region && tfd_region_probe(wr->job->region));
}

void tfd_wr_done(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc)
{
	if (!wr->job && (!wr->conn || wr == wr->conn->probe)) {
		tfd_probe_done(worker, wr, wc);
		return;
	}
	if (!wr->job) {
		tfd_channel_wr_done(wr, wc);
	} else if (wr->conn && may_be_reconciled(wr, wc)) {
		wr->back = 1;
		wr->refused = wc->remote_access;
		tfd_conn_break(wr->conn, TFD_DETAIL_CONNECTION);
		return;
	} else if (wr->conn) { /* else abandoned before */
		wr_settle(worker, wr, wc);
	}
	tfd_wr_give(worker, wr);
}

static void wr_reuse_if_back(struct tfd_worker *worker, struct tfd_wr *wr)
{
	if (wr->back)
		tfd_wr_give(worker, wr);
}

void tfd_wr_abandon(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_worker *worker = wr->conn->group->worker;

	if (!wr->job) {
		tfd_channel_wr_done(wr, wc);
		return;
	}
	wr_settle(worker, wr, wc);
	wr_reuse_if_back(worker, wr);
}

void tfd_wr_return(struct tfd_wr *wr)
{
	struct tfd_worker *worker = wr->conn->group->worker;
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = wr->shard;

	wr_detach(worker, wr);
	if (job->status == TFD_JOB_PENDING && !shard->failed) {
		if (!shard->queued)
			tfd_shard_queue(shard); /* its connection moves it when all its pieces are back */
	} else {
		tfd_shard_advance(shard);
		tfd_job_finish_if_quiet(job);
	}
	wr_reuse_if_back(worker, wr);
}

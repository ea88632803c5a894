/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Posting the next piece of a shard under its connection's window, and taking pieces back. Work is posted in bounded segments, so that
 * a cancel, or a small write, never waits behind more than a window. Whose piece is next: schedule.c.
 */
#include <errno.h>

#include "barrier.h"
#include "parts.h"

#define CONNECT_BOUND_NS 5000000000u /* from the first refused post to giving up */
#define PROGRESS_BOUND_NS 5000000000u /* without any piece coming back, to taking the connection out */
#define CHECK_PAUSE_NS 500000000u
#define OWED_MAX (8u * 4096u)        /* counts of pages that may wait for a page to ride on */

static bool counts_pages(const struct tfd_job *job)
{
	return job->op == TFD_OP_WRITE_PAGES && !(job->flags & TFD_FLAG_COUNT_JOB);
}

static uint32_t units_of(uint64_t owed)
{
	return owed ? tfd_weight_units(tfd_weight_of(owed)) : 0;
}

/* The immediate that rides on a piece. */
static uint32_t plan_units(struct tfd_shard *shard, const struct tfd_rail *rail, uint64_t extent)
{
	bool last = shard->posted + extent == shard->length;

	if (shard->trails)
		return 0;
	if (!counts_pages(shard->job))
		return last ? (uint32_t)(shard->units - shard->units_posted) : 0;
	shard->units_owed += 8 * extent;
	return last || shard->units_owed >= OWED_MAX || !rail->info.ordered ? units_of(shard->units_owed) : 0;
}

static void plan_bytes(const struct tfd_shard *shard, uint64_t segment, struct tfd_plan *plan)
{
	uint64_t offset = shard->first + shard->posted;

	plan->length = shard->length - shard->posted;
	if (plan->length > segment)
		plan->length = segment;
	plan->extent = plan->first = plan->length;
	plan->src_offset = shard->src_offset + offset;
	plan->dst_offset = shard->dst_offset + offset;
}

static bool pays(const struct tfd_shard *shard)
{
	return shard->state == TFD_SHARD_TRAILING || shard->units_owed >= OWED_MAX ||
	       (shard->units_owed && shard->posted == shard->length);
}

static int plan_next(struct tfd_shard *shard, const struct tfd_conn *conn, struct tfd_plan *plan)
{
	uint64_t segment = tfd_window_segment(conn);

	*plan = (struct tfd_plan){ .dst_offset = shard->dst_offset };
	if (pays(shard)) {
		plan->units = units_of(shard->units_owed);
		return 0;
	}
	if (shard->job->op == TFD_OP_WRITE_PAGES && shard->length)
		return tfd_pages_plan(shard, conn->rail, segment, plan);
	plan_bytes(shard, segment, plan);
	return 0;
}

static void fill_post(struct tfd_worker *worker, const struct tfd_shard *shard, const struct tfd_plan *plan,
                      struct tfd_post *post)
{
	const struct tfd_job *job = shard->job;
	const struct tfd_path *path = &shard->open->paths[shard->path];

	*post = (struct tfd_post){
		.length = plan->first,
		.remote_address = path->address + plan->dst_offset,
		.remote_key = path->key,
		.job_bytes = job->op == TFD_OP_WRITE_PAGES ? shard->length * job->length : shard->length,
		.read = job->op == TFD_OP_READ,
	};
	if (plan->length) {
		post->local = job->region->base + plan->src_offset;
		post->mr = job->region->mrs[path->conn->rail->index];
	}
	if (plan->pieces > 1)
		tfd_pages_parts(shard, plan, post, worker->parts);
	if (plan->units) {
		post->has_imm = 1;
		post->imm =
			tfd_weight_of(plan->units) << 29 | tfd_wire_imm(shard->open->name_space, job->imm);
	}
}

static void wr_attach(struct tfd_conn *conn, struct tfd_shard *shard, struct tfd_wr *wr,
                      const struct tfd_plan *plan)
{
	wr->job = shard->job;
	wr->shard = (uint32_t)(shard - shard->job->shards);
	wr->extent = plan->extent;
	wr->units = plan->units;
	wr->imm_number = conn->imms_posted + 1;
	wr->credit = plan->units != 0;
	conn->imms_posted += wr->credit;
	conn->credits.taken += wr->credit;
	tfd_wr_enter(conn, wr, plan->length);
	conn->class_bytes[shard->job->priority] += plan->length;
	conn->class_wrs[shard->job->priority]++;
	shard->inflight++;
	shard->job->inflight++;
}

void tfd_wr_enter(struct tfd_conn *conn, struct tfd_wr *wr, uint64_t length)
{
	wr->conn = conn;
	wr->length = length;
	wr->back = 0;
	wr->prev = NULL;
	wr->next = conn->outstanding;
	if (wr->next)
		wr->next->prev = wr;
	conn->outstanding = wr;
	if (!conn->inflight_wrs) {
		tfd_list_push(&conn->group->worker->conns_inflight, &conn->inflight_link);
		conn->progress_ns = conn->group->worker->now_ns;
	}
	conn->inflight_bytes += wr->length;
	conn->inflight_wrs++;
	conn->group->worker->inflight_wrs++;
	wr->posted_ns = conn->group->worker->now_ns;
	wr->ahead = conn->inflight_bytes;
}

void tfd_wr_leave(struct tfd_wr *wr)
{
	struct tfd_conn *conn = wr->conn;

	if (wr->next)
		wr->next->prev = wr->prev;
	if (wr->prev)
		wr->prev->next = wr->next;
	else
		conn->outstanding = wr->next;
	conn->inflight_bytes -= wr->length;
	conn->inflight_wrs--;
	conn->progress_ns = conn->group->worker->now_ns;
	if (!conn->inflight_wrs)
		tfd_list_remove(&conn->inflight_link);
	conn->group->worker->inflight_wrs--;
	if (wr->credit)
		tfd_credits_acked(conn);
	wr->conn = NULL;
}

static void wr_detach(struct tfd_wr *wr)
{
	wr->conn->class_bytes[wr->job->priority] -= wr->length;
	wr->conn->class_wrs[wr->job->priority]--;
	wr->job->shards[wr->shard].inflight--;
	wr->job->inflight--;
	tfd_wr_leave(wr);
}

/* A piece went out: the shard keeps its place while it has more. */
static void posted(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                   const struct tfd_plan *plan)
{
	struct tfd_job *job = shard->job;

	if (shard->state == TFD_SHARD_DATA && shard->batch)
		tfd_pages_posted(shard, plan);
	job->packed = job->packed || plan->pieces > 1;
	shard->posted += plan->extent;
	shard->units_posted += plan->units;
	shard->units_owed -= shard->units_owed < plan->units ? shard->units_owed : plan->units;
	job->rails |= 1ull << conn->rail->index;
	job->ops = conn->rail->ops;
	tfd_schedule_charge(shard, plan->length);
	if (shard->units_owed || (shard->state == TFD_SHARD_DATA && shard->posted < shard->length))
		return;
	tfd_shard_unqueue(shard);
	shard->state = TFD_SHARD_DRAIN;
	tfd_batch_drop(shard);
	job->posted_ns = worker->now_ns;
}

int tfd_shard_post(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard)
{
	struct tfd_wr *wr = worker->wr_free;
	uint64_t owed = shard->units_owed;
	struct tfd_post post;
	struct tfd_plan plan;
	int rc;

	if (!wr)
		return -EAGAIN;
	rc = plan_next(shard, conn, &plan);
	if (rc) {
		uint32_t detail = shard->job->detail;

		tfd_job_fail(shard->job, rc == -EINVAL ? TFD_JOB_INVALID : TFD_JOB_QUOTA, detail);
		tfd_job_finish_if_quiet(shard->job);
		return 0;
	}
	if (!tfd_window_takes(conn, shard->job->priority, plan.length))
		return -EAGAIN;
	if (!pays(shard) && (plan.extent || !shard->length))
		plan.units = plan_units(shard, conn->rail, plan.extent);
	if (plan.units && !tfd_credits_may_post(conn)) {
		shard->units_owed = owed;
		tfd_credits_wait(conn, shard);
		return 0;
	}
	fill_post(worker, shard, &plan, &post);
	rc = conn->rail->ops->post(conn->half, &post, wr);
	if (rc) {
		shard->units_owed = owed;
		return rc;
	}
	worker->wr_free = wr->next;
	wr_attach(conn, shard, wr, &plan);
	posted(worker, conn, shard, &plan);
	return 0;
}

/* A provider may say -EAGAIN for ever where nobody listens (libfabric's tcp does): that has a bound, too. */
static void check_stall(struct tfd_worker *worker, struct tfd_conn *conn)
{
	if (conn->inflight_wrs || !worker->wr_free) {
		conn->stalled_ns = 0;
		return;
	}
	if (!conn->stalled_ns)
		conn->stalled_ns = worker->now_ns;
	else if (worker->now_ns - conn->stalled_ns > CONNECT_BOUND_NS)
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

/*
 * A cable that was pulled says nothing: TCP would try for a quarter of an hour. The peer lives, or its heartbeats had stopped, so its
 * other rails can carry on.
 */
void tfd_conns_check_progress(struct tfd_worker *worker)
{
	struct tfd_list *link;

	worker->next_stall_check_ns = worker->now_ns + CHECK_PAUSE_NS;
	for (link = worker->conns_inflight.next; link != &worker->conns_inflight; link = link->next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, inflight_link);

		if (worker->now_ns > conn->progress_ns &&
		    worker->now_ns - conn->progress_ns > PROGRESS_BOUND_NS)
			tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
	tfd_channels_check(worker);
	tfd_senders_check(worker);
}

static uint32_t channel_post(struct tfd_worker *worker, struct tfd_conn *conn)
{
	uint32_t count = 0;
	int rc = tfd_channel_post(worker, conn, &count);

	if (count)
		conn->stalled_ns = 0;
	if (rc == -EAGAIN)
		check_stall(worker, conn);
	else if (rc) /* of an incoming half PROVIDER would say that it has lost counts */
		tfd_conn_break(conn, conn->outgoing ? TFD_DETAIL_PROVIDER : TFD_DETAIL_CONNECTION);
	return count;
}

static uint32_t probe_post(struct tfd_worker *worker, struct tfd_conn *conn)
{
	int rc = tfd_probe_post(worker, conn);

	if (rc && rc != -EAGAIN)
		tfd_conn_break(conn, TFD_DETAIL_PROVIDER);
	return rc == 0;
}

/* Messages go ahead of writes; lanes that it has held up may try again once there is room for what they wait for. */
static uint32_t conn_serve(struct tfd_worker *worker, struct tfd_conn *conn)
{
	uint32_t count = 0;

	if (!conn->half || conn->broken)
		return 0;
	if (!conn->started) { /* the far side never told its address */
		check_stall(worker, conn);
		return 0;
	}
	if (tfd_channel_has_work(conn))
		count += channel_post(worker, conn);
	if (!conn->broken && conn->probe_state == TFD_PROBE_WAITS)
		count += probe_post(worker, conn);
	for (uint32_t priority = 0; priority < TFD_CLASSES && !conn->broken; priority++) {
		if (tfd_list_empty(&conn->held[priority]))
			continue;
		check_stall(worker, conn);
		if (tfd_window_opens(conn, priority))
			tfd_schedule_resume(conn, priority);
	}
	return count;
}

static bool conn_waits(const struct tfd_conn *conn)
{
	return !tfd_list_empty(&conn->held[TFD_PRIORITY_BULK]) ||
	       !tfd_list_empty(&conn->held[TFD_PRIORITY_LATENCY]) || tfd_channel_has_work(conn) ||
	       conn->probe_state == TFD_PROBE_WAITS;
}

uint32_t tfd_conns_post(struct tfd_worker *worker)
{
	uint32_t count = 0;
	struct tfd_list *link;
	struct tfd_list *next;

	worker->check_left = TFD_CHECK_BYTES;
	if (!tfd_list_empty(
		    &worker->conns_busy)) { /* another's turn to be first: work requests may run out */
		link = worker->conns_busy.next;
		tfd_list_remove(link);
		tfd_list_push(&worker->conns_busy, link);
	}
	for (link = worker->conns_busy.next; link != &worker->conns_busy; link = next) {
		next = link->next;
		count += conn_serve(worker, tfd_container(link, struct tfd_conn, busy_link));
	}
	count += tfd_schedule_post(worker);
	for (link = worker->conns_busy.next; link != &worker->conns_busy; link = next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, busy_link);

		next = link->next;
		if (conn_waits(conn))
			continue;
		tfd_list_remove(&conn->busy_link);
		conn->stalled_ns = 0; /* those who waited gave up: the next one's time begins anew */
	}
	return count;
}

/* ---- taking back ---- */

static void wr_acked(struct tfd_wr *wr)
{
	struct tfd_conn *conn = wr->conn;
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = &job->shards[wr->shard];
	struct tfd_session *session = job->session;
	struct tfd_rail *rail = conn->rail;

	tfd_window_acked(conn, wr);
	wr_detach(wr);
	job->acked += wr->length;
	shard->acked += wr->extent;
	shard->units_acked += wr->units;
	tfd_store_relaxed(&session->stat.bytes_sent, session->stat.bytes_sent + wr->length);
	tfd_store_relaxed(&rail->info.bytes_sent, rail->info.bytes_sent + wr->length);
	tfd_store_relaxed(&rail->info.writes_sent, rail->info.writes_sent + 1);
	if (job->region && tfd_load_relaxed(&job->region->broken)) /* zeros were sent in its place */
		tfd_job_fail(job, TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_BROKEN_REGION);
	tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

static void wr_failed(struct tfd_wr *wr, uint32_t status, uint32_t detail, bool unknown)
{
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = &job->shards[wr->shard];

	wr_detach(wr);
	if (unknown)
		shard->units_unknown += wr->units;
	tfd_shard_fail(shard, status, detail);
	tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

static void wr_settle(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wr->conn;
	bool local;

	if (wc->type == TFD_WC_SENT) {
		wr_acked(wr);
		return;
	}
	local = wr->job->region && tfd_region_probe(wr->job->region);
	wr_failed(wr,
	          wc->remote_access ? TFD_JOB_REMOTE_ACCESS :
	          local             ? TFD_JOB_LOCAL_ACCESS :
	                              TFD_JOB_PEER_LOST,
	          local ? TFD_DETAIL_BROKEN_REGION : TFD_DETAIL_CONNECTION, !wc->remote_access);
	tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

/* Whether the far side may yet tell what became of it: then it waits for its connection's close. */
static bool may_be_reconciled(const struct tfd_wr *wr, const struct tfd_wc *wc)
{
	return wc->type == TFD_WC_ERROR && !wc->remote_access && wr->conn->half &&
	       wr->conn->rail->info.ordered && !(wr->job->region && tfd_region_probe(wr->job->region));
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
		tfd_conn_break(wr->conn, TFD_DETAIL_CONNECTION);
		return;
	} else if (wr->conn) { /* else abandoned before */
		wr_settle(wr, wc);
	}
	wr->next = worker->wr_free;
	worker->wr_free = wr;
}

static void wr_reuse_if_back(struct tfd_worker *worker, struct tfd_wr *wr)
{
	if (!wr->back)
		return;
	wr->next = worker->wr_free;
	worker->wr_free = wr;
}

void tfd_wr_abandon(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_worker *worker = wr->conn->group->worker;

	if (!wr->job) {
		tfd_channel_wr_done(wr, wc);
		return;
	}
	wr_settle(wr, wc);
	wr_reuse_if_back(worker, wr);
}

void tfd_wr_return(struct tfd_wr *wr)
{
	struct tfd_worker *worker = wr->conn->group->worker;
	struct tfd_job *job = wr->job;
	struct tfd_shard *shard = &job->shards[wr->shard];

	wr_detach(wr);
	if (job->status == TFD_JOB_PENDING && !shard->failed) {
		if (!shard->queued)
			tfd_shard_queue(shard); /* its connection moves it when all its pieces are back */
	} else {
		tfd_shard_advance(shard);
		tfd_job_finish_if_quiet(job);
	}
	wr_reuse_if_back(worker, wr);
}

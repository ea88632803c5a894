/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards: the parts of a job on their paths, and the posting of their pieces under each connection's window. Work is
 * posted in bounded segments, so that a cancel, or a small write, never waits behind more than a window.
 */
#include <errno.h>

#include "barrier.h"
#include "parts.h"

#define CONNECT_BOUND_NS 5000000000u    /* from the first refused post to giving up */
#define WINDOW_WRS 64u                  /* pieces in flight per connection */

static bool shard_has_trailing_imm(const struct tfd_shard *shard)
{
	const struct tfd_job *job = shard->job;

	/* On an unordered rail the immediate could overtake earlier pieces: it waits for their acknowledgements. */
	return shard->length > job->session->group->segment_bytes &&
	       !job->open->paths[shard->path].conn->rail->info.ordered;
}

static void shard_queue(struct tfd_shard *shard)
{
	struct tfd_conn *conn = shard->job->open->paths[shard->path].conn;

	tfd_list_push(&conn->queue[shard->job->priority], &shard->link);
	shard->queued = true;
	if (tfd_list_empty(&conn->busy_link))
		tfd_list_push(&conn->group->worker->conns_busy, &conn->busy_link);
}

void tfd_shard_unqueue(struct tfd_shard *shard)
{
	if (!shard->queued)
		return;
	tfd_list_remove(&shard->link);
	shard->queued = false;
}

/*
 * A job travels whole, by the open's paths in turn. Cut into halves, the landed half of a lost write would complete
 * another's count: that has to wait until the receiver can take it out again.
 */
void tfd_shards_cut(struct tfd_job *job)
{
	struct tfd_open *open = job->open;
	struct tfd_shard *shard = &job->shards[0];

	job->shard_count = 1;
	job->shards_left = 1;
	*shard = (struct tfd_shard){ .job = job, .path = open->next_path, .length = job->length };
	tfd_list_init(&shard->link);
	open->next_path = (uint8_t)(open->next_path + 1u < open->path_count ? open->next_path + 1u : 0);
	if (open->paths[shard->path].conn->half)
		shard_queue(shard);
	else
		tfd_job_fail(job, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
}

/* The weight of a shard's immediate: 1 over the number of shards. */
static uint32_t shard_wire_imm(const struct tfd_job *job)
{
	uint32_t weight = TFD_WIRE_WEIGHT_ONE - (uint32_t)__builtin_ctz(job->shard_count);

	return weight << 29 | job->imm;
}

static void fill_post(const struct tfd_shard *shard, uint64_t piece, struct tfd_post *post)
{
	const struct tfd_job *job = shard->job;
	const struct tfd_path *path = &job->open->paths[shard->path];
	uint64_t offset = shard->offset + shard->posted;
	bool last = shard->posted + piece == shard->length;

	*post = (struct tfd_post){
		.length = piece,
		.remote_address = path->address + job->dst_offset + offset,
		.remote_key = path->key,
	};
	if (piece) {
		post->local = job->region->base + job->src_offset + offset;
		post->mr = job->region->mrs[path->conn->rail->index];
	}
	if (last && (shard->state == TFD_SHARD_TRAILING || !shard_has_trailing_imm(shard))) {
		post->has_imm = 1;
		post->imm = shard_wire_imm(job);
	}
}

static void wr_attach(struct tfd_conn *conn, struct tfd_shard *shard, struct tfd_wr *wr,
                      const struct tfd_post *post)
{
	wr->conn = conn;
	wr->job = shard->job;
	wr->shard = (uint32_t)(shard - shard->job->shards);
	wr->length = post->length;
	wr->carries_imm = post->has_imm;
	wr->prev = NULL;
	wr->next = conn->outstanding;
	if (wr->next)
		wr->next->prev = wr;
	conn->outstanding = wr;
	conn->inflight_bytes += post->length;
	conn->inflight_wrs++;
	conn->group->worker->inflight_wrs++;
	shard->inflight++;
	shard->job->inflight++;
}

static void wr_detach(struct tfd_wr *wr)
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
	conn->group->worker->inflight_wrs--;
	wr->job->shards[wr->shard].inflight--;
	wr->job->inflight--;
	wr->conn = NULL;
}

/* After a piece went out: the shard goes to the queue's end while it has more, so that others get their turn. */
static void shard_advance(struct tfd_worker *worker, struct tfd_shard *shard, const struct tfd_post *post)
{
	struct tfd_conn *conn = shard->job->open->paths[shard->path].conn;

	shard->posted += post->length;
	shard->imm_posted = shard->imm_posted || post->has_imm;
	tfd_list_remove(&shard->link);
	if (shard->posted < shard->length) {
		tfd_list_push(&conn->queue[shard->job->priority], &shard->link);
		return;
	}
	shard->queued = false;
	if (shard->state == TFD_SHARD_DATA)
		shard->state = TFD_SHARD_DRAIN;
	shard->job->posted_ns = worker->now_ns;
}

static int post_one(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard)
{
	struct tfd_group *group = worker->group;
	uint64_t piece = shard->length - shard->posted;
	struct tfd_wr *wr = worker->wr_free;
	struct tfd_post post;
	int rc;

	if (!wr)
		return -EAGAIN;
	if (piece > group->segment_bytes)
		piece = group->segment_bytes;
	if (conn->inflight_wrs &&
	    (conn->inflight_bytes + piece > group->window_bytes || conn->inflight_wrs >= WINDOW_WRS))
		return -EAGAIN;
	fill_post(shard, piece, &post);
	rc = group->ops->post(conn->half, &post, wr);
	if (rc)
		return rc;
	worker->wr_free = wr->next;
	wr_attach(conn, shard, wr, &post);
	shard_advance(worker, shard, &post);
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

static uint32_t conn_post(struct tfd_worker *worker, struct tfd_conn *conn)
{
	uint32_t posted = 0;

	for (int priority = TFD_PRIORITY_LATENCY; priority >= 0; priority--) {
		struct tfd_list *queue = &conn->queue[priority];

		while (!tfd_list_empty(queue)) {
			struct tfd_shard *shard = tfd_container(queue->next, struct tfd_shard, link);
			int rc = post_one(worker, conn, shard);

			if (rc == -EAGAIN) {
				check_stall(worker, conn);
				return posted;
			}
			conn->stalled_ns = 0;
			if (rc) {
				tfd_conn_break(conn, TFD_DETAIL_PROVIDER);
				return posted + 1;
			}
			posted++;
		}
	}
	return posted;
}

uint32_t tfd_conns_post(struct tfd_worker *worker)
{
	uint32_t posted = 0;
	struct tfd_list *link;
	struct tfd_list *next;

	if (!tfd_list_empty(
		    &worker->conns_busy)) { /* another's turn to be first: work requests may run out */
		link = worker->conns_busy.next;
		tfd_list_remove(link);
		tfd_list_push(&worker->conns_busy, link);
	}
	for (link = worker->conns_busy.next; link != &worker->conns_busy; link = next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, busy_link);

		next = link->next;
		if (conn->half && conn->started && !conn->broken)
			posted += conn_post(worker, conn);
		if (tfd_list_empty(&conn->queue[0]) && tfd_list_empty(&conn->queue[1])) {
			tfd_list_remove(&conn->busy_link);
			conn->stalled_ns = 0; /* those who waited gave up: the next one's time begins anew */
		}
	}
	return posted;
}

static void shard_acked(struct tfd_shard *shard, bool imm)
{
	struct tfd_job *job = shard->job;

	shard->imm_acked = shard->imm_acked || imm;
	if (shard->inflight || shard->state == TFD_SHARD_DATA)
		return;
	if (shard->imm_acked) {
		job->shards_left--;
	} else if (shard->state == TFD_SHARD_DRAIN && job->status == TFD_JOB_PENDING) {
		shard->state = TFD_SHARD_TRAILING;
		shard_queue(shard);
	}
}

static void wr_settle(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wr->conn;
	struct tfd_job *job = wr->job;
	struct tfd_session *session = job->session;
	struct tfd_rail *rail = conn->rail;

	wr_detach(wr);
	if (wc->type == TFD_WC_SENT) {
		job->acked += wr->length;
		tfd_store_relaxed(&session->stat.bytes_sent, session->stat.bytes_sent + wr->length);
		tfd_store_relaxed(&rail->info.bytes_sent, rail->info.bytes_sent + wr->length);
		tfd_store_relaxed(&rail->info.writes_sent, rail->info.writes_sent + 1);
		if (job->region && tfd_load_relaxed(&job->region->broken)) /* zeros were sent in its place */
			tfd_job_fail(job, TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_BROKEN_REGION);
		shard_acked(&job->shards[wr->shard], wr->carries_imm != 0);
	} else {
		bool local = job->region && tfd_region_probe(job->region);
		uint32_t status = wc->remote_access ? TFD_JOB_REMOTE_ACCESS :
		                  local             ? TFD_JOB_LOCAL_ACCESS :
		                                      TFD_JOB_PEER_LOST;

		tfd_job_fail(job, status, local ? TFD_DETAIL_BROKEN_REGION : TFD_DETAIL_CONNECTION);
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
	tfd_job_finish_if_quiet(job);
}

void tfd_wr_done(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc)
{
	if (wr->conn) /* else abandoned before */
		wr_settle(wr, wc);
	wr->next = worker->wr_free;
	worker->wr_free = wr;
}

void tfd_wr_abandon(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	wr_settle(wr, wc);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Posting the next pieces of a shard under its connection's window. Work is posted in bounded segments, so that a cancel, or a small
 * write, never waits behind more than a window. Whose piece is next: schedule.c. Taking them back: wr.c.
 */
#include <errno.h>

#include "barrier.h"
#include "parts.h"
#include "wr.h"

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
static uint32_t plan_units(const struct tfd_shard *shard, const struct tfd_rail *rail, uint64_t extent)
{
	bool last = shard->posted + extent == shard->length;
	uint64_t owed = shard->units_owed + 8 * extent;

	if (shard->trails)
		return 0;
	if (!counts_pages(shard->job))
		return last ? (uint32_t)(shard->units - shard->units_posted) : 0;
	return last || owed >= OWED_MAX || !rail->info.ordered ? units_of(owed) : 0;
}

static void plan_bytes(const struct tfd_shard *shard, uint64_t segment, struct tfd_plan *plan)
{
	uint64_t offset = shard->first + shard->posted;

	plan->length = shard->length - shard->posted;
	if (plan->length > segment)
		plan->length = tfd_cut_piece(plan->length, segment);
	plan->extent = plan->first = plan->length;
	plan->src_offset = shard->src_offset + offset;
	plan->dst_offset = shard->dst_offset + offset;
}

/* Its client has moved the bytes: pages are checked, a batch at a time, and no byte is posted. */
static int plan_copied(struct tfd_shard *shard, struct tfd_plan *plan)
{
	uint64_t left = shard->length - shard->posted;

	plan->extent = left;
	if (shard->job->op != TFD_OP_WRITE_PAGES || !left)
		return 0;
	if (left > TFD_BATCH_PIECES)
		plan->extent = TFD_BATCH_PIECES;
	return tfd_batch_fill(shard);
}

static bool pays(const struct tfd_shard *shard)
{
	return shard->state == TFD_SHARD_TRAILING || shard->units_owed >= OWED_MAX ||
	       (shard->units_owed && shard->posted == shard->length);
}

static int plan_next(struct tfd_shard *shard, const struct tfd_conn *conn, struct tfd_plan *plan)
{
	uint64_t segment = tfd_wait_segment(shard, tfd_window_segment(conn, shard->job->priority));

	*plan = (struct tfd_plan){ .dst_offset = shard->dst_offset };
	if (pays(shard)) {
		plan->units = units_of(shard->units_owed);
		return 0;
	}
	if (shard->job->flags & TFD_FLAG_COPIED)
		return plan_copied(shard, plan);
	if (shard->job->op == TFD_OP_WRITE_PAGES && shard->length)
		return tfd_pages_plan(shard, conn, segment, plan);
	plan_bytes(shard, segment, plan);
	return 0;
}

static void fill_post(const struct tfd_shard *shard, const struct tfd_plan *plan, struct tfd_post *post)
{
	const struct tfd_job *job = shard->job;
	const struct tfd_path *path = &shard->open->paths[shard->path];

	*post = (struct tfd_post){
		.length = plan->first,
		.remote_address = path->address + plan->dst_offset,
		.remote_key = path->key,
		.job_bytes = job->op == TFD_OP_WRITE_PAGES ? shard->length * job->length : shard->length,
		.chain = shard->open->handle * 0x9e3779b97f4a7c15ull + shard->number + 1 +
		         shard->tries * 0xd1b54a32d192ed03ull,
		.traffic = job->priority,
		.waited = shard->waited,
		.read = job->op == TFD_OP_READ,
	};
	if (plan->length) {
		post->local = job->region->base + plan->src_offset;
		post->mr = job->region->mrs[path->conn->rail->index];
	}
	if (plan->units) {
		post->has_imm = 1;
		post->imm =
			tfd_weight_of(plan->units) << 29 | tfd_wire_imm(shard->open->name_space, job->imm);
	}
}

/* Of the next immediate of a job of that class. */
static uint64_t next_number(const struct tfd_conn *conn, const struct tfd_job *job)
{
	return conn->orders[tfd_order_of(conn->rail, job->priority)].posted + 1;
}

/* It went out; `ahead` of it, and with it, so many bytes are in flight. */
static inline void attach(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                          struct tfd_wr *wr, const struct tfd_pieces *piece, uint64_t ahead,
                          uint64_t imm_number)
{
	worker->wr_free = wr->next;
	wr->job = shard->job;
	wr->shard = shard;
	wr->extent = piece->extent;
	wr->units = (uint32_t)piece->units;
	wr->imm_number = imm_number;
	tfd_wr_link(conn, wr, piece->bytes, ahead, worker->now_ns);
}

/*
 * Several pieces where the rail takes one at a time: what they have in common is worked out once. Ends early where the rail takes no
 * more. The immediate rides on the last.
 */
static int post_pieces(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                       const struct tfd_plan *plan, struct tfd_post *post, struct tfd_pieces *sum)
{
	const struct tfd_piece *first = &shard->batch->pieces[shard->batch->next];
	const struct tfd_piece *last = first + plan->pieces - 1;
	const struct tfd_piece *piece = first;
	const uint8_t *local = shard->job->region->base;
	uint64_t remote = shard->open->paths[shard->path].address;
	uint64_t number = next_number(conn, shard->job);
	uint64_t ahead = conn->inflight_bytes;
	uint64_t extent = 0;
	struct tfd_wr *wr;
	int rc = -EAGAIN;

	post->has_imm = 0;
	while ((wr = worker->wr_free) != NULL) {
		struct tfd_pieces one = { .bytes = post->length, .extent = piece->pages };

		if (piece == last) {
			one.units = plan->units;
			post->has_imm = plan->units != 0;
		}
		rc = conn->rail->ops->post(conn->half, post, wr);
		if (rc)
			break;
		ahead += one.bytes;
		extent += one.extent;
		attach(worker, conn, shard, wr, &one, ahead, number);
		if (piece++ == last) {
			sum->units = plan->units;
			break;
		}
		post->local = local + piece->src_offset;
		post->remote_address = remote + piece->dst_offset;
		post->length = piece->length;
	}
	sum->bytes = ahead - conn->inflight_bytes;
	sum->extent = extent;
	sum->count = (uint32_t)(piece - first);
	return sum->count ? 0 : rc;
}

static int post_one(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                    const struct tfd_plan *plan, struct tfd_post *post, struct tfd_pieces *sum)
{
	int rc;

	if (plan->pieces > 1)
		tfd_pages_parts(shard, plan, post, worker->parts);
	rc = conn->rail->ops->post(conn->half, post, worker->wr_free);
	if (rc)
		return rc;
	*sum = (struct tfd_pieces){
		.bytes = plan->length, .extent = plan->extent, .units = plan->units, .count = 1
	};
	attach(worker, conn, shard, worker->wr_free, sum, conn->inflight_bytes + plan->length,
	       next_number(conn, shard->job));
	shard->job->packed = shard->job->packed || plan->pieces > 1;
	return 0;
}

/* They went out, and so many pieces of the batch are complete: the shard keeps its place while it has more. */
static void posted(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                   uint32_t complete, const struct tfd_pieces *sum)
{
	struct tfd_job *job = shard->job;

	conn->orders[tfd_order_of(conn->rail, job->priority)].posted += sum->units != 0;
	conn->credits.taken += sum->units != 0;
	tfd_pieces_enter(worker, conn, shard, sum);
	if (shard->state == TFD_SHARD_DATA && shard->batch)
		tfd_pages_posted(shard, complete, sum->bytes);
	shard->posted += sum->extent;
	if (counts_pages(job) && !shard->trails)
		shard->units_owed += 8 * sum->extent;
	shard->units_posted += sum->units;
	shard->units_owed -= shard->units_owed < sum->units ? shard->units_owed : sum->units;
	job->rails |= 1ull << conn->rail->index;
	job->ops = conn->rail->ops;
	tfd_schedule_charge(shard, sum->bytes, sum->count);
	if (tfd_shard_has_more(shard) && shard->waited != TFD_WAITED_FAR)
		return;
	tfd_shard_unqueue(shard);
	if (tfd_shard_has_more(shard)) /* the rest, once this has landed */
		return;
	shard->state = TFD_SHARD_DRAIN;
	tfd_batch_drop(shard);
	job->posted_ns = worker->now_ns;
}

int tfd_shard_post(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard)
{
	struct tfd_post post;
	struct tfd_plan plan;
	struct tfd_pieces sum = { 0 };
	int rc;

	if (!worker->wr_free)
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
		tfd_credits_wait(conn, shard);
		return 0;
	}
	fill_post(shard, &plan, &post);
	if (plan.pieces > 1 && conn->rail->info.max_parts <= 1) {
		rc = post_pieces(worker, conn, shard, &plan, &post, &sum);
		plan.pieces = sum.count;
	} else {
		rc = post_one(worker, conn, shard, &plan, &post, &sum);
	}
	if (rc == -EBUSY) {
		tfd_wait_near(worker, conn, shard);
		return 0;
	}
	if (!rc)
		posted(worker, conn, shard, plan.pieces, &sum);
	return rc;
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
	else if (worker->now_ns - conn->stalled_ns > conn->rail->patience_ns)
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

static bool stands_still(const struct tfd_conn *conn, uint64_t now_ns)
{
	for (uint32_t i = 0; i < conn->rail->orders; i++) {
		const struct tfd_order *order = &conn->orders[i];

		if (order->inflight && now_ns > order->progress_ns &&
		    now_ns - order->progress_ns > conn->rail->patience_ns)
			return true;
	}
	return false;
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

		if (stands_still(conn, worker->now_ns))
			tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
	tfd_rails_check(worker);
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

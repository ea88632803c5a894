/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Posted pieces, as their connection and their shard count them. Inline: a page of a job is a piece where a rail takes one range at a
 * time, so that this is most of what a page costs. "worker" functions, all of them.
 */
#ifndef TFD_WR_H
#define TFD_WR_H

#include "parts.h"

/* What pieces of one connection add up to; of one shard, if they are a shard's. */
struct tfd_pieces {
	uint64_t bytes;
	uint64_t extent;
	uint64_t units;
	uint32_t count;
};

/* On the list of what its connection has in flight; `ahead` of it, and with it, are so many bytes. */
static inline void tfd_wr_link(struct tfd_conn *conn, struct tfd_wr *wr, uint64_t length, uint64_t ahead,
                               uint64_t now_ns)
{
	wr->conn = conn;
	wr->length = length;
	wr->back = 0;
	wr->prev = NULL;
	wr->next = conn->outstanding;
	if (wr->next)
		wr->next->prev = wr;
	conn->outstanding = wr;
	wr->posted_ns = now_ns;
	wr->ahead = ahead;
}

static inline void tfd_wr_unlink(struct tfd_conn *conn, struct tfd_wr *wr)
{
	if (wr->next)
		wr->next->prev = wr->prev;
	if (wr->prev)
		wr->prev->next = wr->next;
	else
		conn->outstanding = wr->next;
	wr->conn = NULL;
}

/* Linked ones. `traffic`: enum tfd_traffic of all of them. */
static inline void tfd_conn_enter(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t traffic,
                                  const struct tfd_pieces *pieces)
{
	struct tfd_order *order = &conn->orders[tfd_order_of(conn->rail, traffic)];

	if (!conn->inflight_wrs)
		tfd_list_push(&worker->conns_inflight, &conn->inflight_link);
	if (!order->inflight)
		order->progress_ns = worker->now_ns;
	order->inflight += pieces->count;
	conn->inflight_bytes += pieces->bytes;
	conn->inflight_wrs += pieces->count;
	worker->inflight_wrs += pieces->count;
}

static inline void tfd_conn_leave(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t traffic,
                                  const struct tfd_pieces *pieces)
{
	struct tfd_order *order = &conn->orders[tfd_order_of(conn->rail, traffic)];

	order->inflight -= pieces->count;
	order->progress_ns = worker->now_ns;
	conn->inflight_bytes -= pieces->bytes;
	conn->inflight_wrs -= pieces->count;
	worker->inflight_wrs -= pieces->count;
	if (!conn->inflight_wrs)
		tfd_list_remove(&conn->inflight_link);
}

static inline void tfd_pieces_enter(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                                    const struct tfd_pieces *pieces)
{
	struct tfd_job *job = shard->job;

	conn->class_bytes[job->priority] += pieces->bytes;
	conn->class_wrs[job->priority] += pieces->count;
	if (job->priority == TFD_PRIORITY_BULK)
		tfd_pace_enter(conn, pieces->bytes);
	shard->inflight += pieces->count;
	job->inflight += pieces->count;
	tfd_conn_enter(worker, conn, job->priority, pieces);
}

static inline void tfd_pieces_leave(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard,
                                    const struct tfd_pieces *pieces)
{
	struct tfd_job *job = shard->job;

	conn->class_bytes[job->priority] -= pieces->bytes;
	conn->class_wrs[job->priority] -= pieces->count;
	if (job->priority == TFD_PRIORITY_BULK)
		tfd_pace_leave(conn, pieces->bytes);
	shard->inflight -= pieces->count;
	job->inflight -= pieces->count;
	tfd_conn_leave(worker, conn, job->priority, pieces);
}

static inline struct tfd_wr *tfd_wr_take(struct tfd_worker *worker)
{
	struct tfd_wr *wr = worker->wr_free;

	worker->wr_free = wr->next;
	return wr;
}

static inline void tfd_wr_give(struct tfd_worker *worker, struct tfd_wr *wr)
{
	wr->next = worker->wr_free;
	worker->wr_free = wr;
}

#endif

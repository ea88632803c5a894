/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections. One that broke stays, unused, until control closes it: only the close makes its pieces quiet.
 */
#include <errno.h>
#include <stdlib.h>

#include "barrier.h"
#include "parts.h"

#define DRAIN_BATCH 16
#define DRAIN_ROUNDS 512

void tfd_conn_put(struct tfd_conn *conn)
{
	if (tfd_sub_seq(&conn->refs, 1) == 1)
		free(conn);
}

void tfd_conn_break(struct tfd_conn *conn, uint32_t detail)
{
	struct tfd_event event = { .type = TFD_EVENT_CONN_LOST, .detail = detail, .id = conn->handle };

	if (conn->broken || !conn->half)
		return;
	conn->broken = true;
	tfd_event_post(conn->group->worker, &event);
}

void tfd_conn_wake(struct tfd_conn *conn)
{
	if (tfd_list_empty(&conn->busy_link))
		tfd_list_push(&conn->group->worker->conns_busy, &conn->busy_link);
}

/*
 * The provider lost completions of a rail, immediates perhaps among them: its connections end, and what has landed by them is
 * unknown. `only`: of this one alone; NULL: of all.
 */
void tfd_conns_uncounted(struct tfd_worker *worker, const struct tfd_rail *rail, const struct tfd_conn *only)
{
	for (struct tfd_list *link = worker->conns.next; link != &worker->conns; link = link->next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, link);

		if (conn->rail != rail || (only && conn != only))
			continue;
		conn->uncounted = true;
		tfd_conn_break(conn, TFD_DETAIL_PROVIDER);
	}
}

/* All their pieces are back: they go on elsewhere, or fail. */
static void move_queued(struct tfd_conn *conn, uint32_t detail)
{
	tfd_schedule_move(conn, detail);
	tfd_credits_move(conn, detail);
	tfd_waits_move(conn, detail);
	while (!tfd_list_empty(&conn->messages)) {
		struct tfd_shard *shard = tfd_container(conn->messages.next, struct tfd_shard, link);
		struct tfd_job *job = shard->job;

		tfd_shard_move(shard, detail);
		tfd_job_finish_if_quiet(job);
	}
	tfd_list_remove(&conn->busy_link);
}

static uint64_t landed_of(const struct tfd_wr *wr, const struct tfd_landed *far)
{
	return far->imms[tfd_order_of(wr->conn->rail, wr->job->priority)];
}

/*
 * The far side took so many immediates, in the order of each channel: what was posted before the last of them, there, has landed, too.
 * All pieces of a shard go by one channel.
 */
static void reconcile(struct tfd_conn *conn, const struct tfd_landed *far)
{
	struct tfd_wc acked = { .type = TFD_WC_SENT };
	struct tfd_wc refused = { .type = TFD_WC_ERROR, .error = EACCES, .remote_access = 1 };

	while (conn->outstanding) {
		struct tfd_wr *oldest = conn->outstanding;

		while (oldest->next)
			oldest = oldest->next;
		if (oldest->job && oldest->back && oldest->refused) {
			if (oldest->shard->refused) { /* by another path as well */
				tfd_wr_abandon(oldest, &refused);
				continue;
			}
			oldest->shard->refused = true;
		}
		/* What a read asked for may not have come back, whatever landed there after it. */
		if (!oldest->job ||
		    (oldest->imm_number <= landed_of(oldest, far) && oldest->job->op != TFD_OP_READ))
			tfd_wr_abandon(oldest, &acked);
		else
			tfd_wr_return(oldest);
	}
}

/* Whether the queue was empty at last. Bounded: where connections share it, others go on filling it. */
static bool drain_closed(struct tfd_worker *worker, struct tfd_conn *conn)
{
	struct tfd_wc wc[DRAIN_BATCH];

	for (int round = 0; round < DRAIN_ROUNDS; round++) {
		int count = conn->rail->ops->half_drain(conn->half, wc, DRAIN_BATCH);

		for (int i = 0; i < count; i++)
			tfd_completion_handle(worker, conn->rail, &wc[i]);
		if (!count)
			return true;
	}
	return false;
}

/* Whether it tells of this connection what can be. */
static bool is_known(const struct tfd_conn *conn, const struct tfd_landed *far)
{
	if (!far || far->channels != conn->rail->orders || !conn->rail->info.ordered)
		return false;
	for (uint32_t i = 0; i < far->channels; i++) {
		if (far->imms[i] > conn->orders[i].posted)
			return false;
	}
	return true;
}

/* By our own hand: no CONN_LOST. */
static void conn_halt(struct tfd_conn *conn)
{
	conn->broken = true;
	if (!conn->halted)
		conn->rail->ops->half_close(conn->half);
	conn->halted = true;
}

static void conn_shut(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t detail,
                      const struct tfd_landed *far)
{
	struct tfd_wc flushed = { .type = TFD_WC_ERROR, .error = ECANCELED };
	bool known = is_known(conn, far);
	struct tfd_wr *wr;
	bool drained;

	if (!conn->half)
		return;
	conn->broken = true;
	for (wr = conn->outstanding; wr && !known; wr = wr->next) {
		if (wr->job)
			tfd_shard_fail(wr->shard, TFD_JOB_PEER_LOST, detail);
	}
	conn_halt(conn);
	drained = drain_closed(worker, conn); /* what was flushed, and what had landed before */
	if (!drained)
		conn->uncounted = true;
	/* An unordered rail goes on receiving what was meant for the half. */
	tfd_credits_close(conn, drained && conn->rail->info.ordered);
	conn->rail->ops->half_free(conn->half);
	conn->half = NULL;
	tfd_list_remove(&conn->link);
	tfd_probe_drop(conn);
	if (known)
		reconcile(conn, far);
	while (conn->outstanding) /* a provider that swallows completions, or a queue too full of others' */
		tfd_wr_abandon(conn->outstanding, &flushed);
	move_queued(conn, detail); /* of what has failed nothing is queued */
	tfd_channel_stop(conn, detail, known ? far : NULL);
}

/* ---- control's calls ---- */

struct conn_call {
	struct tfd_conn *conn;
	void *address;
	const void *far_address;
	size_t *address_bytes;
	size_t far_bytes;
	uint32_t detail;
	const struct tfd_landed *far_landed; /* NULL: unknown */
	struct tfd_landed landed;
	struct tfd_channel *channel; /* to be freed: nothing refers to it any more */
	struct tfd_error *error;
};

static int open_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;
	struct tfd_conn *conn = call->conn;
	const struct tfd_provider_ops *ops = conn->rail->ops;
	int rc = ops->half_open(conn->rail->domain, conn->outgoing, conn, &conn->half, call->address,
	                        call->address_bytes, call->error);

	if (rc)
		return rc;
	rc = tfd_credits_open(conn, call->error);
	if (!rc)
		rc = tfd_channel_start(conn, call->address, call->address_bytes, call->error);
	if (rc) {
		tfd_credits_close(conn, true);
		ops->half_close(conn->half);
		ops->half_free(conn->half);
		conn->half = NULL;
		return rc;
	}
	tfd_list_push(&worker->conns, &conn->link);
	return rc;
}

static int start_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;
	int rc;

	(void)worker;
	if (!call->conn->half || call->conn->started || call->conn->halted)
		return tfd_fail(call->error, -EINVAL, "this connection was started or closed before");
	rc = tfd_channel_join(call->conn, call->far_address, &call->far_bytes, call->error);
	if (!rc)
		rc = call->conn->rail->ops->half_start(call->conn->half, call->far_address, call->far_bytes,
		                                       call->error);
	if (!rc)
		call->conn->started = true;
	return rc;
}

static struct tfd_landed landed_by(const struct tfd_conn *conn)
{
	struct tfd_landed landed = { 0 };

	if (!conn->rail->info.ordered || conn->uncounted || conn->imms_landed < conn->void_until)
		return landed;
	landed.channels = conn->rail->orders;
	for (uint32_t i = 0; i < landed.channels; i++)
		landed.imms[i] = conn->orders[i].landed;
	return landed;
}

/* The far side is not heard any more; what has come by it is taken as ever, while control waits for the device. */
static int halt_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;

	(void)worker;
	conn_halt(call->conn);
	return 0;
}

static int close_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;

	conn_shut(worker, call->conn, call->detail, call->far_landed);
	call->channel = call->conn->channel;
	call->conn->channel = NULL;
	call->landed = landed_by(call->conn);
	return 0;
}

int tfd_conn_open(struct tfd_core *core, uint32_t group, uint32_t rail, uint32_t outgoing, uint64_t peer,
                  uint64_t *handle, void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct conn_call call = { .address = address, .address_bytes = address_bytes, .error = error };
	struct tfd_conn *conn;
	int rc;

	if (group >= core->group_count || rail >= core->groups[group]->rail_count)
		return tfd_fail(error, -ENODEV, "there is no rail %u in domain group %u", rail, group);
	rc = tfd_rail_usable(&core->groups[group]->rails[rail], error);
	if (rc)
		return rc;
	conn = calloc(1, sizeof(*conn));
	if (!conn)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	conn->group = core->groups[group];
	conn->rail = &conn->group->rails[rail];
	conn->outgoing = outgoing != 0;
	conn->peer = peer;
	conn->refs = 1;
	tfd_list_init(&conn->link);
	tfd_list_init(&conn->lanes);
	tfd_list_init(&conn->messages);
	for (uint32_t i = 0; i < TFD_CLASSES; i++) {
		tfd_list_init(&conn->held[i]);
		tfd_list_init(&conn->creditless[i]);
	}
	tfd_list_init(&conn->busy_link);
	tfd_list_init(&conn->inflight_link);
	tfd_window_open(conn);
	call.conn = conn;
	(void)pthread_mutex_lock(&core->lock);
	/* Before the worker knows it: it may break at once, and its loss is told by this name. */
	rc = tfd_table_add(&core->conns, conn, &conn->handle);
	(void)pthread_mutex_unlock(&core->lock);
	if (rc) {
		rc = tfd_fail(error, rc, "no memory for a connection");
		goto err_put;
	}
	rc = tfd_channel_open(conn, error);
	if (!rc)
		rc = tfd_command_run(conn->group->worker, open_command, &call);
	if (rc)
		goto err_forget;
	*handle = conn->handle;
	return 0;

err_forget:
	(void)pthread_mutex_lock(&core->lock);
	(void)tfd_table_remove(&core->conns, conn->handle);
	(void)pthread_mutex_unlock(&core->lock);
	tfd_channel_close(conn->rail, conn->channel);
err_put:
	tfd_conn_put(conn);
	return rc;
}

struct tfd_conn *tfd_conn_get(struct tfd_core *core, uint64_t handle)
{
	struct tfd_conn *conn;

	(void)pthread_mutex_lock(&core->lock);
	conn = tfd_table_get(&core->conns, handle);
	if (conn)
		(void)tfd_add_seq(&conn->refs, 1);
	(void)pthread_mutex_unlock(&core->lock);
	return conn;
}

/* NULL: it is gone, or somebody else's to close. */
static struct tfd_conn *closing_begin(struct tfd_core *core, uint64_t handle)
{
	struct tfd_conn *conn;

	(void)pthread_mutex_lock(&core->lock);
	conn = tfd_table_get(&core->conns, handle);
	if (conn && conn->closing)
		conn = NULL;
	if (conn)
		conn->closing = true;
	(void)pthread_mutex_unlock(&core->lock);
	return conn;
}

/* `gone`: nobody finds it any more, and the table's reference is the caller's. */
static void closing_end(struct tfd_core *core, struct tfd_conn *conn, bool gone)
{
	(void)pthread_mutex_lock(&core->lock);
	conn->closing = false;
	if (gone)
		(void)tfd_table_remove(&core->conns, conn->handle);
	(void)pthread_mutex_unlock(&core->lock);
}

/* Here, so that the worker need not wait for the device. -EAGAIN: somebody copies yet. */
static int halt_and_settle(struct conn_call *call)
{
	const struct tfd_provider_ops *ops = call->conn->rail->ops;

	if (!ops->half_settle || !call->conn->half)
		return 0;
	(void)tfd_command_run(call->conn->group->worker, halt_command, call);
	return ops->half_settle(call->conn->half);
}

int tfd_conn_start(struct tfd_core *core, uint64_t handle, const void *address, size_t address_bytes,
                   struct tfd_error *error)
{
	struct conn_call call = { .far_address = address, .far_bytes = address_bytes, .error = error };
	const struct tfd_provider_ops *ops;
	int rc = 0;

	call.conn = tfd_conn_get(core, handle);
	if (!call.conn)
		return tfd_fail(error, -ENOENT, "the connection was closed");
	ops = call.conn->rail->ops;
	if (ops->reach) /* here, so that the worker need not wait for the network */
		rc = ops->reach(call.conn->rail->domain, address, tfd_channel_address_bytes(address_bytes),
		                error);
	if (!rc)
		rc = tfd_command_run(call.conn->group->worker, start_command, &call);
	tfd_conn_put(call.conn);
	return rc;
}

/* `drop`: whoever copies yet. */
static int conn_close(struct tfd_core *core, uint64_t handle, struct conn_call *call, bool drop)
{
	int rc;

	call->conn = closing_begin(core, handle);
	if (!call->conn)
		return -ENOENT;
	rc = halt_and_settle(call);
	closing_end(core, call->conn, !rc || drop);
	if (rc && !drop)
		return rc;
	rc = tfd_command_run(call->conn->group->worker, close_command, call);
	tfd_channel_close(call->conn->rail, call->channel);
	tfd_conn_put(call->conn);
	return rc;
}

int tfd_conn_close(struct tfd_core *core, uint64_t handle, uint32_t detail,
                   const struct tfd_landed *far_landed, struct tfd_landed *landed)
{
	struct conn_call call = { .detail = detail, .far_landed = far_landed };
	int rc = conn_close(core, handle, &call, false);

	if (!rc && landed)
		*landed = call.landed;
	return rc;
}

void tfd_conn_drop(struct tfd_core *core, uint64_t handle)
{
	struct conn_call call = { .detail = TFD_DETAIL_SESSION_ENDED };

	(void)conn_close(core, handle, &call, true);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections. One that broke stays, unused, until control closes it: only the close makes its pieces quiet.
 */
#include <errno.h>
#include <stdlib.h>

#include "parts.h"

void tfd_conn_put(struct tfd_conn *conn)
{
	if (--conn->refs == 0)
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

static void fail_queued(struct tfd_conn *conn, uint32_t detail)
{
	for (int priority = 0; priority < 2; priority++) {
		while (!tfd_list_empty(&conn->queue[priority])) {
			struct tfd_shard *shard =
			        tfd_container(conn->queue[priority].next, struct tfd_shard, link);
			struct tfd_job *job = shard->job;

			tfd_shard_unqueue(shard); /* also when the job is failing already */
			tfd_job_fail(job, TFD_JOB_PEER_LOST, detail);
			tfd_job_finish_if_quiet(job);
		}
	}
	tfd_list_remove(&conn->busy_link);
}

static void poll_until_empty(struct tfd_worker *worker, struct tfd_rail *rail)
{
	struct tfd_wc wc[16];
	int count;

	do {
		count = worker->group->ops->poll(rail->domain, wc, 16);
		for (int i = 0; i < count; i++) {
			if (wc[i].type == TFD_WC_IMM)
				tfd_imm_arrived(worker, wc[i].imm);
			else if (wc[i].wr)
				tfd_wr_done(worker, wc[i].wr, &wc[i]);
		}
	} while (count > 0);
}

static void conn_shut(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t detail)
{
	struct tfd_wc flushed = { .type = TFD_WC_ERROR, .error = ECANCELED };
	struct tfd_wr *wr;

	if (!conn->half)
		return;
	conn->broken = true; /* by our own hand: no CONN_LOST */
	for (wr = conn->outstanding; wr; wr = wr->next)
		tfd_job_fail(wr->job, TFD_JOB_PEER_LOST, detail);
	worker->group->ops->half_close(conn->half);
	poll_until_empty(worker, conn->rail); /* what was flushed, and what had landed before */
	conn->half = NULL;
	while (conn->outstanding) /* a provider that swallows completions on close */
		tfd_wr_abandon(conn->outstanding, &flushed);
	fail_queued(conn, detail);
}

/* ---- control's calls ---- */

struct conn_call {
	struct tfd_conn *conn;
	void *address;
	const void *far_address;
	size_t *address_bytes;
	size_t far_bytes;
	uint32_t detail;
	struct tfd_error *error;
};

static int open_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;
	struct tfd_conn *conn = call->conn;

	return worker->group->ops->half_open(conn->rail->domain, conn->outgoing, &conn->half,
	                                     call->address, call->address_bytes, call->error);
}

static int start_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;
	int rc;

	if (!call->conn->half || call->conn->started)
		return tfd_fail(call->error, -EINVAL, "this connection was started or closed before");
	rc = worker->group->ops->half_start(call->conn->half, call->far_address, call->far_bytes,
	                                    call->error);
	if (!rc)
		call->conn->started = true;
	return rc;
}

static int close_command(struct tfd_worker *worker, void *argument)
{
	struct conn_call *call = argument;

	conn_shut(worker, call->conn, call->detail);
	tfd_conn_put(call->conn);
	return 0;
}

int tfd_conn_open(struct tfd_core *core, uint32_t group, uint32_t rail, uint32_t outgoing,
                  uint64_t *handle, void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct conn_call call = { .address = address, .address_bytes = address_bytes, .error = error };
	struct tfd_conn *conn;
	uint64_t name;
	int rc;

	if (group >= core->group_count || rail >= core->groups[group]->rail_count)
		return tfd_fail(error, -ENODEV, "there is no rail %u in domain group %u", rail, group);
	conn = calloc(1, sizeof(*conn));
	if (!conn)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	conn->group = core->groups[group];
	conn->rail = &conn->group->rails[rail];
	conn->outgoing = outgoing != 0;
	conn->refs = 1;
	tfd_list_init(&conn->queue[0]);
	tfd_list_init(&conn->queue[1]);
	tfd_list_init(&conn->busy_link);
	call.conn = conn;
	rc = tfd_command_run(conn->group->worker, open_command, &call);
	if (rc)
		goto err_free;
	(void)pthread_mutex_lock(&core->lock);
	rc = tfd_table_add(&core->conns, conn, &name);
	if (!rc)
		conn->handle = name;
	(void)pthread_mutex_unlock(&core->lock);
	if (rc)
		goto err_close;
	*handle = name;
	return 0;

err_close:
	(void)tfd_command_run(conn->group->worker, close_command, &call);
	return tfd_fail(error, rc, "no memory for a connection");
err_free:
	free(conn);
	return rc;
}

/* Connections are started and closed by control one after the other: the pointer lives until the close. */
static struct tfd_conn *conn_get(struct tfd_core *core, uint64_t handle, bool remove)
{
	struct tfd_conn *conn;

	(void)pthread_mutex_lock(&core->lock);
	conn = remove ? tfd_table_remove(&core->conns, handle) : tfd_table_get(&core->conns, handle);
	(void)pthread_mutex_unlock(&core->lock);
	return conn;
}

int tfd_conn_start(struct tfd_core *core, uint64_t handle, const void *address, size_t address_bytes,
                   struct tfd_error *error)
{
	struct conn_call call = { .far_address = address, .far_bytes = address_bytes, .error = error };

	call.conn = conn_get(core, handle, false);
	if (!call.conn)
		return tfd_fail(error, -ENOENT, "the connection was closed");
	return tfd_command_run(call.conn->group->worker, start_command, &call);
}

int tfd_conn_close(struct tfd_core *core, uint64_t handle, uint32_t detail)
{
	struct conn_call call = { .detail = detail };

	call.conn = conn_get(core, handle, true);
	if (!call.conn)
		return -ENOENT;
	return tfd_command_run(call.conn->group->worker, close_command, &call);
}

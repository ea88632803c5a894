/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Probes: a read of no bytes by a new connection, by each of its channels in turn. That it comes back shows that the rail carries in both
 * directions; a rail whose cable is out takes posts, or says -EAGAIN, for as long as one lets it.
 */
#include <errno.h>

#include "parts.h"

int tfd_probe_post(struct tfd_worker *worker, struct tfd_conn *conn)
{
	/* Of the far half's frames for messages: memory that every half has, whatever is open. */
	struct tfd_post post = { .remote_key = conn->channel->far_key.key,
	                         .remote_address = conn->channel->far_key.address,
	                         .traffic = conn->probe_traffic,
	                         .read = 1 };
	struct tfd_wr *wr = worker->wr_free;
	int rc;

	if (!wr)
		return -EAGAIN;
	rc = conn->rail->ops->post(conn->half, &post, wr);
	if (rc)
		return rc;
	worker->wr_free = wr->next;
	wr->conn = conn;
	wr->job = NULL; /* nobody's: what it does not count, it does not move */
	wr->shard = NULL;
	wr->next = wr->prev = NULL;
	conn->probe = wr;
	conn->probe_state = TFD_PROBE_POSTED;
	return 0;
}

void tfd_probe_done(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wr->conn;

	wr->next = worker->wr_free;
	worker->wr_free = wr;
	if (!conn) /* closed before */
		return;
	conn->probe = NULL;
	if (wc->type == TFD_WC_SENT && (uint32_t)conn->probe_traffic + 1 < conn->rail->orders) {
		conn->probe_traffic++;
		conn->probe_state = TFD_PROBE_WAITS;
		tfd_conn_wake(conn);
	} else if (wc->type == TFD_WC_SENT) {
		struct tfd_event event = { .type = TFD_EVENT_CONN_PROVEN, .id = conn->handle };

		tfd_event_post(worker, &event);
	} else {
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
}

/* The provider may still name the piece in a late completion: it is not used again before that. */
void tfd_probe_drop(struct tfd_conn *conn)
{
	if (conn->probe)
		conn->probe->conn = NULL;
	conn->probe = NULL;
	if (conn->probe_state == TFD_PROBE_WAITS)
		conn->probe_state = TFD_PROBE_POSTED;
}

/* ---- control's call ---- */

static int probe_command(struct tfd_worker *worker, void *argument)
{
	struct tfd_conn *conn = argument;

	(void)worker;
	if (!conn->half)
		return -ENOENT;
	if (!conn->started || !conn->outgoing)
		return -EINVAL;
	if (conn->probe_state != TFD_PROBE_NONE)
		return -EBUSY;
	conn->probe_state = TFD_PROBE_WAITS;
	tfd_conn_wake(conn);
	return 0;
}

int tfd_conn_probe(struct tfd_core *core, uint64_t handle)
{
	struct tfd_conn *conn = tfd_conn_get(core, handle);
	int rc;

	if (!conn)
		return -ENOENT;
	rc = tfd_command_run(conn->group->worker, probe_command, conn);
	tfd_conn_put(conn);
	return rc;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Grants of others that a session may use. */
#include <errno.h>
#include <stdlib.h>

#include "barrier.h"
#include "parts.h"

void tfd_open_destroy(struct tfd_open *open)
{
	tfd_fences_free(open);
	for (uint32_t i = 0; i < open->path_count; i++) {
		tfd_lanes_put(open->paths[i].lanes);
		tfd_conn_put(open->paths[i].conn);
	}
	free(open);
}

void tfd_open_quiet_if_idle(struct tfd_open *open)
{
	struct tfd_event event = { .type = TFD_EVENT_OPEN_QUIET,
	                           .id = open->handle,
	                           .session = open->session->handle };

	if (open->refused && tfd_list_empty(&open->shards))
		tfd_event_post(open->session->group->worker, &event);
}

/*
 * A job of this open alone leaves the list with all its shards at once; they lie side by side. Of a scatter each shard leaves
 * by itself, and the job has ended only when all have.
 */
static struct tfd_list *after(const struct tfd_open *open, const struct tfd_shard *shard)
{
	struct tfd_list *link = shard->open_link.next;

	while (shard->job->open && link != &open->shards &&
	       tfd_container(link, struct tfd_shard, open_link)->job == shard->job)
		link = link->next;
	return link;
}

void tfd_open_cancel(struct tfd_open *open, const struct tfd_fence *fence, uint32_t detail)
{
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = open->shards.next; link != &open->shards; link = next) {
		struct tfd_shard *shard = tfd_container(link, struct tfd_shard, open_link);
		struct tfd_job *job = shard->job;

		next = after(open, shard);
		if ((fence && !tfd_fence_names(fence, job)) || shard->failed ||
		    job->status != TFD_JOB_PENDING)
			continue;
		/* What is armed is in no connection's queue: the connection's end did not tell it of its loss. */
		tfd_shard_fail(shard,
		               job->watch && tfd_detail_is_loss(detail) ? TFD_JOB_PEER_LOST :
		                                                          TFD_JOB_CANCELLED,
		               detail);
		tfd_job_finish_if_quiet(job);
	}
}

struct open_call {
	struct tfd_session *session;
	struct tfd_open *open;
	uint64_t handle;
	uint32_t detail;
};

static void lanes_leave(struct tfd_open *open)
{
	for (uint32_t i = 0; i < open->path_count; i++) {
		tfd_lanes_put(open->paths[i].lanes);
		open->paths[i].lanes = NULL;
	}
}

static int add_command(struct tfd_worker *worker, void *argument)
{
	struct open_call *call = argument;
	struct tfd_open *open = call->open;
	int rc = open->rights & TFD_RIGHT_SEND ? tfd_sender_take(worker, open) : 0;

	for (uint32_t i = 0; !rc && i < open->path_count; i++)
		rc = tfd_lanes_get(call->session, open->paths[i].conn, &open->paths[i].lanes);
	if (!rc)
		rc = tfd_table_add(&call->session->opens, open, &open->handle);
	if (rc) {
		lanes_leave(open);
		tfd_sender_give(worker, open);
	} else {
		call->handle = open->handle;
	}
	return rc;
}

static int revoke_command(struct tfd_worker *worker, void *argument)
{
	struct open_call *call = argument;
	struct tfd_open *open = tfd_table_get(&call->session->opens, call->handle);
	struct tfd_event quiet = { .type = TFD_EVENT_OPEN_QUIET,
	                           .id = call->handle,
	                           .session = call->session->handle };

	if (!open)
		return -ENOENT;
	open->refused = call->detail;
	if (tfd_list_empty(&open->shards)) {
		tfd_event_post(worker, &quiet);
		return 0;
	}
	tfd_open_cancel(open, NULL, call->detail); /* the last one tells */
	return 0;
}

static int remove_command(struct tfd_worker *worker, void *argument)
{
	struct open_call *call = argument;
	struct tfd_open *open = tfd_table_get(&call->session->opens, call->handle);

	if (!open)
		return -ENOENT;
	if (!open->refused || !tfd_list_empty(&open->shards))
		return -EBUSY;
	(void)tfd_table_remove(&call->session->opens, call->handle);
	tfd_sender_give(worker, open);
	tfd_open_destroy(open);
	return 0;
}

static int open_call(struct tfd_core *core, uint64_t session, struct open_call *call,
                     int (*run)(struct tfd_worker *, void *))
{
	int rc;

	call->session = tfd_session_get(core, session);
	if (!call->session)
		return -ENOENT;
	rc = tfd_command_run(call->session->group->worker, run, call);
	tfd_session_put(call->session);
	return rc;
}

/* Takes a reference on each connection; path_count says how many. */
static int fill_paths(struct tfd_core *core, struct tfd_open *open, const struct tfd_open_options *options)
{
	int rc = 0;

	(void)pthread_mutex_lock(&core->lock);
	for (uint32_t i = 0; i < options->path_count; i++) {
		struct tfd_conn *conn = tfd_table_get(&core->conns, options->paths[i].conn);

		if (!conn || !conn->outgoing || conn->group != open->session->group) {
			rc = -ENOTCONN;
			break;
		}
		(void)tfd_add_seq(&conn->refs, 1);
		open->paths[open->path_count++] = (struct tfd_path){ .conn = conn,
		                                                     .key = options->paths[i].key,
		                                                     .address = options->paths[i].address };
	}
	(void)pthread_mutex_unlock(&core->lock);
	return rc;
}

int tfd_open_add(struct tfd_core *core, uint64_t session, const struct tfd_open_options *options,
                 uint64_t *handle)
{
	struct open_call call = { 0 };
	struct tfd_open *open;
	int rc;

	if ((!options->path_count && !options->device) || options->path_count > TFD_MAX_PATHS ||
	    options->name_space == TFD_NAME_SPACE_WORKER || options->name_space >= TFD_NAME_SPACES ||
	    options->imm_count > TFD_IMM_COUNT || options->imm_first > TFD_IMM_COUNT - options->imm_count)
		return -EINVAL;
	open = calloc(1, sizeof(*open));
	if (!open)
		return -ENOMEM;
	open->rights = options->rights;
	open->length = options->length;
	open->imm_first = options->imm_first;
	open->imm_count = options->imm_count;
	open->name_space = options->name_space;
	open->expires_ns = options->expires_ns;
	open->device = options->device != 0;
	open->unreached = options->unreached ? options->unreached : TFD_DETAIL_DEVICE_MEMORY;
	open->sender = TFD_NO_SLOT;
	tfd_list_init(&open->shards);
	tfd_list_init(&open->parked);
	tfd_list_init(&open->wait_link);
	tfd_list_init(&open->fences);
	call.open = open;
	call.session = open->session = tfd_session_get(core, session);
	rc = call.session ? fill_paths(core, open, options) : -ENOENT;
	if (!rc)
		rc = tfd_command_run(call.session->group->worker, add_command, &call);
	if (call.session)
		tfd_session_put(call.session);
	if (rc) {
		tfd_open_destroy(open);
		return rc;
	}
	*handle = call.handle;
	return 0;
}

struct path_call {
	struct tfd_session *session;
	uint64_t open;
	uint32_t index;
	struct tfd_path path; /* taken over, or what was there before */
};

static int path_command(struct tfd_worker *worker, void *argument)
{
	struct path_call *call = argument;
	struct tfd_open *open = tfd_table_get(&call->session->opens, call->open);
	struct tfd_path old = { 0 };
	int rc;

	(void)worker;
	if (!open)
		return -ENOENT;
	if (call->index > open->path_count || call->index >= TFD_MAX_PATHS)
		return -EINVAL;
	if (call->index < open->path_count) {
		old = open->paths[call->index];
		if (old.conn->half) /* its shards would lose it */
			return -EBUSY;
	}
	rc = tfd_lanes_get(call->session, call->path.conn, &call->path.lanes);
	if (rc)
		return rc;
	tfd_lanes_put(old.lanes);
	if (call->index == open->path_count && open->unreached == TFD_DETAIL_CONNECTION)
		open->unreached = TFD_DETAIL_DEVICE_MEMORY; /* it was that one */
	open->path_count += call->index == open->path_count;
	open->paths[call->index] = call->path;
	call->path = old;
	return 0;
}

int tfd_open_path_set(struct tfd_core *core, uint64_t session, uint64_t open, uint32_t index,
                      const struct tfd_open_path *path)
{
	struct path_call call = { .open = open, .index = index };
	int rc = -ENOTCONN;

	call.session = tfd_session_get(core, session);
	if (!call.session)
		return -ENOENT;
	call.path = (struct tfd_path){ .conn = tfd_conn_get(core, path->conn),
	                               .key = path->key,
	                               .address = path->address };
	if (call.path.conn && call.path.conn->outgoing && call.path.conn->group == call.session->group)
		rc = tfd_command_run(call.session->group->worker, path_command, &call);
	if (call.path.conn)
		tfd_conn_put(call.path.conn);
	tfd_session_put(call.session);
	return rc;
}

int tfd_open_revoke(struct tfd_core *core, uint64_t session, uint64_t open, uint32_t detail)
{
	struct open_call call = { .handle = open, .detail = detail ? detail : TFD_DETAIL_REVOKED };

	return open_call(core, session, &call, revoke_command);
}

int tfd_open_remove(struct tfd_core *core, uint64_t session, uint64_t open)
{
	struct open_call call = { .handle = open };

	return open_call(core, session, &call, remove_command);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sending messages to mailboxes. A message waits in its connection's queue, or, while the mailbox is full or enough of its open are under
 * way, parked with its open; it is a call until the answer is here:
 *
 *   OK    the job ends; more of its open may be under way at once
 *   FULL  parked; one at a time from now on, the next after READY
 */
#include <string.h>

#include "barrier.h"
#include "parts.h"

#define SENDERS_MAX TFD_IMM_COUNT
#define ASK_AGAIN_NS                                                                                      \
	1000000000u /* READY may have been lost with the far half alone, which nothing here would tell */
#define ASK_CHECKS 4096u         /* of those who wait, in one pass */

int tfd_sender_take(struct tfd_worker *worker, struct tfd_open *open)
{
	open->send_window = TFD_CALLS;
	return tfd_numbers_take(&worker->senders, SENDERS_MAX, open, &open->sender);
}

void tfd_sender_give(struct tfd_worker *worker, struct tfd_open *open)
{
	if (open->sender != TFD_NO_SLOT)
		tfd_numbers_give(&worker->senders, open->sender);
	tfd_list_remove(&open->wait_link);
	open->sender = TFD_NO_SLOT;
}

bool tfd_send_may_go(const struct tfd_open *open)
{
	return !open->full && open->sends_inflight < open->send_window;
}

static void push(struct tfd_shard *shard, struct tfd_list *list)
{
	tfd_list_remove(&shard->link);
	tfd_list_push(list, &shard->link);
	shard->queued = true;
}

static void wait_from_now(struct tfd_open *open)
{
	struct tfd_worker *worker = open->session->group->worker;

	open->wait_ns = worker->now_ns;
	tfd_list_remove(&open->wait_link);
	tfd_list_push(&worker->senders_waiting, &open->wait_link);
}

void tfd_send_park(struct tfd_shard *shard)
{
	if (tfd_list_empty(&shard->open->wait_link))
		wait_from_now(shard->open);
	push(shard, &shard->open->parked);
}

static struct tfd_conn *conn_of(const struct tfd_shard *shard)
{
	return shard->open->paths[shard->path].conn;
}

static void queue_on_conn(struct tfd_shard *shard)
{
	struct tfd_conn *conn = conn_of(shard);

	push(shard, &conn->messages);
	tfd_conn_wake(conn);
}

void tfd_send_queue(struct tfd_shard *shard)
{
	if (!tfd_list_empty(&shard->open->parked) || !tfd_send_may_go(shard->open))
		tfd_send_park(shard);
	else
		queue_on_conn(shard);
}

/* As many as may be under way. A path that is closing takes its messages along to where it ends. */
void tfd_send_unpark(struct tfd_open *open)
{
	uint32_t room = open->send_window > open->sends_inflight ?
	                        (uint32_t)(open->send_window - open->sends_inflight) :
	                        0;

	while (room && !open->full && !tfd_list_empty(&open->parked)) {
		struct tfd_shard *shard = tfd_container(open->parked.next, struct tfd_shard, link);

		if (!conn_of(shard)->half && !tfd_shard_path_next(shard))
			return; /* fail_parked comes */
		queue_on_conn(shard);
		room--;
	}
}

void tfd_send_fill(const struct tfd_shard *shard, struct tfd_frame *frame)
{
	const struct tfd_job *job = shard->job;

	*frame = (struct tfd_frame){ .target = shard->open->paths[shard->path].key,
	                             .kind = TFD_MESSAGE_SEND,
	                             .bytes = (uint32_t)job->length,
	                             .argument = shard->open->sender };
	memcpy(frame + 1, job->table, job->length);
}

void tfd_send_posted(struct tfd_shard *shard, const struct tfd_conn *conn)
{
	struct tfd_job *job = shard->job;

	tfd_list_remove(&shard->link);
	shard->queued = false;
	shard->state = TFD_SHARD_DRAIN;
	shard->inflight++;
	shard->open->sends_inflight++;
	job->inflight++;
	job->rails |= 1ull << conn->rail->index;
	job->ops = conn->rail->ops;
	job->posted_ns = conn->group->worker->now_ns;
}

static void call_over(struct tfd_shard *shard)
{
	shard->inflight--;
	shard->job->inflight--;
	shard->open->sends_inflight--;
}

static void delivered(struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;
	struct tfd_session *session = job->session;
	struct tfd_open *open = shard->open;

	job->acked = shard->acked = job->length;
	tfd_store_relaxed(&session->stat.bytes_sent, session->stat.bytes_sent + job->length);
	if (open->send_window < TFD_CALLS)
		open->send_window = (uint8_t)(2 * open->send_window);
	tfd_shard_done(shard);
}

static void refused_full(struct tfd_shard *shard, uint32_t readies)
{
	struct tfd_open *open = shard->open;

	open->send_window = 1;
	if (open->readies == readies) /* else READY has overtaken this answer */
		open->full = true;
	open->full_path = shard->path;
	wait_from_now(open);
	if (shard->job->status != TFD_JOB_PENDING)
		return;
	shard->state = TFD_SHARD_DATA;
	tfd_send_park(shard);
}

void tfd_send_answered(struct tfd_shard *shard, const struct tfd_frame *answer, uint32_t readies)
{
	struct tfd_open *open = shard->open;
	struct tfd_job *job = shard->job;

	call_over(shard);
	if (answer->kind == TFD_ANSWER_OK)
		delivered(shard);
	else if (answer->kind == TFD_ANSWER_FULL)
		refused_full(shard, readies);
	else
		tfd_shard_fail(shard, TFD_JOB_REMOTE_ACCESS, answer->argument);
	tfd_job_finish_if_quiet(job);
	tfd_send_unpark(open);
}

void tfd_send_lost(struct tfd_shard *shard, uint32_t detail, bool landed)
{
	struct tfd_job *job = shard->job;

	call_over(shard);
	if (landed) { /* or perhaps: it may be in the mailbox, so it must not go again, nor be said not to be there */
		tfd_shard_fail(shard, TFD_JOB_PEER_LOST, detail);
		job->status = TFD_JOB_PEER_LOST; /* of one that was cancelled, too */
		job->detail = detail;
	} else {
		tfd_shard_move(shard, detail);
	}
	tfd_job_finish_if_quiet(job);
}

void tfd_send_ready(struct tfd_open *open)
{
	open->readies++;
	open->full = false;
	tfd_send_unpark(open);
}

static void fail_parked(struct tfd_open *open)
{
	while (!tfd_list_empty(&open->parked)) {
		struct tfd_shard *shard = tfd_container(open->parked.next, struct tfd_shard, link);
		struct tfd_job *job = shard->job;

		tfd_shard_unqueue(shard);
		tfd_shard_fail(shard, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
		tfd_job_finish_if_quiet(job);
	}
}

static bool uses(const struct tfd_open *open, const struct tfd_conn *conn, bool *lives)
{
	bool used = false;

	*lives = false;
	for (uint32_t i = 0; i < open->path_count; i++) {
		used = used || open->paths[i].conn == conn;
		*lives = *lives || open->paths[i].conn->half;
	}
	return used;
}

/* READY may have been lost with it: whoever waits asks again, by another path. */
void tfd_senders_conn_closed(struct tfd_worker *worker, const struct tfd_conn *conn)
{
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = worker->senders_waiting.next; link != &worker->senders_waiting; link = next) {
		struct tfd_open *open = tfd_container(link, struct tfd_open, wait_link);
		bool lives;

		next = link->next;
		if (!uses(open, conn, &lives))
			continue;
		open->full = false;
		if (lives)
			tfd_send_unpark(open);
		else
			fail_parked(open);
	}
}

/* Whether nothing shows that the far half which is to tell it READY is still there, nor will soon. */
static bool is_doubtful(const struct tfd_conn *conn, uint64_t now_ns)
{
	return conn->half && !conn->broken && !conn->channel->calls_open && tfd_list_empty(&conn->messages) &&
	       now_ns >= conn->channel->progress_ns + ASK_AGAIN_NS;
}

/* By the path that is in doubt: its connection turns out to be gone, or else to live, for all that wait there. */
static void ask_again(struct tfd_open *open)
{
	struct tfd_shard *shard = tfd_container(open->parked.next, struct tfd_shard, link);

	shard->path = open->full_path;
	open->full = false;
	tfd_send_unpark(open);
}

void tfd_senders_check(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < ASK_CHECKS && !tfd_list_empty(&worker->senders_waiting); i++) {
		struct tfd_open *open =
			tfd_container(worker->senders_waiting.next, struct tfd_open, wait_link);

		if (worker->now_ns < open->wait_ns + ASK_AGAIN_NS)
			return;
		if (!open->full && tfd_list_empty(&open->parked)) {
			tfd_list_remove(&open->wait_link);
			continue;
		}
		wait_from_now(open);
		if (open->full && !tfd_list_empty(&open->parked) &&
		    is_doubtful(open->paths[open->full_path].conn, worker->now_ns))
			ask_again(open);
	}
}

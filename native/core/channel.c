/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Messages from worker to worker over a pair of halves, by writes with immediates of name space 0, which every provider has.
 *
 * The outgoing side has TFD_CALLS frames at the incoming one for its requests, and the incoming side as many there for the
 * answers. An answer goes into the frame with the number of its request, and a frame is used again when its answer has come: so no
 * frame is ever written over before it was read, and there are no credits that could be lost.
 *
 * The immediate: [3: kind][9: 0][20: number of the far half * TFD_CALLS + frame], or, of READY, [20: number of the far open]. ASK and
 * SEEN (credits.c) have a frame each, in both directions, and need no credit.
 */
#include <errno.h>
#include <string.h>

#include "parts.h"
#include "wr.h"

#define ANSWERS_AT (TFD_CALLS * TFD_REQUEST_BYTES)
#define CREDITS_AT (ANSWERS_AT + TFD_CALLS * sizeof(struct tfd_frame))
#define ANSWER_BOUND_NS 5000000000u /* a worker that lives answers at once */
#define READIES_MAX 64u             /* in flight of a connection, with all else: as its pieces */

enum wire_kind {
	WIRE_REQUEST = 0,
	WIRE_ANSWER = 1,
	WIRE_READY = 2,
	WIRE_ASK = 3,
	WIRE_SEEN = 4,
};

_Static_assert(sizeof(struct tfd_frame) == TFD_LINE, "answers are frames without a payload");
_Static_assert(TFD_CALLS <= 32, "bitmaps of frames");
_Static_assert(CREDITS_AT + 4 * sizeof(struct tfd_frame) == TFD_FRAMES_BYTES, "ASK and SEEN, both ways");

static size_t request_at(uint32_t frame)
{
	return frame * TFD_REQUEST_BYTES;
}

static size_t answer_at(uint32_t frame)
{
	return ANSWERS_AT + frame * sizeof(struct tfd_frame);
}

static size_t credit_at(enum wire_kind kind, bool by_outgoing)
{
	return CREDITS_AT + (2u * (kind == WIRE_SEEN) + by_outgoing) * sizeof(struct tfd_frame);
}

static uint32_t wire(enum wire_kind kind, uint32_t number)
{
	return (uint32_t)kind << 29 | tfd_wire_imm(TFD_NAME_SPACE_WORKER, number);
}

/* ---- its end ---- */

static void call_end(struct tfd_conn *conn, struct tfd_call *call)
{
	call->shard = NULL;
	conn->channel->calls_open--;
	conn->channel->progress_ns = conn->group->worker->now_ns;
	conn->group->worker->inflight_wrs--;
}

/* Its half is gone, what was posted is back. A request that the far side has not counted among what landed goes out again. */
void tfd_channel_stop(struct tfd_conn *conn, uint32_t detail, const struct tfd_landed *far_landed)
{
	struct tfd_channel *channel = conn->channel;
	uint64_t landed =
		far_landed ? far_landed->imms[tfd_order_of(conn->rail, TFD_TRAFFIC_MESSAGE)] : UINT64_MAX;

	for (uint32_t i = 0; i < TFD_CALLS; i++) {
		struct tfd_call *call = &channel->calls[i];
		struct tfd_shard *shard = call->shard;

		if (!shard)
			continue;
		call_end(conn, call);
		if (shard->job->op == TFD_OP_SEND)
			tfd_send_lost(shard, detail, call->imm_number <= landed);
		else
			tfd_verify_lost(shard, detail);
	}
	while (!tfd_list_empty(&channel->waiters))
		tfd_waiter_drop(tfd_container(channel->waiters.next, struct tfd_waiter, conn_link));
	tfd_numbers_give(&conn->group->worker->channels, channel->number);
	if (conn->outgoing)
		tfd_senders_conn_closed(conn->group->worker, conn);
}

/* ---- posting ---- */

bool tfd_channel_has_work(const struct tfd_conn *conn)
{
	const struct tfd_channel *channel = conn->channel;
	const struct tfd_credits *credits = &conn->credits;

	return channel && (!tfd_list_empty(&conn->messages) || channel->checks_due ||
	                   (channel->answers_due & ~channel->answers_writing) ||
	                   !tfd_list_empty(&channel->readies) || (credits->due & ~credits->writing) ||
	                   (tfd_credits_left(conn) && tfd_credits_shards_wait(conn)));
}

static uint32_t checksum(const struct tfd_frame *frame, const void *payload)
{
	struct tfd_frame copy = *frame;

	copy.check = 0;
	return tfd_crc32c(tfd_crc32c(0, &copy, sizeof(copy)), payload, frame->bytes);
}

/*
 * On rails that keep no order an immediate of an earlier half may come while a frame of this one is being written: half of it must
 * not be taken for all of it.
 */
static void seal(const struct tfd_conn *conn, struct tfd_frame *frame, const void *payload)
{
	frame->token = conn->channel->far_token;
	if (!conn->rail->info.ordered)
		frame->check = checksum(frame, payload);
}

/* `bytes` at `at` of our memory go to the same place of the far half's; 0: an immediate alone. */
static int post_frame(struct tfd_worker *worker, struct tfd_conn *conn, size_t at, size_t bytes, uint32_t imm)
{
	struct tfd_order *order = &conn->orders[tfd_order_of(conn->rail, TFD_TRAFFIC_MESSAGE)];
	struct tfd_wr *wr = worker->wr_free;
	struct tfd_post post = { .local = bytes ? conn->channel->memory + at : NULL,
	                         .mr = bytes ? conn->channel->mr : NULL,
	                         .length = bytes,
	                         .remote_address = conn->channel->far_key.address + at,
	                         .remote_key = conn->channel->far_key.key,
	                         .traffic = TFD_TRAFFIC_MESSAGE,
	                         .has_imm = 1,
	                         .imm = imm };
	int rc;

	if (!wr)
		return -EAGAIN;
	rc = conn->rail->ops->post(conn->half, &post, wr);
	if (rc)
		return rc;
	worker->wr_free = wr->next;
	wr->job = NULL;
	wr->shard = NULL;
	wr->message = imm;
	wr->units = 0;
	wr->extent = 0;
	wr->imm_number = ++order->posted;
	wr->credit = imm >> 29 < WIRE_ASK;
	conn->credits.taken += wr->credit;
	tfd_wr_link(conn, wr, bytes, conn->inflight_bytes + bytes, worker->now_ns);
	tfd_conn_enter(worker, conn, TFD_TRAFFIC_MESSAGE, &(struct tfd_pieces){ .bytes = bytes, .count = 1 });
	return 0;
}

static int post_credit(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t message, uint64_t number)
{
	struct tfd_channel *channel = conn->channel;
	enum wire_kind kind = message == TFD_CREDIT_ASK ? WIRE_ASK : WIRE_SEEN;
	struct tfd_frame *frame = (void *)(channel->memory + credit_at(kind, conn->outgoing));
	int rc;

	if (!(conn->credits.due & ~conn->credits.writing & message))
		return 0;
	*frame = (struct tfd_frame){ .target = number };
	seal(conn, frame, NULL);
	rc = post_frame(worker, conn, credit_at(kind, conn->outgoing), sizeof(*frame),
	                wire(kind, channel->far_number * TFD_CALLS));
	if (!rc)
		tfd_credits_posted(conn, message);
	return rc;
}

static int post_credits(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	uint8_t due = conn->credits.due;
	int rc = post_credit(worker, conn, TFD_CREDIT_SEEN, conn->credits.far_number);

	if (!rc)
		rc = post_credit(worker, conn, TFD_CREDIT_ASK, conn->credits.number);
	*count += conn->credits.due != due;
	tfd_credits_release(conn);
	return rc;
}

static int post_answers(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	struct tfd_channel *channel = conn->channel;
	uint32_t due;

	while ((due = channel->answers_due & ~channel->answers_writing) != 0) {
		uint32_t frame = (uint32_t)__builtin_ctz(due);
		int rc;

		if (!tfd_credits_may_post(conn))
			return 0;
		/* Only now: a request may come before its half is told where the far one is. */
		seal(conn, &channel->answers[frame], NULL);
		memcpy(channel->memory + answer_at(frame), &channel->answers[frame],
		       sizeof(struct tfd_frame));
		rc = post_frame(worker, conn, answer_at(frame), sizeof(struct tfd_frame),
		                wire(WIRE_ANSWER, channel->far_number * TFD_CALLS + frame));
		if (rc)
			return rc;
		channel->answers_due &= ~(1u << frame);
		channel->answers_writing |= 1u << frame;
		++*count;
	}
	return 0;
}

static int post_readies(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	struct tfd_channel *channel = conn->channel;

	while (!tfd_list_empty(&channel->readies) && conn->inflight_wrs < READIES_MAX) {
		struct tfd_waiter *waiter = tfd_container(channel->readies.next, struct tfd_waiter, link);
		int rc;

		if (!tfd_credits_may_post(conn))
			return 0;
		rc = post_frame(worker, conn, 0, 0, wire(WIRE_READY, waiter->sender));
		if (rc)
			return rc;
		tfd_waiter_drop(waiter);
		++*count;
	}
	return 0;
}

static struct tfd_call *call_free(struct tfd_channel *channel)
{
	for (uint32_t i = 0; channel->calls_open < TFD_CALLS && i < TFD_CALLS; i++) {
		if (!channel->calls[i].shard && !channel->calls[i].writing)
			return &channel->calls[i];
	}
	return NULL;
}

struct tfd_frame *tfd_channel_frame(struct tfd_conn *conn, const struct tfd_call *call)
{
	return (void *)(conn->channel->memory + request_at((uint32_t)(call - conn->channel->calls)));
}

/* The frame is filled. */
int tfd_channel_call(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_call *call,
                     struct tfd_shard *shard)
{
	struct tfd_channel *channel = conn->channel;
	uint32_t number = (uint32_t)(call - channel->calls);
	uint32_t order = tfd_order_of(conn->rail, TFD_TRAFFIC_MESSAGE);
	struct tfd_frame *frame = tfd_channel_frame(conn, call);
	int rc;

	seal(conn, frame, frame + 1);
	rc = post_frame(worker, conn, request_at(number), sizeof(*frame) + frame->bytes,
	                wire(WIRE_REQUEST, channel->far_number * TFD_CALLS + number));
	if (rc)
		return rc;
	if (!channel->calls_open++)
		channel->progress_ns = worker->now_ns;
	worker->inflight_wrs++; /* until its answer is here */
	*call = (struct tfd_call){ .shard = shard,
	                           .imm_number = conn->orders[order].posted,
	                           .readies = shard->open->readies,
	                           .writing = true };
	return 0;
}

static int post_request(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_call *call,
                        struct tfd_shard *shard)
{
	int rc;

	if (shard->job->op != TFD_OP_SEND)
		return tfd_verify_post(worker, conn, call, shard);
	tfd_send_fill(shard, tfd_channel_frame(conn, call));
	rc = tfd_channel_call(worker, conn, call, shard);
	if (!rc)
		tfd_send_posted(shard, conn);
	return rc;
}

static int post_requests(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	struct tfd_list *queue = &conn->messages;

	while (!tfd_list_empty(queue)) {
		struct tfd_shard *shard = tfd_container(queue->next, struct tfd_shard, link);
		struct tfd_call *call;
		int rc;

		if (shard->job->op == TFD_OP_SEND && !tfd_send_may_go(shard->open)) {
			tfd_send_park(shard);
			continue;
		}
		call = call_free(conn->channel);
		if (!call || !tfd_credits_may_post(conn)) /* an answer comes */
			return 0;
		rc = post_request(worker, conn, call, shard);
		if (rc == -EBUSY) /* its turn comes in the next pass */
			return 0;
		if (rc)
			return rc;
		++*count;
	}
	return 0;
}

/* Reading memory takes its time, so that it is not done where the request arrives. */
static void answer_checks(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	struct tfd_channel *channel = conn->channel;

	while (channel->checks_due && worker->check_left) {
		uint32_t number = (uint32_t)__builtin_ctz(channel->checks_due);
		const uint8_t *request = channel->memory + request_at(number);
		struct tfd_frame frame;

		memcpy(&frame, request, sizeof(frame));
		tfd_verify_answer(worker, conn, &frame, request + sizeof(frame), &channel->answers[number]);
		channel->checks_due &= ~(1u << number);
		channel->answers_due |= 1u << number;
		++*count;
	}
}

/* Adds to *count. -EAGAIN: after a poll; anything else: the connection is broken. */
int tfd_channel_post(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count)
{
	int rc;

	answer_checks(worker, conn, count);
	rc = post_credits(worker, conn, count);
	if (!rc)
		rc = post_answers(worker, conn, count);
	if (!rc)
		rc = post_readies(worker, conn, count);
	return rc ? rc : post_requests(worker, conn, count);
}

/* A write of ours is back. */
void tfd_channel_wr_done(struct tfd_wr *wr, const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wr->conn;
	struct tfd_channel *channel = conn->channel;
	uint32_t frame = wr->message % TFD_CALLS;

	tfd_wr_unlink(conn, wr);
	tfd_conn_leave(conn->group->worker, conn, TFD_TRAFFIC_MESSAGE,
	               &(struct tfd_pieces){ .bytes = wr->length, .count = 1 });
	if (wr->credit)
		tfd_credits_acked(conn);
	switch (wr->message >> 29) {
	case WIRE_REQUEST:
		channel->calls[frame].writing = false;
		break;
	case WIRE_ANSWER:
		channel->answers_writing &= ~(1u << frame);
		break;
	case WIRE_ASK:
		conn->credits.writing &= (uint8_t)~TFD_CREDIT_ASK;
		break;
	case WIRE_SEEN:
		conn->credits.writing &= (uint8_t)~TFD_CREDIT_SEEN;
		break;
	default:
		break;
	}
	if (tfd_channel_has_work(conn))
		tfd_conn_wake(conn);
	if (wc->type == TFD_WC_ERROR)
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

/* ---- arriving ---- */

static void take_request(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t number,
                         const struct tfd_frame *frame)
{
	struct tfd_channel *channel = conn->channel;
	struct tfd_frame *answer = &channel->answers[number];
	const uint8_t *payload = channel->memory + request_at(number) + sizeof(*frame);

	if ((channel->answers_due | channel->checks_due) & 1u << number) {
		worker->dropped_imms++; /* the one before was not answered yet: no peer of ours does that */
		return;
	}
	*answer = (struct tfd_frame){ .kind = TFD_ANSWER_REFUSED };
	if (frame->kind == TFD_MESSAGE_VERIFY && frame->bytes <= TFD_MESSAGE_BYTES_MAX) {
		channel->checks_due |= 1u << number;
		tfd_conn_wake(conn);
		return;
	}
	if (frame->bytes > TFD_MESSAGE_BYTES_MAX)
		answer->argument = TFD_DETAIL_LENGTH;
	else if (frame->kind == TFD_MESSAGE_SEND)
		tfd_mailbox_deliver(worker, conn, frame, payload, answer);
	else
		answer->argument = TFD_DETAIL_BAD_OP;
	channel->answers_due |= 1u << number;
	tfd_conn_wake(conn);
}

static void take_answer(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t number,
                        const struct tfd_frame *frame)
{
	struct tfd_call *call = &conn->channel->calls[number];
	struct tfd_shard *shard = call->shard;

	if (!shard) {
		worker->dropped_imms++;
		return;
	}
	call_end(conn, call);
	if (shard->job->op == TFD_OP_SEND)
		tfd_send_answered(shard, frame, call->readies);
	else
		tfd_verify_answered(shard, frame);
}

/* Where the frame of an immediate is, and whether it is for halves of that direction; false: there is no such kind. */
static bool place_of(const struct tfd_conn *conn, enum wire_kind kind, uint32_t frame, size_t *at)
{
	switch (kind) {
	case WIRE_REQUEST:
		*at = request_at(frame);
		return !conn->outgoing;
	case WIRE_ANSWER:
		*at = answer_at(frame);
		return conn->outgoing;
	case WIRE_ASK:
	case WIRE_SEEN:
		*at = credit_at(kind, !conn->outgoing);
		return true;
	default:
		return false;
	}
}

/*
 * A frame is taken out once: an immediate that was meant for an earlier half of this number, and comes late, must not find there what
 * was read before. False: nothing for this half is there, or not all of it yet.
 */
static bool take_frame(const struct tfd_conn *conn, size_t at, struct tfd_frame *frame)
{
	const struct tfd_channel *channel = conn->channel;
	const uint8_t *payload = channel->memory + at + sizeof(*frame);
	const uint64_t taken = 0;

	memcpy(frame, channel->memory + at, sizeof(*frame));
	if (frame->token != channel->token)
		return false;
	if (!conn->rail->info.ordered) {
		uint32_t most = at < ANSWERS_AT ? TFD_MESSAGE_BYTES_MAX : 0;

		if (frame->bytes > most || frame->check != checksum(frame, payload))
			return false;
	}
	memcpy(channel->memory + at + offsetof(struct tfd_frame, token), &taken, sizeof(taken));
	return true;
}

static void take_ready(struct tfd_worker *worker, uint32_t sender)
{
	struct tfd_open *open = tfd_numbers_get(&worker->senders, sender);

	if (open) /* else one that was closed meanwhile */
		tfd_send_ready(open);
}

void tfd_channel_arrived(struct tfd_worker *worker, const struct tfd_wc *wc)
{
	enum wire_kind kind = wc->imm >> 29;
	uint32_t low = wc->imm & (TFD_IMM_COUNT - 1);
	struct tfd_conn *conn = tfd_numbers_get(&worker->channels, low / TFD_CALLS);
	struct tfd_frame frame;
	size_t at;

	if (kind == WIRE_READY) {
		take_ready(worker, low);
		return;
	}
	if (!conn || (wc->owner && wc->owner != conn) || !place_of(conn, kind, low % TFD_CALLS, &at) ||
	    !take_frame(conn, at, &frame)) {
		worker->dropped_imms++;
		return;
	}
	if (kind == WIRE_REQUEST)
		take_request(worker, conn, low % TFD_CALLS, &frame);
	else if (kind == WIRE_ANSWER)
		take_answer(worker, conn, low % TFD_CALLS, &frame);
	else
		tfd_credits_arrived(conn, kind == WIRE_ASK ? TFD_CREDIT_ASK : TFD_CREDIT_SEEN, frame.target);
}

void tfd_channels_check(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < worker->channels.capacity; i++) {
		struct tfd_conn *conn = worker->channels.items[i];

		if (conn)
			tfd_credits_check(conn);
		if (conn && conn->channel->calls_open && worker->now_ns > conn->channel->progress_ns &&
		    worker->now_ns - conn->channel->progress_ns > ANSWER_BOUND_NS)
			tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Messages between workers where something of them is late, lost, or comes too early: on the simulated fabric, step by step. */
#include "mailbox_fixture.h"
#include "sim_pair.h"

#define SLOTS 2
#define BYTES 64
#define SECONDS 1000000000ull

static const struct tfd_group_options plain;

struct world {
	struct sim_pair pair;
	struct box box;
	uint64_t open;
};

static void world_open(struct world *w, uint32_t paths, const char *fabric)
{
	sim_pair_open(&w->pair, paths, fabric, plain);
	box_open(&w->box, &w->pair.to, 4096, SLOTS, BYTES);
	w->open = open_box(&w->pair.from, &w->box, w->pair.out, paths);
}

static void world_close(struct world *w)
{
	sim_pair_close(&w->pair);
}

static const struct tfd_record *send_one(struct world *w)
{
	return user_submit(&w->pair.from, send_entry(w->open, 0, 8));
}

static void send_all(struct world *w, uint32_t count)
{
	while (count--)
		expect(sim_run(&w->pair, &w->pair.from, send_entry(w->open, 0, 8)), TFD_JOB_OK, 0);
}

static void release_next(struct world *w)
{
	struct tfd_letter letter;

	CHECK(box_next(&w->box, &letter));
	expect(sim_run(&w->pair, &w->pair.to, release_entry(&w->box, letter.slot, letter.number)), TFD_JOB_OK,
	       0);
}

static struct tfd_worker *worker_of(const struct host *host)
{
	return host->core->groups[host->group]->worker;
}

/* An immediate of name space 0 for frame 0 of a half arrives; nobody can tell by which connection. */
static void stray(struct host *host, uint64_t conn, uint32_t kind)
{
	struct tfd_worker *worker = worker_of(host);
	uint32_t number = sim_conn(host, conn)->channel->number;
	struct tfd_wc wc = { .type = TFD_WC_IMM, .imm = kind << 29 | number * TFD_CALLS };

	tfd_completion_handle(worker, &worker->group->rails[0], &wc);
}

/* What comes late, for a half that had the number before, finds a frame that was read already: it is not read again. */
static void test_late_request(void)
{
	struct world w;
	struct tfd_letter letter;

	world_open(&w, 1, "ordered=0");
	send_all(&w, 1);
	sim_steps(&w.pair, 100);
	stray(&w.pair.b, w.pair.in[0], 0);
	sim_steps(&w.pair, 100);
	CHECK(box_next(&w.box, &letter) && !box_next(&w.box, &letter));
	world_close(&w);
}

/* One that comes while a frame of this half is being written does not take the half of it for all. */
static void test_torn_request(void)
{
	struct world w;
	struct tfd_channel *channel;
	struct tfd_frame *frame;
	struct tfd_letter letter;
	uint64_t dropped;

	world_open(&w, 1, "ordered=0");
	channel = sim_conn(&w.pair.b, w.pair.in[0])->channel;
	frame = (void *)channel->memory;
	*frame = (struct tfd_frame){ .token = channel->token,
	                             .target = w.box.info.mailbox,
	                             .kind = TFD_MESSAGE_SEND,
	                             .bytes = 8,
	                             .check = 1 };
	dropped = worker_of(&w.pair.b)->dropped_imms;
	stray(&w.pair.b, w.pair.in[0], 0);
	frame->bytes = UINT32_MAX;
	stray(&w.pair.b, w.pair.in[0], 0);
	CHECK(worker_of(&w.pair.b)->dropped_imms == dropped + 2 && frame->token == channel->token);
	send_all(&w, 1); /* the rest of it arrives */
	CHECK(box_next(&w.box, &letter) && !box_next(&w.box, &letter));
	world_close(&w);
}

/* The same with an answer, while the next request is under way: it does not end it. */
static void test_late_answer(void)
{
	struct world w;
	const struct tfd_record *record;

	world_open(&w, 1, "ordered=0,delay_us=1000");
	send_all(&w, 1);
	sim_steps(&w.pair, 1000);
	record = send_one(&w);
	for (int i = 0; i < PAIR_STEPS && !sim_conn(&w.pair.a, w.pair.out[0])->channel->calls_open; i++)
		sim_step(&w.pair, 1000);
	CHECK(sim_conn(&w.pair.a, w.pair.out[0])->channel->calls[0].shard);
	stray(&w.pair.a, w.pair.out[0], 1);
	CHECK(tfd_load_acquire(&record->done_id) != w.pair.from.next_job);
	sim_await(&w.pair, record, w.pair.from.next_job);
	expect(record, TFD_JOB_OK, 0);
	CHECK(box_value(&w.box) == 2);
	world_close(&w);
}

/*
 * The receiver's half is gone, with its word of who waits, and nothing that the sender has under way would tell it so: its messages
 * still end.
 */
static void test_ready_lost(void)
{
	struct tfd_event event;
	const struct tfd_record *waiting, *behind;
	uint64_t first;
	struct world w;
	bool lost = false;

	world_open(&w, 2, "");
	send_all(&w, SLOTS);
	waiting = send_one(&w);
	behind = send_one(&w);
	first = w.pair.from.next_job - 1;
	sim_steps(&w.pair, 100);
	for (uint32_t i = 0; i < 2; i++)
		CHECK_OK(tfd_conn_close(w.pair.b.core, w.pair.in[i], TFD_DETAIL_CONNECTION, NULL, NULL));
	release_next(&w);
	for (int i = 0; i < 200 && !lost; i++) {
		sim_step(&w.pair, SECONDS / 10);
		lost = sim_event(&w.pair.a, TFD_EVENT_CONN_LOST, &event);
	}
	CHECK(lost);
	for (uint32_t i = 0; i < 2; i++)
		CHECK_OK(tfd_conn_close(w.pair.a.core, w.pair.out[i], TFD_DETAIL_CONNECTION, NULL, NULL));
	sim_await(&w.pair, waiting, first);
	sim_await(&w.pair, behind, first + 1);
	expect(waiting, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	expect(behind, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	world_close(&w);
}

/* A slot that is free while a sender waits by a connection that lives is used, though READY never came. */
static void test_ready_dropped(void)
{
	const struct tfd_record *waiting;
	struct tfd_channel *channel;
	struct world w;

	world_open(&w, 1, "");
	send_all(&w, SLOTS);
	waiting = send_one(&w);
	sim_steps(&w.pair, 100);
	channel = sim_conn(&w.pair.b, w.pair.in[0])->channel;
	CHECK(!tfd_list_empty(&channel->waiters));
	tfd_waiter_drop(tfd_container(channel->waiters.next, struct tfd_waiter, conn_link));
	release_next(&w);
	for (int i = 0; i < 50; i++)
		sim_step(&w.pair, SECONDS / 10);
	CHECK(tfd_load_acquire(&waiting->done_id) == w.pair.from.next_job);
	expect(waiting, TFD_JOB_OK, 0);
	world_close(&w);
}

/* However many wait by a connection that says nothing, one of them asks for all whether it lives. */
static void test_asks(void)
{
	enum { OPENS = 50, ASKS = 20 };
	struct tfd_conn *out;
	uint64_t before;
	struct world w;

	world_open(&w, 1, "");
	send_all(&w, SLOTS);
	for (uint32_t i = 0; i < OPENS; i++) {
		w.open = open_box(&w.pair.from, &w.box, w.pair.out, 1);
		(void)send_one(&w);
		sim_steps(&w.pair, 2);
	}
	out = sim_conn(&w.pair.a, w.pair.out[0]);
	before = out->orders[0].posted;
	for (int i = 0; i < ASKS * 10; i++)
		sim_step(&w.pair, SECONDS / 10);
	CHECK(out->orders[0].posted > before && out->orders[0].posted <= before + ASKS);
	CHECK(box_value(&w.box) == SLOTS && out->half && !out->broken);
	world_close(&w);
}

/* A receiving half that cannot answer has not lost what came by it: nobody's counts are in doubt. */
static void test_answer_refused(void)
{
	struct tfd_event event;
	struct world w;

	world_open(&w, 1, "");
	send_all(&w, SLOTS);
	(void)send_one(&w);
	sim_steps(&w.pair, 100);
	tfd_sim_break(sim_conn(&w.pair.b, w.pair.in[0])->half);
	release_next(&w); /* READY is due */
	sim_steps(&w.pair, 10);
	CHECK(sim_event(&w.pair.b, TFD_EVENT_CONN_LOST, &event));
	CHECK(event.id == w.pair.in[0] && event.detail == TFD_DETAIL_CONNECTION);
	world_close(&w);
}

/* A request that comes before its half knows where the far one is waits for that, and is answered. */
static void test_not_started(void)
{
	uint8_t a[TFD_ADDRESS_MAX], b[TFD_ADDRESS_MAX];
	size_t na = sizeof(a), nb = sizeof(b);
	const struct tfd_record *record;
	struct world w;
	uint64_t out, in;

	world_open(&w, 1, "");
	CHECK_OK(tfd_conn_open(w.pair.a.core, 0, 0, 1, 1, &out, a, &na, &error));
	CHECK_OK(tfd_conn_open(w.pair.b.core, 0, 0, 0, 1, &in, b, &nb, &error));
	CHECK_OK(tfd_conn_start(w.pair.a.core, out, b, nb, &error));
	w.open = open_box(&w.pair.from, &w.box, &out, 1);
	record = send_one(&w);
	sim_steps(&w.pair, 100);
	CHECK(box_value(&w.box) == 1 && tfd_load_acquire(&record->done_id) != w.pair.from.next_job);
	CHECK_OK(tfd_conn_start(w.pair.b.core, in, a, na, &error));
	sim_steps(&w.pair, 100);
	CHECK(tfd_load_acquire(&record->done_id) == w.pair.from.next_job);
	expect(record, TFD_JOB_OK, 0);
	world_close(&w);
}

/* A stall is over once a message has gone out: the time of the next one begins anew. */
static void test_stall_over(void)
{
	struct tfd_conn *conn;
	struct world w;

	world_open(&w, 1, "delay_us=100");
	conn = sim_conn(&w.pair.a, w.pair.out[0]);
	conn->stalled_ns = w.pair.now;
	for (uint32_t i = 0; i < TFD_CALLS; i++)
		(void)send_one(&w);
	w.open = open_box(&w.pair.from, &w.box, w.pair.out, 1);
	(void)send_one(&w); /* more than go out at once: the queue does not become empty */
	sim_step(&w.pair, 1000);
	CHECK(conn->channel->calls_open == TFD_CALLS && !tfd_list_empty(&conn->busy_link));
	CHECK(conn->stalled_ns == 0);
	world_close(&w);
}

/* However many wait, what tells them is bounded as all that a connection has in flight. */
static void test_many_readies(void)
{
	enum { WAIT = 200 };
	struct tfd_mailbox_options options = { .offset = 65536, .slots = WAIT, .slot_bytes = BYTES };
	uint64_t opens[WAIT];
	struct tfd_conn *in;
	struct world w;
	uint32_t most = 0;

	world_open(&w, 1, "delay_us=1000");
	options.region = w.pair.to.region;
	CHECK_OK(tfd_mailbox_add(w.pair.b.core, w.pair.to.session, &options, &w.box.info, &error));
	w.box.offset = options.offset;
	w.box.slots = WAIT;
	w.open = open_box(&w.pair.from, &w.box, w.pair.out, 1);
	send_all(&w, WAIT);
	for (uint32_t i = 0; i < WAIT; i++)
		opens[i] = open_box(&w.pair.from, &w.box, w.pair.out, 1);
	for (uint32_t i = 0; i < WAIT;
	     i++) { /* cancelled: READY finds nothing to send, and each is asked for once */
		struct tfd_entry cancel = { .op = TFD_OP_CANCEL };

		(void)user_submit(&w.pair.from, send_entry(opens[i], 0, 8));
		cancel.argument = w.pair.from.next_job;
		sim_steps(&w.pair, 1000);
		expect(sim_run(&w.pair, &w.pair.from, cancel), TFD_JOB_OK, 0);
	}
	in = sim_conn(&w.pair.b, w.pair.in[0]);
	for (uint32_t i = 0; i < WAIT; i++) {
		uint8_t buffer[BYTES];
		size_t bytes = sizeof(buffer);

		CHECK_OK(tfd_mailbox_take(w.pair.b.core, w.pair.to.session, w.box.info.mailbox, buffer,
		                          &bytes));
	}
	for (int i = 0; i < 100000; i++) {
		sim_step(&w.pair, 1000);
		most = in->inflight_wrs > most ? in->inflight_wrs : most;
	}
	CHECK(most && most <= 64);
	CHECK(tfd_list_empty(&in->channel->readies) && tfd_list_empty(&in->channel->waiters));
	world_close(&w);
}

int main(void)
{
	test_late_request();
	test_torn_request();
	test_late_answer();
	test_ready_lost();
	test_ready_dropped();
	test_asks();
	test_answer_refused();
	test_not_started();
	test_stall_over();
	test_many_readies();
	return 0;
}

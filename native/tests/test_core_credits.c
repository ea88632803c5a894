/* SPDX-License-Identifier: Apache-2.0 */
/* Credits: no queue of arrived immediates overflows, whoever polls rarely, breaks or misbehaves, and everything is counted. */
#include "credits_world.h"
#include "mailbox_fixture.h"

#define SECONDS 1000000000ull
#define PAGES 64u

#ifdef __SANITIZE_THREAD__ /* there is one thread: nothing for it to find */
#define MANY 300u
#else
#define MANY 2000u
#endif

static const struct tfd_entry one_imm = { .op = TFD_OP_IMM };
static struct crowd crowd;

static void open_crowd(uint32_t count, uint32_t rarely, uint32_t ordered, uint32_t delay_us, uint32_t depth)
{
	char fabric[TFD_NAME_MAX];

	(void)snprintf(fabric, sizeof(fabric), "ordered=%u,delay_us=%u,imm_depth=%u", ordered, delay_us,
	               depth);
	crowd_open(&crowd, count, rarely, fabric);
}

static uint64_t stalls(uint32_t sender)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(crowd.from[sender].host.core, 0, 0, &info));
	return info.credit_stalls;
}

/* ---- many senders ---- */

static uint64_t flood(uint32_t senders, uint32_t depth, uint32_t ordered, uint32_t delay_us, uint64_t each)
{
	uint64_t steps;

	open_crowd(senders, 7, ordered, delay_us, depth);
	steps = crowd_run(&crowd, one_imm, each, senders * each);
	CHECK(depth ? depth > 64 || stalls(0) : !stalls(0));
	crowd_close(&crowd);
	return steps;
}

static void test_senders(void)
{
	for (uint32_t ordered = 0; ordered < 2; ordered++) {
		for (uint32_t delay_us = 0; delay_us <= 50; delay_us += 50) {
			uint64_t without = flood(16, 0, ordered, delay_us, MANY);

			/* A queue that holds what is polled at once, and what comes meanwhile, costs next to nothing. */
			CHECK(flood(16, 4096, ordered, delay_us, MANY) < without * 11 / 10);
			CHECK(flood(16, 64, ordered, delay_us, MANY) < without * 20);
			(void)flood(1, 3, ordered, delay_us, 200);
			(void)flood(2, 8, ordered, delay_us, 500);
			(void)flood(64, 1024, ordered, delay_us, 100);
		}
	}
}

/* Where each page brings a count of its own; and bytes that bring none go on beside it. */
static void test_pages(uint32_t ordered)
{
	struct tfd_entry pages = { .op = TFD_OP_WRITE_PAGES,
	                           .length = 512,
	                           .src_stride = 1024,
	                           .dst_stride = 1024,
	                           .table_count = PAGES };

	open_crowd(4, 5, ordered, 20, 64);
	for (uint32_t i = 0; i < crowd.count; i++) {
		struct tfd_page *table = sim_table(&crowd.from[i].user);

		for (uint32_t page = 0; page < PAGES; page++)
			table[page] = (struct tfd_page){ .src = page, .dst = page };
	}
	(void)crowd_run(&crowd, pages, 50, 4ull * 50 * PAGES);
	crowd_close(&crowd);
}

/* One writes to many at once; they poll rarely, and so does it. */
static void test_scatter(void)
{
	enum { ROUNDS = 200, TARGETS = 12 };
	struct tfd_entry scatter = { .op = TFD_OP_SCATTER, .table_count = TARGETS };
	struct user *from = &crowd.user; /* the one that the others wrote to */
	struct tfd_target *targets;

	open_crowd(TARGETS, 3, 0, 20, 128);
	targets = sim_table(from);
	for (uint32_t i = 0; i < TARGETS; i++) {
		uint64_t out, in;

		connect_hosts(&crowd.to, &crowd.from[i].host, &out, &in);
		targets[i] = (struct tfd_target){ .dst_grant = open_grant(from, &crowd.from[i].user, out),
		                                  .length = 100 };
	}
	scatter.src_region = from->region;
	for (uint32_t round = 1; round <= ROUNDS; round++) {
		const struct tfd_record *record = user_submit(from, scatter);

		for (uint32_t i = 0; i < CROWD_STEPS && round % 30 == 0; i++) {
			if (tfd_load_acquire(&record->done_id) == from->next_job)
				break;
			crowd_step(&crowd, PAIR_STEP_NS);
		}
	}
	for (uint32_t i = 0; i < 20000; i++)
		crowd_step(&crowd, PAIR_STEP_NS);
	for (uint32_t i = 0; i < TARGETS; i++)
		CHECK(crowd.from[i].user.counters[0].value == ROUNDS);
	crowd_close(&crowd);
}

/* Requests, answers and READYs are immediates, too. */
static void test_messages(uint32_t ordered, uint32_t depth)
{
	enum { OPENS = 20, EACH = 8 };
	struct sender *sender = &crowd.from[0];
	uint64_t opens[OPENS], taken = 0;
	struct box box;

	open_crowd(1, 3, ordered, 20, depth);
	box_open(&box, &crowd.user, 4096, 4, 64);
	for (uint32_t i = 0; i < OPENS; i++)
		opens[i] = open_box(&sender->user, &box, &sender->out, 1);
	for (uint32_t sent = 0, step = 0; taken < OPENS * EACH; step++) {
		uint8_t buffer[64];
		size_t bytes = sizeof(buffer);

		CHECK(step < CROWD_STEPS);
		if (sent < OPENS * EACH && sender_has_room(sender))
			(void)user_submit(&sender->user, send_entry(opens[sent++ % OPENS], 0, 8));
		taken += step % 10 == 0 && tfd_mailbox_take(crowd.to.core, crowd.user.session,
		                                            box.info.mailbox, buffer, &bytes) == 0;
		crowd_step(&crowd, PAIR_STEP_NS);
	}
	CHECK(box_value(&box) == OPENS * EACH);
	CHECK(stalls(0));
	crowd_close(&crowd);
}

/* ---- who withholds them ---- */

static void steps(uint32_t count, uint64_t ns)
{
	while (count--)
		crowd_step(&crowd, ns);
}

/* As many jobs as the ring takes; the last one's record. */
static const struct tfd_record *fill_ring(struct sender *sender)
{
	const struct tfd_record *record = NULL;
	struct tfd_entry entry = one_imm;

	entry.dst_grant = sender->grant;
	for (int round = 0; round < 8; round++) {
		while (sender_has_room(sender))
			record = user_submit(&sender->user, entry);
		steps(10, PAIR_STEP_NS);
	}
	return record;
}

static bool lost(struct sender *sender, struct tfd_event *event)
{
	return sim_event(&sender->host, TFD_EVENT_CONN_LOST, event);
}

/* By control: of the ring's records one is free. */
static uint64_t submit(struct sender *sender, struct tfd_entry entry)
{
	CHECK_OK(tfd_jobs_submit(sender->host.core, sender->user.session, &entry, 1, NULL, 0));
	return entry.job_id;
}

static uint32_t status_of(struct sender *sender, uint64_t job)
{
	struct tfd_job_end end;

	return tfd_job_result(sender->host.core, sender->user.session, job, &end) == 0 ? end.status : 0;
}

/* A receiver that takes nothing, though what is sent to it is acknowledged: cancel and deadlines work, and then it is given up. */
static void test_stuck(uint32_t ordered)
{
	struct sender *sender = &crowd.from[0];
	struct tfd_entry entry = one_imm;
	const struct tfd_record *record;
	struct tfd_event event;
	uint64_t job, last;

	open_crowd(1, 0, ordered, 0, 64);
	record = fill_ring(sender);
	CHECK(stalls(0) == 1);
	CHECK(sender->done == tfd_credits_grant(sim_conn(&crowd.to, sender->in)));
	last = sender->user.next_job;
	(void)user_submit(&sender->user, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = last });
	entry.dst_grant = sender->grant;
	entry.deadline_ns = crowd.now + 50 * PAIR_STEP_NS;
	job = submit(sender, entry);
	steps(40, PAIR_STEP_NS);
	CHECK(tfd_load_acquire(&record->done_id) == last);
	CHECK(record->status == TFD_JOB_CANCELLED && status_of(sender, job) == 0);
	steps(60, PAIR_STEP_NS);
	CHECK(status_of(sender, job) == TFD_JOB_DEADLINE);
	steps(45, SECONDS / 10);
	CHECK(!lost(sender, &event));
	steps(20, SECONDS / 10);
	CHECK(lost(sender, &event) && event.id == sender->out && event.detail == TFD_DETAIL_CONNECTION);
	record = &sender->user.records[(sender->done + 1) % RING];
	CHECK(tfd_load_acquire(&record->done_id) != sender->done + 1);
	CHECK_OK(tfd_conn_close(sender->host.core, sender->out, event.detail, NULL, NULL));
	CHECK(tfd_load_acquire(&record->done_id) == sender->done + 1 && record->status == TFD_JOB_PEER_LOST);
	crowd_close(&crowd);
}

/* Bytes that bring no count go out while what has one waits. */
static void test_bytes_go_on(void)
{
	struct sender *sender = &crowd.from[0];
	struct tfd_entry write = { .op = TFD_OP_WRITE, .flags = TFD_FLAG_EXACT, .length = 3 * 4096 };

	open_crowd(1, 0, 1, 0, 24);
	memset(sender->user.memory, 7, 3 * 4096);
	(void)fill_ring(sender);
	write.src_region = sender->user.region;
	write.dst_grant = sender->grant;
	(void)submit(sender, write);
	steps(100, PAIR_STEP_NS);
	CHECK(!tfd_credits_left(sim_conn(&sender->host, sender->out)));
	CHECK(memcmp(crowd.user.memory, sender->user.memory, 3 * 4096) == 0);
	crowd_close(&crowd);
}

/* Those who wait for one receiver hold nobody up who writes to another; and when they have gone, nobody is given up. */
static void test_others(void)
{
	struct sender *sender = &crowd.from[0];
	struct tfd_entry entry = one_imm;
	struct tfd_event event;
	struct user other;
	struct host host;
	uint64_t out, in;

	open_crowd(1, 0, 1, 0, 24);
	sim_host_open(&host, 1, "imm_depth=24", (struct tfd_group_options){ 0 });
	user_open(&host, &other);
	connect_hosts(&sender->host, &host, &out, &in);
	(void)fill_ring(sender);
	entry.dst_grant = open_grant(&sender->user, &other, out);
	(void)submit(sender, entry);
	for (int i = 0; i < 10; i++) {
		steps(1, PAIR_STEP_NS);
		(void)tfd_core_step(host.core, crowd.now);
	}
	CHECK(other.counters[0].value == 1);
	CHECK_OK(tfd_open_revoke(sender->host.core, sender->user.session, sender->grant, TFD_DETAIL_REVOKED));
	steps(200, SECONDS / 10);
	CHECK(!lost(sender, &event));
	crowd_close(&crowd);
	tfd_core_close(host.core);
	user_unmap(&other);
}

int main(void)
{
	test_senders();
	test_pages(0);
	test_pages(1);
	test_scatter();
	test_messages(0, 3); /* a grant of one, and not an entry to spare */
	test_messages(1, 3);
	test_messages(1, 24);
	test_stuck(0);
	test_stuck(1);
	test_bytes_go_on();
	test_others();
	return 0;
}

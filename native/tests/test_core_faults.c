/* SPDX-License-Identifier: Apache-2.0 */
/* What goes wrong once and must end well: odd tables, dead members, lost completions, full queues. On the simulated fabric. */
#include "sim_pair.h"

static const struct tfd_group_options plain = { .segment_bytes = 4096,
                                                .window_bytes = 32768,
                                                .cut_bytes = 1 };

static struct tfd_entry basic(const struct sim_pair *pair, uint8_t op, uint32_t imm)
{
	return (struct tfd_entry){
		.op = op, .src_region = pair->from.region, .dst_grant = pair->grant, .imm = imm
	};
}

/* Pages without bytes, all of them at one place: each counts once, and the job ends. */
static void test_empty_pages(void)
{
	for (uint32_t ordered = 0; ordered < 2; ordered++) {
		struct sim_pair pair;
		struct tfd_entry entry;

		sim_pair_open(&pair, 1, ordered ? "" : "ordered=0", plain);
		entry = basic(&pair, TFD_OP_WRITE_PAGES, 1);
		entry.table_count = 300;
		memset(sim_table(&pair.from), 0, 300 * sizeof(struct tfd_page));
		expect(sim_run(&pair, &pair.from, entry), TFD_JOB_OK, 0);
		sim_steps(&pair, 10);
		CHECK(pair.to.counters[1].value == 300);
		sim_pair_close(&pair);
	}
}

static void test_strides(struct sim_pair *pair)
{
	static const uint64_t strides[] = { UINT64_MAX, UINT64_MAX / 2, 1ull << 63, 1ull << 32,
	                                    REGION_BYTES };
	struct tfd_page *page = sim_table(&pair->from);
	struct tfd_entry entry = basic(pair, TFD_OP_WRITE_PAGES, 2);

	entry.table_count = 1;
	entry.length = 1;
	for (size_t i = 0; i < sizeof(strides) / sizeof(strides[0]); i++) {
		for (uint32_t index = 1; index <= UINT32_MAX / 3; index *= 3) {
			*page = (struct tfd_page){ .src = index };
			entry.src_stride = strides[i];
			entry.dst_stride = 0;
			expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
			*page = (struct tfd_page){ .dst = index };
			entry.src_stride = 0;
			entry.dst_stride = strides[i];
			expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID,
			       TFD_DETAIL_DESTINATION_BOUNDS);
		}
	}
	*page = (struct tfd_page){ .src = 1 };
	entry.src_offset = UINT64_MAX;
	entry.src_stride = 1; /* the sum wraps to 0 */
	entry.dst_stride = 0;
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
	entry.table_count =
		0; /* no page: its count alone would leave the grant, and break a NIC's connection */
	entry.flags = TFD_FLAG_COUNT_JOB;
	entry.src_offset = 0;
	entry.dst_offset = REGION_BYTES + 1;
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	CHECK(pair->to.counters[2].value == 0);
	entry.dst_offset = REGION_BYTES;
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_OK, 0);
}

/* One target of three is wrong: nothing of the job is sent. */
static void test_bad_targets(struct sim_pair *pair)
{
	struct tfd_target *targets = sim_table(&pair->from);
	struct tfd_entry entry = basic(pair, TFD_OP_SCATTER, 3);

	entry.dst_grant = 0;
	entry.table_count = 3;
	for (uint32_t bad = 0; bad < 3; bad++) {
		for (uint32_t i = 0; i < 3; i++)
			targets[i] =
				(struct tfd_target){ .dst_grant = pair->grant, .dst_offset = i, .length = 1 };
		targets[bad].dst_grant ^= 1ull << 40; /* of another generation */
		expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_GRANT);
		targets[bad].dst_grant = pair->grant;
		targets[bad].src_offset = UINT64_MAX;
		expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
	}
	entry.table_count = TFD_MAX_TARGETS + 1;
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	CHECK(pair->to.counters[3].value == 0);
}

static void test_cancels(struct sim_pair *pair)
{
	struct tfd_entry write = basic(pair, TFD_OP_WRITE, 4);
	struct tfd_entry cancel = { .op = TFD_OP_CANCEL };
	struct tfd_event event;
	uint64_t job;

	expect(sim_run(pair, &pair->from, write), TFD_JOB_OK, 0);
	cancel.argument = pair->from.next_job; /* over */
	expect(sim_run(pair, &pair->from, cancel), TFD_JOB_INVALID, TFD_DETAIL_NO_SUCH_JOB);
	cancel.argument = pair->from.next_job + 1; /* itself */
	expect(sim_run(pair, &pair->from, cancel), TFD_JOB_INVALID, TFD_DETAIL_NO_SUCH_JOB);
	write.length = REGION_BYTES;
	(void)user_submit(&pair->from, write);
	job = pair->from.next_job;
	sim_steps(pair, 2);
	cancel.argument = job + 64; /* the same record, another job */
	expect(sim_run(pair, &pair->from, cancel), TFD_JOB_INVALID, TFD_DETAIL_NO_SUCH_JOB);
	cancel.argument = job;
	expect(sim_run(pair, &pair->from, cancel), TFD_JOB_OK, 0);
	sim_await(pair, &pair->from.records[job % 64], job);
	expect(&pair->from.records[job % 64], TFD_JOB_CANCELLED, 0);
	while (sim_event(&pair->a, TFD_EVENT_LOST, &event))
		;
	write.length = 1;
	write.deadline_ns = 1; /* passed before it was taken: whoever counts on it is told all the same */
	expect(sim_run(pair, &pair->from, write), TFD_JOB_DEADLINE, 0);
	CHECK(sim_event(&pair->a, TFD_EVENT_LOST, &event) && event.imm == 4 && event.count == 1 &&
	      event.units == 0);
	CHECK(pair->to.counters[4].value == 1);
}

static void test_refusals(void)
{
	struct sim_pair pair;

	sim_pair_open(&pair, 2, "delay_us=50", plain);
	test_strides(&pair);
	test_bad_targets(&pair);
	test_cancels(&pair);
	sim_pair_close(&pair);
}

/* The client rewrites a table that is being read: the job ends, as whatever it comes to, and nothing leaves the grant. */
static void test_table_changes(void)
{
	struct tfd_open_options half = { .rights = TFD_RIGHT_WRITE,
	                                 .length = REGION_BYTES / 2,
	                                 .imm_count = 16 };
	struct sim_pair pair;
	struct tfd_page *pages;
	struct tfd_entry entry;
	uint64_t job, open, random = 1;
	uint32_t invalid = 0;

	sim_pair_open(&pair, 2, "delay_us=20", plain);
	pages = sim_table(&pair.from);
	memset(pair.to.memory, 0x5a, REGION_BYTES);
	sim_paths(&pair, &pair.to, &half);
	CHECK_OK(tfd_open_add(pair.a.core, pair.from.session, &half, &open));
	for (uint32_t round = 0; round < 40; round++) {
		const struct tfd_record *record;

		entry = basic(&pair, TFD_OP_WRITE_PAGES, 5);
		entry.dst_grant = open;
		entry.length = entry.src_stride = entry.dst_stride = 512;
		entry.table_count = 8192;
		for (uint32_t i = 0; i < entry.table_count; i++)
			pages[i] = (struct tfd_page){ .src = i, .dst = i };
		record = user_submit(&pair.from, entry);
		job = pair.from.next_job;
		while (tfd_load_acquire(&record->done_id) != job) {
			random = random * 6364136223846793005ull + 1442695040888963407ull;
			pages[(random >> 33) % entry.table_count] =
				(struct tfd_page){ .src = (uint32_t)(random >> 20),
				                   .dst = round % 2 ? 7 : (uint32_t)(random >> 40) };
			sim_step(&pair, PAIR_STEP_NS);
		}
		CHECK(record->status == TFD_JOB_INVALID || record->status == TFD_JOB_OK);
		invalid += record->status == TFD_JOB_INVALID;
	}
	CHECK(invalid > 0);
	for (uint32_t i = REGION_BYTES / 2; i < REGION_BYTES; i++)
		CHECK(pair.to.memory[i] == 0x5a);
	sim_pair_close(&pair);
}

/* A scatter and a barrier of which one member has died: the others get theirs, and the job ends as that one failed. */
static void test_dead_member(void)
{
	for (int broken = 0; broken < 2; broken++) {
		struct sim_pair pair;
		struct tfd_target *targets;
		struct tfd_event event;
		struct tfd_entry entry;
		uint64_t other;

		sim_pair_open(&pair, 2, "delay_us=20", plain);
		targets = sim_table(&pair.from);
		pair.paths = 1; /* the other grant goes by the first path only, which dies */
		other = sim_grant(&pair, &pair.from, &pair.to);
		if (broken)
			tfd_sim_break(sim_conn(&pair.a, pair.out[0])->half);
		CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, NULL));
		CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, NULL, NULL));
		for (uint32_t op = TFD_OP_SCATTER; op <= TFD_OP_BARRIER; op++) {
			bool bytes = op == TFD_OP_SCATTER;

			entry = basic(&pair, (uint8_t)op, 6);
			entry.dst_grant = 0;
			entry.table_count = 9;
			if (!bytes)
				entry.src_region = 0;
			for (uint32_t i = 0; i < 9; i++)
				targets[i] = (struct tfd_target){ .dst_grant = i == 4 ? other : pair.grant,
				                                  .dst_offset = 10000 * i,
				                                  .length = bytes ? 9000 : 0 };
			expect(sim_run(&pair, &pair.from, entry), TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
			CHECK(sim_event(&pair.a, TFD_EVENT_LOST, &event));
			CHECK(event.id == other && event.imm == 6 && event.count == 1 && event.units == 0);
			CHECK(!sim_event(&pair.a, TFD_EVENT_LOST, &event));
			sim_steps(&pair, 10);
			CHECK(pair.to.counters[6].value == (bytes ? 8u : 16u));
		}
		for (uint32_t i = 0; i < 9; i++)
			CHECK((memcmp(pair.to.memory + 10000 * i, pair.from.memory, 9000) == 0) == (i != 4));
		sim_pair_close(&pair);
	}
}

/* More jobs than records and ring entries: the client waits for room, nothing is lost and the session stays whole. */
static void test_full_ring(void)
{
	struct sim_pair pair;
	struct tfd_event event;
	struct tfd_entry entry;

	sim_pair_open(&pair, 1, "delay_us=30", plain);
	entry = basic(&pair, TFD_OP_WRITE, 7);
	entry.length = 5000;
	for (uint64_t i = 0; i < 1000; i++) {
		uint64_t next = pair.from.next_job + 1;

		while (pair.from.ring->tail - tfd_load_acquire(&pair.from.ring->head) == 64 ||
		       (next > 64 && pair.from.records[next % 64].done_id != next - 64))
			sim_step(&pair, PAIR_STEP_NS);
		(void)user_submit(&pair.from, entry);
	}
	for (uint64_t job = pair.from.next_job - 63; job <= pair.from.next_job; job++)
		sim_await(&pair, &pair.from.records[job % 64], job);
	sim_steps(&pair, 10);
	CHECK(pair.to.counters[7].value == 1000);
	CHECK(!sim_event(&pair.a, TFD_EVENT_SESSION_BROKEN, &event));
	sim_pair_close(&pair);
}

/* Regions come and go while jobs read others: one in use stays, one that is gone is refused. */
static void test_registering(void)
{
	struct sim_pair pair;
	struct tfd_region_options options = { .writable = 1, .length = 65536 };
	struct tfd_entry entry;
	uint64_t count = 0;

	sim_pair_open(&pair, 2, "delay_us=30", plain);
	options.fd = memfd_create("test", MFD_CLOEXEC);
	CHECK(options.fd >= 0 && ftruncate(options.fd, 65536) == 0);
	entry = basic(&pair, TFD_OP_WRITE, 8);
	entry.length = 65536;
	for (int i = 0; i < 200; i++) {
		const struct tfd_record *record;
		uint64_t region, job;

		CHECK_OK(tfd_region_add(pair.a.core, pair.from.session, &options, &region, &error));
		entry.src_region = pair.from.region;
		(void)user_submit(&pair.from, entry);
		entry.src_region = region;
		record = user_submit(&pair.from, entry);
		job = pair.from.next_job;
		sim_steps(&pair, 1 + i % 3);
		if (tfd_load_acquire(&record->done_id) != job)
			CHECK(tfd_region_remove(pair.a.core, pair.from.session, region) == -EBUSY);
		sim_await(&pair, record, job);
		CHECK_OK(tfd_region_remove(pair.a.core, pair.from.session, region));
		expect(record, TFD_JOB_OK, 0);
		expect(sim_run(&pair, &pair.from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_REGION);
		count += 2;
	}
	sim_steps(&pair, 100);
	CHECK(pair.to.counters[8].value == count);
	(void)close(options.fd);
	sim_pair_close(&pair);
}

/* The far side never told its address: jobs wait, but not for ever. */
static void test_lost_handshake(void)
{
	struct sim_pair pair;
	uint8_t address[TFD_ADDRESS_MAX];
	size_t bytes = sizeof(address);
	const struct tfd_record *record;
	struct tfd_event event;
	uint64_t conn;

	sim_pair_open(&pair, 1, "", plain);
	CHECK_OK(tfd_conn_open(pair.a.core, pair.a.group, 0, 1, 1, &conn, address, &bytes, &error));
	CHECK(tfd_conn_start(pair.a.core, conn, address, 0, &error) == -EPROTO);
	CHECK(tfd_conn_start(pair.a.core, conn, address, TFD_ADDRESS_MAX, &error) == -EPROTO);
	pair.out[0] = conn;
	pair.grant = sim_grant(&pair, &pair.from, &pair.to);
	record = user_submit(&pair.from, basic(&pair, TFD_OP_WRITE, 9));
	for (int i = 0; i < 30; i++)
		sim_step(&pair, 500000000);
	CHECK(sim_event(&pair.a, TFD_EVENT_CONN_LOST, &event) && event.id == conn);
	CHECK_OK(tfd_conn_close(pair.a.core, conn, TFD_DETAIL_CONNECTION, NULL, NULL));
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	CHECK(tfd_conn_start(pair.a.core, conn, address, bytes, &error) == -ENOENT);
	sim_pair_close(&pair);
}

/* The receiver's queue lost completions: nobody may be told how many immediates have landed. */
static void test_overrun(void)
{
	struct sim_pair pair;
	struct tfd_event event;
	struct tfd_landed landed;

	sim_pair_open(&pair, 2, "", plain);
	for (int i = 0; i < 8; i++)
		(void)user_submit(&pair.from, basic(&pair, TFD_OP_WRITE, 10));
	for (int i = 0; i < 4; i++) /* its far side does not poll */
		(void)tfd_core_step(pair.a.core, pair.now);
	tfd_sim_overrun(pair.b.core->groups[0]->rails[0].domain);
	sim_steps(&pair, 4);
	CHECK(pair.to.counters[10].value == 4); /* by the other rail */
	CHECK(sim_event(&pair.b, TFD_EVENT_CONN_LOST, &event));
	CHECK(event.id == pair.in[0] && event.detail == TFD_DETAIL_PROVIDER);
	CHECK(!sim_event(&pair.b, TFD_EVENT_CONN_LOST, &event));
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!landed.channels);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[1], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(landed.channels == 1 && landed.imms[0] == 4);
	sim_pair_close(&pair);
}

/* A half closes while its queue is full of others' completions: what it has not looked at it does not deny. */
static void test_full_queue(void)
{
	struct sim_pair pair;
	struct tfd_landed landed;
	uint64_t out, in;

	sim_pair_open(&pair, 1, "", plain);
	connect_rails(&pair.a, 0, &pair.b, 0, &out, &in);
	for (int i = 0; i < 20000; i++) {
		struct tfd_entry entry = basic(&pair, TFD_OP_IMM, 11);

		entry.src_region = 0;
		(void)user_submit(&pair.from, entry);
		for (int k = 0; k < 3; k++)
			(void)tfd_core_step(pair.a.core, pair.now);
		CHECK(pair.from.records[pair.from.next_job % 64].done_id == pair.from.next_job);
	}
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!landed.channels || landed.imms[0] == 20000);
	sim_pair_close(&pair);
}

/* On a rail that does not tell whose an immediate is, a peer's end takes nothing out that was never put down for it. */
static void test_settle_unordered(void)
{
	struct sim_pair pair;
	struct tfd_session *session;

	sim_pair_open(&pair, 1, "ordered=0", plain);
	session = tfd_session_get(pair.b.core, pair.to.session);
	tfd_imm_arrived(pair.b.core->groups[0]->worker, 0,
	                2u << 29 | session->name_space << TFD_IMM_BITS | 12);
	CHECK(session->counts[12].eighths == 4);
	CHECK_OK(tfd_counters_fault(pair.b.core, pair.to.session, 12, 1, 1, 4, 77)); /* that half is lost */
	CHECK(session->counts[12].eighths == 0);
	CHECK_OK(tfd_counters_settle(pair.b.core, 77));
	CHECK(session->counts[12].eighths == 0);
	tfd_session_put(session);
	sim_pair_close(&pair);
}

/* Scatters to very many: what they need of the daemon's memory has a bound, and those within it all end. */
static void test_many_targets(void)
{
	struct sim_pair pair;
	struct tfd_target *targets;
	struct tfd_entry entry;
	uint32_t refused = 0;

	sim_pair_open(&pair, 1, "move=0", plain);
	targets = sim_table(&pair.from);
	for (uint32_t i = 0; i < TFD_MAX_TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair.grant };
	entry = basic(&pair, TFD_OP_BARRIER, 13);
	entry.src_region = entry.dst_grant = 0;
	entry.table_count = TFD_MAX_TARGETS;
	for (uint32_t i = 0; i < 40; i++)
		(void)user_submit(&pair.from, entry);
	for (uint64_t job = 1; job <= 40; job++) {
		sim_await(&pair, &pair.from.records[job], job);
		refused += pair.from.records[job].status == TFD_JOB_QUOTA;
		if (pair.from.records[job].status != TFD_JOB_QUOTA)
			expect(&pair.from.records[job], TFD_JOB_OK, 0);
	}
	sim_steps(&pair, 100);
	CHECK(refused == 40 - TFD_SESSION_SHARDS / TFD_MAX_TARGETS);
	CHECK(pair.to.counters[13].value == TFD_SESSION_SHARDS);
	expect(sim_run(&pair, &pair.from, entry), TFD_JOB_OK, 0); /* there is room again */
	sim_pair_close(&pair);
}

int main(void)
{
	test_empty_pages();
	test_refusals();
	test_table_changes();
	test_dead_member();
	test_full_ring();
	test_registering();
	test_lost_handshake();
	test_overrun();
	test_full_queue();
	test_settle_unordered();
	test_many_targets();
	return 0;
}

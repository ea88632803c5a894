/* SPDX-License-Identifier: Apache-2.0 */
/* Several paths: who carries what, what one that dies leaves to the others, and when a job is over. On the simulated fabric. */
#include "sim_pair.h"

#define WRITE_BYTES 4096u

static const struct tfd_group_options whole = { .segment_bytes = WRITE_BYTES,
                                                .window_bytes = 2 * WRITE_BYTES, /* two in flight */
                                                .cut_bytes = 1u << 30 };
static const struct tfd_group_options cut = { .segment_bytes = WRITE_BYTES,
                                              .window_bytes = 2 * WRITE_BYTES,
                                              .cut_bytes = 1 };

static struct tfd_entry write_of(const struct sim_pair *pair, uint32_t number, uint64_t length)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = pair->from.region,
	                           .src_offset = (uint64_t)number * length,
	                           .dst_grant = pair->grant,
	                           .dst_offset = (uint64_t)number * length,
	                           .length = length,
	                           .imm = 1 };
}

static uint64_t rail_sent(const struct host *host, uint32_t rail)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(host->core, host->group, rail, &info));
	return info.bytes_sent;
}

/*
 * Which rail a write takes goes round. Every rail has keys of its own, and refuses the others': a shard on the wrong one would
 * fail.
 */
static void test_rotation(void)
{
	for (uint32_t paths = 1; paths <= PAIR_PATHS; paths++) {
		struct sim_pair pair;

		sim_pair_open(&pair, paths, "", whole);
		for (uint32_t i = 0; i < 12 * paths; i++) {
			expect(sim_run(&pair, &pair.from, write_of(&pair, i, WRITE_BYTES)), TFD_JOB_OK, 0);
			CHECK(rail_sent(&pair.a, i % paths) == (i / paths + 1) * WRITE_BYTES);
		}
		CHECK(memcmp(pair.to.memory, pair.from.memory, 12 * paths * WRITE_BYTES) == 0);
		CHECK(pair.to.counters[1].value == 12 * paths);
		sim_pair_close(&pair);
	}
}

/* No byte is lost where a length does not divide over the rails, wherever the rotation stands. */
static void test_lengths(void)
{
	static const uint64_t lengths[] = { 1, 2, 3, 7, 8, 9, 63, 64, 65, 4095, 4097, 16383, 16385, 100003 };

	for (uint32_t paths = 1; paths <= PAIR_PATHS; paths++) {
		struct sim_pair pair;
		uint64_t count = 0;

		sim_pair_open(&pair, paths, "delay_us=7", cut);
		for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
			for (uint32_t turn = 0; turn < paths; turn++) {
				struct tfd_entry entry = write_of(&pair, 0, lengths[i]);

				entry.dst_offset = 64;
				entry.src_offset = 3 + turn;
				memset(pair.to.memory, 0xa5, lengths[i] + 128);
				expect(sim_run(&pair, &pair.from, entry), TFD_JOB_OK, 0);
				sim_steps(&pair, 5);
				CHECK(pair.to.counters[1].value == ++count);
				CHECK(memcmp(pair.to.memory + 64, pair.from.memory + 3 + turn, lengths[i]) ==
				      0);
				CHECK(pair.to.memory[63] == 0xa5 && pair.to.memory[64 + lengths[i]] == 0xa5);
			}
		}
		sim_pair_close(&pair);
	}
}

/* Of eight writes on two paths two are under way on each. The first path breaks, and nobody tells what has landed by it. */
static void test_queued_move(const struct tfd_landed *far_landed)
{
	bool known = far_landed && far_landed->channels == 1 && !far_landed->imms[0];
	struct sim_pair pair;
	struct tfd_event event;
	uint64_t lost = 0;

	sim_pair_open(&pair, 2, "delay_us=1000", whole);
	for (uint32_t i = 0; i < 8; i++)
		(void)user_submit(&pair.from, write_of(&pair, i, WRITE_BYTES));
	sim_step(&pair, 1); /* all are taken, none has landed */
	CHECK(pair.to.counters[1].value == 0);
	CHECK(sim_conn(&pair.a, pair.out[0])->inflight_wrs == 2);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_HEARTBEAT, far_landed, NULL));
	for (uint32_t i = 0; i < 8; i++) {
		bool under_way = i == 0 || i == 2;

		sim_await(&pair, &pair.from.records[i + 1], i + 1);
		if (under_way && !known)
			expect(&pair.from.records[i + 1], TFD_JOB_PEER_LOST, TFD_DETAIL_HEARTBEAT);
		else
			expect(&pair.from.records[i + 1], TFD_JOB_OK, 0);
	}
	while (sim_event(&pair.a, TFD_EVENT_LOST, &event))
		lost += event.imm == 1 && event.units == 0;
	CHECK(lost == (known ? 0u : 2u));
	sim_steps(&pair, 1000);
	CHECK(pair.to.counters[1].value == (known ? 8u : 6u));
	CHECK(rail_sent(&pair.a, 1) == (known ? 8u : 6u) * WRITE_BYTES);
	sim_pair_close(&pair);
}

/* One rail fails a job while another still reads its memory: it ends when that has let go, too. */
static void test_error_waits_for_others(void)
{
	struct sim_pair pair;
	const struct tfd_record *record;
	struct tfd_conn *other;
	uint64_t steps = 0;

	sim_pair_open(&pair, 2, "delay_us=5000", cut);
	record = user_submit(&pair.from, write_of(&pair, 0, 2 * WRITE_BYTES));
	sim_step(&pair, 1);
	other = sim_conn(&pair.a, pair.out[1]);
	CHECK(other->inflight_wrs == 1 && sim_conn(&pair.a, pair.out[0])->inflight_wrs == 1);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	while (other->inflight_wrs) {
		CHECK(tfd_load_acquire(&record->done_id) != pair.from.next_job);
		CHECK(tfd_region_remove(pair.a.core, pair.from.session, pair.from.region) == -EBUSY);
		sim_step(&pair, PAIR_STEP_NS);
		steps++;
	}
	CHECK(steps > 0);
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	CHECK_OK(tfd_region_remove(pair.a.core, pair.from.session, pair.from.region));
	sim_pair_close(&pair);
}

/* A region that is gone is gone on every rail. */
static void test_unregistered_everywhere(void)
{
	for (uint32_t rail = 0; rail < PAIR_PATHS; rail++) {
		struct tfd_open_options options = {
			.rights = TFD_RIGHT_WRITE, .length = REGION_BYTES, .imm_count = 16, .path_count = 1
		};
		struct sim_pair pair;
		struct tfd_open_options all = { 0 };
		struct tfd_entry entry;

		sim_pair_open(&pair, PAIR_PATHS, "", whole);
		sim_paths(&pair, &pair.to, &all);
		options.name_space = all.name_space;
		options.paths[0] = all.paths[rail];
		CHECK_OK(tfd_open_add(pair.a.core, pair.from.session, &options, &pair.grant));
		entry = write_of(&pair, 1, WRITE_BYTES);
		expect(sim_run(&pair, &pair.from, entry), TFD_JOB_OK, 0);
		CHECK_OK(tfd_region_remove(pair.b.core, pair.to.session, pair.to.region));
		memset(pair.to.memory, 0x3c, REGION_BYTES);
		expect(sim_run(&pair, &pair.from, entry), TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_CONNECTION);
		for (uint32_t i = 0; i < REGION_BYTES; i++)
			CHECK(pair.to.memory[i] == 0x3c);
		sim_pair_close(&pair);
	}
}

/* An exact write whose data is acknowledged waits for the others' with nothing on its path: which gets a new connection meanwhile. */
static void test_replaced_under_exact(void)
{
	struct sim_pair pair;
	struct tfd_entry entry;
	struct tfd_open_options all = { 0 };
	const struct tfd_record *record;
	struct tfd_landed landed;

	sim_pair_open(&pair, 2, "delay_us=2000", cut);
	entry = write_of(&pair, 0, 2 * WRITE_BYTES);
	entry.flags = TFD_FLAG_EXACT;
	record = user_submit(&pair.from, entry);
	sim_step(&pair, 1);
	while (sim_conn(&pair.a, pair.out[0])->inflight_wrs && sim_conn(&pair.a, pair.out[1])->inflight_wrs)
		sim_step(&pair, PAIR_STEP_NS);
	for (uint32_t i = 0; i < 2; i++) {
		if (sim_conn(&pair.a, pair.out[i])->inflight_wrs)
			continue;
		CHECK_OK(tfd_conn_close(pair.b.core, pair.in[i], TFD_DETAIL_CONNECTION, NULL, &landed));
		CHECK_OK(tfd_conn_close(pair.a.core, pair.out[i], TFD_DETAIL_CONNECTION, &landed, NULL));
		connect_rails(&pair.a, i, &pair.b, i, &pair.out[i], &pair.in[i]);
		sim_paths(&pair, &pair.to, &all);
		CHECK_OK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, i, &all.paths[i]));
	}
	CHECK(tfd_load_acquire(&record->done_id) != pair.from.next_job);
	CHECK(pair.to.counters[1].value == 0);
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_OK, 0);
	sim_steps(&pair, 500);
	CHECK(pair.to.counters[1].value == 1);
	sim_pair_close(&pair);
}

int main(void)
{
	test_rotation();
	test_lengths();
	test_queued_move(NULL);
	test_queued_move(&(struct tfd_landed){ .channels = 1 });
	test_queued_move(&(struct tfd_landed){ .channels = 3 }); /* of a rail with one */
	test_queued_move(&(struct tfd_landed){ .imms = { 3 }, .channels = 1 }); /* more than were posted */
	test_error_waits_for_others();
	test_unregistered_everywhere();
	test_replaced_under_exact();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection of three channels, each ordered by itself: what landed by each is numbered, told and reconciled apart. On the
 * simulated fabric, where they overtake each other.
 */
#include "sim_pair.h"

#define WRITE_BYTES 4096u
#define JOBS 32u
#define SECONDS 1000000000ull

static const struct tfd_group_options many = { .segment_bytes = WRITE_BYTES,
                                               .window_bytes = JOBS * WRITE_BYTES,
                                               .cut_bytes = 1u << 30 };

/* Each has a place of its own. */
static struct tfd_entry write_of(const struct sim_pair *pair, uint32_t number, uint64_t priority)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .priority = (uint8_t)priority,
	                           .src_region = pair->from.region,
	                           .src_offset = (uint64_t)number * WRITE_BYTES,
	                           .dst_grant = pair->grant,
	                           .dst_offset = (uint64_t)number * WRITE_BYTES,
	                           .length = WRITE_BYTES,
	                           .imm = 1 + (uint32_t)priority };
}

static struct tfd_worker *worker_of(const struct host *host)
{
	return host->core->groups[host->group]->worker;
}

static void check_counts(const struct sim_pair *pair, uint64_t bulk, uint64_t latency)
{
	CHECK(pair->to.counters[1 + TFD_PRIORITY_BULK].value == bulk);
	CHECK(pair->to.counters[1 + TFD_PRIORITY_LATENCY].value == latency);
}

/*
 * Bulk and urgent writes in turn on two paths, one of which breaks when some of each have landed, more of the one than of the other.
 * What each channel has landed goes once, and the rest by the other path: all jobs are well, all counts exact.
 */
static uint32_t lose_path(uint64_t seed, uint32_t steps)
{
	struct tfd_landed landed;
	struct sim_pair pair;
	char fabric[TFD_NAME_MAX];

	(void)snprintf(fabric, sizeof(fabric), "seed=%llu,channels=3,delay_us=300", (unsigned long long)seed);
	sim_pair_open(&pair, 2, fabric, many);
	for (uint32_t i = 0; i < JOBS; i++)
		(void)user_submit(&pair.from, write_of(&pair, i, i % 2));
	sim_steps(&pair, (int)steps);
	tfd_sim_break(sim_conn(&pair.a, pair.out[0])->half);
	sim_steps(&pair, 1);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(landed.channels == 3 && !landed.imms[TFD_TRAFFIC_MESSAGE]);
	CHECK(landed.imms[0] + landed.imms[1] <= JOBS / 2);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, &landed, NULL));
	for (uint64_t job = 1; job <= JOBS; job++) {
		sim_await(&pair, &pair.from.records[job % pair.from.header->record_count], job);
		expect(&pair.from.records[job % pair.from.header->record_count], TFD_JOB_OK, 0);
	}
	sim_steps(&pair, 100);
	check_counts(&pair, JOBS / 2, JOBS / 2);
	CHECK(memcmp(pair.to.memory, pair.from.memory, JOBS * WRITE_BYTES) == 0);
	sim_pair_close(&pair);
	return landed.imms[0] != landed.imms[1];
}

static void test_paths_lost(void)
{
	uint32_t apart = 0;

	for (uint64_t seed = 1; seed <= 40; seed++)
		apart += lose_path(seed, 5 + (uint32_t)seed % 40);
	CHECK(apart > 10);
}

/* What cannot be is not believed: jobs under way end with an error, none is taken for landed. */
static void test_nonsense_told(const struct tfd_landed *told)
{
	struct sim_pair pair;

	sim_pair_open(&pair, 2, "channels=3,delay_us=1000", many);
	for (uint32_t i = 0; i < 4; i++)
		(void)user_submit(&pair.from, write_of(&pair, i, TFD_PRIORITY_LATENCY));
	sim_step(&pair, 1);
	CHECK(sim_conn(&pair.a, pair.out[0])->inflight_wrs == 2);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, told, NULL));
	for (uint32_t i = 0; i < 4; i++) {
		sim_await(&pair, &pair.from.records[i + 1], i + 1);
		expect(&pair.from.records[i + 1], i % 2 ? TFD_JOB_OK : TFD_JOB_PEER_LOST,
		       i % 2 ? 0 : TFD_DETAIL_CONNECTION);
	}
	sim_steps(&pair, 200);
	check_counts(&pair, 0, 2);
	sim_pair_close(&pair);
}

/* A provider that names a channel that there is not has miscounted: nobody is told how many have landed. */
static void test_order_out_of_bounds(const char *fabric, uint32_t order)
{
	struct tfd_landed landed = { .channels = 1 };
	struct sim_pair pair;
	struct tfd_event event;
	struct tfd_wc wc = { .type = TFD_WC_IMM, .order = order };
	struct tfd_conn *in;

	sim_pair_open(&pair, 1, fabric, many);
	expect(sim_run(&pair, &pair.from, write_of(&pair, 0, TFD_PRIORITY_BULK)), TFD_JOB_OK, 0);
	in = wc.owner = sim_conn(&pair.b, pair.in[0]);
	tfd_completion_handle(worker_of(&pair.b), in->rail, &wc);
	sim_steps(&pair, 1);
	CHECK(sim_event(&pair.b, TFD_EVENT_CONN_LOST, &event));
	CHECK(event.id == pair.in[0] && event.detail == TFD_DETAIL_PROVIDER);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!landed.channels);
	sim_pair_close(&pair);
}

/* Nothing comes back by one channel while the others go on: the connection is broken all the same, and what waits goes elsewhere. */
static void test_one_channel_stands(uint32_t traffic)
{
	struct sim_pair pair;
	struct tfd_event event;
	struct tfd_landed landed;
	uint64_t began, stuck;

	sim_pair_open(&pair, 2, "channels=3", many);
	began = pair.now;
	tfd_sim_mute_channel(sim_conn(&pair.a, pair.out[0])->half, traffic);
	(void)user_submit(&pair.from, write_of(&pair, 0, traffic));
	stuck = pair.from.next_job;
	while (!sim_event(&pair.a, TFD_EVENT_CONN_LOST, &event)) {
		expect(sim_run(&pair, &pair.from, write_of(&pair, 1, !traffic)), TFD_JOB_OK, 0);
		sim_step(&pair, SECONDS / 8);
		CHECK(pair.now - began < 7 * SECONDS);
	}
	CHECK(event.id == pair.out[0] && pair.now - began > 5 * SECONDS);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!landed.imms[traffic] && landed.imms[!traffic]);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, &landed, NULL));
	for (int i = 0; i < 100 && pair.to.counters[1 + traffic].value != 1; i++)
		sim_step(&pair, PAIR_STEP_NS);
	CHECK(pair.to.counters[1 + traffic].value == 1 && stuck == 1);
	sim_pair_close(&pair);
}

/* A connection is proven when the far side has answered by all of its channels. */
static void test_probe(uint32_t channels)
{
	char fabric[TFD_NAME_MAX];

	(void)snprintf(fabric, sizeof(fabric), "channels=%u", channels);
	for (uint32_t mute = 0; mute <= channels; mute++) {
		struct sim_pair pair;
		struct tfd_event event;

		sim_pair_open(&pair, 1, fabric, many);
		if (mute < channels)
			tfd_sim_mute_channel(sim_conn(&pair.a, pair.out[0])->half, mute);
		CHECK_OK(tfd_conn_probe(pair.a.core, pair.out[0]));
		sim_steps(&pair, 100);
		CHECK(sim_event(&pair.a, TFD_EVENT_CONN_PROVEN, &event) == (mute == channels));
		CHECK(tfd_conn_probe(pair.a.core, pair.out[0]) == -EBUSY);
		sim_pair_close(&pair);
	}
}

/*
 * A full far queue with three channels: whatever ASK overtakes, or is overtaken by, no more immediates wait than there is room for, and
 * nobody is taken for one that floods.
 */
static void test_credits(uint64_t seed)
{
	struct sim_pair pair;
	struct tfd_rail_info info;
	char fabric[TFD_NAME_MAX];

	(void)snprintf(fabric, sizeof(fabric), "seed=%llu,channels=3,delay_us=200,imm_depth=24",
	               (unsigned long long)seed);
	sim_pair_open(&pair, 1, fabric, many);
	for (uint64_t job = 1; job <= 20 * JOBS; job++) {
		const struct tfd_record *record = &pair.from.records[job % 64];

		if (job > 64)
			sim_await(&pair, record, job - 64);
		(void)user_submit(&pair.from, write_of(&pair, (uint32_t)job % JOBS, job / 3 % 2));
		sim_step(&pair, seed * PAIR_STEP_NS / 8);
	}
	for (int i = 0; i < 2000; i++)
		sim_step(&pair, PAIR_STEP_NS);
	CHECK(pair.to.counters[1].value + pair.to.counters[2].value == 20 * JOBS);
	CHECK(tfd_sim_overruns() == 0);
	CHECK_OK(tfd_group_rail(pair.b.core, pair.b.group, 0, &info));
	CHECK(info.credit_floods == 0 && info.channels == 3);
	sim_pair_close(&pair);
}

int main(void)
{
	test_paths_lost();
	test_nonsense_told(&(struct tfd_landed){ .channels = 1 });
	test_nonsense_told(&(struct tfd_landed){ .imms = { 1 }, .channels = 3 }); /* bulk: none was posted */
	test_nonsense_told(&(struct tfd_landed){ .imms = { 0, 3 }, .channels = 3 });
	test_order_out_of_bounds("channels=3", 3);
	test_order_out_of_bounds("", 1);
	test_order_out_of_bounds("", UINT32_MAX);
	test_one_channel_stands(TFD_PRIORITY_BULK);
	test_one_channel_stands(TFD_PRIORITY_LATENCY);
	test_probe(1);
	test_probe(3);
	for (uint64_t seed = 1; seed <= 12; seed++)
		test_credits(seed);
	return 0;
}

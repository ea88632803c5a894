/* SPDX-License-Identifier: Apache-2.0 */
/* Credits where connections break, the queue is shared out, and the far side does not keep to them. */
#include "sim_pair.h"

#define SECONDS 1000000000ull

static const struct tfd_group_options plain;
static const struct tfd_entry one_imm = { .op = TFD_OP_IMM };

static struct tfd_worker *worker_of(const struct host *host)
{
	return host->core->groups[host->group]->worker;
}

static struct tfd_rail *rail_of(const struct host *host, uint32_t rail)
{
	return &host->core->groups[host->group]->rails[rail];
}

static void step_sender(struct sim_pair *pair, uint32_t count)
{
	while (count--) {
		pair->now += PAIR_STEP_NS;
		tfd_sim_set_now(pair->now);
		(void)tfd_core_step(pair->a.core, pair->now);
	}
}

static void submit_imms(struct sim_pair *pair, uint32_t count)
{
	struct tfd_entry entry = one_imm;

	entry.dst_grant = pair->grant;
	while (count--)
		(void)user_submit(&pair->from, entry);
}

/* ---- the rail's queue ---- */

/* All of it is given out, then no more; what a half had is free again once nothing can come by it. */
static void test_shared_out(uint32_t ordered)
{
	struct host host;
	uint8_t address[TFD_ADDRESS_MAX];
	uint64_t conns[64], first = 0;
	uint32_t count = 0, shares = 0;
	uint64_t now = 1000000;

	sim_host_open(&host, 1, ordered ? "imm_depth=64" : "ordered=0,imm_depth=64", plain);
	(void)tfd_core_step(host.core, now);
	for (int round = 0; round < 2; round++) {
		for (count = shares = 0;; count++) {
			size_t bytes = sizeof(address);
			int rc = tfd_conn_open(host.core, 0, 0, count % 2, 1, &conns[count], address, &bytes,
			                       &error);

			if (rc) {
				CHECK(rc == -ENOSPC && strstr(error.text, "64 arrived immediates"));
				break;
			}
			CHECK(tfd_credits_grant(sim_conn(&host, conns[count])) >= 1);
			shares += sim_conn(&host, conns[count])->credits.share;
		}
		CHECK(count > 10 && shares <= 64 && rail_of(&host, 0)->credits_free == 64 - shares);
		CHECK(!first || count == first);
		first = count;
		while (count--)
			CHECK_OK(tfd_conn_close(host.core, conns[count], 0, NULL, NULL));
		CHECK(rail_of(&host, 0)->credits_free == (ordered ? 64 : 64 - shares));
		(void)tfd_core_step(host.core, now += 2 * SECONDS);
	}
	tfd_core_close(host.core);
}

/* ---- breaks ---- */

/* Its shards wait for credits; they go on by the other path, nothing is counted twice, and the shares come back. */
static void test_break(void)
{
	enum { JOBS = 60 };
	struct sim_pair pair;
	uint32_t left_free;
	struct tfd_landed landed;

	sim_pair_open(&pair, 2, "imm_depth=24", plain);
	left_free = rail_of(&pair.b, 0)->credits_free;
	submit_imms(&pair, JOBS);
	step_sender(&pair, 50);
	CHECK(!tfd_credits_left(sim_conn(&pair.a, pair.out[0])));
	tfd_sim_break(sim_conn(&pair.a, pair.out[0])->half);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(rail_of(&pair.b, 0)->credits_free > left_free && rail_of(&pair.b, 0)->credits_free == 24);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, &landed, NULL));
	CHECK(landed.imms[0] && rail_of(&pair.a, 0)->credits_free == 24);
	sim_steps(&pair, 2000);
	for (uint64_t job = 1; job <= JOBS; job++)
		expect(&pair.from.records[job % 64], TFD_JOB_OK, 0);
	CHECK(pair.to.counters[0].value == JOBS);
	connect_rails(&pair.a, 0, &pair.b, 0, &pair.out[0], &pair.in[0]);
	CHECK(rail_of(&pair.b, 0)->credits_free == left_free);
	sim_pair_close(&pair);
}

/* ---- a far side that does not keep to them ---- */

static void arrive(struct host *host, uint64_t conn, uint32_t kind, bool tell_owner)
{
	struct tfd_conn *half = sim_conn(host, conn);
	struct tfd_wc wc = { .type = TFD_WC_IMM,
	                     .imm = kind << 29 | half->channel->number * TFD_CALLS,
	                     .owner = tell_owner ? half : NULL };

	tfd_completion_handle(worker_of(host), half->rail, &wc);
}

/* The frame of ASK, or of SEEN, as the far half would have written it. */
static struct tfd_frame *frame_of(struct host *host, uint64_t conn, uint32_t message)
{
	struct tfd_conn *half = sim_conn(host, conn);
	uint8_t *frames = half->channel->memory + TFD_CALLS * (TFD_REQUEST_BYTES + sizeof(struct tfd_frame));
	uint32_t index = 2u * (message == TFD_CREDIT_SEEN) + !half->outgoing;

	return (struct tfd_frame *)(void *)frames + index;
}

static void forge(struct host *host, uint64_t conn, uint32_t message, uint64_t number)
{
	*frame_of(host, conn, message) =
		(struct tfd_frame){ .token = sim_conn(host, conn)->channel->token, .target = number };
	arrive(host, conn, message == TFD_CREDIT_ASK ? 3 : 4, true);
}

/* More than was taken does not come back, whatever the far side says; and it hears no second SEEN before it asks again. */
static void test_forged(void)
{
	struct sim_pair pair;
	struct tfd_credits before;
	struct tfd_conn *out, *in;
	uint64_t dropped;

	sim_pair_open(&pair, 1, "imm_depth=256", plain);
	out = sim_conn(&pair.a, pair.out[0]);
	in = sim_conn(&pair.b, pair.in[0]);
	before = out->credits;
	dropped = worker_of(&pair.a)->dropped_imms;
	forge(&pair.a, pair.out[0], TFD_CREDIT_SEEN, 0); /* nothing was asked */
	submit_imms(&pair, 60);
	step_sender(&pair, 20);
	CHECK(out->credits.asking && !tfd_credits_left(out));
	forge(&pair.a, pair.out[0], TFD_CREDIT_SEEN, 1); /* of no question of ours */
	forge(&pair.a, pair.out[0], TFD_CREDIT_SEEN, UINT64_MAX);
	frame_of(&pair.a, pair.out[0], TFD_CREDIT_SEEN)->token = 1; /* for another half */
	arrive(&pair.a, pair.out[0], 4, true);
	for (uint32_t kind = 5; kind < 8; kind++)
		arrive(&pair.a, pair.out[0], kind, true);
	CHECK(worker_of(&pair.a)->dropped_imms == dropped + 7);
	CHECK(out->credits.limit == before.limit && !out->broken);
	dropped = worker_of(&pair.b)->dropped_imms;
	forge(&pair.b, pair.in[0], TFD_CREDIT_ASK, 7);
	forge(&pair.b, pair.in[0], TFD_CREDIT_ASK, 8);
	CHECK(worker_of(&pair.b)->dropped_imms == dropped + 1 && in->credits.far_number == 7);
	sim_pair_close(&pair);
}

/* Who posts more than it was granted is cut off, where one can tell who it was; the count of what came stays right. */
static void test_flood(uint32_t ordered)
{
	struct sim_pair pair;
	struct tfd_rail_info info;
	struct tfd_event event;
	struct tfd_landed landed;

	sim_pair_open(&pair, 1, ordered ? "imm_depth=128" : "ordered=0,imm_depth=128", plain);
	sim_conn(&pair.a, pair.out[0])->credits.limit = UINT64_MAX;
	submit_imms(&pair, 40);
	step_sender(&pair, 20);
	CHECK(!sim_event(&pair.b, TFD_EVENT_CONN_LOST, &event));
	sim_steps(&pair, 5);
	CHECK_OK(tfd_group_rail(pair.b.core, 0, 0, &info));
	CHECK(info.credit_floods == ordered && info.imm_depth == 128 && pair.to.counters[0].value == 40);
	CHECK(sim_event(&pair.b, TFD_EVENT_CONN_LOST, &event) == ordered);
	CHECK(!ordered || (event.id == pair.in[0] && event.detail == TFD_DETAIL_CONNECTION));
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!ordered || landed.imms[0] >= 40);
	sim_pair_close(&pair);
}

/* A far side that has none of its own, or says that it grants what it likes, is taken at its word. */
static void test_one_sided(void)
{
	struct sim_pair pair = { .now = 1000000, .paths = 1 };

	tfd_sim_set_now(pair.now);
	sim_host_open(&pair.a, 1, "", plain);
	sim_host_open(&pair.b, 1, "imm_depth=16", plain);
	user_open(&pair.a, &pair.from);
	user_open(&pair.b, &pair.to);
	connect_hosts(&pair.a, &pair.b, &pair.out[0], &pair.in[0]);
	pair.grant = sim_grant(&pair, &pair.from, &pair.to);
	CHECK(sim_conn(&pair.b, pair.in[0])->credits.limit == UINT64_MAX);
	CHECK(sim_conn(&pair.a, pair.out[0])->credits.limit < 16);
	submit_imms(&pair, 60);
	step_sender(&pair, 100);
	sim_steps(&pair, 1000);
	CHECK(pair.to.counters[0].value == 60);
	sim_pair_close(&pair);
}

/* A rail that cannot carry the messages of its own connections is refused when it is opened. */
static void test_short_messages(void)
{
	struct tfd_core_options core = { .max_sessions = 1, .stepped = 1 };
	struct tfd_group_options group = { .provider = "sim", .rails = { "sim0" }, .rail_count = 1 };
	struct tfd_core *host;
	uint32_t index;

	CHECK_OK(tfd_core_open(&core, &host, &error));
	(void)snprintf(group.fabric, sizeof(group.fabric), "max_message=%zu", TFD_REQUEST_BYTES - 1);
	CHECK(tfd_group_open(host, &group, &index, &error) == -ENOTSUP && strstr(error.text, "8255 bytes"));
	(void)snprintf(group.fabric, sizeof(group.fabric), "max_message=%zu", TFD_REQUEST_BYTES);
	CHECK_OK(tfd_group_open(host, &group, &index, &error));
	tfd_core_close(host);
}

int main(void)
{
	uint64_t overruns = tfd_sim_overruns();

	test_shared_out(0);
	test_shared_out(1);
	test_break();
	test_forged();
	test_flood(0);
	test_flood(1);
	test_one_sided();
	test_short_messages();
	CHECK(tfd_sim_overruns() == overruns);
	return 0;
}

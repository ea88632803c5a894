/* SPDX-License-Identifier: Apache-2.0 */
/* Ports that lose their link and get it again, devices that are removed, halves that break with nothing posted. On the simulated fabric. */
#include "sim_pair.h"

#define WRITE_BYTES 16384u
#define JOBS 40u
#define SECONDS 1000000000ull

static const struct tfd_group_options cut = { .segment_bytes = 4096, .cut_bytes = 1 };

static struct tfd_rail *rail_of(const struct host *host, uint32_t rail)
{
	return &host->core->groups[host->group]->rails[rail];
}

static struct tfd_entry write_of(const struct sim_pair *pair, uint64_t region, uint32_t number)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .priority = number % 2,
	                           .src_region = region,
	                           .src_offset = (uint64_t)number * WRITE_BYTES,
	                           .dst_grant = pair->grant,
	                           .dst_offset = (uint64_t)number * WRITE_BYTES,
	                           .length = WRITE_BYTES,
	                           .imm = 1 };
}

static void submit_all(struct sim_pair *pair)
{
	for (uint32_t i = 0; i < JOBS; i++)
		(void)user_submit(&pair->from, write_of(pair, pair->from.region, i));
}

/* What events of one host say. */
struct seen {
	uint32_t lost; /* connections; bitmap by path */
	uint32_t state; /* of rail 0, told last */
	uint32_t states; /* events of rails */
};

/* As control does: whatever is told lost is destroyed at both ends, the receiver's first. */
static void take_events(struct sim_pair *pair, struct host *host, struct seen *seen)
{
	struct tfd_event event;

	while (tfd_core_events(host->core, &event, 1)) {
		for (uint32_t i = 0; event.type == TFD_EVENT_CONN_LOST && i < pair->paths; i++) {
			struct tfd_landed landed;

			if ((event.id != pair->out[i] && event.id != pair->in[i]) || seen->lost & 1u << i)
				continue;
			CHECK(event.detail == TFD_DETAIL_CONNECTION);
			seen->lost |= 1u << i;
			CHECK_OK(tfd_conn_close(pair->b.core, pair->in[i], event.detail, NULL, &landed));
			CHECK_OK(tfd_conn_close(pair->a.core, pair->out[i], event.detail, &landed, NULL));
		}
		if (event.type != TFD_EVENT_RAIL_STATE)
			continue;
		CHECK(event.id == 0);
		seen->state = (uint32_t)event.count;
		seen->states++;
	}
}

static void step(struct sim_pair *pair, uint64_t ns, struct seen *a, struct seen *b)
{
	sim_step(pair, ns);
	take_events(pair, &pair->a, a);
	b->lost = a->lost;
	take_events(pair, &pair->b, b);
	a->lost = b->lost;
}

static void await_all(struct sim_pair *pair, struct seen *a, struct seen *b, uint64_t ns)
{
	for (uint64_t job = 1; job <= JOBS; job++) {
		const struct tfd_record *record = &pair->from.records[job % 64];

		for (int i = 0; tfd_load_acquire(&record->done_id) != job; i++) {
			CHECK(i < PAIR_STEPS);
			step(pair, ns, a, b);
		}
		expect(record, TFD_JOB_OK, 0);
	}
	for (int i = 0; i < 200; i++)
		step(pair, PAIR_STEP_NS, a, b);
	CHECK(pair->to.counters[1].value == JOBS && pair->to.counters[1].faults == 0);
	CHECK(memcmp(pair->to.memory, pair->from.memory, JOBS * WRITE_BYTES) == 0);
}

static uint32_t state_of(const struct host *host, uint32_t rail)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(host->core, host->group, rail, &info));
	return info.state;
}

static int connects(const struct host *host, uint32_t rail, uint32_t outgoing)
{
	uint8_t address[TFD_ADDRESS_MAX];
	size_t bytes = sizeof(address);
	uint64_t conn;
	int rc = tfd_conn_open(host->core, host->group, rail, outgoing, 1, &conn, address, &bytes, &error);

	if (!rc)
		CHECK_OK(tfd_conn_close(host->core, conn, 0, NULL, NULL));
	return rc;
}

/* Registers memory while a device is gone, and writes from there. */
static void write_from_new_region(struct sim_pair *pair)
{
	struct tfd_region_options options = { .writable = 1, .length = WRITE_BYTES };
	struct tfd_region_key keys[PAIR_PATHS];
	uint64_t region;

	options.fd = memfd_create("test", MFD_CLOEXEC);
	CHECK(options.fd >= 0 && ftruncate(options.fd, WRITE_BYTES) == 0);
	CHECK_OK(tfd_region_add(pair->a.core, pair->from.session, &options, &region, &error));
	CHECK_OK(tfd_region_keys(pair->a.core, pair->from.session, region, keys, PAIR_PATHS));
	CHECK(keys[0].key == 0 && keys[1].key != 0);
	expect(sim_run(pair, &pair->from, write_of(pair, region, 0)), TFD_JOB_OK, 0);
	sim_steps(pair, 100);
	CHECK(pair->to.counters[1].value == JOBS + 1);
	CHECK_OK(tfd_region_remove(pair->a.core, pair->from.session, region));
	(void)close(options.fd);
}

/* Under load, by a completion or by the look that comes twice a second; the other rail carries on, and no count is wrong. */
static void test_removed(uint64_t seed, bool here, bool tells)
{
	struct seen a = { 0 }, b = { 0 };
	struct sim_pair pair;
	struct host *host = here ? &pair.a : &pair.b;
	char fabric[TFD_NAME_MAX];

	(void)snprintf(fabric, sizeof(fabric), "seed=%llu,channels=3,delay_us=400", (unsigned long long)seed);
	sim_pair_open(&pair, 2, fabric, cut);
	submit_all(&pair);
	for (uint64_t i = 0; i < 10 + seed * 7 % 100; i++)
		step(&pair, PAIR_STEP_NS, &a, &b);
	tfd_sim_remove(rail_of(host, 0)->domain, tells);
	await_all(&pair, &a, &b, PAIR_STEP_NS);
	for (int i = 0; i < 10; i++)
		step(&pair, SECONDS / 10, &a, &b);
	CHECK(a.lost == 1);
	CHECK((here ? &a : &b)->state == TFD_RAIL_GONE && a.states + b.states == 1);
	CHECK(state_of(host, 0) == TFD_RAIL_GONE && state_of(host, 1) == TFD_RAIL_UP);
	CHECK(connects(host, 0, 1) == -ENODEV && strstr(error.text, "sim0: its device was removed"));
	CHECK(connects(host, 0, 0) == -ENODEV && connects(host, 1, 1) == 0);
	if (here)
		write_from_new_region(&pair);
	sim_pair_close(&pair);
}

/* Memory is registered between the removal and the first look: what reads it does not go by that rail. */
static void test_registered_while_removed(void)
{
	struct seen a = { 0 }, b = { 0 };
	struct sim_pair pair;

	sim_pair_open(&pair, 2, "channels=3,delay_us=10", cut);
	submit_all(&pair);
	await_all(&pair, &a, &b, PAIR_STEP_NS);
	tfd_sim_remove(rail_of(&pair.a, 0)->domain, false);
	write_from_new_region(&pair);
	take_events(&pair, &pair.a, &a);
	CHECK(a.lost == 1 && a.state == TFD_RAIL_GONE);
	sim_pair_close(&pair);
}

/* A link that flaps: nothing but time is lost. */
static void test_flap(bool here)
{
	struct seen a = { 0 }, b = { 0 };
	struct sim_pair pair;
	struct host *host = here ? &pair.a : &pair.b;

	sim_pair_open(&pair, 2, "channels=3,delay_us=100", cut);
	submit_all(&pair);
	step(&pair, PAIR_STEP_NS, &a, &b);
	tfd_sim_port(rail_of(host, 0)->domain, false);
	for (int i = 0; i < 13; i++)
		step(&pair, SECONDS / 10, &a, &b);
	CHECK((here ? &a : &b)->state == TFD_RAIL_DOWN && state_of(host, 0) == TFD_RAIL_DOWN);
	CHECK(connects(host, 0, 1) == -ENETDOWN && strstr(error.text, "sim0: its port is down"));
	tfd_sim_port(rail_of(host, 0)->domain, true);
	await_all(&pair, &a, &b, PAIR_STEP_NS);
	for (int i = 0; i < 10; i++)
		step(&pair, SECONDS / 10, &a, &b);
	CHECK(a.lost == 0 && (here ? &a : &b)->state == TFD_RAIL_UP && a.states + b.states == 2);
	sim_pair_close(&pair);
}

/* One that stays down: after a second jobs go by the other; once it is up connections can be made again. */
static void test_down(void)
{
	struct seen a = { 0 }, b = { 0 };
	struct sim_pair pair;
	uint64_t out, in, began;

	sim_pair_open(&pair, 2, "channels=3,delay_us=100", cut);
	submit_all(&pair);
	step(&pair, PAIR_STEP_NS, &a, &b);
	tfd_sim_port(rail_of(&pair.a, 0)->domain, false);
	began = pair.now;
	await_all(&pair, &a, &b, SECONDS / 100);
	CHECK(a.lost == 1 && pair.now - began >= SECONDS && pair.now - began < 3 * SECONDS);
	CHECK(connects(&pair.a, 0, 0) == -ENETDOWN);
	tfd_sim_port(rail_of(&pair.a, 0)->domain, true);
	connect_rails(&pair.a, 0, &pair.b, 0, &out, &in);
	CHECK_OK(tfd_conn_probe(pair.a.core, out));
	for (int i = 0; i < 10; i++)
		step(&pair, SECONDS / 10, &a, &b);
	CHECK(a.state == TFD_RAIL_UP && a.states == 2);
	CHECK(sim_conn(&pair.a, out)->half && !sim_conn(&pair.a, out)->broken);
	sim_pair_close(&pair);
}

/* A half that breaks with nothing posted is told of, at either end; the others are not touched. */
static void test_fatal(bool here)
{
	struct sim_pair pair;
	struct host *host = here ? &pair.a : &pair.b;
	struct tfd_event event;

	sim_pair_open(&pair, 2, "channels=3", cut);
	tfd_sim_fatal(sim_conn(host, here ? pair.out[0] : pair.in[0])->half);
	sim_steps(&pair, 2);
	CHECK(sim_event(host, TFD_EVENT_CONN_LOST, &event));
	CHECK(event.id == (here ? pair.out[0] : pair.in[0]) && event.detail == TFD_DETAIL_CONNECTION);
	CHECK(!sim_event(host, TFD_EVENT_CONN_LOST, &event));
	CHECK(!sim_conn(host, here ? pair.out[1] : pair.in[1])->broken);
	sim_pair_close(&pair);
}

int main(void)
{
	for (uint64_t seed = 1; seed <= 16; seed++)
		test_removed(seed, seed % 2 == 0, seed % 4 < 2);
	test_registered_while_removed();
	test_flap(true);
	test_flap(false);
	test_down();
	test_fatal(true);
	test_fatal(false);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fences on every provider, proven by canaries: writers go on, a fence is asked for and answers, the receiver fills the pages with a
 * pattern, and no byte of them changes afterwards. Each slot is looked at when later writes have landed, and again before it is used
 * again. TFD_CANARY_RUNS: rounds of each kind on each fabric. With TFD_TEST_PROVIDER on that one alone.
 */
#include "core/parts.h"
#include "core_fixture.h"

#define PAGE_BYTES (128u << 10)
#define SLOT_PAGES 8u
#define SLOT_BYTES (PAGE_BYTES * SLOT_PAGES)
#define SLOTS (REGION_BYTES / SLOT_BYTES - 1) /* the last is for writes that nothing stops */
#define JOBS 16u
#define LATER 4u
#define RECORDS 64u
#define ENDS 65536u /* kept; a round submits less */
#define SENT 0xff
#define FENCED 1u
#define STAYS 2u

struct fabric {
	const char *name;
	const char *provider;
	const char *rail;
	const char *options;
	bool one_host;
	uint32_t copy_threads;
	const char *library; /* "": found */
};

static const struct fabric fabrics[] = {
	{ "libfabric", "libfabric", "127.0.0.1", "", false, 0, "" },
	{ "tcp", "tcp", "127.0.0.1", "", false, 0, "" },
	{ "local", "local", "local", "", true, 0, "" },
	{ "local, by helpers", "local", "local", "", true, 2, "" },
	{ "sim, ordered", "sim", "sim0", "ordered=1,delay_us=300", false, 0, "" },
	{ "sim, unordered", "sim", "sim0", "ordered=0,delay_us=300", false, 0, "" },
};

struct run {
	struct host hosts[2];
	struct host *a, *b; /* the writer's and the receiver's, perhaps the same */
	struct user from, to;
	uint64_t out, in, grant;
	uint64_t flying[RECORDS];
	uint8_t ends[ENDS]; /* status of jobs whose record another has by now */
	uint64_t number;
	uint64_t caught; /* rounds whose fence met a job in flight */
	uint8_t expected[SLOTS]; /* 0: nothing yet */
};

/* ---- writing ---- */

static bool may_submit(const struct run *run)
{
	uint64_t slot = (run->from.next_job + 1) % RECORDS;

	return (!run->flying[slot] ||
	        tfd_load_acquire(&run->from.records[slot].done_id) == run->flying[slot]) &&
	       run->from.ring->tail - tfd_load_acquire(&run->from.ring->head) < RECORDS;
}

static uint64_t submit(struct run *run, struct tfd_entry entry)
{
	uint64_t slot = (run->from.next_job + 1) % RECORDS;

	while (!may_submit(run))
		(void)usleep(20);
	run->ends[run->flying[slot] % ENDS] = (uint8_t)run->from.records[slot].status;
	(void)user_submit(&run->from, entry);
	run->flying[slot] = run->from.next_job;
	return run->from.next_job;
}

/* PENDING while it runs. */
static uint32_t end_of(const struct run *run, uint64_t job)
{
	const struct tfd_record *record = &run->from.records[job % RECORDS];

	if (run->flying[job % RECORDS] != job)
		return run->ends[job % ENDS];
	return tfd_load_acquire(&record->done_id) == job ? record->status : TFD_JOB_PENDING;
}

static uint32_t await_end(const struct run *run, uint64_t job)
{
	uint32_t end = end_of(run, job);

	for (int i = 0; end == TFD_JOB_PENDING; i++) {
		CHECK(i < 250000); /* it ends within 5 s */
		(void)usleep(20);
		end = end_of(run, job);
	}
	return end;
}

static struct tfd_entry page_write(const struct run *run, uint64_t grant, uint32_t imm, uint32_t slot,
                                   uint32_t page)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = run->from.region,
	                           .dst_grant = grant,
	                           .dst_offset = (uint64_t)slot * SLOT_BYTES + page * PAGE_BYTES,
	                           .length = PAGE_BYTES,
	                           .imm = imm };
}

static uint64_t submit_other(struct run *run)
{
	return submit(run,
	              page_write(run, run->grant, STAYS, SLOTS, (uint32_t)run->from.next_job % SLOT_PAGES));
}

/* Rings wait for a control that leaves losses lying. */
static void take_events(struct host *host)
{
	struct tfd_event events[16];

	while (tfd_core_events(host->core, events, 16))
		;
}

/* Waits for an event while the writer goes on; `entry`: what it submits. */
static void await_event(struct run *run, uint32_t type, uint64_t id, const struct tfd_entry *entry)
{
	struct tfd_event event;

	for (int i = 0; i < 500000; i++) {
		while (tfd_core_events(run->a->core, &event, 1)) {
			if (event.type == type && event.id == id)
				return;
		}
		if (may_submit(run))
			(void)(entry ? submit(run, *entry) : submit_other(run));
		else
			(void)usleep(10);
	}
	(void)fprintf(stderr, "no event %u\n", type);
	exit(1);
}

/* ---- the fences ---- */

static void do_cancel(struct run *run, uint64_t grant, const uint64_t *jobs, uint32_t slot)
{
	(void)grant;
	(void)slot;
	for (uint32_t i = JOBS; i-- > 0;)
		(void)submit(run, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = jobs[i] });
	for (uint32_t i = 0; i < JOBS; i++)
		(void)await_end(run, jobs[i]);
}

/* The writer goes on at the very pages. */
static void do_revoke(struct run *run, uint64_t grant, const uint64_t *jobs, uint32_t slot)
{
	struct tfd_entry entry = page_write(run, grant, STAYS, slot, 0);

	(void)jobs;
	CHECK_OK(tfd_open_revoke(run->a->core, run->from.session, grant, TFD_DETAIL_REVOKED));
	await_event(run, TFD_EVENT_OPEN_QUIET, grant, &entry);
}

static void do_fence(struct run *run, uint64_t grant, const uint64_t *jobs, uint32_t slot)
{
	const struct tfd_imm_range range = { FENCED, 1 };

	(void)jobs;
	(void)slot;
	CHECK_OK(tfd_open_fence(run->a->core, run->from.session, grant, &range, 1, ++run->number));
	await_event(run, TFD_EVENT_FENCE_QUIET, grant, NULL);
}

/* The receiver destroys its half, while the writer, which has heard nothing, goes on. */
static void do_reset(struct run *run, uint64_t grant, const uint64_t *jobs, uint32_t slot)
{
	(void)grant;
	(void)jobs;
	(void)slot;
	CHECK_OK(tfd_conn_close(run->b->core, run->in, TFD_DETAIL_CONNECTION, NULL, NULL));
}

struct kind {
	const char *name;
	void (*run)(struct run *, uint64_t, const uint64_t *, uint32_t);
};

static const struct kind kinds[] = {
	{ "cancel", do_cancel }, { "revoke", do_revoke }, { "fence", do_fence }, { "reset", do_reset }
};

/* The writer hears that its connection is gone, and both begin anew. */
static void reconnect(struct run *run)
{
	CHECK_OK(tfd_conn_close(run->a->core, run->out, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_open_revoke(run->a->core, run->from.session, run->grant, TFD_DETAIL_CONNECTION));
	(void)wait_event(run->a, TFD_EVENT_OPEN_QUIET, run->grant);
	CHECK_OK(tfd_open_remove(run->a->core, run->from.session, run->grant));
	connect_hosts(run->a, run->b, &run->out, &run->in);
	run->grant = open_grant(&run->from, &run->to, run->out);
}

/* ---- rounds ---- */

static void look(const struct run *run, uint32_t slot, const char *when)
{
	const uint8_t *bytes = run->to.memory + (size_t)slot * SLOT_BYTES;
	uint32_t late = 0;

	for (uint32_t i = 0; run->expected[slot] && i < SLOT_BYTES; i++)
		late += bytes[i] != run->expected[slot];
	if (!late)
		return;
	(void)fprintf(stderr, "%u bytes landed late in slot %u, seen %s\n", late, slot, when);
	exit(1);
}

static void play(struct run *run, const struct kind *kind, uint32_t number)
{
	bool revoke = kind->run == do_revoke;
	uint64_t grant = revoke ? open_grant(&run->from, &run->to, run->out) : run->grant;
	uint32_t slot = number % SLOTS;
	uint64_t jobs[JOBS], later[LATER];
	bool caught = false;

	look(run, slot, "before the next round");
	for (uint32_t i = 0; i < JOBS; i++) {
		jobs[i] = submit(run, page_write(run, grant, FENCED, slot, i % SLOT_PAGES));
		if (i % 4 == 0)
			(void)submit_other(run);
	}
	while (number % 4 && end_of(run, jobs[number % 4 - 1]) == TFD_JOB_PENDING)
		(void)sched_yield(); /* some have landed, some are on their way */
	kind->run(run, grant, jobs, slot);
	run->expected[slot] = (uint8_t)(1 + number % (SENT - 1));
	memset(run->to.memory + (size_t)slot * SLOT_BYTES, run->expected[slot], SLOT_BYTES);
	if (kind->run == do_reset)
		reconnect(run);
	for (uint32_t i = 0; i < JOBS; i++) {
		CHECK(kind->run == do_reset || /* with the others each has ended before its fence */
		      end_of(run, jobs[i]) != TFD_JOB_PENDING);
		caught = await_end(run, jobs[i]) != TFD_JOB_OK || caught;
	}
	for (uint32_t i = 0; i < LATER; i++)
		later[i] = submit_other(run);
	for (uint32_t i = 0; i < LATER; i++)
		CHECK(await_end(run, later[i]) == TFD_JOB_OK);
	look(run, slot, "after later writes");
	run->caught += caught;
	take_events(run->a);
	take_events(run->b);
	if (revoke)
		CHECK_OK(tfd_open_remove(run->a->core, run->from.session, grant));
}

/* ---- a run ---- */

static void open_host(struct host *host, const struct fabric *fabric)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	struct tfd_group_options group = { .rail_count = 1,
	                                   .segment_bytes = fabric->copy_threads ? 128u << 10 : 32u << 10,
	                                   .copy_threads = fabric->copy_threads,
	                                   .window_bytes = 256u << 10 };

	(void)strcpy(group.provider, fabric->provider);
	(void)strcpy(group.rails[0], fabric->rail);
	(void)strcpy(group.fabric, fabric->options);
	(void)strcpy(group.library, fabric->library);
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void run_open(struct run *run, const struct fabric *fabric)
{
	memset(run, 0, sizeof(*run));
	run->a = &run->hosts[0];
	run->b = &run->hosts[!fabric->one_host];
	open_host(run->a, fabric);
	if (!fabric->one_host)
		open_host(run->b, fabric);
	user_open(run->a, &run->from);
	user_open(run->b, &run->to);
	memset(run->from.memory, SENT, REGION_BYTES);
	connect_hosts(run->a, run->b, &run->out, &run->in);
	run->grant = open_grant(&run->from, &run->to, run->out);
}

static void run_close(struct run *run)
{
	for (uint32_t slot = 0; slot < SLOTS; slot++)
		look(run, slot, "at the end");
	user_close(&run->from);
	user_close(&run->to);
	tfd_core_close(run->a->core);
	if (run->b != run->a)
		tfd_core_close(run->b->core);
}

static void run_all(const struct fabric *fabric, uint32_t rounds)
{
	for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
		struct run run;

		run_open(&run, fabric);
		for (uint32_t i = 0; i < rounds; i++)
			play(&run, &kinds[k], i);
		CHECK(run.caught > 0);
		(void)printf("%s: %s: runs=%u caught=%llu\n", fabric->name, kinds[k].name, rounds,
		             (unsigned long long)run.caught);
		(void)fflush(stdout);
		run_close(&run);
	}
}

static const char *wish(const char *name, const char *otherwise)
{
	const char *value = getenv(name);

	return value ? value : otherwise;
}

int main(void)
{
	uint32_t rounds = (uint32_t)strtoul(wish("TFD_CANARY_RUNS", "20"), NULL, 10);
	const char *provider = wish("TFD_TEST_PROVIDER", NULL);
	struct fabric chosen = { .name = provider,
	                         .provider = provider,
	                         .rail = wish("TFD_TEST_RAIL", "127.0.0.1"),
	                         .options = wish("TFD_TEST_FABRIC", ""),
	                         .library = wish("TFD_TEST_LIBRARY", "") };

	if (provider) {
		chosen.one_host = strcmp(provider, "local") == 0;
		run_all(&chosen, rounds);
		return 0;
	}
	for (size_t f = 0; f < sizeof(fabrics) / sizeof(fabrics[0]); f++)
		run_all(&fabrics[f], rounds);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the worker itself costs, on the null fabric: nothing moves and nothing takes time, so that all that is measured is its passes and
 * the simulated rail's own work. One thread: the passes are called by hand.
 *
 *   worker_cost pages PARTS PAGES ROUNDS    ns a page, of each round
 *   worker_cost scatter TARGETS ROUNDS      ns from taking a scatter out of the ring to its last post, of each round
 *
 * `pages` alone under callgrind, with --toggle-collect=worker_passes, tells instructions.
 */
#include "tests/sim_pair.h"

#define PAGE_BYTES 256u
#define STRIDE 512u
#define PAGES_MAX 16384u
#define TARGETS_MAX 512u

static uint64_t clock_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct tfd_worker *worker_of(const struct host *host)
{
	return host->core->groups[0]->worker;
}

/* Until the job has ended. */
static __attribute__((noinline)) void worker_passes(struct tfd_worker *worker,
                                                    const struct tfd_record *record, uint64_t job)
{
	while (tfd_load_acquire(&record->done_id) != job)
		(void)tfd_worker_poll_hot(worker);
}

/* What has arrived is counted, and the waker sleeps. */
static void settle(struct sim_pair *pair)
{
	while (tfd_core_step(pair->b.core, pair->now))
		continue;
	(void)tfd_core_step(pair->a.core, pair->now);
}

static void run_pages(uint32_t parts, uint32_t count, uint32_t rounds)
{
	char fabric[TFD_NAME_MAX];
	struct sim_pair pair;
	struct tfd_page *pages;
	struct tfd_entry entry;

	(void)snprintf(fabric, sizeof(fabric), "move=0,parts=%u", parts);
	sim_pair_open(&pair, 1, fabric, (struct tfd_group_options){ 0 });
	worker_of(&pair.a)->now_ns = pair.now;
	pages = sim_table(&pair.from);
	for (uint32_t i = 0; i < count; i++)
		pages[i] = (struct tfd_page){ .src = count - 1 - i, .dst = i };
	entry = (struct tfd_entry){ .op = TFD_OP_WRITE_PAGES,
	                            .src_region = pair.from.region,
	                            .dst_grant = pair.grant,
	                            .imm = 1,
	                            .length = PAGE_BYTES,
	                            .src_stride = STRIDE,
	                            .dst_stride = STRIDE,
	                            .table_count = count };
	for (uint32_t i = 0; i <= rounds; i++) { /* the first one fills pools and caches */
		const struct tfd_record *record = user_submit(&pair.from, entry);
		uint64_t begin = clock_ns();

		worker_passes(worker_of(&pair.a), record, pair.from.next_job);
		if (i)
			(void)printf("%.2f\n", (double)(clock_ns() - begin) / count);
		expect(record, TFD_JOB_OK, 0);
		settle(&pair);
		CHECK(pair.to.counters[1].value == (uint64_t)count * (i + 1));
	}
	sim_pair_close(&pair);
}

/* Every target by a connection of its own, as to so many peers. */
static void open_targets(struct sim_pair *pair, uint32_t count)
{
	struct tfd_target *targets = sim_table(&pair->from);

	for (uint32_t i = 0; i < count; i++) {
		uint64_t in;

		connect_rails(&pair->a, 0, &pair->b, 0, &pair->out[0], &in);
		targets[i] = (struct tfd_target){ .dst_grant = sim_grant(pair, &pair->from, &pair->to),
		                                  .src_offset = i * STRIDE,
		                                  .dst_offset = i * STRIDE,
		                                  .length = PAGE_BYTES };
	}
}

static void run_scatter(uint32_t count, uint32_t rounds)
{
	struct sim_pair pair;
	struct tfd_worker *worker;
	struct tfd_session *session;
	struct tfd_entry entry;

	sim_pair_open(&pair, 1, "move=0", (struct tfd_group_options){ 0 });
	worker = worker_of(&pair.a);
	worker->now_ns = pair.now;
	session = tfd_session_get(pair.a.core, pair.from.session);
	open_targets(&pair, count);
	entry = (struct tfd_entry){
		.op = TFD_OP_SCATTER, .src_region = pair.from.region, .imm = 1, .table_count = count
	};
	for (uint32_t i = 0; i <= rounds; i++) {
		const struct tfd_record *record = user_submit(&pair.from, entry);
		uint64_t begin = clock_ns(), end;

		(void)tfd_ring_drain(worker, session, &session->sources[0]);
		(void)tfd_conns_post(worker);
		end = clock_ns();
		CHECK(worker->inflight_wrs == count);
		if (i)
			(void)printf("%llu\n", (unsigned long long)(end - begin));
		worker_passes(worker, record, pair.from.next_job);
		expect(record, TFD_JOB_OK, 0);
		settle(&pair);
		CHECK(pair.to.counters[1].value == (uint64_t)count * (i + 1));
	}
	tfd_session_put(session);
	sim_pair_close(&pair);
}

static uint32_t number(const char *text, uint32_t most)
{
	unsigned long value = strtoul(text, NULL, 10);

	CHECK(value > 0 && value <= most);
	return (uint32_t)value;
}

int main(int count, char **words)
{
	if (count == 5 && strcmp(words[1], "pages") == 0)
		run_pages(number(words[2], UINT32_MAX), number(words[3], PAGES_MAX),
		          number(words[4], UINT32_MAX));
	else if (count == 4 && strcmp(words[1], "scatter") == 0)
		run_scatter(number(words[2], TARGETS_MAX), number(words[3], UINT32_MAX));
	else
		CHECK(!"pages PARTS PAGES ROUNDS, or scatter TARGETS ROUNDS");
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core over provider verbs while its connections break, on the double: two paths, of which the device breaks one in the midst of many
 * writes. What landed by it stays counted, the rest goes by the other one: every job ends well and every count is exact. And a device with
 * few receives: credits see to it that there is one for each immediate.
 */
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdbool.h>

#include "core_fixture.h"
#include "softverbs/softverbs.h"

#define PATHS 2u
#define JOBS 120u
#define BREAKS_AT 40u
#define ROUNDS 5u /* of each kind */
#define SHARERS 32u /* writes of a session beside one that is refused */

enum kind { QUEUE_PAIR_NEAR, QUEUE_PAIR_FAR, LOST_ACK, REFUSED, DENIED, KINDS };

static struct host host_a, host_b;
static struct user from, other, to;
static uint64_t out[PATHS], in[PATHS];
static bool ended[PATHS];
static uint64_t told_lost; /* writes of `other` */
static uint32_t random_state = 1;

static uint32_t random_below(uint32_t bound)
{
	random_state = random_state * 1664525u + 1013904223u;
	return (random_state >> 8) % bound;
}

static void rails_set(const char *device)
{
	CHECK(setenv("TFD_TEST_PROVIDER", "verbs", 1) == 0);
	CHECK(setenv("TFD_TEST_LIBRARY", "libsoftverbs.so", 1) == 0);
	CHECK(setenv("TFD_TEST_RAIL", device, 1) == 0);
}

static void world_open(const char *configuration)
{
	CHECK(softverbs_configure(configuration) == 0);
	rails_set("soft0");
	host_open_rails(&host_a, PATHS, 16384);
	rails_set("soft1");
	host_open_rails(&host_b, PATHS, 16384);
	user_open(&host_a, &from);
	user_open(&host_a, &other);
	user_open(&host_b, &to);
}

static void world_close(void)
{
	user_close(&from);
	user_close(&other);
	user_close(&to);
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
}

static void paths_connect(void)
{
	for (uint32_t i = 0; i < PATHS; i++) {
		connect_rails(&host_a, i, &host_b, i, &out[i], &in[i]);
		ended[i] = false;
	}
}

/* By the paths from `first` on. `key_off`: of its keys, which then are none. */
static uint64_t grant_add(const struct user *user, uint32_t first, uint64_t key_off)
{
	struct tfd_open_options options = { .path_count = PATHS - first,
	                                    .rights = TFD_RIGHT_WRITE,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16 };
	struct tfd_region_key keys[PATHS];
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(host_b.core, to.session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(host_b.core, to.session, to.region, keys, PATHS));
	CHECK_OK(tfd_session_name_space(host_b.core, to.session, &options.name_space));
	for (uint32_t i = first; i < PATHS; i++)
		options.paths[i - first] = (struct tfd_open_path){ .conn = out[i],
		                                                   .key = keys[i].key + key_off,
		                                                   .address = keys[i].address };
	CHECK_OK(tfd_open_add(host_a.core, user->session, &options, &open));
	return open;
}

static uint64_t grant_open_spoilt(uint64_t key_off)
{
	paths_connect();
	return grant_add(&from, 0, key_off);
}

static uint64_t grant_open(void)
{
	return grant_open_spoilt(0);
}

/* As two daemons do it: the receiver closes first and tells what has landed. */
static void path_end(uint32_t path)
{
	struct tfd_landed landed;

	if (ended[path]) /* both ends may tell that it is lost */
		return;
	ended[path] = true;
	CHECK_OK(tfd_conn_close(host_b.core, in[path], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(host_a.core, out[path], TFD_DETAIL_CONNECTION, &landed, NULL));
}

static void losses_take(struct host *host, const uint64_t *conns)
{
	struct tfd_event event;

	while (tfd_core_events(host->core, &event, 1)) {
		if (event.type == TFD_EVENT_LOST && event.session == other.session)
			told_lost += event.count;
		for (uint32_t i = 0; i < PATHS; i++) {
			if (event.type == TFD_EVENT_CONN_LOST && event.id == conns[i])
				path_end(i);
		}
	}
}

static void break_something(enum kind kind)
{
	const char *device = kind == QUEUE_PAIR_FAR ? "soft1" : "soft0";
	uint32_t numbers[64], count = softverbs_qps(device, numbers, 64);

	CHECK(count > 0 && count <= 64);
	if (kind == LOST_ACK)
		softverbs_lose_ack("soft0", random_below(8));
	else if (kind == REFUSED)
		softverbs_fail("ibv_wr_complete", random_below(4), ENOMEM);
	else if (kind == DENIED)
		softverbs_wc_fail("soft0", random_below(8), IBV_WC_REM_ACCESS_ERR);
	else
		CHECK(softverbs_qp_fatal(numbers[random_below(count)]) == 0);
}

static bool is_done(const struct tfd_record *record, uint64_t job)
{
	losses_take(&host_a, out);
	losses_take(&host_b, in);
	return tfd_load_acquire(&record->done_id) == job;
}

static void await_job(const struct tfd_record *record, uint64_t job)
{
	for (int i = 0; i < 100000; i++) {
		if (is_done(record, job)) {
			CHECK(record->status == TFD_JOB_OK);
			return;
		}
		(void)usleep(100);
	}
	CHECK(!"a job ends");
}

static void test_broken_path(enum kind kind)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .src_region = from.region, .imm = 1 };
	uint64_t before, job[16] = { 0 };
	struct tfd_record *record[16];

	entry.dst_grant = grant_open();
	before = tfd_load_acquire(&to.counters[1].value);
	for (uint32_t i = 0; i < JOBS; i++) {
		uint32_t slot = i % 16;

		if (job[slot])
			await_job(record[slot], job[slot]);
		if (i == BREAKS_AT)
			break_something(kind);
		/* A byte goes by one path, and counts 1 there: more of it than there is shows. Of half a count that is too much nothing would. */
		entry.length = kind == LOST_ACK || i % 4 == 0 ? 1 : 1 + random_below(100000);
		entry.src_offset = entry.dst_offset = random_below(REGION_BYTES - 100000);
		record[slot] = user_submit(&from, entry);
		job[slot] = from.next_job;
	}
	for (uint32_t slot = 0; slot < 16; slot++)
		await_job(record[slot], job[slot]);
	for (int i = 0; i < 50000 && tfd_load_acquire(&to.counters[1].value) != before + JOBS; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&to.counters[1].value) == before + JOBS);
	CHECK(!ended[0] || !ended[1]); /* one was broken; perhaps in a queue pair that nothing goes by */
	for (uint32_t i = 0; i < PATHS; i++)
		path_end(i);
	softverbs_fail(NULL, 0, 0);
	CHECK(tfd_load_acquire(&to.counters[1].value) == before + JOBS);
}

/* Immediates by the thousand into a device that has few receives. */
static void test_few_receives(void)
{
	struct tfd_entry entry = { .op = TFD_OP_IMM, .imm = 2 };
	struct softverbs_counts counts;
	uint64_t before = 0, job[32] = { 0 };
	struct tfd_record *record[32];

	entry.dst_grant = grant_open();
	for (uint32_t i = 0; i < 3000; i++) {
		uint32_t slot = i % 32;

		if (job[slot])
			await_job(record[slot], job[slot]);
		record[slot] = user_submit(&from, entry);
		job[slot] = from.next_job;
	}
	for (uint32_t slot = 0; slot < 32; slot++)
		await_job(record[slot], job[slot]);
	for (int i = 0; i < 50000 && tfd_load_acquire(&to.counters[2].value) != before + 3000; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&to.counters[2].value) == before + 3000);
	softverbs_counts("soft1", &counts);
	CHECK(counts.rnr == 0 && counts.srq_low > 0 && counts.srq_low != UINT32_MAX &&
	      counts.immediates >= 3000);
	softverbs_counts("soft0", &counts);
	CHECK(counts.rnr == 0 && counts.signalled <= counts.posted && counts.doorbells <= counts.posted);
	for (uint32_t i = 0; i < PATHS; i++)
		path_end(i);
}

/*
 * A write that the far device refuses, as it does with a wrong key, and for a moment when its daemon is killed. If that daemon answers it was
 * refused; if not, it died. Neither ends before the connection is closed.
 */
static void test_refused_by_a_device(bool answers)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .src_region = from.region, .imm = 1, .length = 64 };
	struct tfd_record *record;

	entry.dst_grant = grant_open_spoilt(1000);
	losses_take(&host_a, out); /* of connections before these */
	losses_take(&host_b, in);
	record = user_submit(&from, entry);
	(void)wait_event(&host_a, TFD_EVENT_CONN_LOST, 0); /* a part of it goes by each path */
	for (uint32_t i = 0; i < PATHS; i++) {
		CHECK(tfd_load_acquire(&record->done_id) != from.next_job);
		if (answers) {
			path_end(i);
			continue;
		}
		CHECK_OK(tfd_conn_close(host_a.core, out[i], TFD_DETAIL_CONNECTION, NULL, NULL));
		CHECK_OK(tfd_conn_close(host_b.core, in[i], TFD_DETAIL_CONNECTION, NULL, NULL));
	}
	wait_done(record, from.next_job);
	CHECK(record->status == (answers ? TFD_JOB_REMOTE_ACCESS : TFD_JOB_PEER_LOST));
}

/* ---- sessions that share a queue pair ---- */

static uint32_t status_of(const struct tfd_record *record, uint64_t job)
{
	for (int i = 0; i < 100000 && !is_done(record, job); i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&record->done_id) == job);
	return record->status;
}

static void posted_await(uint64_t number)
{
	struct softverbs_counts counts;

	for (int i = 0; i < 100000; i++) {
		softverbs_counts("soft0", &counts);
		if (counts.posted >= number)
			return;
		(void)usleep(100);
	}
	CHECK(!"all is posted");
}

/*
 * The device refuses a write of one session: what others have behind it on its queue pair goes by the other path, or ends with an error, and
 * what has not landed is told. Every write is of one byte, so that it is one piece.
 */
static void test_shared_queue_pair(uint32_t first)
{
	struct tfd_entry wrong = { .op = TFD_OP_WRITE, .src_region = from.region, .length = 1, .imm = 5 };
	struct tfd_entry right = { .op = TFD_OP_WRITE, .src_region = other.region, .length = 1, .imm = 4 };
	struct tfd_record *records[SHARERS], *refused = NULL;
	struct softverbs_counts counts;
	uint64_t before, jobs[SHARERS], well = 0;

	paths_connect();
	wrong.dst_grant = grant_add(&from, first, 1000);
	right.dst_grant = grant_add(&other, first, 0);
	before = tfd_load_acquire(&to.counters[4].value);
	told_lost = 0;
	memset(to.memory, 0, SHARERS + 1);
	memset(other.memory, 1, SHARERS + 1);
	softverbs_counts("soft0", &counts);
	softverbs_hold("soft0", 1);
	for (uint32_t i = 0; i < SHARERS; i++) {
		if (i ==
		    SHARERS /
		            2) { /* each session has a ring of its own: they are in this order by our waiting alone */
			posted_await(counts.posted + i);
			refused = user_submit(&from, wrong);
			posted_await(counts.posted + i + 1);
		}
		right.src_offset = right.dst_offset = i + 1;
		records[i] = user_submit(&other, right);
		jobs[i] = other.next_job;
	}
	posted_await(counts.posted + SHARERS + 1);
	softverbs_hold("soft0", 0);
	for (uint32_t i = 0; i < SHARERS; i++) {
		uint32_t status = status_of(records[i], jobs[i]);

		CHECK(status == TFD_JOB_OK || status == TFD_JOB_PEER_LOST);
		CHECK(status != TFD_JOB_OK || to.memory[i + 1] == 1);
		CHECK(first == 0 || (status == TFD_JOB_OK) == (i < SHARERS / 2));
		well += status == TFD_JOB_OK;
	}
	CHECK(status_of(refused, from.next_job) == TFD_JOB_REMOTE_ACCESS && to.memory[0] == 0);
	for (uint32_t i = 0; i < PATHS; i++)
		path_end(i);
	losses_take(&host_a, out);
	CHECK(tfd_load_acquire(&to.counters[4].value) == before + well && told_lost == SHARERS - well);
	CHECK(tfd_load_acquire(&to.counters[5].value) == 0);
}

/* 1,000 pages that lie nowhere side by side: the receiver has 13 completions of them, 512 + 7 * 64 + 5 * 8. */
static void test_pages(void)
{
	struct tfd_page *pages = (struct tfd_page *)(from.segment + from.header->arena_offset);
	struct tfd_entry entry = { .op = TFD_OP_WRITE_PAGES,
	                           .src_region = from.region,
	                           .imm = 6,
	                           .length = 64,
	                           .src_stride = 64,
	                           .dst_stride = 128,
	                           .table_count = 1000 };
	struct softverbs_counts before, after;
	struct tfd_record *record;

	paths_connect();
	entry.dst_grant = grant_add(&from, 1, 0);
	for (uint32_t i = 0; i < 1000; i++) {
		pages[i] = (struct tfd_page){ .src = 999 - i, .dst = i };
		memset(from.memory + (uint64_t)i * 64, (int)(i % 251), 64);
	}
	softverbs_counts("soft1", &before);
	record = user_submit(&from, entry);
	await_job(record, from.next_job);
	for (int i = 0; i < 50000 && tfd_load_acquire(&to.counters[6].value) != 1000; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&to.counters[6].value) == 1000);
	softverbs_counts("soft1", &after);
	CHECK(after.immediates - before.immediates == 13 && after.rnr == before.rnr);
	for (uint32_t i = 0; i < 1000; i++)
		CHECK(memcmp(to.memory + (uint64_t)i * 128, from.memory + (uint64_t)(999 - i) * 64, 64) == 0);
	for (uint32_t i = 0; i < PATHS; i++)
		path_end(i);
}

/* ---- a device that takes its time with what it has taken of the receives: its worker goes on meanwhile ---- */

static uint32_t closed;

static void *near_close(void *unused)
{
	CHECK_OK(tfd_conn_close(host_a.core, out[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	tfd_store_release(&closed, 1u); /* pairs with works_while_closing */
	return unused;
}

static bool any_broken(const char *device)
{
	uint32_t numbers[64], count = softverbs_qps(device, numbers, 64);

	for (uint32_t i = 0; i < count && i < 64; i++) {
		if (softverbs_qp_state(numbers[i]) == IBV_QPS_ERR)
			return true;
	}
	return false;
}

/* Whether a job goes out and comes back by the one connection before the other is closed: the device is waited for, for a bounded while. */
static bool works_while_closing(void)
{
	struct tfd_entry entry = { .op = TFD_OP_IMM, .imm = 3 };
	struct tfd_record *record;
	pthread_t thread;
	bool worked;

	paths_connect();
	entry.dst_grant = grant_add(&from, 1, 0);
	closed = 0;
	softverbs_last_hold("soft0", 1);
	CHECK(pthread_create(&thread, NULL, near_close, NULL) == 0);
	for (int i = 0; i < 50000 && !any_broken("soft0"); i++)
		(void)usleep(100);
	record = user_submit(&from, entry);
	wait_done(record, from.next_job);
	worked = !tfd_load_acquire(&closed); /* pairs with near_close */
	softverbs_last_hold("soft0", 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK_OK(tfd_conn_close(host_b.core, in[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(host_a.core, out[1], TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(host_b.core, in[1], TFD_DETAIL_CONNECTION, NULL, NULL));
	return worked;
}

/* On a host that is busy the bound may pass first. */
static void test_worker_goes_on(void)
{
	int tries = 5;

	while (!works_while_closing())
		CHECK(--tries);
}

int main(void)
{
	world_open("mode=threaded hurry=1000");
	for (uint32_t i = 0; i < ROUNDS * KINDS; i++)
		test_broken_path((enum kind)(i % KINDS));
	test_refused_by_a_device(true);
	test_refused_by_a_device(false);
	test_shared_queue_pair(0);
	test_shared_queue_pair(1);
	test_pages();
	world_close();
	world_open("mode=threaded max_srq_wr=128 max_cqe=256");
	test_few_receives();
	world_close();
	world_open("mode=threaded");
	test_worker_goes_on();
	world_close();
	return 0;
}

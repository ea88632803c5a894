/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Watchers with a worker that runs and sleeps, and the client's own half: a bump wakes it, a store by a device is seen all the same, and
 * jobs that wait let it sleep. Bumps and the worker's going to sleep race on purpose.
 */
#include "core/parts.h"
#include "core_fixture.h"
#include "transferd/client.h"

#define RECORDS 8192u
#define MANY 4096u
#define RACES 400u

static struct host host;
static struct user target;
static uint64_t written; /* writes that ended well: each counts 1 */

struct armer {
	struct user user;
	struct tfd_client *client;
	uint64_t grant;
	uint32_t watcher;
};

static void armer_open(struct armer *armer, uint64_t conn)
{
	user_open_sized(&host, &armer->user, RECORDS);
	armer->grant = open_grant(&armer->user, &target, conn);
	CHECK_OK(
		tfd_client_open(armer->user.fds.segment_fd, &armer->user.fds.doorbell_fd, 1, &armer->client));
	CHECK_OK(tfd_client_watcher_open(armer->client, &armer->watcher));
}

static void armer_close(struct armer *armer)
{
	tfd_client_close(armer->client);
	user_close(&armer->user);
}

static uint64_t arm(struct armer *armer, uint64_t value, uint8_t flags)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .flags = TFD_FLAG_ARMED | flags,
	                           .src_region = armer->user.region,
	                           .dst_grant = armer->grant,
	                           .length = 64,
	                           .imm = 1,
	                           .watcher = armer->watcher,
	                           .fire_at = value };

	CHECK_OK(tfd_client_submit_wait(armer->client, 0, &entry, 1, -1));
	return entry.job_id;
}

static void expect_ok(struct armer *armer, uint64_t job)
{
	struct tfd_result result;

	CHECK_OK(tfd_client_job_wait(armer->client, job, 20000000000, 0, &result));
	CHECK(result.status == TFD_JOB_OK);
	tfd_client_job_release(armer->client, job);
}

static void expect_written(struct armer *armer, uint64_t job)
{
	expect_ok(armer, job);
	written++;
}

/* A write may end before its count is taken out of the far queue. */
static void expect_counted(void)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&target.counters[1].value) < written; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&target.counters[1].value) == written);
}

static void await_sleep(const struct armer *armer)
{
	for (int i = 0; i < 100000; i++) {
		if (tfd_load_seq(&armer->user.ring->need_wakeup))
			return;
		(void)usleep(100);
	}
	(void)fprintf(stderr, "the worker does not sleep\n");
	exit(1);
}

static uint64_t value_of(struct armer *armer)
{
	uint64_t value;

	CHECK_OK(tfd_client_watcher_read(armer->client, armer->watcher, &value));
	return value;
}

/* The worker's sleep is bounded by 1 s: what a lost wake-up would take. None of these takes that long. */
static void test_wakes(struct armer *armer)
{
	uint64_t started = tfd_client_now_ns();

	for (uint32_t i = 0; i < RACES; i++) {
		uint64_t job = arm(armer, value_of(armer) + 1, 0);

		if (i % 4 == 0)
			await_sleep(armer);
		else /* about when it falls asleep: it spins for 50 µs */
			for (uint64_t until = tfd_client_now_ns() + 40000 + i * 50;
			     tfd_client_now_ns() < until;)
				continue;
		CHECK_OK(tfd_client_watcher_bump(armer->client, armer->watcher, 1));
		expect_written(armer, job);
	}
	CHECK(tfd_client_now_ns() - started < RACES / 4 * 1000000000ull);
}

/* A plain store, and nobody rings: also after the worker has given up spinning. */
static void test_device(struct armer *armer)
{
	uint64_t job = arm(armer, value_of(armer) + 1, TFD_FLAG_POLLED);

	tfd_store_release(&armer->user.watchers[armer->watcher].value, value_of(armer) + 1);
	expect_written(armer, job);
	job = arm(armer, value_of(armer) + 1, TFD_FLAG_POLLED);
	await_sleep(armer); /* a second later: from then on it looks each millisecond */
	tfd_store_release(&armer->user.watchers[armer->watcher].value, value_of(armer) + 1);
	expect_written(armer, job);
}

static void test_thousands_sleep(struct armer *armer)
{
	static uint64_t jobs[MANY];
	uint64_t value = value_of(armer);

	for (uint32_t i = 0; i < MANY; i++)
		jobs[i] = arm(armer, value + 1 + i % 7, 0);
	await_sleep(armer);
	for (int asleep = 0, i = 0; asleep < 20; i++) { /* and stays there */
		asleep = tfd_load_seq(&armer->user.ring->need_wakeup) ? asleep + 1 : 0;
		CHECK(i < 50000);
		(void)usleep(500);
	}
	CHECK_OK(tfd_client_watcher_bump(armer->client, armer->watcher, 7));
	for (uint32_t i = 0; i < MANY; i++)
		expect_written(armer, jobs[i]);
	expect_counted();
}

static void *bump_often(void *argument)
{
	struct armer *armer = argument;

	for (uint32_t i = 0; i < 10000; i++)
		CHECK_OK(tfd_client_watcher_bump(armer->client, armer->watcher, 1));
	return NULL;
}

static void test_bumps_of_threads_add_up(struct armer *armer)
{
	uint64_t value = value_of(armer);
	uint64_t job = arm(armer, value + 40000, 0);
	struct tfd_result result;
	pthread_t threads[4];

	for (int i = 0; i < 3; i++)
		CHECK(pthread_create(&threads[i], NULL, bump_often, armer) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(tfd_client_job_poll(armer->client, job, &result) == -EAGAIN);
	(void)bump_often(armer);
	expect_written(armer, job);
	CHECK(value_of(armer) == value + 40000);
}

static void test_taking(struct armer *armer)
{
	uint32_t slots[8];
	uint32_t count = 0;
	uint64_t value = 9;

	while (tfd_client_watcher_open(armer->client, &slots[count]) == 0)
		count++;
	CHECK(count == 7); /* and the armer's own */
	CHECK(tfd_client_watcher_open(armer->client, &slots[0]) == -ENOSPC);
	CHECK_OK(tfd_client_watcher_bump(armer->client, slots[3], 5));
	tfd_client_watcher_close(armer->client, slots[3]);
	tfd_client_watcher_close(armer->client, slots[3]); /* once more does nothing */
	CHECK_OK(tfd_client_watcher_open(armer->client, &slots[3]));
	CHECK(tfd_client_watcher_open(armer->client, &slots[0]) == -ENOSPC);
	CHECK_OK(tfd_client_watcher_read(armer->client, slots[3], &value));
	CHECK(value == 0); /* begins anew */
	CHECK_OK(tfd_client_watcher_bump(armer->client, slots[3], UINT64_MAX));
	CHECK(tfd_client_watcher_bump(armer->client, slots[3], 1) == -ERANGE); /* would pass 2^64 */
	CHECK(tfd_client_watcher_bump(armer->client, 8, 1) == -ERANGE);
	CHECK_OK(tfd_client_watcher_set(armer->client, slots[3], 9)); /* may fall */
	CHECK_OK(tfd_client_watcher_read(armer->client, slots[3], &value));
	CHECK(value == 9);
	CHECK(tfd_client_watcher_set(armer->client, 8, 1) == -ERANGE);
	CHECK(tfd_client_watcher_set(NULL, 0, 1) == -EPIPE);
	CHECK(tfd_client_watcher_read(armer->client, UINT32_MAX, &value) == -ERANGE);
	CHECK(tfd_client_watcher_bump(NULL, 0, 1) == -EPIPE);
	for (uint32_t i = 0; i < count; i++)
		tfd_client_watcher_close(armer->client, slots[i]);
}

/* What another thread arms while a watcher is closed would be started by the next one that has its slot. */
static void test_nothing_is_armed_behind_the_end(struct armer *armer)
{
	struct tfd_entry disarm = { .op = TFD_OP_DISARM };
	struct tfd_entry late[2] = { { .op = TFD_OP_IMM, .imm = 1, .dst_grant = armer->grant },
	                             { .op = TFD_OP_IMM,
		                       .flags = TFD_FLAG_ARMED,
		                       .imm = 1,
		                       .dst_grant = armer->grant,
		                       .fire_at = 1 } };
	uint32_t slot, again;

	CHECK_OK(tfd_client_watcher_open(armer->client, &slot));
	disarm.argument = late[1].watcher = slot;
	CHECK_OK(tfd_client_submit_wait(armer->client, 0, &disarm, 1, -1));
	CHECK(tfd_client_submit_wait(armer->client, 0, late, 2, -1) == -ESTALE); /* nor the other one */
	expect_ok(armer, disarm.job_id);
	tfd_client_watcher_close(armer->client, slot);
	CHECK(tfd_client_submit_wait(armer->client, 0, late, 2, -1) == -ESTALE);
	CHECK_OK(tfd_client_watcher_open(armer->client, &again));
	CHECK(again == slot);
	CHECK_OK(tfd_client_submit_wait(armer->client, 0, late, 2, -1));
	CHECK_OK(tfd_client_watcher_bump(armer->client, slot, 1));
	expect_written(armer, late[0].job_id);
	expect_written(armer, late[1].job_id);
	tfd_client_watcher_close(armer->client, slot);
}

static void test_after_the_end(struct armer *armer)
{
	uint64_t job = arm(armer, UINT64_MAX, 0);
	struct tfd_result result;
	uint32_t slot;

	CHECK_OK(tfd_session_end(host.core, armer->user.session, TFD_DETAIL_SESSION_ENDED));
	CHECK_OK(tfd_client_job_poll(armer->client, job, &result));
	CHECK(result.status == TFD_JOB_CANCELLED && result.detail == TFD_DETAIL_SESSION_ENDED);
	CHECK(tfd_client_watcher_bump(armer->client, armer->watcher, 1) == -EPIPE);
	CHECK(tfd_client_watcher_open(armer->client, &slot) == -EPIPE);
}

int main(void)
{
	struct armer armer;
	uint64_t out, in;

	host_open(&host);
	user_open(&host, &target);
	connect_hosts(&host, &host, &out, &in);
	armer_open(&armer, out);
	test_taking(&armer);
	test_nothing_is_armed_behind_the_end(&armer);
	test_wakes(&armer);
	test_device(&armer);
	test_thousands_sleep(&armer);
	test_bumps_of_threads_add_up(&armer);
	test_after_the_end(&armer);
	armer_close(&armer);
	user_close(&target);
	tfd_core_close(host.core);
	return 0;
}

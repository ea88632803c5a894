/* SPDX-License-Identifier: Apache-2.0 */
/* Waiting: targets, faults, bounds, signals, the daemon's death, and no wake-up that is lost. */
#include <signal.h>
#include <stdbool.h>

#include "fake_daemon.h"

#define FOREVER (-1)
#define MS 1000000ll

struct waiter {
	pthread_t thread;
	struct tfd_client *client;
	uint32_t slot;
	uint64_t target;
	uint64_t spin_ns;
	int rc;
	uint64_t took_ns;
};

static void *wait_counter(void *argument)
{
	struct waiter *w = argument;
	uint64_t start = tfd_client_now_ns();

	w->rc = tfd_client_counter_wait(w->client, w->slot, w->target, FOREVER, w->spin_ns);
	w->took_ns = tfd_client_now_ns() - start;
	return NULL;
}

static void *wait_job(void *argument)
{
	struct waiter *w = argument;
	struct tfd_result result;
	uint64_t start = tfd_client_now_ns();

	w->rc = tfd_client_job_wait(w->client, w->target, FOREVER, w->spin_ns, &result);
	w->took_ns = tfd_client_now_ns() - start;
	return NULL;
}

static void waiter_start(struct waiter *w, void *(*run)(void *))
{
	CHECK(pthread_create(&w->thread, NULL, run, w) == 0);
}

static void until_asleep(const uint32_t *waiters, uint32_t count)
{
	while (tfd_load_seq(waiters) < count)
		usleep(100);
	usleep(2000); /* from counted to asleep; the test is right without, but then tests less */
}

static void test_targets_and_faults(void)
{
	struct fake_daemon fake;
	struct tfd_counter_view view, views[2];
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_counter_wait(client, 1, 0, 0, 0) == 0);
	CHECK(tfd_client_counter_wait(client, 1, 1, 0, 0) == -ETIMEDOUT);
	CHECK(tfd_client_counter_wait(client, 1, 1, 2 * MS, 1 * MS) == -ETIMEDOUT);
	CHECK(tfd_client_counter_wait(client, 4, 0, 0, 0) == -ERANGE);
	CHECK(tfd_client_counter_read(client, 4, &view) == -ERANGE);
	fake_count(&fake, 1);
	fake_fault(&fake, 1, 2);
	CHECK(tfd_client_counter_wait(client, 1, 1, 0, 0) == 0); /* reached wins */
	CHECK(tfd_client_counter_wait(client, 1, 2, FOREVER, 0) == -EIO);
	CHECK(tfd_client_counter_read(client, 1, &view) == 0);
	CHECK(view.value == 1 && view.faults == 1 && view.lost == 2 && view.acknowledged == 0);
	CHECK(tfd_client_counters_read(client, (const uint32_t[]){ 0, 1 }, 2, views) == 0);
	CHECK(views[0].value == 0 && views[1].value == 1 && views[1].faults == 1 && views[1].lost == 2);
	CHECK(tfd_client_counters_read(client, (const uint32_t[]){ 0, 4 }, 2, views) == -ERANGE);
	CHECK(tfd_client_counters_read(NULL, (const uint32_t[]){ 0 }, 1, views) == -EPIPE);
	fake.counter[1].acknowledged = 1;
	CHECK(tfd_client_counter_wait(client, 1, 2, 1 * MS, 0) == -ETIMEDOUT);
	fake_fault(&fake, 1, 0);
	CHECK(tfd_client_counter_wait(client, 1, 2, 1 * MS, 0) == -EIO);
	tfd_client_close(client);
	fake_fini(&fake);
}

static void test_sleepers_wake(void)
{
	struct fake_daemon fake;
	struct waiter one = { .slot = 0, .target = 1 };
	struct waiter two = { .slot = 0, .target = 2 };
	struct waiter faulted = { .slot = 1, .target = 1 };
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	one.client = two.client = faulted.client = client;
	waiter_start(&one, wait_counter);
	waiter_start(&two, wait_counter);
	waiter_start(&faulted, wait_counter);
	until_asleep(&fake.counter[0].waiters, 2);
	until_asleep(&fake.counter[1].waiters, 1);
	while (tfd_load_seq(&fake.counter[0].wake_at) != 1) /* the lower of both */
		sched_yield();
	fake_count(&fake, 0);
	CHECK(pthread_join(one.thread, NULL) == 0 && one.rc == 0);
	fake_fault(&fake, 1, 1);
	CHECK(pthread_join(faulted.thread, NULL) == 0 && faulted.rc == -EIO);
	fake_count(&fake, 0);
	CHECK(pthread_join(two.thread, NULL) == 0 && two.rc == 0);
	CHECK(fake.counter[0].waiters == 0 && fake.counter[1].waiters == 0);
	tfd_client_close(client);
	fake_fini(&fake);
}

/* One count at a time, each waited for without a bound: a single lost wake-up shows as half a second. */
static void test_no_wake_up_is_lost(void)
{
	enum { ROUNDS = 4000 };
	struct fake_daemon fake;
	struct tfd_client *client;
	struct tfd_result result;
	uint64_t start;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	fake_start(&fake);
	start = tfd_client_now_ns();
	for (uint32_t i = 1; i <= ROUNDS; i++) {
		int64_t job =
			tfd_client_job_submit(client, 0, TFD_OP_IMM, 0, 2, 0, 0, 3, 0, 0, 0, 0, FOREVER);

		CHECK(job > 0);
		if (i % 2)
			CHECK(tfd_client_counter_wait(client, 2, i, FOREVER, i % 5 ? 0 : 5000) == 0);
		CHECK(tfd_client_job_wait(client, (uint64_t)job, FOREVER, i % 3 ? 0 : 5000, &result) == 0);
		tfd_client_job_release(client, (uint64_t)job);
	}
	/* Far below one recheck a round, whatever the machine and the sanitizer. */
	CHECK(tfd_client_now_ns() - start < (uint64_t)ROUNDS * 20 * MS);
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

static void test_death(bool by_daemon)
{
	struct fake_daemon fake;
	struct tfd_result result;
	struct waiter counter = { .slot = 0, .target = 1 };
	struct waiter job = { 0 };
	struct tfd_client *client;
	int64_t ended;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	fake_start(&fake);
	ended = tfd_client_job_submit(client, 0, TFD_OP_IMM, 0, 3, 0, 0, 3, 0, 1, 0, 0, FOREVER);
	CHECK(tfd_client_counter_wait(client, 3, 1, FOREVER, 0) == 0);
	job.target = (uint64_t)tfd_client_job_submit(client, 0, TFD_OP_WRITE, 0, 1, 0, 0, 3, 0, HELD_LENGTH,
	                                             0, 0, FOREVER);
	job.client = counter.client = client;
	waiter_start(&counter, wait_counter);
	waiter_start(&job, wait_job);
	until_asleep(&fake.counter[0].waiters, 1);
	until_asleep(&fake.record[job.target & 0xffff].waiters, 1);
	if (by_daemon)
		tfd_store_release(&fake.header->state, TFD_SESSION_ENDED);
	else
		tfd_client_set_dead(client);
	CHECK(pthread_join(counter.thread, NULL) == 0 && counter.rc == -EPIPE);
	CHECK(pthread_join(job.thread, NULL) == 0 && job.rc == -EPIPE);
	CHECK(counter.took_ns < 1500 * (uint64_t)MS && job.took_ns < 1500 * (uint64_t)MS);
	CHECK(tfd_client_is_dead(client));
	/* What was told before stays told. */
	CHECK(tfd_client_job_poll(client, (uint64_t)ended, &result) == 0);
	CHECK(tfd_client_counter_wait(client, 3, 1, FOREVER, 0) == 0);
	CHECK(tfd_client_counter_wait(client, 3, 2, FOREVER, 0) == -EPIPE);
	CHECK(tfd_client_job_submit(client, 0, TFD_OP_IMM, 0, 3, 0, 0, 3, 0, 1, 0, 0, FOREVER) == -EPIPE);
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

static void on_signal(int number)
{
	(void)number;
}

static void test_signals_interrupt(void)
{
	struct sigaction action = { .sa_handler = on_signal };
	struct fake_daemon fake;
	struct waiter w = { .slot = 0, .target = 1 };
	struct tfd_client *client;

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	w.client = client;
	waiter_start(&w, wait_counter);
	until_asleep(&fake.counter[0].waiters, 1);
	CHECK(pthread_kill(w.thread, SIGUSR1) == 0);
	CHECK(pthread_join(w.thread, NULL) == 0 && w.rc == -EINTR);
	CHECK(fake.counter[0].waiters == 0);
	tfd_client_close(client);
	fake_fini(&fake);
}

static void test_event_fd(void)
{
	struct fake_daemon fake;
	struct pollfd events;
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	events = (struct pollfd){ .fd = fake.event_fd, .events = POLLIN };
	fake_count(&fake, 0);
	CHECK(poll(&events, 1, 0) == 0);
	tfd_client_set_event_waiters(client, 1);
	fake_count(&fake, 0);
	CHECK(poll(&events, 1, 0) == 1);
	tfd_client_close(client);
	fake_fini(&fake);
}

int main(void)
{
	test_targets_and_faults();
	test_sleepers_wake();
	test_no_wake_up_is_lost();
	test_death(false);
	test_death(true);
	test_signals_interrupt();
	test_event_fd();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* One session misbehaves within its rights: floods, closed pipes. Another goes on, and memory stays bounded. */
#include <fcntl.h>

#include "core/parts.h"
#include "core_fixture.h"

#define PAIRS 60000
#define QUEUE_BOUND 16384 /* events; the session's own bound is 4,096 losses */

/* Every write is cancelled at once, and control takes no events: the flooding ring has to wait, nobody else's. */
static void test_loss_flood(struct user *bad, struct user *good, uint64_t open)
{
	struct tfd_entry write_entry = {
		.op = TFD_OP_WRITE, .src_region = bad->region, .dst_grant = open, .length = REGION_BYTES
	};
	uint32_t mask = bad->header->ring_entries - 1;
	uint32_t tail = bad->ring->tail;

	for (int i = 0; i < PAIRS; i++) {
		uint64_t one = 1;

		for (int k = 0; k < 100 && tail - tfd_load_acquire(&bad->ring->head) > mask - 2; k++)
			(void)usleep(10);
		if (tail - tfd_load_acquire(&bad->ring->head) > mask - 2)
			break; /* it waits, as it should */
		for (int entry = 0; entry < 2; entry++, tail++) {
			struct tfd_entry *slot = &bad->entries[tail & mask];

			*slot = write_entry;
			slot->imm = (uint32_t)i % 2; /* alternating: merging alone would not help */
			if (entry)
				*slot = (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = bad->next_job };
			slot->job_id = ++bad->next_job;
			slot->record = (uint32_t)(slot->job_id & (bad->header->record_count - 1));
		}
		tfd_store_seq(&bad->ring->tail, tail);
		(void)!write(bad->fds.doorbell_fd, &one, sizeof(one));
	}
	(void)pthread_mutex_lock(&bad->host->core->event_lock);
	CHECK(bad->host->core->queue_count > 1000); /* the flood was one */
	CHECK(bad->host->core->queue_capacity <= QUEUE_BOUND);
	(void)pthread_mutex_unlock(&bad->host->core->event_lock);
	CHECK(user_run(good, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = 1 })->status ==
	      TFD_JOB_INVALID);
}

/* A client that closes, fills and drains what it was given. */
static void test_pipes(struct host *host, struct user *good)
{
	struct user bad;
	char bytes[4096] = { 0 };

	user_open(host, &bad);
	(void)fcntl(bad.fds.doorbell_fd, F_SETFL, 0);
	(void)fcntl(bad.fds.event_fd, F_SETFL, 0);
	bad.header->event_waiters = 1;
	for (int i = 0; i < 20000; i++) /* nobody reads the event pipe: it fills */
		(void)user_run(&bad, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = 1 });
	(void)fcntl(bad.fds.doorbell_fd, F_SETFL, O_NONBLOCK);
	for (int i = 0; i < 1000; i++)
		(void)!write(bad.fds.doorbell_fd, bytes, sizeof(bytes));
	CHECK(user_run(good, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = 1 })->status ==
	      TFD_JOB_INVALID);
	user_close(&bad);
}

static void test_control_jobs(struct host *host, uint64_t conn, struct user *target)
{
	struct tfd_entry entries[8];
	struct tfd_job_end end;
	struct user user;

	user_open(host, &user);
	CHECK(tfd_jobs_submit(host->core, user.session, entries, TFD_CONTROL_ENDS + 1, NULL, 0) == -E2BIG);
	memset(entries, 0, sizeof(entries));
	for (int i = 0; i < 8; i++)
		entries[i] = (struct tfd_entry){ .op = TFD_OP_WRITE,
		                                 .src_region = user.region,
		                                 .dst_grant = open_grant(&user, target, conn),
		                                 .length = REGION_BYTES };
	CHECK_OK(tfd_jobs_submit(host->core, user.session, entries, 8, NULL, 0));
	CHECK_OK(tfd_session_end(host->core, user.session, TFD_DETAIL_SESSION_ENDED));
	(void)wait_event(host, TFD_EVENT_SESSION_QUIET, user.session);
	for (int i = 0; i < 8; i++)
		CHECK_OK(tfd_job_result(host->core, user.session, entries[i].job_id, &end));
	CHECK(end.status == TFD_JOB_CANCELLED || end.status == TFD_JOB_OK);
	CHECK(tfd_jobs_submit(host->core, user.session, entries, 1, NULL, 0) == -ESHUTDOWN);
	user_free(&user);
}

static int publish_ten(struct tfd_worker *worker, void *argument)
{
	struct user *user = argument;

	(void)worker; /* busy with this command: it cannot have looked at the ring before the end */
	for (int i = 0; i < 10; i++)
		(void)user_submit(user, (struct tfd_entry){ .op = TFD_OP_WRITE,
		                                            .src_region = user->region,
		                                            .dst_grant = user->grant,
		                                            .length = REGION_BYTES });
	return 0;
}

static uint32_t holding; /* shared */

/* Holds the worker until two commands wait, which it then runs in one batch: no look at the rings between them. */
static int hold_for_two(struct tfd_worker *worker, void *argument)
{
	struct tfd_command *top;

	(void)argument;
	tfd_store_release(&holding, 1); /* pairs with test_published_before_end: the inbox was taken before */
	do
		top = tfd_load_seq(&worker->inbox);
	while (!top || !top->next);
	return 0;
}

static void *hold_thread(void *argument)
{
	CHECK(tfd_command_run(argument, hold_for_two, NULL) == 0);
	return NULL;
}

static void *publish_thread(void *argument)
{
	struct user *user = argument;

	CHECK(tfd_command_run(user->host->core->groups[0]->worker, publish_ten, user) == 0);
	return NULL;
}

/* Every job that a client published before its end either lands or is told as lost. */
static void test_published_before_end(struct host *host, uint64_t conn, struct user *target)
{
	struct tfd_event event;
	struct user user;
	struct tfd_worker *worker = host->core->groups[0]->worker;
	pthread_t threads[2];
	uint64_t told = 0;
	uint64_t landed;

	user_open(host, &user);
	user.grant = open_grant(&user, target, conn);
	landed = tfd_load_acquire(&target->counters[0].value);
	tfd_store_release(&holding, 0);
	CHECK(pthread_create(&threads[0], NULL, hold_thread, worker) == 0);
	while (!tfd_load_acquire(&holding)) /* pairs with hold_for_two */
		(void)usleep(100);
	CHECK(pthread_create(&threads[1], NULL, publish_thread, &user) == 0);
	while (!tfd_load_seq(&worker->inbox))
		(void)usleep(100);
	CHECK_OK(tfd_session_end(host->core, user.session, TFD_DETAIL_SESSION_ENDED));
	for (int i = 0; i < 5000; i++) {
		if (!tfd_core_events(host->core, &event, 1)) {
			(void)usleep(1000);
			continue;
		}
		if (event.type == TFD_EVENT_LOST && event.id == user.grant)
			told++;
		if (event.type == TFD_EVENT_SESSION_QUIET && event.id == user.session)
			break;
	}
	CHECK(event.type == TFD_EVENT_SESSION_QUIET);
	for (int i = 0; i < 5000; i++) {
		if (tfd_load_acquire(&target->counters[0].value) - landed + told >= 10)
			break;
		(void)usleep(1000);
	}
	CHECK(tfd_load_acquire(&target->counters[0].value) - landed + told == 10);
	(void)pthread_join(threads[0], NULL);
	(void)pthread_join(threads[1], NULL);
	user_free(&user);
}

int main(void)
{
	struct host host;
	struct user bad, good;
	uint64_t out, in, open;

	host_open(&host);
	user_open(&host, &bad);
	user_open(&host, &good);
	connect_hosts(&host, &host, &out, &in);
	open = open_grant(&bad, &good, out);
	test_control_jobs(&host, out, &good);
	for (int i = 0; i < 20; i++)
		test_published_before_end(&host, out, &good);
	test_pipes(&host, &good);
	test_loss_flood(&bad, &good, open);
	user_close(&bad);
	user_close(&good);
	tfd_core_close(host.core);
	return 0;
}

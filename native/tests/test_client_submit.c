/* SPDX-License-Identifier: Apache-2.0 */
/* Submitting: all or none, back-pressure, records that come back however their owners behave, several threads. */
#include <signal.h>

#include "fake_daemon.h"

#define FOREVER (-1)
#define SPIN_NS 20000

static int64_t submit_one(struct tfd_client *client, uint32_t imm, uint64_t length, int64_t timeout_ns)
{
	return tfd_client_job_submit(client, 0, TFD_OP_WRITE, TFD_PRIORITY_BULK, imm, 1, 2, 3, 4, length, 0,
	                             0, timeout_ns);
}

static void test_entry_arrives_whole(void)
{
	struct fake_daemon fake;
	struct tfd_client *client;
	const struct tfd_entry *e;
	uint64_t before = tfd_client_now_ns();
	int64_t job;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	job = tfd_client_job_submit(client, 0, TFD_OP_CANCEL, TFD_PRIORITY_LATENCY, 5, 6, 7, 8, 9, 10,
	                            1000000000, 11, 0);
	CHECK(job > 0);
	CHECK(fake.ring->tail == 1);
	e = &fake.ring_entries[0];
	CHECK(e->op == TFD_OP_CANCEL && e->priority == TFD_PRIORITY_LATENCY && e->flags == 0);
	CHECK(e->imm == 5 && e->src_region == 6 && e->src_offset == 7 && e->dst_grant == 8);
	CHECK(e->dst_offset == 9 && e->length == 10 && e->argument == 11);
	CHECK(e->job_id == (uint64_t)job && e->record == ((uint64_t)job & 0xffff));
	CHECK(e->deadline_ns >= before + 1000000000 && e->deadline_ns <= tfd_client_now_ns() + 1000000000);
	CHECK(tfd_client_job_submit(client, 0, 1, 0, 0, 0, 0, 0, 0, 0, UINT64_MAX, 0, 0) > 0);
	CHECK(fake.ring_entries[1].deadline_ns == UINT64_MAX);
	tfd_client_close(client);
	fake_fini(&fake);
}

static void test_all_or_none(void)
{
	struct fake_daemon fake;
	struct tfd_entry entries[64] = { 0 };
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_submit(client, 1, entries, 1) == -EINVAL);
	CHECK(tfd_client_submit(client, 0, entries, 9) == -E2BIG);
	CHECK(tfd_client_submit(client, 0, entries, 0) == 0);
	CHECK(tfd_client_submit(client, 0, entries, 5) == 0);
	CHECK(tfd_client_submit(client, 0, entries + 8, 4) == -EAGAIN);
	CHECK(entries[8].job_id == 0 && fake.ring->tail == 5);
	CHECK(submit_one(client, 0, 1, 0) > 0);
	CHECK(tfd_client_submit_wait(client, 0, entries + 8, 4, 1000000) == -ETIMEDOUT);
	CHECK(tfd_client_submit(client, 0, entries + 8, 2) == 0);
	CHECK(submit_one(client, 0, 1, 0) == -EAGAIN);
	/* A head that is ahead of the tail: the daemon is broken, not us. */
	tfd_store_release(&fake.ring->head, 9u);
	CHECK(submit_one(client, 0, 1, 0) == -EPIPE);
	tfd_client_close(client);
	CHECK(submit_one(NULL, 0, 1, 0) == -EPIPE);
	fake_fini(&fake);
}

/* Finished jobs whose owners keep them do not starve the others. */
static void test_kept_results_block_nobody(void)
{
	enum { JOBS = 1000 };
	static int64_t jobs[JOBS];
	struct fake_daemon fake;
	struct tfd_client *client;
	struct tfd_result result;

	fake_layout(&fake, 8, 16, 32);
	client = fake_attach(&fake);
	fake_start(&fake);
	for (uint32_t i = 0; i < JOBS; i++) {
		jobs[i] = submit_one(client, i % 21, i, FOREVER);
		CHECK(jobs[i] > 0);
		for (uint32_t j = i > 20 ? i - 20 : 0; j < i; j++)
			CHECK(jobs[j] != jobs[i]);
	}
	for (uint32_t i = 0; i < JOBS; i++) {
		CHECK(tfd_client_job_wait(client, (uint64_t)jobs[i], FOREVER, SPIN_NS, &result) == 0);
		CHECK(result.status == TFD_JOB_OK && result.bytes == i && result.detail == i % 21);
		CHECK(result.submitted_ns && result.submitted_ns <= result.ended_ns);
		CHECK(tfd_client_job_poll(client, (uint64_t)jobs[i], &result) == 0);
		tfd_client_job_release(client, (uint64_t)jobs[i]);
		tfd_client_job_release(client, (uint64_t)jobs[i]);
		CHECK(tfd_client_job_poll(client, (uint64_t)jobs[i], &result) == -ENOENT);
	}
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

/* Jobs released in flight give their records back when they end. */
static void test_released_in_flight(void)
{
	struct fake_daemon fake;
	struct tfd_client *client;
	struct tfd_result result;
	int64_t job = 0;

	fake_layout(&fake, 32, 16, 4);
	client = fake_attach(&fake);
	fake_start(&fake);
	for (int i = 0; i < 16; i++) {
		job = submit_one(client, 0, HELD_LENGTH, FOREVER);
		CHECK(job > 0);
		tfd_client_job_release(client, (uint64_t)job);
	}
	CHECK(tfd_client_job_poll(client, (uint64_t)job, &result) == -ENOENT);
	CHECK(submit_one(client, 0, 1, 5000000) == -ETIMEDOUT);
	fake_flush(&fake);
	for (int i = 0; i < 16; i++) {
		job = submit_one(client, 0, 1, FOREVER);
		CHECK(job > 0);
		CHECK(tfd_client_job_wait(client, (uint64_t)job, FOREVER, 0, &result) == 0);
	}
	/* Unknown ids. */
	CHECK(tfd_client_job_poll(client, 0, &result) == -ENOENT);
	CHECK(tfd_client_job_poll(client, UINT64_MAX, &result) == -ENOENT);
	CHECK(tfd_client_job_wait(client, UINT64_MAX, 0, 0, &result) == -ENOENT);
	tfd_client_job_release(client, UINT64_MAX);
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

struct producer {
	pthread_t thread;
	struct tfd_client *client;
	uint32_t imm;
	uint32_t jobs;
};

static void *produce(void *argument)
{
	struct producer *p = argument;
	struct tfd_result result;

	for (uint32_t i = 0; i < p->jobs; i++) {
		int64_t job = submit_one(p->client, p->imm, i, FOREVER);

		CHECK(job > 0);
		if (i % 3 == 0) {
			tfd_client_job_release(p->client, (uint64_t)job);
			continue;
		}
		CHECK(tfd_client_job_wait(p->client, (uint64_t)job, FOREVER, i % 2 ? 0 : SPIN_NS, &result) ==
		      0);
		CHECK(result.bytes == i && result.status == TFD_JOB_OK);
		if (i % 3 == 1)
			tfd_client_job_release(p->client, (uint64_t)job);
	}
	return NULL;
}

static void test_several_threads(void)
{
	enum { THREADS = 4, JOBS = 3000 };
	struct producer producers[THREADS];
	struct fake_daemon fake;
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, THREADS);
	client = fake_attach(&fake);
	fake_start(&fake);
	for (uint32_t i = 0; i < THREADS; i++) {
		producers[i] = (struct producer){ .client = client, .imm = i, .jobs = JOBS };
		CHECK(pthread_create(&producers[i].thread, NULL, produce, &producers[i]) == 0);
	}
	for (uint32_t i = 0; i < THREADS; i++)
		CHECK(tfd_client_counter_wait(client, i, JOBS, FOREVER, 0) == 0);
	for (uint32_t i = 0; i < THREADS; i++)
		CHECK(pthread_join(producers[i].thread, NULL) == 0);
	CHECK(tfd_load_seq(&fake.ring->tail) == THREADS * JOBS);
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

/* The doorbell of a daemon that is gone is a broken pipe: no signal, no failure here, and none left pending. */
static void test_doorbell_of_a_dead_daemon(void)
{
	struct fake_daemon fake;
	struct tfd_client *client = NULL;
	sigset_t pending;
	int doorbell[2];

	fake_layout(&fake, 8, 16, 4);
	CHECK(pipe2(doorbell, O_CLOEXEC | O_NONBLOCK) == 0);
	CHECK(tfd_client_open(fake.segment_fd, &doorbell[1], 1, &client) == 0);
	tfd_store_seq(&fake.ring->need_wakeup, 1u);
	CHECK(submit_one(client, 0, 1, 0) > 0);
	close(doorbell[0]);
	CHECK(submit_one(client, 0, 1, 0) > 0);
	CHECK(sigpending(&pending) == 0 && !sigismember(&pending, SIGPIPE));
	tfd_client_close(client);
	close(doorbell[1]);
	/* Full is as good as written. */
	CHECK(pipe2(doorbell, O_CLOEXEC | O_NONBLOCK) == 0);
	while (write(doorbell[1], "full", 4) == 4)
		continue;
	CHECK(tfd_client_open(fake.segment_fd, &doorbell[1], 1, &client) == 0);
	CHECK(submit_one(client, 0, 1, 0) > 0);
	tfd_client_close(client);
	close(doorbell[0]);
	close(doorbell[1]);
	fake_fini(&fake);
}

int main(void)
{
	test_doorbell_of_a_dead_daemon();
	test_entry_arrives_whole();
	test_all_or_none();
	test_kept_results_block_nobody();
	test_released_in_flight();
	test_several_threads();
	return 0;
}

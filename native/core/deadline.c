/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs with a deadline, in a binary heap: the next one to pass is first, and none is looked at before its time, so that tens of
 * thousands of one session cost the others nothing. Owner: worker.
 */
#include <errno.h>
#include <stdlib.h>

#include "parts.h"

#define CAPACITY_LEAST 256u
#define PER_PASS 256u /* of many that pass at once */

int tfd_deadlines_reserve(struct tfd_worker *worker, uint32_t jobs)
{
	uint32_t capacity = worker->deadline_capacity ? worker->deadline_capacity : CAPACITY_LEAST;
	struct tfd_job **heap;

	if (jobs <= worker->deadline_capacity)
		return 0;
	while (capacity < jobs)
		capacity *= 2;
	heap = realloc(worker->deadlines, capacity * sizeof(*heap));
	if (!heap)
		return -ENOMEM;
	worker->deadlines = heap;
	worker->deadline_capacity = capacity;
	return 0;
}

static void place(struct tfd_worker *worker, uint32_t at, struct tfd_job *job)
{
	worker->deadlines[at] = job;
	job->deadline_at = at + 1;
}

static void rise(struct tfd_worker *worker, uint32_t at, struct tfd_job *job)
{
	while (at) {
		uint32_t parent = (at - 1) / 2;

		if (worker->deadlines[parent]->deadline_ns <= job->deadline_ns)
			break;
		place(worker, at, worker->deadlines[parent]);
		at = parent;
	}
	place(worker, at, job);
}

static void sink(struct tfd_worker *worker, uint32_t at, struct tfd_job *job)
{
	uint32_t count = worker->deadline_count;

	for (;;) {
		uint32_t child = 2 * at + 1;

		if (child >= count)
			break;
		if (child + 1 < count &&
		    worker->deadlines[child + 1]->deadline_ns < worker->deadlines[child]->deadline_ns)
			child++;
		if (worker->deadlines[child]->deadline_ns >= job->deadline_ns)
			break;
		place(worker, at, worker->deadlines[child]);
		at = child;
	}
	place(worker, at, job);
}

void tfd_deadline_add(struct tfd_worker *worker, struct tfd_job *job)
{
	rise(worker, worker->deadline_count++, job);
}

void tfd_deadline_remove(struct tfd_worker *worker, struct tfd_job *job)
{
	uint32_t at = job->deadline_at - 1;
	struct tfd_job *last;

	if (!job->deadline_at)
		return;
	job->deadline_at = 0;
	last = worker->deadlines[--worker->deadline_count];
	if (last == job)
		return;
	if (at && worker->deadlines[(at - 1) / 2]->deadline_ns > last->deadline_ns)
		rise(worker, at, last);
	else
		sink(worker, at, last);
}

uint64_t tfd_deadline_next(const struct tfd_worker *worker)
{
	return worker->deadline_count ? worker->deadlines[0]->deadline_ns : UINT64_MAX;
}

void tfd_deadlines_check(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < PER_PASS && tfd_deadline_next(worker) <= worker->now_ns; i++) {
		struct tfd_job *job = worker->deadlines[0];

		tfd_deadline_remove(worker, job); /* it has failed: its deadline matters no more */
		tfd_job_fail(job, TFD_JOB_DEADLINE, TFD_DETAIL_NONE);
		tfd_job_finish_if_quiet(job);
	}
}

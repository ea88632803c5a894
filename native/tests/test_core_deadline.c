/* SPDX-License-Identifier: Apache-2.0 */
/* The heap of deadlines against the plainest model: random jobs come and go, the earliest is always first. */
#include <stdlib.h>

#include "core/parts.h"
#include "core_fixture.h"

#define JOBS 500u
#define STEPS 50000u

static struct tfd_job jobs[JOBS];

static uint64_t earliest(void)
{
	uint64_t found = UINT64_MAX;

	for (uint32_t i = 0; i < JOBS; i++) {
		if (jobs[i].deadline_at && jobs[i].deadline_ns < found)
			found = jobs[i].deadline_ns;
	}
	return found;
}

int main(void)
{
	static struct tfd_worker worker;
	uint32_t there = 0;

	srandom(7);
	CHECK(tfd_deadline_next(&worker) == UINT64_MAX);
	CHECK(tfd_deadlines_reserve(&worker, JOBS) == 0);
	for (uint32_t i = 0; i < STEPS; i++) {
		struct tfd_job *job = &jobs[(uint32_t)random() % JOBS];

		if (job->deadline_at) {
			tfd_deadline_remove(&worker, job);
			tfd_deadline_remove(&worker, job); /* once more does nothing */
			there--;
		} else {
			job->deadline_ns = (uint64_t)random() % 1000; /* some alike */
			tfd_deadline_add(&worker, job);
			there++;
		}
		CHECK(worker.deadline_count == there);
		CHECK(tfd_deadline_next(&worker) == earliest());
	}
	free(worker.deadlines);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The heap of deadlines against the plainest model: random jobs come and go, the earliest is always first. What has failed has none but for its copy. */
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
		if (jobs[i].deadline.at && jobs[i].deadline.key < found)
			found = jobs[i].deadline.key;
	}
	return found;
}

int main(void)
{
	static struct tfd_worker worker;
	uint32_t there = 0;

	srandom(7);
	CHECK(tfd_deadline_next(&worker) == UINT64_MAX);
	CHECK(tfd_heap_reserve(&worker.deadlines, JOBS) == 0);
	for (uint32_t i = 0; i < STEPS; i++) {
		struct tfd_job *job = &jobs[(uint32_t)random() % JOBS];

		if (job->deadline.at) {
			tfd_deadline_remove(&worker, job);
			tfd_deadline_remove(&worker, job); /* once more does nothing */
			there--;
		} else {
			uint64_t at = 1 + (uint64_t)random() % 1000; /* some alike */
			uint64_t until = 1 + (uint64_t)random() % 1000;
			bool failed = random() % 2, copied = random() % 2;

			job->status = failed ? TFD_JOB_CANCELLED : TFD_JOB_PENDING;
			job->deadline_ns = at;
			job->copy_until_ns = copied ? until : 0;
			tfd_deadline_add(&worker, job);
			there += !failed || copied;
			if (failed || (copied && until < at))
				at = until;
			CHECK(job->deadline.at ? job->deadline.key == at : failed && !copied);
		}
		CHECK(worker.deadlines.count == there);
		CHECK(tfd_deadline_next(&worker) == earliest());
	}
	tfd_heap_fini(&worker.deadlines);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs with a deadline: the next one to pass is first, and none is looked at before its time, so that tens of thousands of one
 * session cost the others nothing. Owner: worker.
 */
#include "parts.h"

#define PER_PASS 256u /* of many that pass at once */

void tfd_deadline_add(struct tfd_worker *worker, struct tfd_job *job)
{
	uint64_t at = job->status == TFD_JOB_PENDING ? job->deadline_ns : 0;

	if (job->copy_until_ns && (!at || job->copy_until_ns < at))
		at = job->copy_until_ns;
	job->deadline.key = at;
	if (at)
		tfd_heap_add(&worker->deadlines, &job->deadline);
}

void tfd_deadline_remove(struct tfd_worker *worker, struct tfd_job *job)
{
	tfd_heap_remove(&worker->deadlines, &job->deadline);
}

uint64_t tfd_deadline_next(const struct tfd_worker *worker)
{
	const struct tfd_heap_item *first = tfd_heap_first(&worker->deadlines);

	return first ? first->key : UINT64_MAX;
}

void tfd_deadlines_check(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < PER_PASS && tfd_deadline_next(worker) <= worker->now_ns; i++) {
		struct tfd_job *job =
			tfd_container(tfd_heap_first(&worker->deadlines), struct tfd_job, deadline);

		tfd_deadline_remove(worker, job); /* it has failed: its deadline matters no more */
		if (job->copy_until_ns && job->copy_until_ns <= worker->now_ns) {
			tfd_copied_give_up(job);
			continue;
		}
		tfd_job_fail(job, TFD_JOB_DEADLINE, TFD_DETAIL_NONE);
		tfd_job_finish_if_quiet(job);
	}
}

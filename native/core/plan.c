/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans: jobs that are kept in private memory and launched by one ring entry each. The sizes and offsets of a launch may be a table
 * in the arena, which its owner, or a kernel of a device, fills before: it is read once the launch begins, each word once, and checked then
 * against what the plan was made with. What is wrong with it ends that launch.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

int tfd_plans_open(struct tfd_session *session, uint32_t count)
{
	session->plans =
		count ? calloc(count, sizeof(*session->plans)) : NULL; /* NOLINT: pointers are meant */
	if (count && !session->plans)
		return -ENOMEM;
	session->plan_count = count;
	return 0;
}

void tfd_plans_free(struct tfd_session *session)
{
	for (uint32_t i = 0; i < session->plan_count; i++)
		free(session->plans[i]);
	free(session->plans);
}

void tfd_plan_pools_free(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < TFD_JOB_CLASSES; i++) {
		while (worker->plan_free[i]) {
			struct tfd_template *plan = worker->plan_free[i];

			worker->plan_free[i] = plan->next_free;
			free(plan);
		}
	}
}

struct tfd_template *tfd_plan_get(const struct tfd_session *session, uint64_t number)
{
	return number < session->plan_count ? session->plans[number] : NULL;
}

/* From free lists by size, which grow and stay, as those of jobs. */
struct tfd_template *tfd_plan_add(struct tfd_session *session, uint32_t number, uint32_t target_count)
{
	struct tfd_worker *worker = session->group->worker;
	uint8_t plan_class = tfd_job_class(target_count);
	uint32_t room = tfd_job_class_shards(plan_class);
	struct tfd_template *plan = worker->plan_free[plan_class];

	if (room > TFD_SESSION_PLAN_TARGETS - session->plan_targets)
		return NULL;
	if (plan)
		worker->plan_free[plan_class] = plan->next_free;
	else
		plan = malloc(sizeof(*plan) + room * sizeof(plan->targets[0]));
	if (!plan)
		return NULL;
	plan->next_free = NULL;
	plan->plan_class = plan_class;
	session->plan_targets += room;
	session->plans[number] = plan;
	return plan;
}

void tfd_plan_remove(struct tfd_session *session, uint32_t number)
{
	struct tfd_worker *worker = session->group->worker;
	struct tfd_template *plan = session->plans[number];

	if (!plan)
		return;
	session->plan_targets -= tfd_job_class_shards(plan->plan_class);
	session->plans[number] = NULL;
	plan->next_free = worker->plan_free[plan->plan_class];
	worker->plan_free[plan->plan_class] = plan;
}

/* ---- launches with a table ---- */

static bool counts_pages(const struct tfd_job *job)
{
	return job->op == TFD_OP_WRITE_PAGES && !(job->flags & TFD_FLAG_COUNT_JOB);
}

/*
 * How many pages it will count nobody knows yet. If it is lost before, its receiver is told so, without a number: an eighth is none in
 * whole writes.
 */
void tfd_launch_enter(struct tfd_job *job)
{
	for (uint32_t i = 0; i < job->shard_count && counts_pages(job); i++)
		job->shards[i].units = i == 0;
}

static uint32_t slice_read(const struct tfd_job *job, uint32_t index, struct tfd_slice *slice)
{
	memcpy(slice, job->launch + sizeof(struct tfd_plan_table) + index * sizeof(*slice), sizeof(*slice));
	/* A compiler must not read the segment again in place of the copy. */
	__asm__ volatile("" : : "r"(slice) : "memory");
	return slice->src_offset <= job->length && slice->length <= job->length - slice->src_offset ?
	               TFD_DETAIL_NONE :
	               TFD_DETAIL_SOURCE_BOUNDS;
}

/* Whether the grant takes it. */
static uint32_t slice_check(const struct tfd_job *job, const struct tfd_slice *slice,
                            const struct tfd_open *open)
{
	if (slice->dst_offset > open->length || slice->length > open->length - slice->dst_offset)
		return TFD_DETAIL_DESTINATION_BOUNDS;
	return tfd_open_takes(open, job->region, false, slice->length) || job->flags & TFD_FLAG_COPIED ?
	               TFD_DETAIL_NONE :
	               TFD_DETAIL_ONE_BYTE;
}

/* Of a job with one grant; it may have been made with more shards than it needs now. */
static uint32_t parts_for(const struct tfd_job *job, uint64_t length, bool eighths, uint64_t shortest)
{
	uint32_t count = tfd_cut_count(job->open, job->region, length, eighths, shortest);

	return count < job->shard_count ? count : job->shard_count;
}

/* The pages themselves are read and checked as they are posted. */
static uint32_t read_pages(struct tfd_job *job, uint32_t count)
{
	job->table = job->launch + sizeof(struct tfd_plan_table);
	job->counts = count;
	job->parts = count || !counts_pages(job) ? parts_for(job, count, !counts_pages(job), 1) : 0;
	return TFD_DETAIL_NONE;
}

static uint32_t read_write(struct tfd_job *job, uint32_t count)
{
	struct tfd_slice slice;
	uint32_t detail;

	job->parts = 0;
	if (!count)
		return TFD_DETAIL_NONE;
	detail = slice_read(job, 0, &slice);
	if (!detail)
		detail = slice_check(job, &slice, job->open);
	if (detail)
		return detail;
	job->src_offset += slice.src_offset;
	job->dst_offset = slice.dst_offset;
	job->length = slice.length;
	job->parts = parts_for(job, slice.length, true, job->session->group->cut_bytes);
	return TFD_DETAIL_NONE;
}

static uint32_t read_targets(struct tfd_job *job, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_shard *shard = &job->shards[i];
		struct tfd_slice slice;
		uint32_t detail = slice_read(job, i, &slice);

		if (!detail && shard->open) /* else it has failed before */
			detail = slice_check(job, &slice, shard->open);
		if (detail)
			return detail;
		shard->src_offset = job->src_offset + slice.src_offset;
		shard->dst_offset = slice.dst_offset;
		shard->length = slice.length;
	}
	job->parts = count;
	return TFD_DETAIL_NONE;
}

uint32_t tfd_launch_read(struct tfd_job *job)
{
	struct tfd_plan_table head;

	memcpy(&head, job->launch, sizeof(head));
	__asm__ volatile("" : : "r"(&head) : "memory");
	if (head.count > job->capacity)
		return TFD_DETAIL_TABLE;
	if (job->op == TFD_OP_WRITE_PAGES)
		return read_pages(job, head.count);
	return job->op == TFD_OP_WRITE ? read_write(job, head.count) : read_targets(job, head.count);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a job: PENDING, perhaps failing (its status set, nothing more is posted), ended once every posted
 * piece is back. It ends exactly once: tfd_job_finish_if_quiet is the only way out.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "parts.h"

static const uint32_t class_shards[TFD_JOB_CLASSES] = { 1, 8, 64, 512, TFD_MAX_TARGETS };

uint32_t tfd_job_class_shards(uint8_t shard_class)
{
	return class_shards[shard_class];
}

uint8_t tfd_job_class(uint32_t shard_count)
{
	uint8_t shard_class = 0;

	while (class_shards[shard_class] < shard_count)
		shard_class++;
	return shard_class;
}

/*
 * Jobs come from free lists by size; growing one is the one allocation a submit may cause, and it is never given back: so what one
 * session can make the lists grow by has a bound.
 */
struct tfd_job *tfd_job_alloc(struct tfd_session *session, uint32_t shard_count)
{
	struct tfd_worker *worker = session->group->worker;
	uint8_t shard_class = tfd_job_class(shard_count);
	struct tfd_job *job;

	if (class_shards[shard_class] > TFD_SESSION_SHARDS - session->shard_count)
		return NULL;
	job = worker->job_free[shard_class];
	if (!job) {
		if (tfd_heap_reserve(&worker->deadlines, worker->jobs_made + 1) != 0)
			return NULL;
		job = malloc(sizeof(*job) + class_shards[shard_class] * sizeof(job->shards[0]));
		if (!job)
			return NULL;
		worker->jobs_made++;
	} else {
		worker->job_free[shard_class] =
			job->link.next ? tfd_container(job->link.next, struct tfd_job, link) : NULL;
	}
	memset(job, 0, sizeof(*job) + shard_count * sizeof(job->shards[0]));
	job->session = session;
	job->shard_class = shard_class;
	job->shard_count = job->parts = job->shards_left = job->data_left = shard_count;
	tfd_list_init(&job->link);
	for (uint32_t i = 0; i < shard_count; i++) {
		job->shards[i].job = job;
		tfd_list_init(&job->shards[i].link);
		tfd_list_init(&job->shards[i].open_link);
	}
	return job;
}

static void job_release(struct tfd_worker *worker, struct tfd_job *job)
{
	job->link.next =
		worker->job_free[job->shard_class] ? &worker->job_free[job->shard_class]->link : NULL;
	worker->job_free[job->shard_class] = job;
}

void tfd_job_drop(struct tfd_job *job)
{
	job_release(job->session->group->worker, job);
}

void tfd_jobs_free(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < TFD_JOB_CLASSES; i++) {
		while (worker->job_free[i]) {
			struct tfd_job *job = worker->job_free[i];

			worker->job_free[i] =
				job->link.next ? tfd_container(job->link.next, struct tfd_job, link) : NULL;
			free(job);
		}
	}
	while (worker->batch_free) {
		struct tfd_batch *batch = worker->batch_free;

		worker->batch_free = batch->next_free;
		free(batch);
	}
	while (worker->fraction_free) {
		struct tfd_fraction *fraction = worker->fraction_free;

		worker->fraction_free = fraction->next;
		free(fraction);
	}
}

/* The worker has stopped: what is in flight ends with the core. */
void tfd_jobs_discard(struct tfd_session *session)
{
	while (!tfd_list_empty(&session->jobs)) {
		struct tfd_job *job = tfd_container(session->jobs.next, struct tfd_job, link);

		tfd_list_remove(&job->link);
		for (uint32_t i = 0; i < job->shard_count; i++)
			free(job->shards[i].batch);
		if (job->tables)
			tfd_tables_put(job->source, job->tables);
		free(job);
	}
}

void tfd_job_enter(struct tfd_job *job)
{
	struct tfd_session *session = job->session;

	job->status = TFD_JOB_PENDING;
	job->source->in_flight[job->record] = job;
	tfd_list_push(&session->jobs, &job->link);
	session->job_count++;
	session->shard_count += class_shards[job->shard_class];
	tfd_store_relaxed(&session->stat.jobs_in_flight, session->job_count);
	if (job->region)
		job->region->jobs++;
	tfd_deadline_add(session->group->worker, job);
	tfd_job_cut(job);
	if (job->launch)
		tfd_launch_enter(job);
	for (uint32_t i = 0; i < job->shard_count; i++)
		tfd_shard_enter(&job->shards[i]);
}

void tfd_job_go(struct tfd_job *job)
{
	job->begun = true;
	job->number = job->session->next_job++;
	for (uint32_t i = 0; i < job->shard_count; i++) {
		if (job->shards[i].state !=
		    TFD_SHARD_DONE) /* of an armed scatter a target may have failed before */
			tfd_shard_go(&job->shards[i]);
	}
	tfd_job_finish_if_quiet(job);
}

void tfd_job_start(struct tfd_job *job)
{
	tfd_job_enter(job);
	tfd_job_go(job);
}

void tfd_job_fail(struct tfd_job *job, uint32_t status, uint32_t detail)
{
	if (job->status != TFD_JOB_PENDING)
		return;
	job->status = (uint8_t)status;
	job->detail = detail;
	tfd_copied_fail(job);
	for (uint32_t i = 0; i < job->shard_count; i++) {
		struct tfd_shard *shard = &job->shards[i];

		tfd_shard_unqueue(shard);
		tfd_batch_drop(shard);
		if (job->open || shard->state == TFD_SHARD_DONE)
			continue;
		shard->failed = true;
		job->part_status = (uint8_t)status;
		if (!shard->inflight && !tfd_copied_runs(job))
			tfd_shard_done(shard);
	}
}

void tfd_record_end(struct tfd_session *session, struct tfd_source *source, uint32_t record,
                    const struct tfd_record *end)
{
	struct tfd_record *shared = &source->records[record];

	shared->status = end->status;
	shared->detail = end->detail;
	shared->bytes = end->bytes;
	shared->accepted_ns = end->accepted_ns;
	shared->posted_ns = end->posted_ns;
	shared->ended_ns = end->ended_ns;
	shared->path = end->path;
	/* Seq, before the waker's look at `waiters`; pairs with tfd_client_job_poll and tfd_job_result. */
	tfd_store_seq(&shared->done_id, end->done_id);
	tfd_wake_record(session, source, record);
}

/* Whether a rail that it wrote by does not write by its device. */
static bool job_emulated(const struct tfd_job *job)
{
	const struct tfd_group *group = job->session->group;

	for (uint64_t rails = job->op == TFD_OP_READ ? 0 : job->rails; rails; rails &= rails - 1) {
		if (group->rails[__builtin_ctzll(rails)].info.emulated)
			return true;
	}
	return false;
}

static uint32_t job_path(const struct tfd_job *job)
{
	if (job->op == TFD_OP_READ && job->flags & TFD_FLAG_COPIED && job->acked)
		return TFD_PATH_CUDA;
	if (!job->ops)
		return 0;
	return (job->flags & TFD_FLAG_COPIED ? TFD_PATH_CUDA : job->ops->path_id) |
	       (uint32_t)__builtin_popcountll(job->rails) << TFD_PATH_RAILS_SHIFT |
	       (job->packed ? TFD_PATH_PACKED : 0) | (job_emulated(job) ? TFD_PATH_EMULATED : 0);
}

static void job_unlink(struct tfd_job *job)
{
	struct tfd_session *session = job->session;

	job->source->in_flight[job->record] = NULL;
	tfd_list_remove(&job->link);
	tfd_deadline_remove(session->group->worker, job);
	tfd_disarm(job);
	session->job_count--;
	session->shard_count -= class_shards[job->shard_class];
	tfd_store_relaxed(&session->stat.jobs_in_flight, session->job_count);
	if (job->region)
		job->region->jobs--;
	if (job->tables)
		tfd_tables_put(job->source, job->tables);
}

/* Everything was acknowledged before the failure could matter; but wrong bytes stay wrong. */
static void decide_status(struct tfd_job *job)
{
	if (job->part_status)
		job->status = job->part_status;
	else if (!job->shards_left && job->begun && job->status != TFD_JOB_LOCAL_ACCESS)
		job->status = TFD_JOB_OK;
}

void tfd_job_finish_if_quiet(struct tfd_job *job)
{
	struct tfd_session *session = job->session;
	struct tfd_worker *worker = session->group->worker;
	struct tfd_record end;

	if (job->inflight || (job->status == TFD_JOB_PENDING && job->shards_left) || tfd_copied_runs(job))
		return;
	decide_status(job);
	if (job->status != TFD_JOB_OK)
		tfd_store_relaxed(&session->stat.jobs_failed, session->stat.jobs_failed + 1);
	tfd_store_relaxed(&session->stat.jobs_ended, session->stat.jobs_ended + 1);
	if (job->status != TFD_JOB_OK && job->open && job->shard_count)
		tfd_loss_tell(&job->shards[0], job->status, job->detail);
	end = (struct tfd_record){ .done_id = job->job_id,
	                           .status = job->status,
	                           .detail = job->status == TFD_JOB_OK ? TFD_DETAIL_NONE : job->detail,
	                           .bytes = job->acked,
	                           .accepted_ns = job->accepted_ns,
	                           .posted_ns = job->posted_ns,
	                           .ended_ns = tfd_now_ns(),
	                           .path = job_path(job) };
	job_unlink(job); /* the record may be used again as soon as done_id is seen */
	tfd_record_end(session, job->source, job->record, &end);
	for (uint32_t i = 0; i < job->shard_count; i++) /* after the loss: a fence may be answered now */
		tfd_shard_settle(&job->shards[i]);
	job_release(worker, job);
	tfd_session_quiet_if_idle(session);
}

/* ---- control's calls ---- */

struct list_call {
	struct tfd_session *session;
	struct tfd_job_info *jobs;
	uint32_t max;
	uint32_t count;
};

static int list_command(struct tfd_worker *worker, void *argument)
{
	struct list_call *call = argument;
	struct tfd_list *link;

	for (link = call->session->jobs.next; link != &call->session->jobs; link = link->next) {
		struct tfd_job *job = tfd_container(link, struct tfd_job, link);

		if (call->count == call->max)
			break;
		call->jobs[call->count++] = (struct tfd_job_info){
			.session = job->session->handle,
			.job_id = job->job_id,
			.open = job->open ? job->open->handle : 0,
			.length = job->length, /* of a page, where it has pages */
			.acknowledged = job->acked,
			.age_ns = worker->now_ns - job->accepted_ns,
			.op = job->op,
			.imm = job->imm & (TFD_IMM_COUNT - 1),
			.status = job->status,
			.priority = job->priority,
		};
	}
	return 0;
}

int tfd_jobs_list(struct tfd_core *core, uint64_t session, struct tfd_job_info *jobs, uint32_t max,
                  uint32_t *count)
{
	struct list_call call = { .jobs = jobs, .max = max };

	call.session = tfd_session_get(core, session);
	if (!call.session)
		return -ENOENT;
	(void)tfd_command_run(call.session->group->worker, list_command, &call);
	tfd_session_put(call.session);
	*count = call.count;
	return 0;
}

int tfd_job_result(struct tfd_core *core, uint64_t session, uint64_t job_id, struct tfd_job_end *out)
{
	struct tfd_session *s = tfd_session_get(core, session);
	struct tfd_record *record;
	uint64_t last;
	int rc = -ENOENT;

	if (!s)
		return -ENOENT;
	last = tfd_load_relaxed(&s->next_control_job);
	if (job_id && job_id <= last && last - job_id < TFD_CONTROL_ENDS) {
		record = &s->sources[1].records[job_id % TFD_CONTROL_ENDS];
		rc = -EAGAIN;
		if (tfd_load_acquire(&record->done_id) == job_id) { /* pairs with tfd_record_end */
			*out = (struct tfd_job_end){ .job_id = job_id,
			                             .status = record->status,
			                             .detail = record->detail,
			                             .bytes = record->bytes,
			                             .accepted_ns = record->accepted_ns,
			                             .posted_ns = record->posted_ns,
			                             .ended_ns = record->ended_ns,
			                             .path = record->path };
			/* Its record may have been taken by a later job meanwhile. */
			rc = tfd_load_acquire(&record->done_id) == job_id ? 0 : -ENOENT;
		}
	}
	tfd_session_put(s);
	return rc;
}

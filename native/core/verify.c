/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checksums of jobs. When all data of a shard is acknowledged, it goes out a second time as ranges and the CRC-32C of what should be there;
 * the receiver's worker reads its memory, and answers. What the shard counts trails that, so nothing is counted that was not compared.
 *
 * Both sides read at most TFD_CHECK_BYTES in a pass, in slices of SLICE_BYTES, so that nobody waits behind a long job's checksum.
 */
#include <errno.h>
#include <string.h>

#include "barrier.h"
#include "parts.h"

#define SLICE_BYTES 65536u
#define RANGES_MAX (TFD_MESSAGE_BYTES_MAX / sizeof(struct range))

/* In the terms of the key that the frame is for. */
struct range {
	uint64_t address;
	uint64_t length;
};

/* How far a shard has come once a request is out. */
struct step {
	uint64_t extent;
	uint64_t piece_posted;
	uint32_t next; /* of the batch */
};

static bool has_pages(const struct tfd_shard *shard)
{
	return shard->job->op == TFD_OP_WRITE_PAGES;
}

bool tfd_verify_wanted(const struct tfd_shard *shard)
{
	return (shard->job->flags & TFD_FLAG_CHECKSUM) && shard->length && !shard->checked;
}

void tfd_verify_start(struct tfd_shard *shard)
{
	shard->state = TFD_SHARD_VERIFY;
	shard->posted = 0; /* counts once more what has been sent */
	tfd_batch_drop(shard);
}

/* ---- asking ---- */

static void add(const struct tfd_shard *shard, struct tfd_frame *frame, uint64_t src_offset,
                uint64_t dst_offset, uint64_t length)
{
	struct range range = { .address = shard->open->paths[shard->path].address + dst_offset,
	                       .length = length };

	memcpy((uint8_t *)(frame + 1) + frame->bytes, &range, sizeof(range));
	frame->bytes += (uint32_t)sizeof(range);
	frame->argument = tfd_crc32c(frame->argument, shard->job->region->base + src_offset, length);
}

static void fill_bytes(const struct tfd_shard *shard, struct tfd_frame *frame, struct step *step)
{
	uint64_t offset = shard->first + shard->posted;

	step->extent = shard->length - shard->posted;
	if (step->extent > SLICE_BYTES)
		step->extent = SLICE_BYTES;
	add(shard, frame, shard->src_offset + offset, shard->dst_offset + offset, step->extent);
}

/* From the table again, as the client has it now, and checked again: what it changes meanwhile is its own harm. */
static int fill_pages(struct tfd_shard *shard, struct tfd_frame *frame, struct step *step)
{
	struct tfd_batch *batch = shard->batch;
	uint64_t left = SLICE_BYTES;
	int rc = 0;

	if (!batch || batch->next == batch->count)
		rc = tfd_batch_fill(shard);
	if (rc)
		return rc;
	batch = shard->batch;
	step->next = batch->next;
	step->piece_posted = shard->piece_posted;
	for (uint32_t i = 0; i < RANGES_MAX && left && step->next < batch->count; i++) {
		const struct tfd_piece *piece = &batch->pieces[step->next];
		uint64_t length = piece->length - step->piece_posted;

		if (length > left)
			length = left;
		add(shard, frame, piece->src_offset + step->piece_posted,
		    piece->dst_offset + step->piece_posted, length);
		left -= length;
		step->piece_posted += length;
		if (step->piece_posted < piece->length)
			break;
		step->extent += piece->pages;
		step->piece_posted = 0;
		step->next++;
	}
	return 0;
}

static int fill(struct tfd_shard *shard, struct tfd_frame *frame, struct step *step)
{
	*frame = (struct tfd_frame){ .target = shard->open->paths[shard->path].key,
	                             .kind = TFD_MESSAGE_VERIFY,
	                             .name_space = shard->open->name_space };
	if (has_pages(shard))
		return fill_pages(shard, frame, step);
	fill_bytes(shard, frame, step);
	return 0;
}

static void posted(struct tfd_shard *shard, struct tfd_conn *conn, const struct step *step)
{
	struct tfd_job *job = shard->job;

	shard->posted += step->extent;
	if (shard->batch) {
		shard->batch->next = step->next;
		shard->piece_posted = step->piece_posted;
	}
	shard->inflight++;
	job->inflight++;
	job->posted_ns = conn->group->worker->now_ns;
	tfd_list_remove(&shard->link);
	shard->queued = shard->posted < shard->length;
	if (shard->queued)
		tfd_list_push(&conn->messages, &shard->link);
	else
		tfd_batch_drop(shard);
}

int tfd_verify_post(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_call *call,
                    struct tfd_shard *shard)
{
	struct tfd_job *job = shard->job;
	struct step step = { 0 };
	int rc;

	if (!worker->check_left)
		return -EBUSY;
	rc = fill(shard, tfd_channel_frame(conn, call), &step);
	if (rc) {
		tfd_job_fail(job, rc == -EINVAL ? TFD_JOB_INVALID : TFD_JOB_QUOTA, job->detail);
		tfd_job_finish_if_quiet(job);
		return 0;
	}
	worker->check_left -= worker->check_left < SLICE_BYTES ? worker->check_left : SLICE_BYTES;
	rc = tfd_channel_call(worker, conn, call, shard);
	if (!rc)
		posted(shard, conn, &step);
	return rc;
}

static void call_over(struct tfd_shard *shard)
{
	shard->inflight--;
	shard->job->inflight--;
}

void tfd_verify_answered(struct tfd_shard *shard, const struct tfd_frame *answer)
{
	struct tfd_job *job = shard->job;

	call_over(shard);
	if (job->region && tfd_load_relaxed(&job->region->broken)) /* zeros were compared */
		tfd_job_fail(job, TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_BROKEN_REGION);
	else if (answer->kind != TFD_ANSWER_OK)
		tfd_shard_fail(shard, TFD_JOB_REMOTE_ACCESS, answer->argument);
	if (!shard->inflight && !shard->queued && shard->state == TFD_SHARD_VERIFY &&
	    job->status == TFD_JOB_PENDING && !shard->failed) {
		shard->checked = true;
		shard->state = TFD_SHARD_DRAIN;
	}
	tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

/* All of it is compared once more, by another path; there is no harm in that. */
void tfd_verify_lost(struct tfd_shard *shard, uint32_t detail)
{
	struct tfd_job *job = shard->job;

	call_over(shard);
	if (!shard->inflight && !shard->queued && !shard->failed && job->status == TFD_JOB_PENDING)
		tfd_shard_move(shard, detail);
	else
		tfd_shard_advance(shard);
	tfd_job_finish_if_quiet(job);
}

/* ---- answering ---- */

/* Its memory against its checksum. */
static uint32_t compare(const struct tfd_region *region, uint64_t begin, const struct tfd_frame *frame,
                        const uint8_t *payload)
{
	uint64_t left = SLICE_BYTES;
	uint32_t crc = 0;

	for (uint32_t at = 0; at + sizeof(struct range) <= frame->bytes; at += sizeof(struct range)) {
		struct range range;
		uint64_t offset;

		memcpy(&range, payload + at, sizeof(range));
		offset = range.address - begin;
		if (offset > region->length || range.length > region->length - offset || range.length > left)
			return TFD_DETAIL_DESTINATION_BOUNDS;
		left -= range.length;
		crc = tfd_crc32c(crc, region->base + offset, range.length);
	}
	if (tfd_load_relaxed(&region->broken))
		return TFD_DETAIL_BROKEN_REGION;
	return crc == frame->argument ? TFD_DETAIL_NONE : TFD_DETAIL_CHECKSUM;
}

void tfd_verify_answer(struct tfd_worker *worker, struct tfd_conn *conn, const struct tfd_frame *frame,
                       const uint8_t *payload, struct tfd_frame *answer)
{
	uint32_t rail = conn->rail->index;
	const struct tfd_region *region = tfd_region_find(conn->rail, frame->name_space, frame->target);

	worker->check_left -= worker->check_left < SLICE_BYTES ? worker->check_left : SLICE_BYTES;
	answer->argument = region && !region->device ?
	                           compare(region, region->keys[rail].address, frame, payload) :
	                           TFD_DETAIL_BAD_REGION;
	if (answer->argument == TFD_DETAIL_NONE)
		answer->kind = TFD_ANSWER_OK;
}

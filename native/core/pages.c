/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Page tables. They lie in memory that the client may change at any time, and may be long: they are copied, checked and merged
 * in batches, and everything that is posted is read from a batch.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

static struct tfd_batch *batch_take(struct tfd_worker *worker)
{
	struct tfd_batch *batch = worker->batch_free;

	if (batch)
		worker->batch_free = batch->next_free;
	else
		batch = malloc(sizeof(*batch));
	if (batch)
		batch->count = batch->next = 0;
	return batch;
}

void tfd_batch_drop(struct tfd_shard *shard)
{
	struct tfd_worker *worker = shard->job->session->group->worker;

	if (!shard->batch)
		return;
	shard->batch->next_free = worker->batch_free;
	worker->batch_free = shard->batch;
	shard->batch = NULL;
}

/* Where a page begins, or false when it leaves the `bytes` that there are. */
static bool page_at(uint64_t base, uint64_t stride, uint32_t index, uint64_t length, uint64_t bytes,
                    uint64_t *offset)
{
	uint64_t distance;

	if (__builtin_mul_overflow(stride, (uint64_t)index, &distance) ||
	    __builtin_add_overflow(base, distance, offset))
		return false;
	return *offset <= bytes && length <= bytes - *offset;
}

static uint32_t page_check(const struct tfd_shard *shard, struct tfd_page page, struct tfd_piece *piece)
{
	const struct tfd_job *job = shard->job;

	piece->length = job->length;
	piece->pages = 1;
	if (!page_at(job->src_offset, job->src_stride, page.src, job->length, job->region->length,
	             &piece->src_offset))
		return TFD_DETAIL_SOURCE_BOUNDS;
	if (!page_at(job->dst_offset, job->dst_stride, page.dst, job->length, shard->open->length,
	             &piece->dst_offset))
		return TFD_DETAIL_DESTINATION_BOUNDS;
	return TFD_DETAIL_NONE;
}

/* Whether one piece, and one post, may be several pages: one immediate need not count one page. */
static bool joins(const struct tfd_shard *shard, const struct tfd_rail *rail)
{
	return rail->info.ordered || shard->trails;
}

/* Adjacent pages go as one piece; pages of no bytes are adjacent wherever they are. */
static bool merge(const struct tfd_rail *rail, struct tfd_piece *last, const struct tfd_piece *piece)
{
	if (piece->length && (last->src_offset + last->length != piece->src_offset ||
	                      last->dst_offset + last->length != piece->dst_offset ||
	                      last->length + piece->length > rail->segment_bytes))
		return false;
	last->length += piece->length;
	last->pages += piece->pages;
	return true;
}

int tfd_batch_fill(struct tfd_shard *shard)
{
	struct tfd_page pages[TFD_BATCH_PIECES];
	const struct tfd_rail *rail = shard->open->paths[shard->path].conn->rail;
	struct tfd_job *job = shard->job;
	bool merges = joins(shard, rail);
	uint64_t left = shard->length - shard->posted;
	uint32_t count = left < TFD_BATCH_PIECES ? (uint32_t)left : TFD_BATCH_PIECES;
	struct tfd_batch *batch;

	if (!shard->batch)
		shard->batch = batch_take(job->session->group->worker);
	batch = shard->batch;
	if (!batch)
		return -ENOMEM;
	batch->count = batch->next = 0;
	shard->piece_posted = 0;
	memcpy(pages, job->table + (shard->first + shard->posted) * sizeof(pages[0]),
	       count * sizeof(pages[0]));
	/* A compiler must not read the segment again in place of the copy. */
	__asm__ volatile("" : : "r"(pages) : "memory");
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_piece piece;
		uint32_t detail = page_check(shard, pages[i], &piece);

		if (detail) {
			job->detail = detail;
			return -EINVAL;
		}
		if (!merges || !batch->count || !merge(rail, &batch->pieces[batch->count - 1], &piece))
			batch->pieces[batch->count++] = piece;
	}
	return 0;
}

/* As many pieces as one post may carry and the segment holds, but at least one, or a segment of it. */
int tfd_pages_plan(struct tfd_shard *shard, const struct tfd_rail *rail, uint64_t segment,
                   struct tfd_plan *plan)
{
	const struct tfd_piece *piece;
	uint32_t left;

	if (!shard->batch || shard->batch->next == shard->batch->count) {
		int rc = tfd_batch_fill(shard);

		if (rc)
			return rc;
	}
	piece = &shard->batch->pieces[shard->batch->next];
	plan->src_offset = piece->src_offset + shard->piece_posted;
	plan->dst_offset = piece->dst_offset + shard->piece_posted;
	plan->length = plan->first = piece->length - shard->piece_posted;
	if (plan->length > segment) {
		plan->length = plan->first = segment;
		return 0;
	}
	plan->extent = piece->pages;
	plan->pieces = 1;
	if (!joins(shard, rail))
		return 0;
	left = shard->batch->count - shard->batch->next;
	if (left > rail->info.max_parts)
		left = rail->info.max_parts;
	while (plan->pieces < left && plan->length + piece[plan->pieces].length <= segment) {
		plan->length += piece[plan->pieces].length;
		plan->extent += piece[plan->pieces].pages;
		plan->pieces++;
	}
	return 0;
}

void tfd_pages_parts(const struct tfd_shard *shard, const struct tfd_plan *plan, struct tfd_post *post,
                     struct tfd_post_part *parts)
{
	const struct tfd_piece *piece = &shard->batch->pieces[shard->batch->next + 1];
	const uint8_t *local = shard->job->region->base;
	uint64_t remote = shard->open->paths[shard->path].address;

	post->part_count = plan->pieces - 1;
	post->parts = parts;
	for (uint32_t i = 0; i < post->part_count; i++)
		parts[i] = (struct tfd_post_part){ .local = local + piece[i].src_offset,
		                                   .remote_address = remote + piece[i].dst_offset,
		                                   .length = piece[i].length };
}

void tfd_pages_posted(struct tfd_shard *shard, const struct tfd_plan *plan)
{
	shard->piece_posted += plan->length;
	if (!plan->pieces)
		return;
	shard->batch->next += plan->pieces;
	shard->piece_posted = 0;
}

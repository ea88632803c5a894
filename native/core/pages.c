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

/* Adjacent pages go as one piece, where one immediate need not count one page. */
static bool merge(const struct tfd_shard *shard, struct tfd_piece *last, const struct tfd_piece *piece)
{
	const struct tfd_rail *rail = shard->open->paths[shard->path].conn->rail;

	if (!rail->info.ordered && !shard->trails)
		return false;
	if (last->src_offset + last->length != piece->src_offset ||
	    last->dst_offset + last->length != piece->dst_offset ||
	    last->length + piece->length > rail->segment_bytes)
		return false;
	last->length += piece->length;
	last->pages += piece->pages;
	return true;
}

int tfd_batch_fill(struct tfd_shard *shard)
{
	struct tfd_page pages[TFD_BATCH_PIECES];
	struct tfd_job *job = shard->job;
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
		if (!batch->count || !merge(shard, &batch->pieces[batch->count - 1], &piece))
			batch->pieces[batch->count++] = piece;
	}
	return 0;
}

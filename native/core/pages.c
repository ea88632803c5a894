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

/* Where the pages of one side are. */
struct side {
	uint64_t base;
	uint64_t stride;
	uint64_t end; /* of where a page may begin; 0: nowhere */
	bool small; /* no index makes it overflow */
};

static struct side side_of(uint64_t base, uint64_t stride, uint64_t length, uint64_t bytes)
{
	return (struct side){ .base = base,
	                      .stride = stride,
	                      .end = length <= bytes ? bytes - length + 1 : 0,
	                      .small = !(base >> 63) && !(stride >> 31) };
}

static inline bool place(const struct side *side, uint32_t index, uint64_t *offset)
{
	uint64_t distance;

	if (side->small) {
		*offset = side->base + side->stride * index;
		return *offset < side->end;
	}
	return !__builtin_mul_overflow(side->stride, (uint64_t)index, &distance) &&
	       !__builtin_add_overflow(side->base, distance, offset) && *offset < side->end;
}

/* Whether one piece, and one post, may be several pages: one immediate need not count one page. */
static bool joins(const struct tfd_shard *shard, const struct tfd_rail *rail)
{
	return rail->info.ordered || shard->trails;
}

/*
 * Checks pages and makes pieces of them: adjacent ones go as one, if any do, of at most `most` bytes; pages of no bytes are adjacent
 * wherever they are. The first that leaves its region or grant ends it: enum tfd_detail.
 */
static uint32_t check_and_merge(const struct tfd_shard *shard, const struct tfd_page *pages, uint32_t count,
                                bool merges, uint64_t most, struct tfd_batch *batch)
{
	const struct tfd_job *job = shard->job;
	const uint64_t length = job->length;
	const struct side src = side_of(job->src_offset, job->src_stride, length, job->region->length);
	const struct side dst = side_of(job->dst_offset, job->dst_stride, length, shard->open->length);
	struct tfd_piece *piece = batch->pieces; /* after the last */
	uint64_t src_next = 0, dst_next = 0;

	for (uint32_t i = 0; i < count; i++) {
		uint64_t from, to;

		if (!place(&src, pages[i].src, &from))
			return TFD_DETAIL_SOURCE_BOUNDS;
		if (!place(&dst, pages[i].dst, &to))
			return TFD_DETAIL_DESTINATION_BOUNDS;
		if (merges && i &&
		    ((from == src_next && to == dst_next && piece[-1].length + length <= most) || !length)) {
			piece[-1].length += length;
			piece[-1].pages++;
		} else {
			*piece++ = (struct tfd_piece){ from, to, length, 1 };
		}
		src_next = from + length;
		dst_next = to + length;
	}
	batch->count = (uint32_t)(piece - batch->pieces);
	return TFD_DETAIL_NONE;
}

int tfd_batch_fill(struct tfd_shard *shard)
{
	const struct tfd_rail *rail = shard->open->paths[shard->path].conn->rail;
	struct tfd_page pages[TFD_BATCH_PIECES];
	struct tfd_job *job = shard->job;
	uint64_t left = shard->length - shard->posted;
	uint32_t count = left < TFD_BATCH_PIECES ? (uint32_t)left : TFD_BATCH_PIECES;
	uint32_t detail;

	if (!shard->batch)
		shard->batch = batch_take(job->session->group->worker);
	if (!shard->batch)
		return -ENOMEM;
	shard->batch->count = shard->batch->next = 0;
	shard->piece_posted = 0;
	memcpy(pages, job->table + (shard->first + shard->posted) * sizeof(pages[0]),
	       count * sizeof(pages[0]));
	/* A compiler must not read the segment again in place of the copy. */
	__asm__ volatile("" : : "r"(pages) : "memory");
	detail = check_and_merge(shard, pages, count, joins(shard, rail), rail->segment_bytes, shard->batch);
	if (!detail)
		return 0;
	job->detail = detail;
	return -EINVAL;
}

/* Those that follow the first. */
static void add_pieces(const struct tfd_piece *piece, uint32_t left, uint64_t segment, struct tfd_plan *plan)
{
	uint64_t room = segment - plan->length;
	uint64_t extent = plan->extent;
	uint32_t i = 1;

	for (; i < left && piece[i].length <= room; i++) {
		room -= piece[i].length;
		extent += piece[i].pages;
	}
	plan->length = segment - room;
	plan->extent = extent;
	plan->pieces = i;
}

/* As many pieces as one post may carry, or may be posted, and the segment holds; but at least one, or a segment of it. */
int tfd_pages_plan(struct tfd_shard *shard, const struct tfd_conn *conn, uint64_t segment,
                   struct tfd_plan *plan)
{
	const struct tfd_rail *rail = conn->rail;
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
		plan->length = plan->first = tfd_cut_piece(plan->length, segment);
		return 0;
	}
	plan->extent = piece->pages;
	plan->pieces = 1;
	if (!joins(shard, rail))
		return 0;
	left = rail->info.max_parts > 1 ? rail->info.max_parts : tfd_window_posts(conn, shard->job->priority);
	if (left > shard->batch->count - shard->batch->next)
		left = shard->batch->count - shard->batch->next;
	add_pieces(piece, left, segment, plan);
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

void tfd_pages_posted(struct tfd_shard *shard, uint32_t pieces, uint64_t bytes)
{
	shard->piece_posted += bytes;
	if (!pieces)
		return;
	shard->batch->next += pieces;
	shard->piece_posted = 0;
}

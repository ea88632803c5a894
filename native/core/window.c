/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much may be in flight on a connection: as much as drains within a few milliseconds. A fence waits for what is in flight, and a
 * small write behind it; on a slow rail a window that fits a fast one would be tens of milliseconds. Owner: worker.
 */
#include "parts.h"

#define DRAIN_NS 5000000u         /* what a piece may take, on a path that is not longer by itself */
#define LEAST_MAX_NS 1000000000u
#define WINDOW_START (512u << 10) /* doubles in each round trip until a piece takes too long */
#define WINDOW_LEAST (64u << 10)
#define WINDOW_WRS 64u
#define WINDOW_WRS_PART 8u /* of the work requests that are free a connection takes no more than that part */
#define DEEP_WRS_PART 32u /* and beyond WINDOW_WRS of them, where its queue takes more, that one */
#define SEGMENTS 4u /* of a window */
#define SEGMENT_LEAST (16u << 10)

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

void tfd_window_open(struct tfd_conn *conn)
{
	conn->window_bytes = smaller(conn->group->window_bytes, WINDOW_START);
	conn->window_rises = true;
	conn->least_ns = LEAST_MAX_NS;
	conn->bound_ns = 2 * LEAST_MAX_NS;
}

uint64_t tfd_window_segment(const struct tfd_conn *conn, uint32_t priority)
{
	uint64_t most = conn->rail->segment_bytes;
	uint64_t segment = conn->window_bytes / SEGMENTS;

	/* As configured; or the pieces of a shard were planned when it was cut. */
	if (conn->group->segment_given || !conn->rail->info.ordered)
		return most;
	if (priority == TFD_PRIORITY_BULK)
		segment = smaller(segment, tfd_pace_segment(conn->rail));
	return smaller(segment > SEGMENT_LEAST ? segment : SEGMENT_LEAST, most);
}

/* However many connections hold theirs and nothing comes back: as fewer are free each gets less, and some always are. */
static uint32_t posts_most(const struct tfd_conn *conn)
{
	uint32_t used = conn->group->worker->inflight_wrs;
	uint32_t left = used < TFD_WRS_PER_WORKER ? TFD_WRS_PER_WORKER - used : 0;
	uint32_t deep = (uint32_t)smaller(left / DEEP_WRS_PART, conn->rail->info.queue_depth);
	uint32_t part = (uint32_t)smaller(left / WINDOW_WRS_PART, WINDOW_WRS);

	return part > deep ? part : deep;
}

/* Each class has the window for itself: so what is urgent need not wait until there is room, and what is not goes on beside it. */
bool tfd_window_takes(struct tfd_conn *conn, uint32_t priority, uint64_t length)
{
	bool fits = conn->class_bytes[priority] + length <= conn->window_bytes;

	conn->window_tight[priority] = !fits;
	conn->awaited_bytes[priority] = length;
	return !conn->class_wrs[priority] || (fits && conn->class_wrs[priority] < posts_most(conn));
}

uint32_t tfd_window_posts(const struct tfd_conn *conn, uint32_t priority)
{
	uint32_t out = conn->class_wrs[priority];
	uint32_t most = posts_most(conn);

	return out < most ? most - out : 1;
}

bool tfd_window_opens(struct tfd_conn *conn, uint32_t priority)
{
	uint64_t segment = tfd_window_segment(conn, priority); /* a smaller one than it was, perhaps */

	return tfd_window_takes(conn, priority, smaller(conn->awaited_bytes[priority], segment));
}

/* At most to half in a round trip: a worker that had no processor for a while looks like a rail that has become slow. */
static void shrink(struct tfd_conn *conn, uint64_t fits)
{
	uint64_t least = smaller(conn->group->window_bytes, WINDOW_LEAST);

	conn->window_rises = false;
	conn->shrunk_ns = conn->group->worker->now_ns;
	if (fits < conn->window_bytes / 2)
		fits = conn->window_bytes / 2;
	conn->window_bytes = smaller(conn->window_bytes, fits > least ? fits : least);
}

/* What it took tells the rate, if the window was in use when it was posted: a lone piece that took long was held up by others. */
void tfd_window_learn(struct tfd_conn *conn, const struct tfd_wr *wr, uint64_t took)
{
	if (!wr->length)
		return;
	conn->least_ns = smaller(conn->least_ns, took);
	conn->bound_ns = 2 * conn->least_ns > DRAIN_NS ? 2 * conn->least_ns : DRAIN_NS;
	if (took <= conn->bound_ns) {
		if (conn->window_tight[wr->job->priority])
			conn->window_bytes += conn->window_rises ? wr->length : wr->length / 8;
		conn->window_bytes = smaller(conn->window_bytes, conn->group->window_bytes);
	} else if (wr->posted_ns > conn->shrunk_ns && 2 * wr->ahead >= conn->window_bytes) {
		shrink(conn, wr->ahead * conn->bound_ns / took);
	}
}

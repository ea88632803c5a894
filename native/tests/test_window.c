/* SPDX-License-Identifier: Apache-2.0 */
/* The window of a connection on rails of known rate and length, in virtual time. */
#include "core/parts.h"
#include "core_fixture.h"

#define PIECES 512u
#define MS 1000000ull
#define MIB (1u << 20)

struct pipe {
	struct tfd_worker worker;
	struct tfd_group group;
	struct tfd_rail rail;
	struct tfd_conn conn;
	struct tfd_job job;
	struct tfd_wr pieces[PIECES];
	uint64_t back_ns[PIECES];
	uint32_t first, count;
	double bytes_per_ns;
	uint64_t length_ns; /* of the path, there and back */
	uint64_t free_ns;   /* when the rail has sent what it has */
	uint64_t sent;      /* bytes acknowledged */
};

static void pipe_open(struct pipe *pipe, double gbps, uint64_t length_ns, bool ordered)
{
	memset(pipe, 0, sizeof(*pipe));
	pipe->worker.now_ns = MS;
	pipe->group.worker = &pipe->worker;
	pipe->group.window_bytes = 4 * MIB;
	pipe->rail.segment_bytes = MIB;
	pipe->rail.pace.bulk_most = UINT64_MAX;
	pipe->rail.info.ordered = ordered;
	pipe->conn.group = &pipe->group;
	pipe->conn.rail = &pipe->rail;
	pipe->bytes_per_ns = gbps / 8;
	pipe->length_ns = length_ns;
	tfd_window_open(&pipe->conn);
}

static void post(struct pipe *pipe, uint64_t length)
{
	uint32_t slot = (pipe->first + pipe->count++) % PIECES;
	uint64_t now = pipe->worker.now_ns;

	pipe->conn.inflight_bytes = pipe->conn.class_bytes[0] += length;
	pipe->conn.class_wrs[0]++;
	pipe->worker.inflight_wrs++;
	pipe->pieces[slot] = (struct tfd_wr){
		.job = &pipe->job, .length = length, .posted_ns = now, .ahead = pipe->conn.inflight_bytes
	};
	if (pipe->free_ns < now)
		pipe->free_ns = now;
	pipe->free_ns += (uint64_t)((double)length / pipe->bytes_per_ns);
	pipe->back_ns[slot] = pipe->free_ns + pipe->length_ns;
}

/* `late`: the worker looks that much later. */
static void take(struct pipe *pipe, uint64_t late)
{
	uint32_t slot = pipe->first++ % PIECES;

	if (pipe->worker.now_ns < pipe->back_ns[slot] + late)
		pipe->worker.now_ns = pipe->back_ns[slot] + late;
	pipe->count--;
	tfd_window_acked(&pipe->conn, &pipe->pieces[slot],
	                 pipe->worker.now_ns - pipe->pieces[slot].posted_ns);
	pipe->conn.inflight_bytes = pipe->conn.class_bytes[0] -= pipe->pieces[slot].length;
	pipe->conn.class_wrs[0]--;
	pipe->worker.inflight_wrs--;
	pipe->sent += pipe->pieces[slot].length;
}

/* Sends as much as the window lets, for a time; tells the share of the rail's rate that it used. */
static double flood(struct pipe *pipe, uint64_t time_ns)
{
	uint64_t begin = pipe->worker.now_ns;
	uint64_t before = pipe->sent;

	while (pipe->worker.now_ns < begin + time_ns) {
		while (tfd_window_takes(&pipe->conn, 0, tfd_window_segment(&pipe->conn, 0)))
			post(pipe, tfd_window_segment(&pipe->conn, 0));
		take(pipe, 0);
	}
	return (double)(pipe->sent - before) / pipe->bytes_per_ns / (double)(pipe->worker.now_ns - begin);
}

/* How long it takes until nothing is in flight. */
static uint64_t drain(struct pipe *pipe)
{
	uint64_t begin = pipe->worker.now_ns;

	while (pipe->count)
		take(pipe, 0);
	return pipe->worker.now_ns - begin;
}

static void test_rate(double gbps)
{
	struct pipe pipe;

	pipe_open(&pipe, gbps, MS / 20, true);
	(void)flood(&pipe, 200 * MS); /* it finds its window */
	for (int i = 0; i < 20; i++) {
		double used = flood(&pipe, 50 * MS);

		CHECK(used > 0.95);
		CHECK(drain(&pipe) < 6 * MS);
	}
}

/* A path that is long by itself keeps what it needs. */
static void test_long_path(void)
{
	struct pipe pipe;

	pipe_open(&pipe, 1, 20 * MS, true);
	(void)flood(&pipe, 1000 * MS);
	CHECK(flood(&pipe, 1000 * MS) > 0.9);
}

/* Once it has become slow, it fits within a few round trips; and comes back. */
static void test_rate_changes(void)
{
	struct pipe pipe;

	pipe_open(&pipe, 40, MS / 20, true);
	(void)flood(&pipe, 50 * MS);
	CHECK(pipe.conn.window_bytes == 4 * MIB && tfd_window_segment(&pipe.conn, 0) == MIB);
	pipe.bytes_per_ns = 1.0 / 8;
	(void)flood(&pipe, 200 * MS);
	CHECK(drain(&pipe) < 6 * MS);
	pipe.bytes_per_ns = 40.0 / 8;
	(void)flood(&pipe, 50 * MS);
	CHECK(pipe.conn.window_bytes == 4 * MIB);
}

/* A worker that had no processor for 10 ms costs at most half of the window; a lone piece that was late costs nothing. */
static void test_hiccup(void)
{
	struct pipe pipe;

	pipe_open(&pipe, 40, MS / 20, true);
	(void)flood(&pipe, 50 * MS);
	while (tfd_window_takes(&pipe.conn, 0, MIB))
		post(&pipe, MIB);
	for (uint64_t late = 10 * MS; pipe.count; late = 0)
		take(&pipe, late);
	CHECK(pipe.conn.window_bytes >= 2 * MIB && pipe.conn.window_bytes < 4 * MIB);
	(void)flood(&pipe, 50 * MS);
	CHECK(pipe.conn.window_bytes == 4 * MIB);
	CHECK(tfd_window_takes(&pipe.conn, 0, 4096));
	(void)drain(&pipe);
	post(&pipe, 4096);
	take(&pipe, 50 * MS);
	CHECK(pipe.conn.window_bytes == 4 * MIB);
}

/* Pieces of an unordered rail are as long as they were planned; a small window that was asked for stays small. */
static void test_limits(void)
{
	struct pipe pipe;

	pipe_open(&pipe, 1, MS / 20, false);
	(void)flood(&pipe, 100 * MS);
	CHECK(tfd_window_segment(&pipe.conn, 0) == MIB && pipe.conn.window_bytes < 4 * MIB);
	pipe_open(&pipe, 1000, 0, true);
	pipe.group.window_bytes = 2048;
	pipe.rail.segment_bytes = 512;
	tfd_window_open(&pipe.conn);
	CHECK(flood(&pipe, MS) > 0.9);
	CHECK(pipe.conn.window_bytes == 2048 && tfd_window_segment(&pipe.conn, 0) == 512);
}

/* Pages of 4 KiB, one in a post, by 400 Gbit/s and 10 us: more are in flight than elsewhere, as long as work requests abound. */
static double pages(uint32_t queue_depth, uint32_t used_by_others)
{
	struct pipe pipe;

	pipe_open(&pipe, 400, MS / 100, true);
	pipe.group.segment_given = true;
	pipe.rail.segment_bytes = 4096;
	pipe.rail.info.queue_depth = queue_depth;
	pipe.worker.inflight_wrs = used_by_others;
	(void)flood(&pipe, 10 * MS);
	return flood(&pipe, 10 * MS);
}

static void test_deep_queue(void)
{
	CHECK(pages(0, 0) < 0.6);
	CHECK(pages(512, 0) > 0.95);
	CHECK(pages(80, 0) < 0.75); /* no more than the queue takes */
	CHECK(pages(512, 2048) < 0.6 && pages(512, 2048) > 0.45); /* half of them are used: as elsewhere */
}

int main(void)
{
	test_deep_queue();
	test_rate(0.5);
	test_rate(1);
	test_rate(2.5);
	test_rate(10);
	test_rate(40);
	test_long_path();
	test_rate_changes();
	test_hiccup();
	test_limits();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bulk beside urgent work. A small write waits for what is in flight on its rail, on all connections together, and a window that keeps a
 * rail busy through any hiccup is milliseconds of that. So while a rail has carried something of the latency class within the last second,
 * all the bulk in flight on it is at most what the rail needs to stay busy: what the path holds, and some slack for a worker
 * that has no processor for a moment.
 *
 * That takes the rail's rate, which is measured while bulk waits for its windows and may have them: before the urgent work, and again for
 * a few milliseconds once it is too old. Owner: worker.
 */
#include "parts.h"

#define URGENT_NS 1000000000u
#define CHECK_NS 10000000u
#define SAMPLE_NS 5000000u
#define RATE_AGES_NS 10000000000u
#define SLACK_NS 500000u
#define SLACK_MAX (64u << 10)
#define BULK_LEAST (32u << 10) /* two segments */
#define SEGMENTS 4u
#define BOOST_ONE TFD_BOOST_ONE
#define BOOST_MOST (64u * BOOST_ONE)

static uint64_t bytes_in(const struct tfd_pace *pace, uint64_t ns)
{
	return pace->bytes_per_ms * (ns / 1000) / 1000;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* For longer than two pieces may take, each: what it has in flight holds nobody else up. */
static bool stands(const struct tfd_conn *conn, uint64_t now_ns)
{
	const struct tfd_order *order = &conn->orders[tfd_order_of(conn->rail, TFD_PRIORITY_BULK)];

	return now_ns > order->progress_ns && now_ns - order->progress_ns > 2 * conn->bound_ns;
}

/* More where the rail carries less than it could, and less where it does not: what the path holds, and how late a worker is. */
static void adapt(struct tfd_rail *rail, uint64_t now_ns)
{
	struct tfd_pace *pace = &rail->pace;
	uint64_t could = bytes_in(pace, now_ns - pace->sample_ns);

	if (pace->bulk_most == UINT64_MAX)
		return;
	if (pace->sample_ns && !tfd_list_empty(&rail->round[TFD_PRIORITY_BULK])) {
		if (pace->sample_bytes < could - could / 16)
			pace->boost += pace->boost < BOOST_MOST ? pace->boost / 8 : 0;
		else
			pace->boost -= (pace->boost - BOOST_ONE) / 8;
	}
	pace->sample_ns = now_ns;
	pace->sample_bytes = 0;
}

static void set_most(struct tfd_rail *rail, uint64_t now_ns)
{
	struct tfd_pace *pace = &rail->pace;
	uint64_t slack = bytes_in(pace, SLACK_NS);
	bool was_free = pace->bulk_most == UINT64_MAX;
	bool is_free = !pace->urgent_ns || now_ns - pace->urgent_ns >= URGENT_NS || !pace->bytes_per_ms ||
	               now_ns - pace->rate_ns >= RATE_AGES_NS;

	if (slack > SLACK_MAX)
		slack = SLACK_MAX;
	pace->bulk_most = is_free ? UINT64_MAX : larger(slack, BULK_LEAST) * pace->boost / BOOST_ONE;
	if (is_free != was_free) /* what was acknowledged before was under another bound */
		pace->sample_ns = 0;
}

/* Every CHECK_NS. */
void tfd_paces_check(struct tfd_worker *worker)
{
	struct tfd_group *group = worker->group;

	worker->next_pace_ns = worker->now_ns + CHECK_NS;
	for (uint32_t i = 0; i < group->rail_count; i++)
		adapt(&group->rails[i], worker->now_ns);
	for (struct tfd_list *link = worker->conns_inflight.next; link != &worker->conns_inflight;
	     link = link->next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, inflight_link);
		struct tfd_pace *pace = &conn->rail->pace;

		if (!conn->class_wrs[TFD_PRIORITY_BULK] || conn->stands)
			continue;
		if (stands(conn, worker->now_ns)) {
			conn->stands = true;
			pace->bulk_bytes -= conn->class_bytes[TFD_PRIORITY_BULK];
		}
	}
	for (uint32_t i = 0; i < group->rail_count; i++)
		set_most(&group->rails[i], worker->now_ns);
}

void tfd_pace_urgent(struct tfd_rail *rail, struct tfd_worker *worker)
{
	rail->pace.urgent_ns = worker->now_ns;
	if (rail->pace.bulk_most == UINT64_MAX) /* at once */
		set_most(rail, worker->now_ns);
}

bool tfd_pace_takes_bulk(const struct tfd_rail *rail)
{
	return rail->pace.bulk_bytes < rail->pace.bulk_most;
}

uint64_t tfd_pace_segment(const struct tfd_rail *rail)
{
	return rail->pace.bulk_most / SEGMENTS;
}

void tfd_pace_enter(struct tfd_conn *conn, uint64_t length)
{
	if (!conn->stands)
		conn->rail->pace.bulk_bytes += length;
}

/* It is off its connection's books. */
void tfd_pace_leave(struct tfd_conn *conn, uint64_t length)
{
	struct tfd_pace *pace = &conn->rail->pace;

	if (conn->stands)
		pace->bulk_bytes += conn->class_bytes[TFD_PRIORITY_BULK];
	else
		pace->bulk_bytes -= length;
	conn->stands = false;
	if (!pace->bulk_bytes && pace->bulk_most == UINT64_MAX)
		pace->sample_ns = 0; /* the rail had nothing to do: that says nothing about its rate */
}

/* From one acknowledgement that finds bulk waiting for a window to another such one. */
void tfd_pace_acked(struct tfd_conn *conn, uint64_t length)
{
	struct tfd_pace *pace = &conn->rail->pace;
	uint64_t now_ns = conn->group->worker->now_ns;
	uint64_t rate;

	pace->sample_bytes += length;
	if (pace->bulk_most != UINT64_MAX || !conn->holds[TFD_PRIORITY_BULK] ||
	    (pace->sample_ns && now_ns - pace->sample_ns < SAMPLE_NS))
		return;
	if (pace->sample_ns) {
		rate = pace->sample_bytes * 1000 / ((now_ns - pace->sample_ns) / 1000);
		pace->bytes_per_ms =
			now_ns - pace->rate_ns < RATE_AGES_NS ? (3 * pace->bytes_per_ms + rate) / 4 : rate;
		pace->rate_ns = now_ns;
	}
	pace->sample_ns = now_ns;
	pace->sample_bytes = 0;
}

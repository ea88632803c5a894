/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Credits: an immediate takes an entry of the far rail's queue until the far worker polls it, and a queue that is full loses them. So each
 * half has a share of its rail's queue (tfd_rail_info.imm_depth), all of them together no more than there is, and tells the far half
 * how many immediates it may have posted that were not polled yet.
 *
 * Which they are only the queue's order tells: on unordered rails an immediate does not say by whom it comes. What has been
 * acknowledged is in the queue, or was. Then ASK is posted, which comes behind it; when the far worker takes ASK out, and
 * answers SEEN, it has taken out all before it. ASK is not sent again before SEEN, so that a share holds one of each, beside the grant.
 */
#include <errno.h>

#include "barrier.h"
#include "parts.h"
#include "schedule.h"

#define RESERVED 2u            /* of a share: ASK, and the SEEN to ours */
#define SHARE_LEAST (RESERVED + 1)
#define SHARE_MOST_IN 128u     /* twice the pieces that a connection has in flight, or as many (window.c) */
#define SHARE_MOST_OUT 32u     /* answers, and READYs */
#define SPREAD 8u              /* the first connection gets an eighth at most */
#define LATE_NS 1000000000u    /* what was under way to a half that is closed has arrived by then */
#define STALL_BOUND_NS 5000000000u

static void late_free(struct tfd_rail *rail, uint64_t now_ns)
{
	if (now_ns < rail->credits_late_ns)
		return;
	rail->credits_free += rail->credits_late[0];
	rail->credits_late[0] = rail->credits_late[1];
	rail->credits_late[1] = 0;
	if (now_ns - rail->credits_late_ns >= LATE_NS) {
		rail->credits_free += rail->credits_late[0];
		rail->credits_late[0] = 0;
	}
	rail->credits_late_ns = now_ns + LATE_NS;
}

/* The less is free the smaller a part of it: the first get what they can use, and many more get something. */
static uint32_t share_of(const struct tfd_rail *rail, uint32_t most)
{
	uint64_t share = (uint64_t)rail->credits_free * rail->credits_free / SPREAD / rail->info.imm_depth;

	if (share > most)
		share = most;
	return share > SHARE_LEAST ? (uint32_t)share : SHARE_LEAST;
}

int tfd_credits_open(struct tfd_conn *conn, struct tfd_error *error)
{
	struct tfd_rail *rail = conn->rail;
	uint32_t share;

	conn->credits = (struct tfd_credits){ .ask_at = UINT64_MAX, .flood_at = UINT64_MAX };
	if (!rail->info.imm_depth)
		return 0;
	late_free(rail, conn->group->worker->now_ns);
	share = share_of(rail, conn->outgoing ? SHARE_MOST_OUT : SHARE_MOST_IN);
	if (share > rail->credits_free)
		return tfd_fail(error, -ENOSPC,
		                "rail %s: its queue of %u arrived immediates is shared out among its "
		                "connections: use a provider with a longer queue, more rails, or fewer peers",
		                rail->info.name, rail->info.imm_depth);
	rail->credits_free -= share;
	conn->credits.share = share;
	if (rail->info.ordered) /* else nobody knows by which half one comes */
		conn->credits.flood_at = share;
	return 0;
}

void tfd_credits_close(struct tfd_conn *conn, bool quiet)
{
	struct tfd_rail *rail = conn->rail;

	if (!conn->credits.share)
		return;
	late_free(rail, conn->group->worker->now_ns);
	if (quiet)
		rail->credits_free += conn->credits.share;
	else
		rail->credits_late[1] += conn->credits.share;
	conn->credits.share = 0;
}

uint32_t tfd_credits_grant(const struct tfd_conn *conn)
{
	return conn->credits.share ? conn->credits.share - RESERVED : 0;
}

/* So that the answer is here, usually, before the other half is used up, too. */
static uint64_t half_of(uint32_t grant)
{
	return (grant + 1) / 2;
}

void tfd_credits_join(struct tfd_conn *conn, uint32_t grant)
{
	conn->credits.grant = grant;
	conn->credits.limit = grant ? grant : UINT64_MAX;
	conn->credits.ask_at = grant ? half_of(grant) : UINT64_MAX;
}

/* ---- what goes out ---- */

bool tfd_credits_may_post(struct tfd_conn *conn)
{
	struct tfd_rail_info *info = &conn->rail->info;

	if (tfd_credits_left(conn))
		return true;
	if (!conn->credits.stalled_ns) {
		conn->credits.stalled_ns = conn->group->worker->now_ns;
		tfd_store_relaxed(&info->credit_stalls, info->credit_stalls + 1);
	}
	return false;
}

void tfd_credits_wait(struct tfd_conn *conn, struct tfd_shard *shard)
{
	struct tfd_lane *lane = shard->lane;

	tfd_shard_unqueue(shard);
	tfd_list_push(&lane->creditless, &shard->link);
	shard->queued = true;
	if (tfd_list_empty(&lane->credit_link))
		tfd_list_push(&conn->creditless[shard->job->priority], &lane->credit_link);
}

/* The next lane with shards that wait; those whose shards gave up leave. NULL: there is none. */
static struct tfd_lane *next_lane(struct tfd_conn *conn)
{
	for (int priority = TFD_PRIORITY_LATENCY; priority >= 0; priority--) {
		struct tfd_list *lanes = &conn->creditless[priority];

		while (!tfd_list_empty(lanes)) {
			struct tfd_lane *lane = tfd_container(lanes->next, struct tfd_lane, credit_link);

			if (!tfd_list_empty(&lane->creditless))
				return lane;
			tfd_list_remove(&lane->credit_link);
		}
	}
	return NULL;
}

/*
 * As many as there are credits, of each session in turn, so that each is looked at once for each. Those that need none any more
 * leave theirs to the next.
 */
void tfd_credits_release(struct tfd_conn *conn)
{
	uint64_t left = conn->credits.limit - conn->credits.taken;
	struct tfd_lane *lane;

	for (; left && (lane = next_lane(conn)) != NULL; left--) {
		struct tfd_shard *shard = tfd_container(lane->creditless.next, struct tfd_shard, link);

		tfd_list_remove(&lane->credit_link);
		tfd_shard_unqueue(shard);
		if (!tfd_list_empty(&lane->creditless))
			tfd_list_push(&conn->creditless[shard->job->priority], &lane->credit_link);
		tfd_shard_queue(shard);
	}
}

/* Its connection is closed. */
void tfd_credits_move(struct tfd_conn *conn, uint32_t detail)
{
	struct tfd_lane *lane;

	while ((lane = next_lane(conn)) != NULL) {
		struct tfd_shard *shard = tfd_container(lane->creditless.next, struct tfd_shard, link);
		struct tfd_job *job = shard->job;

		tfd_shard_move(shard, detail);
		tfd_job_finish_if_quiet(job);
	}
}

void tfd_credits_ask(struct tfd_conn *conn)
{
	conn->credits.ask_at = UINT64_MAX;
	conn->credits.due |= TFD_CREDIT_ASK;
	if (conn->half && !conn->broken)
		tfd_conn_wake(conn);
}

void tfd_credits_posted(struct tfd_conn *conn, uint32_t message)
{
	struct tfd_credits *credits = &conn->credits;

	credits->due &= (uint8_t)~message;
	credits->writing |= (uint8_t)message;
	if (message == TFD_CREDIT_ASK) {
		credits->asked = credits->acked;
		credits->asking = true;
	}
}

/* ---- what comes ---- */

static void take_ask(struct tfd_conn *conn, uint64_t number)
{
	struct tfd_credits *credits = &conn->credits;

	if (credits->due & TFD_CREDIT_SEEN) {
		conn->group->worker->dropped_imms++; /* it has had no answer to the one before */
		return;
	}
	credits->far_number = number;
	credits->due |= TFD_CREDIT_SEEN;
	if (credits->flood_at != UINT64_MAX)
		credits->flood_at = conn->imms_landed + credits->share;
	tfd_conn_wake(conn);
}

static void take_seen(struct tfd_conn *conn, uint64_t number)
{
	struct tfd_credits *credits = &conn->credits;

	if (!credits->asking || number != credits->number) {
		conn->group->worker->dropped_imms++; /* none that was taken comes back by it */
		return;
	}
	credits->asking = false;
	credits->number++;
	credits->limit = credits->asked + credits->grant;
	credits->ask_at = credits->asked + half_of(credits->grant);
	credits->stalled_ns = 0;
	if (credits->flood_at != UINT64_MAX)
		credits->flood_at++;
	if (credits->acked >= credits->ask_at)
		tfd_credits_ask(conn);
	tfd_conn_wake(conn);
}

void tfd_credits_arrived(struct tfd_conn *conn, uint32_t message, uint64_t number)
{
	if (message == TFD_CREDIT_ASK)
		take_ask(conn, number);
	else
		take_seen(conn, number);
}

void tfd_credits_flooded(struct tfd_conn *conn)
{
	struct tfd_rail_info *info = &conn->rail->info;

	conn->credits.flood_at = UINT64_MAX;
	tfd_store_relaxed(&info->credit_floods, info->credit_floods + 1);
	tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

static bool is_stalled(struct tfd_conn *conn)
{
	return !tfd_credits_left(conn) && (next_lane(conn) || tfd_channel_has_work(conn));
}

/* A worker that lives answers at once, and one that does not answer is of no use, even if it lives. */
void tfd_credits_check(struct tfd_conn *conn)
{
	uint64_t now_ns = conn->group->worker->now_ns;

	if (!conn->started || !is_stalled(conn)) /* or those who waited gave up */
		conn->credits.stalled_ns = 0;
	else if (!conn->credits.stalled_ns) /* some went out by the last SEEN, others still wait */
		conn->credits.stalled_ns = now_ns;
	else if (now_ns - conn->credits.stalled_ns > STALL_BOUND_NS)
		tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
}

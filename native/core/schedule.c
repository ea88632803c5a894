/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose piece goes out next. Deficit round robin over the sessions of a rail, in each of two classes: a session's *flow* takes its
 * turn of so many bytes by whichever of its connections take something. A flow has a *lane* for each connection, where its shards
 * wait in the order in which their jobs were submitted.
 *
 *   lane    ready   in its flow; the one whose first job is the oldest goes first
 *           held    with its connection, which takes nothing now; those who are held go on in the order of their turns
 *   flow    on the rail's round while any of its lanes is ready
 *
 * So a pass looks at flows that can post, and at nobody else. Owner: worker.
 */
#include <errno.h>
#include <stdlib.h>

#include "parts.h"
#include "schedule.h"

#define QUANTUM \
	4096u /* bytes of a turn, times the session's weight; what a piece goes beyond is owed by the next turns */
#define CHARGE_LEAST 512u /* what a post is worth at least: a flood of empty ones costs, too */
/* Bytes that the latency class may be ahead of bulk that could go; from there on bulk gets one byte of eight. */
#define LEAD_MAX (1u << 20)
#define LEAD_SHARE 7u

/* ---- lanes ---- */

int tfd_lanes_get(struct tfd_session *session, struct tfd_conn *conn, struct tfd_lanes **out)
{
	struct tfd_lanes *lanes;

	for (struct tfd_list *link = conn->lanes.next; link != &conn->lanes; link = link->next) {
		lanes = tfd_container(link, struct tfd_lanes, conn_link);
		if (lanes->session == session) {
			lanes->refs++;
			*out = lanes;
			return 0;
		}
	}
	lanes = calloc(1, sizeof(*lanes));
	if (!lanes)
		return -ENOMEM;
	lanes->session = session;
	lanes->refs = 1;
	for (uint32_t priority = 0; priority < TFD_CLASSES; priority++) {
		struct tfd_lane *lane = &lanes->lane[priority];

		tfd_list_init(&lane->link);
		tfd_list_init(&lane->shards);
		tfd_list_init(&lane->creditless);
		tfd_list_init(&lane->credit_link);
		lane->conn = conn;
		lane->flow = &session->flows[conn->rail->index * TFD_CLASSES + priority];
	}
	tfd_list_push(&conn->lanes, &lanes->conn_link);
	*out = lanes;
	return 0;
}

void tfd_lanes_put(struct tfd_lanes *lanes)
{
	if (!lanes || --lanes->refs)
		return;
	tfd_list_remove(&lanes->conn_link);
	for (uint32_t priority = 0; priority < TFD_CLASSES; priority++)
		tfd_list_remove(&lanes->lane[priority].credit_link);
	free(lanes);
}

int tfd_flows_open(struct tfd_session *session, uint32_t weight)
{
	uint32_t count = session->group->rail_count * TFD_CLASSES;

	session->flows = calloc(count, sizeof(*session->flows));
	if (!session->flows)
		return -ENOMEM;
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_flow *flow = &session->flows[i];

		tfd_list_init(&flow->link);
		tfd_list_init(&flow->lanes);
		flow->rail = &session->group->rails[i / TFD_CLASSES];
		flow->priority = i % TFD_CLASSES;
		flow->quantum = (int64_t)QUANTUM * weight;
	}
	return 0;
}

static struct tfd_shard *first_shard(const struct tfd_lane *lane)
{
	return tfd_container(lane->shards.next, struct tfd_shard, link);
}

static uint64_t age_of_lane(const struct tfd_list *link)
{
	return first_shard(tfd_container(link, struct tfd_lane, link))->job->number;
}

static uint64_t age_of_shard(const struct tfd_list *link)
{
	return tfd_container(link, struct tfd_shard, link)->job->number;
}

/* It can go: after the lanes of its flow with older jobs. Most often that is at the end, else mostly at the beginning. */
static void lane_ready(struct tfd_lane *lane)
{
	struct tfd_flow *flow = lane->flow;
	struct tfd_list *before = &flow->lanes;
	uint64_t age = age_of_lane(&lane->link);

	if (!tfd_list_empty(&flow->lanes) && age_of_lane(flow->lanes.prev) > age) {
		before = flow->lanes.next;
		while (age_of_lane(before) <= age)
			before = before->next;
	}
	tfd_list_push(before, &lane->link);
	if (tfd_list_empty(&flow->link))
		tfd_list_push(&flow->rail->round[flow->priority], &flow->link);
}

static void lane_remove(struct tfd_lane *lane)
{
	tfd_list_remove(&lane->link);
	if (tfd_list_empty(&lane->flow->lanes))
		tfd_list_remove(&lane->flow->link);
}

static void lane_hold(struct tfd_lane *lane)
{
	struct tfd_conn *conn = lane->conn;

	lane_remove(lane);
	conn->holds[lane->flow->priority] = true;
	tfd_list_push(&conn->held[lane->flow->priority], &lane->link);
	tfd_conn_wake(conn);
}

/* ---- shards come and go ---- */

/* Before younger jobs' shards. What comes back out of order comes in order itself, so it is looked for where the last one went. */
static struct tfd_list *place(struct tfd_lane *lane, uint64_t age)
{
	struct tfd_list *before;

	if (tfd_list_empty(&lane->shards) || age_of_shard(lane->shards.prev) <= age)
		return &lane->shards;
	before = lane->returned && lane->returned->job->number <= age ? lane->returned->link.next :
	                                                                lane->shards.next;
	while (age_of_shard(before) <= age)
		before = before->next;
	return before;
}

void tfd_schedule_enter(struct tfd_shard *shard)
{
	struct tfd_lane *lane = &shard->open->paths[shard->path].lanes->lane[shard->job->priority];
	struct tfd_list *before = place(lane, shard->job->number);
	bool idle = tfd_list_empty(&lane->shards);

	if (before != &lane->shards)
		lane->returned = shard;
	tfd_list_push(before, &shard->link);
	shard->lane = lane;
	lane->flow->shards++;
	if (lane->flow->priority == TFD_PRIORITY_LATENCY)
		tfd_pace_urgent(lane->flow->rail, lane->conn->group->worker);
	if (!idle)
		return;
	if (lane->conn->holds[lane->flow->priority])
		lane_hold(lane);
	else
		lane_ready(lane);
}

void tfd_schedule_leave(struct tfd_shard *shard)
{
	struct tfd_lane *lane = shard->lane;
	struct tfd_flow *flow = lane->flow;

	tfd_list_remove(&shard->link);
	shard->lane = NULL;
	if (lane->returned == shard)
		lane->returned = NULL;
	if (tfd_list_empty(&lane->shards))
		lane_remove(lane);
	if (!--flow->shards && flow->deficit > 0) /* nothing is saved up; what is owed stays owed */
		flow->deficit = 0;
}

void tfd_schedule_charge(const struct tfd_shard *shard, uint64_t bytes, uint32_t posts)
{
	struct tfd_flow *flow = shard->lane->flow;
	struct tfd_rail *rail = flow->rail;
	uint64_t least = (uint64_t)posts * CHARGE_LEAST;
	uint64_t charge = bytes > least ? bytes : least;

	flow->deficit -= (int64_t)charge;
	if (flow->priority == TFD_PRIORITY_LATENCY)
		rail->lead += charge;
	else
		rail->lead -= charge * LEAD_SHARE < rail->lead ? charge * LEAD_SHARE : rail->lead;
}

/* Its connection takes something again: those who are held go on, in the order in which they were held up. */
void tfd_schedule_resume(struct tfd_conn *conn, uint32_t priority)
{
	struct tfd_list *held = &conn->held[priority];

	conn->holds[priority] = false;
	while (!tfd_list_empty(held)) {
		struct tfd_lane *lane = tfd_container(held->next, struct tfd_lane, link);

		tfd_list_remove(&lane->link);
		lane_ready(lane);
	}
}

void tfd_schedule_move(struct tfd_conn *conn, uint32_t detail)
{
	for (struct tfd_list *link = conn->lanes.next; link != &conn->lanes; link = link->next) {
		struct tfd_lanes *lanes = tfd_container(link, struct tfd_lanes, conn_link);

		for (int priority = TFD_PRIORITY_LATENCY; priority >= 0; priority--) {
			struct tfd_lane *lane = &lanes->lane[priority];

			while (!tfd_list_empty(&lane->shards)) {
				struct tfd_shard *shard = first_shard(lane);
				struct tfd_job *job = shard->job;

				tfd_shard_move(shard, detail);
				tfd_job_finish_if_quiet(job);
			}
		}
	}
}

/* ---- turns ---- */

static struct tfd_flow *next_flow(struct tfd_rail *rail)
{
	struct tfd_list *bulk = &rail->round[TFD_PRIORITY_BULK];
	struct tfd_list *latency = &rail->round[TFD_PRIORITY_LATENCY];
	bool may = !tfd_list_empty(bulk) && tfd_pace_takes_bulk(rail);

	if (!may)
		rail->lead = 0;
	if (!tfd_list_empty(latency) && rail->lead <= LEAD_MAX)
		return tfd_container(latency->next, struct tfd_flow, link);
	return may ? tfd_container(bulk->next, struct tfd_flow, link) : NULL;
}

/* Whether it posted, or ended a job that cannot; else its lane is held. */
static bool post_first(struct tfd_worker *worker, struct tfd_lane *lane)
{
	struct tfd_conn *conn = lane->conn;
	struct tfd_shard *shard = first_shard(lane);
	uint64_t age = shard->job->number;
	int rc = -EAGAIN;

	if (conn->half && conn->started && !conn->broken)
		rc = tfd_shard_post(worker, conn, shard);
	if (rc) {
		if (rc != -EAGAIN)
			tfd_conn_break(conn, TFD_DETAIL_PROVIDER);
		lane_hold(lane);
		return false;
	}
	conn->stalled_ns = 0;
	if (!tfd_list_empty(&lane->shards) && age_of_lane(&lane->link) != age) { /* another's is older now */
		tfd_list_remove(&lane->link);
		lane_ready(lane);
	}
	return true;
}

/* NULL: nothing of the flow can go. */
static struct tfd_lane *first_lane(struct tfd_flow *flow)
{
	while (!tfd_list_empty(&flow->lanes)) {
		struct tfd_lane *lane = tfd_container(flow->lanes.next, struct tfd_lane, link);

		if (!lane->conn->holds[flow->priority])
			return lane;
		lane_hold(lane); /* found so by another session's turn */
	}
	return NULL;
}

static bool is_alone(const struct tfd_flow *flow)
{
	return flow->link.next == flow->link.prev;
}

static uint32_t take_turn(struct tfd_worker *worker, struct tfd_flow *flow)
{
	struct tfd_lane *lane = first_lane(flow);
	uint32_t count = 0;

	if (lane && flow->deficit <= 0) /* who cannot go has no turn: it would gain on those who can */
		flow->deficit += flow->quantum;
	while (lane && flow->deficit <= 0 && is_alone(flow)) /* its next turns come at once */
		flow->deficit += flow->quantum;
	while (lane && flow->deficit > 0 && worker->wr_free) {
		count += post_first(worker, lane);
		if (flow->priority == TFD_PRIORITY_BULK && !tfd_pace_takes_bulk(flow->rail))
			break;
		lane = first_lane(flow);
	}
	if (flow->deficit <= 0 && !tfd_list_empty(&flow->lanes)) {
		tfd_list_remove(&flow->link);
		tfd_list_push(&flow->rail->round[flow->priority], &flow->link);
	}
	return count;
}

static uint32_t rail_post(struct tfd_worker *worker, struct tfd_rail *rail)
{
	struct tfd_flow *flow;
	uint32_t count = 0;

	while (worker->wr_free && (flow = next_flow(rail)) != NULL)
		count += take_turn(worker, flow);
	return count;
}

uint32_t tfd_schedule_post(struct tfd_worker *worker)
{
	struct tfd_group *group = worker->group;
	uint32_t count = 0;

	if (++worker->first_rail >=
	    group->rail_count) /* another's turn to be first: work requests may run out */
		worker->first_rail = 0;
	for (uint32_t i = worker->first_rail; i < group->rail_count; i++)
		count += rail_post(worker, &group->rails[i]);
	for (uint32_t i = 0; i < worker->first_rail; i++)
		count += rail_post(worker, &group->rails[i]);
	return count;
}

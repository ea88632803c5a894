/* SPDX-License-Identifier: Apache-2.0 */
/* What schedule.c keeps of who wants to post by what. */
#ifndef TFD_SCHEDULE_H
#define TFD_SCHEDULE_H

#include "model.h"

/* What a session has to post in one class on one rail. Owner: worker. */
struct tfd_flow {
	struct tfd_list link; /* rail->round, while any of its lanes is ready */
	struct tfd_list lanes; /* tfd_lane.link: those that are ready, the one with the oldest job first */
	struct tfd_rail *rail;
	int64_t deficit; /* bytes that it may post yet in this turn; below 0: owed */
	int64_t quantum; /* bytes that a turn adds */
	uint32_t priority;
	uint32_t shards; /* in all its lanes */
};

/* A flow's shards on one connection. Owner: worker. */
struct tfd_lane {
	struct tfd_list link; /* flow->lanes, or conn->held, while it has shards */
	struct tfd_list shards; /* tfd_shard.link, in the order of their jobs */
	struct tfd_flow *flow;
	struct tfd_conn *conn; /* borrowed: of the opens whose paths count in `refs` */
	/* Shards that wait for a credit; while there are any the lane is on conn->creditless. */
	struct tfd_list creditless;
	struct tfd_list credit_link;
	struct tfd_shard *returned; /* borrowed; the last that came back out of order; NULL: it has left */
};

struct tfd_lanes {
	struct tfd_list conn_link;
	struct tfd_session *session;
	uint32_t refs; /* paths of the session's opens */
	struct tfd_lane lane[TFD_CLASSES];
};

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the client half: a lane, and what jobs.c and submit.c ask of it. */
#ifndef TFD_SHM_LANE_H
#define TFD_SHM_LANE_H

#include "session.h"
#include "transferd/lane.h"

struct tfd_lane {
	struct tfd_lane *next; /* of the client; under its lock */
	struct tfd_client *client; /* borrowed: outlives the lane */
	struct tfd_lane_options options; /* constant */
	uint64_t *word; /* in the segment; writer: the stream */
	struct tfd_copy_marks *marks; /* in the segment, or NULL */
	uint32_t failed; /* any thread, atomically, as the next; never goes back to 0 */
	uint32_t closed; /* it takes no more */
	pthread_mutex_t lock; /* guards last: values are published, and enqueued, in order */
	uint64_t last;
	uint64_t refused_job; /* the one at which it was closed */
	int32_t refused;
};

/* The job on `slot` is a copy of the lane whose watcher its entry is armed on. */
void tfd_lane_hold_locked(struct tfd_client *client, struct tfd_client_slot *slot,
                          const struct tfd_entry *entry);
/* Nothing on a stream reads the slot's table any more; true of what is no copy. */
bool tfd_lane_passed(const struct tfd_client_slot *slot);
/*
 * A copy whose job has ended, otherwise than OK: whether it writes no more. One that waits for a trigger is made void: it may be
 * enqueued for ever.
 */
bool tfd_lane_stop_locked(struct tfd_client *client, struct tfd_client_slot *slot);
void tfd_lanes_fini(struct tfd_client *client);

/*
 * stream.c: whether the stream of the application's can have a copy. -ESTALE: it is another one, or the driver says of neither; -EBUSY: what it
 * is given goes into a graph. 0 of a stream of ours.
 */
int tfd_lane_look(const struct tfd_lane *lane);
/* Puts a copy that is published on the lane's stream, under its lock; a CUresult. */
int tfd_lane_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry, const struct tfd_copy *copy);

#endif

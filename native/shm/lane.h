/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the client half: what jobs.c and submit.c ask of lanes. */
#ifndef TFD_SHM_LANE_H
#define TFD_SHM_LANE_H

#include "session.h"

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

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads that copy, so that the worker goes on polling meanwhile. The worker gives each its own tasks by a ring of its own; nobody
 * locks. Without tasks they yield for a moment, then sleep.
 */
#ifndef TFD_LOCAL_HELPERS_H
#define TFD_LOCAL_HELPERS_H

#include "copy.h"

#define TFD_LOCAL_TASKS 2u /* of a helper: one that it copies, and the next one */

/* Worker, from the taking of it until it is given; then the helper's, until it is done. */
struct tfd_local_task {
	uint32_t *state; /* shared; enum tfd_local_state: told here */
	struct tfd_local_copy copy;
};

struct tfd_local_helper {
	_Alignas(64) uint32_t given; /* shared; the worker writes it: tasks so far */
	_Alignas(64) uint32_t done; /* shared; the helper writes it */
	_Alignas(64) uint32_t sleeping; /* shared; futex: 1 while the helper sleeps */
	struct tfd_local_helpers *all;
	pthread_t thread;
	struct tfd_local_task tasks[TFD_LOCAL_TASKS];
};

struct tfd_local_helpers {
	uint32_t count;
	uint32_t next; /* worker: whose turn it is */
	uint32_t stop; /* shared */
	uint32_t worker_sleeps; /* shared; it wants to be told by wake_fd */
	int wake_fd; /* constant; borrowed */
	struct tfd_local_helper *each; /* owned */
};

/* control. Starts threads; `wake_fd` (an eventfd that outlives them) is written when one is done and the worker sleeps. */
int tfd_local_helpers_open(struct tfd_local_helpers *helpers, uint32_t count, int wake_fd,
                           struct tfd_error *error);
/* control, once the worker has stopped. Idempotent. */
void tfd_local_helpers_close(struct tfd_local_helpers *helpers);

/* worker, hot. A task to fill in, of the helper whose turn it is; NULL: all have enough to do. */
struct tfd_local_task *tfd_local_helpers_take(struct tfd_local_helpers *helpers);
/* worker, hot. Hands over the task that was taken last. */
void tfd_local_helpers_give(struct tfd_local_helpers *helpers);
/* worker. Waits until nothing is being copied: as long as that takes. */
void tfd_local_helpers_drain(const struct tfd_local_helpers *helpers);

#endif

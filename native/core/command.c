/* SPDX-License-Identifier: Apache-2.0 */
/* Control's commands to a worker: a lock-free stack of frames on the callers' own stacks. */
#include <sched.h>
#include <unistd.h>

#include "barrier.h"
#include "futex.h"
#include "parts.h"

#define COMMAND_SPINS 200 /* yields before the caller sleeps: a running worker answers within some µs */

int tfd_command_run(struct tfd_worker *worker, int (*run)(struct tfd_worker *, void *), void *argument)
{
	struct tfd_command command = { .run = run, .argument = argument };
	struct tfd_command *top = tfd_load_relaxed(&worker->inbox);
	uint64_t one = 1;

	if (worker->core->options.stepped)
		return run(worker, argument);
	/* pairs with tfd_commands_take: the frame is written before it is seen; seq against `sleeping` */
	do
		command.next = top;
	while (!tfd_replace_seq(&worker->inbox, &top, &command));
	if (tfd_load_seq(&worker->sleeping)) /* pairs with worker_sleep: it stores, then looks at the inbox */
		(void)!write(worker->wake_fd, &one, sizeof(one));
	for (int i = 0; i < COMMAND_SPINS && !tfd_load_acquire(&command.done); i++)
		(void)sched_yield();
	while (!tfd_load_acquire(&command.done)) /* pairs with tfd_commands_take: rc and results */
		tfd_futex_wait(&command.done, 0, -1);
	return command.rc;
}

bool tfd_commands_take(struct tfd_worker *worker)
{
	struct tfd_command *list = NULL;
	struct tfd_command *taken;

	if (!tfd_load_relaxed(&worker->inbox))
		return false;
	taken = tfd_swap_seq(&worker->inbox, NULL);
	while (taken) { /* oldest first */
		struct tfd_command *next = taken->next;

		taken->next = list;
		list = taken;
		taken = next;
	}
	while (list) {
		struct tfd_command *command = list;

		list = command->next; /* before `done`: then the frame is its caller's again */
		command->rc = command->run(worker, command->argument);
		tfd_store_release(&command->done, 1); /* pairs with tfd_command_run */
		/* A caller that has returned by now leaves a wake-up on a stale address, which is harmless. */
		tfd_futex_wake_all(&command->done);
	}
	return true;
}

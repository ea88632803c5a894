/* SPDX-License-Identifier: Apache-2.0 */
#include "helpers.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/futex.h"
#include "../../core/parts.h"

#define SPIN_NS 100000u /* without a task before it sleeps: longer than a worker needs for a pass */

static bool has_task(const struct tfd_local_helper *helper)
{
	return tfd_load_seq(&helper->given) != helper->done;
}

static void task_run(struct tfd_local_helper *helper)
{
	struct tfd_local_task *task = &helper->tasks[helper->done % TFD_LOCAL_TASKS];
	uint32_t *state = task->state;
	const uint64_t one = 1;

	/* pairs with the poll of the worker: the bytes. Sequential, as worker_sleeps is read next */
	tfd_store_seq(state, tfd_local_copy_run(&task->copy));
	/* pairs with tfd_local_helpers_take, _drain: the task is the worker's again */
	tfd_store_release(&helper->done, helper->done + 1);
	if (tfd_load_seq(&helper->all->worker_sleeps))
		(void)!write(helper->all->wake_fd, &one, sizeof(one));
}

/* Until there is a task, or it is time to stop. */
static void task_wait(struct tfd_local_helper *helper)
{
	uint64_t end = tfd_now_ns() + SPIN_NS;

	while (!has_task(helper) && tfd_now_ns() < end)
		(void)sched_yield();
	if (has_task(helper))
		return;
	/* pairs with tfd_local_helpers_give, _close: they store, then look at sleeping */
	tfd_store_seq(&helper->sleeping, 1);
	if (!has_task(helper) && !tfd_load_seq(&helper->all->stop))
		tfd_futex_wait(&helper->sleeping, 1, -1);
	tfd_store_seq(&helper->sleeping, 0);
}

static void *helper_run(void *argument)
{
	struct tfd_local_helper *helper = argument;

	while (!tfd_load_seq(&helper->all->stop)) {
		if (has_task(helper))
			task_run(helper);
		else
			task_wait(helper);
	}
	return NULL;
}

static void helper_wake(struct tfd_local_helper *helper)
{
	if (!tfd_load_seq(&helper->sleeping))
		return;
	tfd_store_seq(&helper->sleeping, 0);
	tfd_futex_wake_all(&helper->sleeping);
}

int tfd_local_helpers_open(struct tfd_local_helpers *helpers, uint32_t count, int wake_fd,
                           struct tfd_error *error)
{
	*helpers = (struct tfd_local_helpers){ .wake_fd = wake_fd };
	if (!count)
		return 0;
	helpers->each = aligned_alloc(_Alignof(struct tfd_local_helper), count * sizeof(*helpers->each));
	if (!helpers->each)
		return tfd_fail(error, -ENOMEM, "no memory for %u copying threads", count);
	memset(helpers->each, 0, count * sizeof(*helpers->each));
	for (; helpers->count < count; helpers->count++) {
		struct tfd_local_helper *helper = &helpers->each[helpers->count];
		char name[16];
		int rc;

		helper->all = helpers;
		rc = pthread_create(&helper->thread, NULL, helper_run, helper);
		if (rc) {
			tfd_local_helpers_close(helpers);
			return tfd_fail(error, -rc, "a copying thread cannot start: %s", strerror(rc));
		}
		(void)snprintf(name, sizeof(name), "tfd-copy-%u", helpers->count % 1000);
		(void)pthread_setname_np(helper->thread, name);
	}
	return 0;
}

void tfd_local_helpers_close(struct tfd_local_helpers *helpers)
{
	tfd_store_seq(&helpers->stop, 1); /* pairs with task_wait */
	for (uint32_t i = 0; i < helpers->count; i++) {
		helper_wake(&helpers->each[i]);
		(void)pthread_join(helpers->each[i].thread, NULL);
	}
	free(helpers->each);
	*helpers = (struct tfd_local_helpers){ .wake_fd = -1 };
}

struct tfd_local_task *tfd_local_helpers_take(struct tfd_local_helpers *helpers)
{
	for (uint32_t i = 0; i < helpers->count; i++) {
		struct tfd_local_helper *helper = &helpers->each[helpers->next];

		/* pairs with task_run: it does not look at its task any more */
		if (helper->given - tfd_load_acquire(&helper->done) < TFD_LOCAL_TASKS)
			return &helper->tasks[helper->given % TFD_LOCAL_TASKS];
		helpers->next = (helpers->next + 1) % helpers->count;
	}
	return NULL;
}

void tfd_local_helpers_give(struct tfd_local_helpers *helpers)
{
	struct tfd_local_helper *helper = &helpers->each[helpers->next];

	/* pairs with has_task: the task. Sequential, as sleeping is read next */
	tfd_store_seq(&helper->given, helper->given + 1);
	helper_wake(helper);
	helpers->next = (helpers->next + 1) % helpers->count;
}

void tfd_local_helpers_drain(const struct tfd_local_helpers *helpers)
{
	for (uint32_t i = 0; i < helpers->count; i++) {
		/* pairs with task_run */
		while (tfd_load_acquire(&helpers->each[i].done) != helpers->each[i].given)
			(void)sched_yield();
	}
}

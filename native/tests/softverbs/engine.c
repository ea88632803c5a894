/* SPDX-License-Identifier: Apache-2.0 */
/* When things are carried: by a thread of ours, or by whoever posts. Queue pairs take turns, a work request each. */
#include "soft.h"

#include <errno.h>
#include <time.h>

#include "core/barrier.h"

static struct {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	pthread_t thread;
	struct soft_qp *first; /* queued ones, in the order of their turns */
	struct soft_qp *last;
	uint64_t kicks;
	uint32_t stop;
} engine = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* engine.lock */
static void queue(struct soft_qp *qp)
{
	if (qp->queued)
		return;
	qp->queued = 1;
	qp->next_queued = NULL;
	if (engine.last)
		engine.last->next_queued = qp;
	else
		engine.first = qp;
	engine.last = qp;
}

/* engine.lock */
static void unlink_queued(struct soft_qp *before, struct soft_qp *qp)
{
	if (before)
		before->next_queued = qp->next_queued;
	else
		engine.first = qp->next_queued;
	if (engine.last == qp)
		engine.last = before;
	qp->queued = 0;
}

/* Both locks. The next whose time has come; *due becomes the earliest of the others. */
static struct soft_qp *pick(uint64_t now, uint64_t *due)
{
	struct soft_qp *before = NULL;

	*due = SOFT_NEVER;
	for (struct soft_qp *qp = engine.first; qp; before = qp, qp = qp->next_queued) {
		if (qp->due_ns <= now) {
			unlink_queued(before, qp);
			return qp;
		}
		if (qp->due_ns < *due)
			*due = qp->due_ns;
	}
	return NULL;
}

/* Until there is a kick beyond `kicks`, or until `due`. Whether to go on. */
static int await(uint64_t kicks, uint64_t due)
{
	struct timespec end = { .tv_sec = (time_t)(due / 1000000000u), .tv_nsec = (long)(due % 1000000000u) };
	int go;

	(void)pthread_mutex_lock(&engine.lock);
	while (!engine.stop && engine.kicks == kicks) {
		if (due == SOFT_NEVER)
			(void)pthread_cond_wait(&engine.cond, &engine.lock);
		else if (pthread_cond_timedwait(&engine.cond, &engine.lock, &end) == ETIMEDOUT)
			break;
	}
	go = !engine.stop;
	(void)pthread_mutex_unlock(&engine.lock);
	return go;
}

static void *run(void *unused)
{
	uint64_t due, kicks;
	struct soft_qp *qp;

	do {
		do {
			soft_lock();
			(void)pthread_mutex_lock(&engine.lock);
			kicks = engine.kicks;
			qp = pick(soft_now_ns(), &due);
			(void)pthread_mutex_unlock(&engine.lock);
			if (qp) {
				int more = soft_carry(qp);

				if (more || qp->due_ns) {
					(void)pthread_mutex_lock(&engine.lock);
					queue(qp);
					(void)pthread_mutex_unlock(&engine.lock);
				}
			}
			soft_unlock();
		} while (qp);
	} while (await(kicks, due));
	return unused;
}

void soft_engine_start(void)
{
	pthread_condattr_t attr;

	(void)pthread_condattr_init(&attr);
	(void)pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	(void)pthread_cond_init(&engine.cond, &attr);
	(void)pthread_condattr_destroy(&attr);
	engine.stop = 0;
	if (pthread_create(&engine.thread, NULL, run, NULL))
		soft_abort("no thread can be made");
}

void soft_engine_stop(void)
{
	(void)pthread_mutex_lock(&engine.lock);
	engine.stop = 1;
	(void)pthread_cond_signal(&engine.cond);
	(void)pthread_mutex_unlock(&engine.lock);
	(void)pthread_join(engine.thread, NULL);
	(void)pthread_cond_destroy(&engine.cond);
}

void soft_kick_locked(struct soft_qp *qp)
{
	if (fabric.config.mode == SOFT_NULL)
		return;
	if (fabric.config.mode == SOFT_INLINE_MODE) {
		while (soft_carry(qp))
			continue;
		return;
	}
	(void)pthread_mutex_lock(&engine.lock);
	queue(qp);
	engine.kicks++;
	(void)pthread_cond_signal(&engine.cond);
	(void)pthread_mutex_unlock(&engine.lock);
}

void soft_kick(struct soft_qp *qp)
{
	int carries = fabric.config.mode == SOFT_INLINE_MODE;

	if (carries)
		soft_lock();
	soft_kick_locked(qp);
	if (carries)
		soft_unlock();
}

void soft_unqueue(struct soft_qp *qp)
{
	struct soft_qp *before = NULL;

	(void)pthread_mutex_lock(&engine.lock);
	for (struct soft_qp *at = engine.first; at; before = at, at = at->next_queued) {
		if (at == qp) {
			unlink_queued(before, qp);
			break;
		}
	}
	(void)pthread_mutex_unlock(&engine.lock);
	if (qp->parked)
		tfd_store_relaxed(&fabric.parked, fabric.parked - 1);
	qp->parked = 0;
}

void soft_unpark(const struct soft_cq *cq)
{
	soft_lock();
	for (uint32_t i = 0; i < SOFT_QPS && fabric.parked; i++) {
		struct soft_qp *qp = fabric.qps[i];

		if (qp && qp->parked && (!cq || (struct soft_cq *)qp->ex.qp_base.send_cq == cq))
			soft_kick_locked(qp);
	}
	soft_unlock();
}

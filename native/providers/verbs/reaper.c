/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Destroys queue pairs that are stopped: ibv_destroy_qp(3). A thread of the rail does it, because a device may take long: rdma_rxe waits
 * until no packet of the queue pair is left in the kernel, which are seconds where they wait for a neighbour that does not answer, and the
 * worker would stand for all its peers. Nobody waits for it but who closes the rail.
 */
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "verbs.h"

#define WAIT_NS 100000000u

static void half_destroy(struct tfd_domain *domain, struct tfd_half *half)
{
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		struct tfd_verbs_queue *queue = &half->queues[i];

		if (queue->qp) /* until then the thread of events may name the queue */
			(void)domain->library->destroy_qp(queue->qp);
		free(queue->posted);
	}
	free(half);
}

static void *reaper_run(void *argument)
{
	struct tfd_domain *domain = argument;
	struct tfd_verbs_reaper *reaper = &domain->reaper;

	(void)pthread_mutex_lock(&reaper->lock);
	for (;;) {
		struct tfd_list *link = reaper->halves.next;

		if (link == &reaper->halves) {
			if (reaper->stops)
				break;
			(void)pthread_cond_wait(&reaper->some, &reaper->lock);
			continue;
		}
		tfd_list_remove(link);
		(void)pthread_mutex_unlock(&reaper->lock);
		half_destroy(domain, tfd_container(link, struct tfd_half, link));
		(void)tfd_sub_seq(&reaper->pending, 1u); /* pairs with tfd_verbs_reaped */
		(void)pthread_mutex_lock(&reaper->lock);
	}
	(void)pthread_mutex_unlock(&reaper->lock);
	return NULL;
}

int tfd_verbs_reaper_open(struct tfd_domain *domain, struct tfd_error *error)
{
	struct tfd_verbs_reaper *reaper = &domain->reaper;
	int rc = pthread_create(&reaper->thread, NULL, reaper_run, domain);

	if (rc)
		return tfd_fail(error, -rc, "a rail's thread that destroys queue pairs cannot start: %s",
		                strerror(rc));
	reaper->runs = true;
	(void)pthread_setname_np(reaper->thread, "tfd-reaper");
	return 0;
}

void tfd_verbs_reaper_close(struct tfd_domain *domain)
{
	struct tfd_verbs_reaper *reaper = &domain->reaper;

	if (!reaper->runs)
		return;
	(void)pthread_mutex_lock(&reaper->lock);
	reaper->stops = true;
	(void)pthread_cond_signal(&reaper->some);
	(void)pthread_mutex_unlock(&reaper->lock);
	(void)pthread_join(reaper->thread, NULL);
}

void tfd_verbs_reap(struct tfd_half *half)
{
	struct tfd_verbs_reaper *reaper = &half->domain->reaper;

	(void)tfd_add_seq(&reaper->pending, 1u);
	(void)pthread_mutex_lock(&reaper->lock);
	tfd_list_push(&reaper->halves, &half->link);
	(void)pthread_cond_signal(&reaper->some);
	(void)pthread_mutex_unlock(&reaper->lock);
}

bool tfd_verbs_reaped(const struct tfd_domain *domain)
{
	return !tfd_load_seq(&domain->reaper.pending);
}

bool tfd_verbs_reap_wait(const struct tfd_domain *domain)
{
	uint64_t end_ns = tfd_now_ns() + WAIT_NS;

	while (!tfd_verbs_reaped(domain)) {
		if (tfd_now_ns() > end_ns)
			return false;
		(void)sched_yield();
	}
	return true;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Completion queues. One that overran takes nothing more; what is in it can be polled. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/barrier.h"

SOFT_EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context,
                                         struct ibv_comp_channel *channel, int vector)
{
	struct soft_context *soft = soft_context_of(context);
	struct soft_cq *cq;

	if (soft_fails(soft, "ibv_create_cq"))
		return NULL;
	if (cqe < 1 || (uint32_t)cqe > fabric.config.max_cqe || vector < 0 ||
	    vector >= context->num_comp_vectors || (channel && channel->context != context)) {
		(void)soft_refuse(EINVAL, "ibv_create_cq: %d entries (at most %u), vector %d", cqe,
		                  fabric.config.max_cqe, vector);
		return NULL;
	}
	cq = calloc(1, sizeof(*cq));
	if (!cq)
		return NULL;
	cq->ring = calloc((size_t)cqe, sizeof(*cq->ring));
	if (!cq->ring) {
		free(cq);
		return NULL;
	}
	cq->size = (uint32_t)cqe;
	cq->context = soft;
	cq->cq = (struct ibv_cq){
		.context = context, .channel = channel, .cq_context = cq_context, .cqe = cqe
	};
	(void)pthread_mutex_init(&cq->cq.mutex, NULL);
	(void)pthread_cond_init(&cq->cq.cond, NULL);
	(void)pthread_mutex_init(&cq->lock, NULL);
	soft_lock();
	if (channel)
		channel->refcnt++;
	soft->objects++;
	soft->device->counts.cqs++;
	soft_unlock();
	return &cq->cq;
}

SOFT_EXPORT int ibv_destroy_cq(struct ibv_cq *cq)
{
	struct soft_cq *soft = (struct soft_cq *)cq;

	if (soft_fails(NULL, "ibv_destroy_cq"))
		return errno;
	soft_lock();
	if (soft->users) {
		soft_unlock();
		return soft_refuse(EBUSY, "ibv_destroy_cq: %u queue pairs use it", soft->users);
	}
	soft->context->objects--;
	soft->context->device->counts.cqs--;
	if (cq->channel) {
		cq->channel->refcnt--;
		soft_inbox_forget(&((struct soft_channel *)cq->channel)->events, cq);
	}
	soft_inbox_forget(&soft->context->events, cq);
	soft_unlock();
	soft_await_acks(&cq->mutex, &cq->cond, &cq->comp_events_completed, soft->told, "ibv_destroy_cq");
	soft_await_acks(&cq->mutex, &cq->cond, &cq->async_events_completed, soft->async_told,
	                "ibv_destroy_cq (asynchronous)");
	(void)pthread_mutex_destroy(&cq->mutex);
	(void)pthread_cond_destroy(&cq->cond);
	(void)pthread_mutex_destroy(&soft->lock);
	free(soft->ring);
	free(soft);
	return 0;
}

/* cq->lock. Whether its channel is to be told. */
static int cq_fire(struct soft_cq *cq, const struct soft_cqe *cqe, int solicited)
{
	if (!cq->armed || (cq->armed == 2 && !solicited && cqe->wc.status == IBV_WC_SUCCESS))
		return 0;
	cq->armed = 0;
	return cq->cq.channel != NULL;
}

int soft_cq_push(struct soft_cq *cq, const struct soft_cqe *cqe, int solicited)
{
	struct soft_device *device = cq->context->device;
	struct ibv_async_event event = { .element.cq = &cq->cq };
	int fire = 0, broke = 0, lost;
	uint32_t held;

	(void)pthread_mutex_lock(&cq->lock);
	held = cq->tail - cq->head;
	if (!cq->overrun && (held == cq->size || device->overrun[cqe->receive])) {
		device->overrun[cqe->receive] = 0;
		cq->overrun = 1;
		broke = 1;
	}
	lost = cq->overrun != 0;
	if (!lost) {
		cq->ring[cq->tail++ % cq->size] = *cqe;
		fire = cq_fire(cq, cqe, solicited);
	}
	(void)pthread_mutex_unlock(&cq->lock);
	(void)tfd_add_relaxed(&device->counts.completions, !lost);
	if (!lost && held + 1 > tfd_load_relaxed(&device->counts.cq_high))
		tfd_store_relaxed(&device->counts.cq_high, held + 1);
	if (fire)
		soft_inbox_put(&((struct soft_channel *)cq->cq.channel)->events, &event, cq);
	if (broke)
		soft_raise(cq->context, IBV_EVENT_CQ_ERR, cq, 0);
	return lost ? -1 : 0;
}

void soft_cq_clean(struct soft_cq *cq, const struct soft_qp *qp)
{
	uint32_t kept, at;

	(void)pthread_mutex_lock(&cq->lock);
	for (kept = at = cq->head; at != cq->tail; at++) {
		const struct soft_cqe *cqe = &cq->ring[at % cq->size];

		if (cqe->qp != qp) {
			cq->ring[kept++ % cq->size] = *cqe;
		} else if (cqe->receive) {
			soft_srq_polled((struct soft_srq *)qp->ex.qp_base.srq);
			(void)tfd_add_relaxed(&cq->context->device->counts.receives_lost, 1);
		}
	}
	cq->tail = kept;
	(void)pthread_mutex_unlock(&cq->lock);
}

static void cqe_polled(const struct soft_cqe *cqe)
{
	if (cqe->receive) {
		soft_srq_polled((struct soft_srq *)cqe->qp->ex.qp_base.srq);
		return;
	}
	(void)pthread_mutex_lock(&cqe->qp->lock);
	cqe->qp->freed = cqe->freed;
	(void)pthread_mutex_unlock(&cqe->qp->lock);
}

int soft_cq_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc)
{
	struct soft_cq *soft = (struct soft_cq *)cq;
	int found = 0;

	(void)pthread_mutex_lock(&soft->lock);
	while (found < count && soft->head != soft->tail) {
		const struct soft_cqe *cqe = &soft->ring[soft->head % soft->size];

		cqe_polled(cqe);
		wc[found++] = cqe->wc;
		soft->head++;
	}
	(void)pthread_mutex_unlock(&soft->lock);
	if (!found && tfd_load_relaxed(&fabric.parked))
		soft_unpark(soft);
	return found;
}

int soft_cq_arm(struct ibv_cq *cq, int solicited_only)
{
	struct soft_cq *soft = (struct soft_cq *)cq;

	if (soft_fails(soft->context, "ibv_req_notify_cq"))
		return errno;
	(void)pthread_mutex_lock(&soft->lock);
	/* Only what comes from now on fires it: who arms polls once more. For any beats for solicited ones. */
	soft->armed = soft->armed == 1 || !solicited_only ? 1 : 2;
	(void)pthread_mutex_unlock(&soft->lock);
	return 0;
}

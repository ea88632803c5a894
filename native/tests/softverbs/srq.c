/* SPDX-License-Identifier: Apache-2.0 */
/* Shared receive queues. An entry is used from its post until the completion that names it is polled. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>

#include "core/barrier.h"

SOFT_EXPORT struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *init)
{
	struct soft_context *context = soft_context_of(pd->context);
	struct soft_srq *srq;

	if (soft_fails(context, "ibv_create_srq"))
		return NULL;
	if (!init->attr.max_wr || init->attr.max_wr > fabric.config.max_srq_wr || init->attr.max_sge > 1) {
		(void)soft_refuse(EINVAL, "ibv_create_srq: %u entries (at most %u) of %u pieces",
		                  init->attr.max_wr, fabric.config.max_srq_wr, init->attr.max_sge);
		return NULL;
	}
	srq = calloc(1, sizeof(*srq));
	if (!srq)
		return NULL;
	srq->ring = calloc(init->attr.max_wr, sizeof(*srq->ring));
	if (!srq->ring) {
		free(srq);
		return NULL;
	}
	srq->size = init->attr.max_wr;
	srq->context = context;
	srq->srq = (struct ibv_srq){ .context = pd->context, .srq_context = init->srq_context, .pd = pd };
	(void)pthread_mutex_init(&srq->srq.mutex, NULL);
	(void)pthread_cond_init(&srq->srq.cond, NULL);
	(void)pthread_mutex_init(&srq->lock, NULL);
	soft_lock();
	context->objects++;
	((struct soft_pd *)pd)->users++;
	context->device->counts.srqs++;
	soft_unlock();
	return &srq->srq;
}

SOFT_EXPORT int ibv_modify_srq(struct ibv_srq *srq, struct ibv_srq_attr *attr, int mask)
{
	struct soft_srq *soft = (struct soft_srq *)srq;

	if (soft_fails(soft->context, "ibv_modify_srq"))
		return errno;
	if (mask != IBV_SRQ_LIMIT)
		return soft_refuse(EOPNOTSUPP, "ibv_modify_srq: mask %#x: only the limit can be changed",
		                   (uint32_t)mask);
	if (attr->srq_limit > soft->size)
		return soft_refuse(EINVAL, "ibv_modify_srq: limit %u of %u entries", attr->srq_limit,
		                   soft->size);
	(void)pthread_mutex_lock(&soft->lock);
	soft->limit = attr->srq_limit;
	(void)pthread_mutex_unlock(&soft->lock);
	return 0;
}

SOFT_EXPORT int ibv_query_srq(struct ibv_srq *srq, struct ibv_srq_attr *attr)
{
	struct soft_srq *soft = (struct soft_srq *)srq;

	if (soft_fails(soft->context, "ibv_query_srq"))
		return errno;
	(void)pthread_mutex_lock(&soft->lock);
	*attr = (struct ibv_srq_attr){ .max_wr = soft->size, .max_sge = 1, .srq_limit = soft->limit };
	(void)pthread_mutex_unlock(&soft->lock);
	return 0;
}

SOFT_EXPORT int ibv_destroy_srq(struct ibv_srq *srq)
{
	struct soft_srq *soft = (struct soft_srq *)srq;

	if (soft_fails(NULL, "ibv_destroy_srq"))
		return errno;
	soft_lock();
	if (soft->users) {
		soft_unlock();
		return soft_refuse(EBUSY, "ibv_destroy_srq: %u queue pairs use it", soft->users);
	}
	soft->context->objects--;
	soft->context->device->counts.srqs--;
	(void)tfd_add_relaxed(&soft->context->device->counts.srq_entries, soft->head - soft->tail);
	((struct soft_pd *)srq->pd)->users--;
	soft_inbox_forget(&soft->context->events, srq);
	soft_unlock();
	soft_await_acks(&srq->mutex, &srq->cond, &srq->events_completed, soft->async_told, "ibv_destroy_srq");
	(void)pthread_mutex_destroy(&srq->mutex);
	(void)pthread_cond_destroy(&srq->cond);
	(void)pthread_mutex_destroy(&soft->lock);
	free(soft->ring);
	free(soft);
	return 0;
}

static int srq_add(struct soft_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	uint32_t before = srq->tail;
	int error = 0;

	for (; wr; wr = wr->next) {
		*bad = wr;
		if (wr->num_sge > 1)
			error = EINVAL;
		else if (srq->tail - srq->head + srq->unpolled == srq->size)
			error = ENOMEM;
		if (error)
			break;
		srq->ring[srq->tail++ % srq->size].wr_id = wr->wr_id;
	}
	(void)tfd_add_relaxed(&srq->context->device->counts.srq_entries, srq->tail - before);
	return error;
}

int soft_srq_post(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct soft_srq *soft = (struct soft_srq *)srq;
	int error = soft_fails(soft->context, "ibv_post_srq_recv");

	*bad = wr;
	if (error)
		return error;
	(void)pthread_mutex_lock(&soft->lock);
	error = srq_add(soft, wr, bad);
	(void)pthread_mutex_unlock(&soft->lock);
	if (tfd_load_relaxed(&fabric.parked))
		soft_unpark(NULL);
	return error;
}

int soft_null_srq_post(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	return srq_add((struct soft_srq *)srq, wr, bad);
}

int soft_srq_take(struct soft_srq *srq, uint64_t *wr_id)
{
	struct softverbs_counts *counts = &srq->context->device->counts;
	int limit = 0;
	uint32_t left;

	(void)pthread_mutex_lock(&srq->lock);
	if (srq->head == srq->tail) {
		(void)pthread_mutex_unlock(&srq->lock);
		return -1;
	}
	*wr_id = srq->ring[srq->head++ % srq->size].wr_id;
	srq->unpolled++;
	left = srq->tail - srq->head;
	if (left < srq->limit) {
		srq->limit = 0; /* until it is set again */
		limit = 1;
	}
	(void)pthread_mutex_unlock(&srq->lock);
	(void)tfd_add_relaxed(&counts->srq_entries, UINT32_MAX);
	if (left < tfd_load_relaxed(&counts->srq_low))
		tfd_store_relaxed(&counts->srq_low, left);
	if (limit)
		soft_raise(srq->context, IBV_EVENT_SRQ_LIMIT_REACHED, srq, 0);
	return 0;
}

void soft_srq_polled(struct soft_srq *srq)
{
	(void)pthread_mutex_lock(&srq->lock);
	srq->unpolled--;
	(void)pthread_mutex_unlock(&srq->lock);
}

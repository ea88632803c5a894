/* SPDX-License-Identifier: Apache-2.0 */
/* Reliably connected queue pairs: making, asking, ending them. Their states are in modify.c. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SEND_OPS (IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ)

static int init_check(const struct ibv_qp_init_attr_ex *init)
{
	const struct soft_config *config = &fabric.config;
	const struct ibv_qp_cap *cap = &init->cap;

	if (init->qp_type != IBV_QPT_RC)
		return soft_refuse(EOPNOTSUPP, "ibv_create_qp: type %d: only reliably connected ones",
		                   (int)init->qp_type);
	if (!init->send_cq || !init->recv_cq || !init->pd)
		return soft_refuse(EINVAL, "ibv_create_qp: no completion queue, or no domain");
	if (!init->srq)
		return soft_refuse(EOPNOTSUPP, "ibv_create_qp: only with a shared receive queue");
	if (init->send_cq->context != init->pd->context || init->recv_cq->context != init->pd->context ||
	    init->srq->context != init->pd->context)
		return soft_refuse(EINVAL, "ibv_create_qp: its parts are of different contexts");
	if (!cap->max_send_wr || cap->max_send_wr > config->max_qp_wr)
		return soft_refuse(EINVAL, "ibv_create_qp: max_send_wr %u, at most %u", cap->max_send_wr,
		                   config->max_qp_wr);
	if (cap->max_send_sge > config->max_sge)
		return soft_refuse(EINVAL, "ibv_create_qp: max_send_sge %u, at most %u", cap->max_send_sge,
		                   config->max_sge);
	if (cap->max_inline_data > config->max_inline)
		return soft_refuse(EINVAL, "ibv_create_qp: max_inline_data %u, at most %u",
		                   cap->max_inline_data, config->max_inline);
	if (init->comp_mask & ~(uint32_t)(IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS))
		return soft_refuse(EOPNOTSUPP, "ibv_create_qp_ex: comp_mask %#x", init->comp_mask);
	if (init->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS && init->send_ops_flags & ~(uint64_t)SEND_OPS)
		return soft_refuse(EOPNOTSUPP, "ibv_create_qp_ex: send_ops_flags %#llx",
		                   (unsigned long long)init->send_ops_flags);
	return 0;
}

/* fabric.lock. Gives it a number; errno. */
static int qp_add(struct soft_qp *qp)
{
	struct ibv_qp *base = &qp->ex.qp_base;

	if (qp->context->device->counts.qps >= fabric.config.max_qp)
		return soft_refuse(ENOMEM, "ibv_create_qp: the device has %u", fabric.config.max_qp);
	for (uint32_t i = 0; i < SOFT_QPS; i++) {
		uint32_t slot = fabric.qp_hand++ % SOFT_QPS;

		if (fabric.qps[slot] || !slot) /* 0 and 1 are the port's own */
			continue;
		fabric.qps[slot] = qp;
		qp->number = (uint32_t)++fabric.qp_lives[slot] << 16 | slot;
		base->qp_num = qp->number;
		((struct soft_cq *)base->send_cq)->users++;
		((struct soft_cq *)base->recv_cq)->users++;
		((struct soft_srq *)base->srq)->users++;
		((struct soft_pd *)base->pd)->users++;
		qp->context->objects++;
		qp->context->device->counts.qps++;
		return 0;
	}
	return soft_refuse(ENOMEM, "ibv_create_qp: no number is free");
}

static void qp_free(struct soft_qp *qp)
{
	struct ibv_qp *base = &qp->ex.qp_base;

	(void)pthread_mutex_destroy(&base->mutex);
	(void)pthread_cond_destroy(&base->cond);
	(void)pthread_mutex_destroy(&qp->lock);
	free(qp->ring);
	free(qp);
}

static struct soft_qp *qp_new(const struct ibv_qp_init_attr_ex *init)
{
	struct soft_qp *qp = calloc(1, sizeof(*qp));

	if (!qp)
		return NULL;
	qp->ex.qp_base = (struct ibv_qp){
		.context = init->pd->context,
		.qp_context = init->qp_context,
		.pd = init->pd,
		.send_cq = init->send_cq,
		.recv_cq = init->recv_cq,
		.srq = init->srq,
		.state = IBV_QPS_RESET,
		.qp_type = IBV_QPT_RC,
	};
	qp->context = soft_context_of(init->pd->context);
	qp->state = IBV_QPS_RESET;
	qp->cap = init->cap;
	qp->cap.max_recv_wr = 0;
	qp->cap.max_recv_sge = 0;
	qp->signal_all = init->sq_sig_all != 0;
	(void)pthread_mutex_init(&qp->ex.qp_base.mutex, NULL);
	(void)pthread_cond_init(&qp->ex.qp_base.cond, NULL);
	(void)pthread_mutex_init(&qp->lock, NULL);
	qp->ring = calloc(qp->cap.max_send_wr, sizeof(*qp->ring));
	if (!qp->ring) {
		qp_free(qp);
		return NULL;
	}
	if (init->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) {
		qp->send_ops = init->send_ops_flags;
		if (fabric.config.mode == SOFT_NULL)
			soft_null_extend(qp);
		else
			soft_post_extend(qp);
	}
	return qp;
}

/* `verb` is its name for softverbs_fail; writes what the queue pair can do. */
static struct ibv_qp *qp_create(struct ibv_qp_init_attr_ex *init, const char *verb)
{
	struct soft_qp *qp;
	int error;

	if (init->pd && soft_fails(soft_context_of(init->pd->context), verb))
		return NULL;
	errno = init_check(init);
	if (errno)
		return NULL;
	qp = qp_new(init);
	if (!qp)
		return NULL;
	soft_lock();
	error = qp_add(qp);
	soft_unlock();
	if (error) {
		qp_free(qp);
		errno = error;
		return NULL;
	}
	init->cap = qp->cap;
	return &qp->ex.qp_base;
}

SOFT_EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct ibv_qp_init_attr_ex whole = {
		.qp_context = init->qp_context,
		.send_cq = init->send_cq,
		.recv_cq = init->recv_cq,
		.srq = init->srq,
		.cap = init->cap,
		.qp_type = init->qp_type,
		.sq_sig_all = init->sq_sig_all,
		.comp_mask = IBV_QP_INIT_ATTR_PD,
		.pd = pd,
	};
	struct ibv_qp *qp = qp_create(&whole, "ibv_create_qp");

	if (qp)
		init->cap = whole.cap;
	return qp;
}

struct ibv_qp *soft_qp_create_ex(struct ibv_context *context, struct ibv_qp_init_attr_ex *init)
{
	if (!(init->comp_mask & IBV_QP_INIT_ATTR_PD) || !init->pd || init->pd->context != context) {
		(void)soft_refuse(EINVAL, "ibv_create_qp_ex: no protection domain of this context");
		return NULL;
	}
	return qp_create(init, "ibv_create_qp_ex");
}

SOFT_EXPORT struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *qp)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;

	return soft->send_ops ? &soft->ex : NULL;
}

SOFT_EXPORT int ibv_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                             struct ibv_qp_init_attr *init)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;

	(void)mask; /* as drivers do: all is told */
	if (soft_fails(soft->context, "ibv_query_qp"))
		return errno;
	soft_lock();
	*attr = soft->attr;
	attr->qp_state = soft->state;
	attr->cur_qp_state = soft->state;
	attr->cap = soft->cap;
	qp->state = soft->state;
	soft_unlock();
	*init = (struct ibv_qp_init_attr){ .qp_context = qp->qp_context,
	                                   .send_cq = qp->send_cq,
	                                   .recv_cq = qp->recv_cq,
	                                   .srq = qp->srq,
	                                   .cap = soft->cap,
	                                   .qp_type = IBV_QPT_RC,
	                                   .sq_sig_all = (int)soft->signal_all };
	return 0;
}

SOFT_EXPORT int ibv_destroy_qp(struct ibv_qp *qp)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;

	if (soft_fails(NULL, "ibv_destroy_qp"))
		return errno;
	soft_lock();
	if (soft_qp_find(soft->number) != soft)
		soft_abort("ibv_destroy_qp: %p is none", (void *)qp);
	soft_unqueue(soft);
	soft_last_forget(soft);
	fabric.qps[soft->number & 0xffff] = NULL;
	soft_cq_clean((struct soft_cq *)qp->send_cq, soft);
	soft_cq_clean((struct soft_cq *)qp->recv_cq, soft);
	((struct soft_cq *)qp->send_cq)->users--;
	((struct soft_cq *)qp->recv_cq)->users--;
	((struct soft_srq *)qp->srq)->users--;
	((struct soft_pd *)qp->pd)->users--;
	soft->context->objects--;
	soft->context->device->counts.qps--;
	soft_inbox_forget(&soft->context->events, soft);
	soft_unlock();
	soft_await_acks(&qp->mutex, &qp->cond, &qp->events_completed, soft->async_told, "ibv_destroy_qp");
	qp_free(soft);
	return 0;
}

struct soft_qp *soft_qp_find(uint32_t number)
{
	uint32_t slot = number & 0xffff;
	struct soft_qp *qp = slot < SOFT_QPS ? fabric.qps[slot] : NULL;

	return qp && qp->number == number ? qp : NULL;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The states of a queue pair, as ibv_modify_qp(3) has them for RC: which transitions there are, what each needs and what it may bring. */
#include "soft.h"

#include <errno.h>
#include <string.h>

struct transition {
	enum ibv_qp_state from;
	enum ibv_qp_state to;
	uint32_t needs;
	uint32_t may;
};

static const struct transition transitions[] = {
	{ IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0 },
	{ IBV_QPS_INIT, IBV_QPS_INIT, 0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS },
	{ IBV_QPS_INIT, IBV_QPS_RTR,
	  IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
	          IBV_QP_MIN_RNR_TIMER,
	  IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS },
	{ IBV_QPS_RTR, IBV_QPS_RTS,
	  IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_TIMEOUT,
	  IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
	{ IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
};

static int mask_check(enum ibv_qp_state from, enum ibv_qp_state to, uint32_t mask)
{
	uint32_t rest = mask & ~(uint32_t)IBV_QP_STATE;

	if (to == IBV_QPS_RESET || to == IBV_QPS_ERR)
		return rest ? soft_refuse(EINVAL, "ibv_modify_qp to RESET or ERR: mask %#x", mask) : 0;
	for (size_t i = 0; i < sizeof(transitions) / sizeof(transitions[0]); i++) {
		const struct transition *t = &transitions[i];

		if (t->from != from || t->to != to)
			continue;
		if ((rest & t->needs) != t->needs)
			return soft_refuse(EINVAL, "ibv_modify_qp: state %d to %d needs %#x, too", (int)from,
			                   (int)to, t->needs & ~rest);
		if (rest & ~(t->needs | t->may))
			return soft_refuse(EINVAL, "ibv_modify_qp: state %d to %d does not take %#x",
			                   (int)from, (int)to, rest & ~(t->needs | t->may));
		return 0;
	}
	return soft_refuse(EINVAL, "ibv_modify_qp: there is no way from state %d to %d", (int)from, (int)to);
}

static int values_check(const struct soft_qp *qp, const struct ibv_qp_attr *attr, uint32_t mask)
{
	const struct soft_device *device = qp->context->device;
	const struct soft_config *config = &fabric.config;

	if (mask & IBV_QP_PORT && (!attr->port_num || attr->port_num > config->ports))
		return soft_refuse(EINVAL, "ibv_modify_qp: port %u of %u", attr->port_num, config->ports);
	if (mask & IBV_QP_PKEY_INDEX &&
	    (attr->pkey_index >= SOFT_PKEYS || !device->ports[0].pkeys[attr->pkey_index]))
		return soft_refuse(EINVAL, "ibv_modify_qp: there is no partition key %u", attr->pkey_index);
	if (mask & IBV_QP_CUR_STATE && attr->cur_qp_state != qp->state)
		return soft_refuse(EINVAL, "ibv_modify_qp: its state is not %d", (int)attr->cur_qp_state);
	if (mask & IBV_QP_PATH_MTU && (attr->path_mtu < IBV_MTU_256 ||
	                               (uint32_t)attr->path_mtu > device->ports[qp->attr.port_num - 1].mtu))
		return soft_refuse(EINVAL, "ibv_modify_qp: MTU %d, the port's %u", (int)attr->path_mtu,
		                   device->ports[qp->attr.port_num - 1].mtu);
	if (mask & IBV_QP_AV && attr->ah_attr.port_num != qp->attr.port_num)
		return soft_refuse(EINVAL, "ibv_modify_qp: the path's port %u is not the queue pair's %u",
		                   attr->ah_attr.port_num, qp->attr.port_num);
	if ((mask & IBV_QP_RQ_PSN && attr->rq_psn >> 24) || (mask & IBV_QP_SQ_PSN && attr->sq_psn >> 24) ||
	    (mask & IBV_QP_DEST_QPN && attr->dest_qp_num >> 24))
		return soft_refuse(EINVAL, "ibv_modify_qp: a number of more than 24 bits");
	if ((mask & IBV_QP_MAX_QP_RD_ATOMIC && attr->max_rd_atomic > config->max_rd_atomic) ||
	    (mask & IBV_QP_MAX_DEST_RD_ATOMIC && attr->max_dest_rd_atomic > config->max_rd_atomic))
		return soft_refuse(EINVAL, "ibv_modify_qp: more than %u reads", config->max_rd_atomic);
	if ((mask & IBV_QP_RETRY_CNT && attr->retry_cnt > 7) ||
	    (mask & IBV_QP_RNR_RETRY && attr->rnr_retry > 7) ||
	    (mask & IBV_QP_TIMEOUT && attr->timeout > 31) ||
	    (mask & IBV_QP_MIN_RNR_TIMER && attr->min_rnr_timer > 31))
		return soft_refuse(EINVAL, "ibv_modify_qp: a count or a timer out of range");
	return mask & IBV_QP_AV ? soft_path_check(device, &attr->ah_attr) : 0;
}

static void values_take(struct soft_qp *qp, const struct ibv_qp_attr *attr, uint32_t mask)
{
	struct ibv_qp_attr *own = &qp->attr;

	if (mask & IBV_QP_PKEY_INDEX)
		own->pkey_index = attr->pkey_index;
	if (mask & IBV_QP_PORT)
		own->port_num = attr->port_num;
	if (mask & IBV_QP_ACCESS_FLAGS)
		own->qp_access_flags = attr->qp_access_flags;
	if (mask & IBV_QP_AV)
		own->ah_attr = attr->ah_attr;
	if (mask & IBV_QP_PATH_MTU)
		own->path_mtu = attr->path_mtu;
	if (mask & IBV_QP_DEST_QPN)
		own->dest_qp_num = attr->dest_qp_num;
	if (mask & IBV_QP_RQ_PSN)
		own->rq_psn = attr->rq_psn;
	if (mask & IBV_QP_SQ_PSN)
		own->sq_psn = attr->sq_psn;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC)
		own->max_dest_rd_atomic = attr->max_dest_rd_atomic;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC)
		own->max_rd_atomic = attr->max_rd_atomic;
	if (mask & IBV_QP_MIN_RNR_TIMER)
		own->min_rnr_timer = attr->min_rnr_timer;
	if (mask & IBV_QP_RETRY_CNT)
		own->retry_cnt = attr->retry_cnt;
	if (mask & IBV_QP_RNR_RETRY)
		own->rnr_retry = attr->rnr_retry;
	if (mask & IBV_QP_TIMEOUT)
		own->timeout = attr->timeout;
}

/* fabric.lock */
static void state_set(struct soft_qp *qp, enum ibv_qp_state state)
{
	(void)pthread_mutex_lock(&qp->lock);
	qp->state = state;
	if (state == IBV_QPS_RESET)
		qp->head = qp->tail = qp->freed = 0;
	(void)pthread_mutex_unlock(&qp->lock);
	qp->due_ns = 0;
	qp->timeouts = qp->rnr = 0;
}

static void reset(struct soft_qp *qp)
{
	soft_unqueue(qp);
	soft_last_forget(qp);
	soft_cq_clean((struct soft_cq *)qp->ex.qp_base.send_cq, qp);
	soft_cq_clean((struct soft_cq *)qp->ex.qp_base.recv_cq, qp);
	memset(&qp->attr, 0, sizeof(qp->attr));
}

void soft_qp_break(struct soft_qp *qp, int event)
{
	enum ibv_qp_state before = qp->state;

	if (before == IBV_QPS_ERR)
		return;
	if (before != IBV_QPS_RESET)
		soft_last_begin(qp);
	state_set(qp, IBV_QPS_ERR);
	if (event >= 0)
		soft_raise(qp->context, (enum ibv_event_type)event, qp, 0);
	soft_kick_locked(qp);
	if (fabric.config.mode == SOFT_NULL)
		(void)soft_last_tell(qp);
}

SOFT_EXPORT int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;
	enum ibv_qp_state to;
	int error;

	if (soft_fails(soft->context, "ibv_modify_qp"))
		return errno;
	soft_lock();
	to = mask & IBV_QP_STATE ? attr->qp_state : soft->state;
	error = mask_check(soft->state, to, (uint32_t)mask);
	if (!error)
		error = values_check(soft, attr, (uint32_t)mask);
	if (!error) {
		values_take(soft, attr, (uint32_t)mask);
		qp->state = to;
		if (to == IBV_QPS_RESET)
			reset(soft);
		if (to == IBV_QPS_ERR)
			soft_qp_break(soft, -1);
		else
			state_set(soft, to);
	}
	soft_unlock();
	return error;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a queue pair has taken of its shared receive queue while it breaks: completions that are on their way to the queue, and the receive of
 * a message that is in the midst of arriving, which is flushed. "Last WQE reached" comes after all of them (InfiniBand Architecture
 * Specification, o11-5.2.5). Whoever resets or destroys the queue pair before that loses them (10.3.1).
 */
#include "soft.h"

#include "core/barrier.h"

/* A write with immediate that its sender has posted, and that has not landed. */
static int is_arriving(const struct soft_qp *qp)
{
	struct soft_qp *far = soft_qp_find(qp->attr.dest_qp_num);
	uint32_t tail;

	if (!far || far->attr.dest_qp_num != qp->number || far->state != IBV_QPS_RTS)
		return 0;
	(void)pthread_mutex_lock(&far->lock);
	tail = far->tail;
	(void)pthread_mutex_unlock(&far->lock);
	for (uint32_t i = far->head; i != tail; i++) {
		if (far->ring[i % far->cap.max_send_wr].opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
			return 1;
	}
	return 0;
}

static void write_all(struct soft_qp *qp)
{
	for (uint32_t i = 0; i < qp->unwritten_count; i++)
		(void)soft_cq_push((struct soft_cq *)qp->ex.qp_base.recv_cq, &qp->unwritten[i], 0);
	qp->unwritten_count = 0;
}

/* Late is not for ever. */
static void keep(struct soft_qp *qp, const struct soft_cqe *cqe)
{
	if (qp->unwritten_count == SOFT_UNWRITTEN)
		write_all(qp);
	qp->unwritten[qp->unwritten_count++] = *cqe;
}

int soft_last_keep(struct soft_qp *qp, const struct soft_cqe *cqe)
{
	struct soft_device *device = qp->context->device;

	if (!device->late && !qp->unwritten_count)
		return 0;
	device->late -= device->late != 0;
	keep(qp, cqe);
	return 1;
}

void soft_last_begin(struct soft_qp *qp)
{
	struct soft_cqe flushed = { .qp = qp, .receive = 1 };

	qp->last_told = 0;
	qp->last_ns = soft_now_ns() + fabric.config.last_us * 1000ull;
	if ((qp->state != IBV_QPS_RTR && qp->state != IBV_QPS_RTS) || !is_arriving(qp) ||
	    soft_srq_take((struct soft_srq *)qp->ex.qp_base.srq, &flushed.wc.wr_id))
		return;
	flushed.wc.status = IBV_WC_WR_FLUSH_ERR;
	flushed.wc.opcode = (enum ibv_wc_opcode)0x7e; /* not valid of an error */
	flushed.wc.qp_num = qp->number;
	keep(qp, &flushed);
}

int soft_last_tell(struct soft_qp *qp)
{
	if (qp->last_told)
		return 0;
	if (qp->context->device->last_held) {
		qp->due_ns = SOFT_NEVER;
		return 0;
	}
	if (fabric.config.mode == SOFT_THREADED && soft_now_ns() < qp->last_ns) {
		qp->due_ns = qp->last_ns;
		return 0;
	}
	qp->due_ns = 0;
	qp->last_told = 1;
	write_all(qp);
	if (fabric.config.last)
		soft_raise(qp->context, IBV_EVENT_QP_LAST_WQE_REACHED, qp, 0);
	return 1;
}

void soft_last_forget(struct soft_qp *qp)
{
	(void)tfd_add_relaxed(&qp->context->device->counts.receives_lost, (uint64_t)qp->unwritten_count);
	qp->unwritten_count = 0;
	qp->last_told = 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The null mode: a post is checked for room and written into its slot, and what it asks to be told of is complete. Nothing moves, no
 * lock is taken: for one thread, to measure what calls it.
 */
#include "soft.h"

#include <errno.h>

static struct soft_wqe *null_slot(struct soft_qp *qp)
{
	return &qp->ring[qp->tail % qp->cap.max_send_wr];
}

static int null_room(const struct soft_qp *qp)
{
	return qp->tail - qp->freed < qp->cap.max_send_wr ? 0 : ENOMEM;
}

static void null_done(struct soft_qp *qp, const struct soft_wqe *wqe)
{
	struct softverbs_counts *counts = &qp->context->device->counts;
	struct soft_cq *cq = (struct soft_cq *)qp->ex.qp_base.send_cq;
	struct soft_cqe *cqe;

	qp->head = ++qp->tail;
	counts->posted++;
	if (!(wqe->flags & IBV_SEND_SIGNALED))
		return;
	counts->signalled++;
	if (cq->tail - cq->head == cq->size)
		soft_abort("null mode: a completion queue overran");
	cqe = &cq->ring[cq->tail++ % cq->size];
	cqe->qp = qp;
	cqe->receive = 0;
	cqe->freed = qp->tail;
	cqe->wc.wr_id = wqe->wr_id;
	cqe->wc.status = IBV_WC_SUCCESS;
	cqe->wc.opcode = wqe->opcode == IBV_WR_RDMA_READ ? IBV_WC_RDMA_READ : IBV_WC_RDMA_WRITE;
	cqe->wc.qp_num = qp->number;
}

static void null_copy(struct soft_wqe *wqe, const struct ibv_sge *sges, uint32_t count)
{
	wqe->sge_count = count;
	for (uint32_t i = 0; i < count; i++)
		wqe->sges[i] = sges[i];
}

int soft_null_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;

	soft->context->device->counts.doorbells++;
	for (; wr; wr = wr->next) {
		struct soft_wqe *wqe = null_slot(soft);

		*bad = wr;
		if (null_room(soft))
			return ENOMEM;
		wqe->wr_id = wr->wr_id;
		wqe->remote_address = wr->wr.rdma.remote_addr;
		wqe->remote_key = wr->wr.rdma.rkey;
		wqe->opcode = wr->opcode;
		wqe->flags = wr->send_flags;
		wqe->imm = wr->imm_data;
		null_copy(wqe, wr->sg_list, (uint32_t)wr->num_sge);
		null_done(soft, wqe);
	}
	return 0;
}

int soft_null_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc)
{
	struct soft_cq *soft = (struct soft_cq *)cq;
	int found = 0;

	while (found < count && soft->head != soft->tail) {
		const struct soft_cqe *cqe = &soft->ring[soft->head++ % soft->size];

		cqe->qp->freed = cqe->freed;
		wc[found++] = cqe->wc;
	}
	return found;
}

static void null_start(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;

	qp->built_tail = qp->tail;
	qp->built_error = 0;
}

static struct soft_wqe *built_last(struct soft_qp *qp)
{
	return &qp->ring[(qp->built_tail - 1) % qp->cap.max_send_wr];
}

static void null_begin(struct ibv_qp_ex *ex, uint32_t opcode, uint32_t key, uint64_t address, __be32 imm)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;
	struct soft_wqe *wqe = &qp->ring[qp->built_tail % qp->cap.max_send_wr];

	if (qp->built_tail - qp->freed >= qp->cap.max_send_wr) {
		qp->built_error = ENOMEM;
		return;
	}
	qp->built_tail++;
	wqe->wr_id = ex->wr_id;
	wqe->remote_address = address;
	wqe->remote_key = key;
	wqe->opcode = opcode;
	wqe->flags = ex->wr_flags;
	wqe->imm = imm;
	wqe->sge_count = 0;
}

static void null_write(struct ibv_qp_ex *ex, uint32_t key, uint64_t address)
{
	null_begin(ex, IBV_WR_RDMA_WRITE, key, address, 0);
}

static void null_write_imm(struct ibv_qp_ex *ex, uint32_t key, uint64_t address, __be32 imm)
{
	null_begin(ex, IBV_WR_RDMA_WRITE_WITH_IMM, key, address, imm);
}

static void null_read(struct ibv_qp_ex *ex, uint32_t key, uint64_t address)
{
	null_begin(ex, IBV_WR_RDMA_READ, key, address, 0);
}

static void null_set_sge_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_sge *sges)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;

	if (!qp->built_error)
		null_copy(built_last(qp), sges, (uint32_t)count);
}

static void null_set_sge(struct ibv_qp_ex *ex, uint32_t key, uint64_t address, uint32_t length)
{
	struct ibv_sge sge = { .addr = address, .length = length, .lkey = key };

	null_set_sge_list(ex, 1, &sge);
}

static void null_set_inline_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_data_buf *list)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;
	struct soft_wqe *wqe = built_last(qp);

	for (size_t i = 0; i < count && !qp->built_error; i++)
		wqe->sges[i % SOFT_SGES].addr = (uintptr_t)list[i].addr;
}

static void null_set_inline(struct ibv_qp_ex *ex, void *address, size_t length)
{
	struct ibv_data_buf one = { .addr = address, .length = length };

	null_set_inline_list(ex, 1, &one);
}

static int null_complete(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;

	if (qp->built_error)
		return qp->built_error;
	qp->context->device->counts.doorbells++;
	qp->context->device->counts.wr_posted += qp->built_tail - qp->tail;
	while (qp->tail != qp->built_tail)
		null_done(qp, null_slot(qp));
	return 0;
}

static void null_abort(struct ibv_qp_ex *ex)
{
	(void)ex; /* what was built is written over */
}

void soft_null_extend(struct soft_qp *qp)
{
	struct ibv_qp_ex *ex = &qp->ex;

	ex->wr_start = null_start;
	ex->wr_complete = null_complete;
	ex->wr_abort = null_abort;
	ex->wr_set_sge = null_set_sge;
	ex->wr_set_sge_list = null_set_sge_list;
	ex->wr_set_inline_data = null_set_inline;
	ex->wr_set_inline_data_list = null_set_inline_list;
	ex->wr_rdma_write = qp->send_ops & IBV_QP_EX_WITH_RDMA_WRITE ? null_write : NULL;
	ex->wr_rdma_write_imm = qp->send_ops & IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM ? null_write_imm : NULL;
	ex->wr_rdma_read = qp->send_ops & IBV_QP_EX_WITH_RDMA_READ ? null_read : NULL;
}

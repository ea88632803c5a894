/* SPDX-License-Identifier: Apache-2.0 */
/* Posting to a send queue, by lists and by the ibv_wr_ functions: what a device checks before anything moves. */
#include "soft.h"

#include <errno.h>
#include <string.h>

#include "core/barrier.h"

static struct soft_wqe *wqe_at(struct soft_qp *qp, uint32_t index)
{
	return &qp->ring[index % qp->cap.max_send_wr];
}

/* qp->lock. Whether it takes one more at `tail`: an errno. */
static int room(const struct soft_qp *qp, uint32_t tail)
{
	if (tfd_load_relaxed(&qp->context->gone))
		return EIO;
	if (qp->state != IBV_QPS_RTS && qp->state != IBV_QPS_ERR)
		return soft_refuse(EINVAL, "ibv_post_send: queue pair %#x is in state %d", qp->number,
		                   (int)qp->state);
	if (tail - qp->freed >= qp->cap.max_send_wr)
		return soft_refuse(
			ENOMEM,
			"ibv_post_send: all %u work requests of queue pair %#x are used until more "
			"completions are polled",
			qp->cap.max_send_wr, qp->number);
	return 0;
}

static int inline_fill(const struct soft_qp *qp, struct soft_wqe *wqe, const struct ibv_sge *sges,
                       uint32_t count)
{
	wqe->sge_count = 0;
	for (uint32_t i = 0; i < count; i++) {
		if (sges[i].length > qp->cap.max_inline_data - wqe->inline_bytes)
			return soft_refuse(EINVAL, "ibv_post_send: more than %u bytes inline",
			                   qp->cap.max_inline_data);
		memcpy(wqe->bytes + wqe->inline_bytes, (const void *)(uintptr_t)sges[i].addr, sges[i].length);
		wqe->inline_bytes += sges[i].length;
	}
	return 0;
}

static int checked(struct soft_qp *qp, const struct ibv_send_wr *wr, struct soft_wqe *wqe)
{
	if (wr->opcode != IBV_WR_RDMA_WRITE && wr->opcode != IBV_WR_RDMA_WRITE_WITH_IMM &&
	    wr->opcode != IBV_WR_RDMA_READ)
		return soft_refuse(EOPNOTSUPP, "ibv_post_send: opcode %d", (int)wr->opcode);
	if (wr->num_sge < 0 || (uint32_t)wr->num_sge > qp->cap.max_send_sge)
		return soft_refuse(EINVAL, "ibv_post_send: %d pieces, at most %u", wr->num_sge,
		                   qp->cap.max_send_sge);
	wqe->wr_id = wr->wr_id;
	wqe->remote_address = wr->wr.rdma.remote_addr;
	wqe->remote_key = wr->wr.rdma.rkey;
	wqe->opcode = wr->opcode;
	wqe->flags = wr->send_flags | (qp->signal_all ? IBV_SEND_SIGNALED : 0);
	wqe->imm = wr->imm_data;
	wqe->inline_bytes = 0;
	if (wr->send_flags & IBV_SEND_INLINE) {
		if (wr->opcode == IBV_WR_RDMA_READ)
			return soft_refuse(EINVAL, "ibv_post_send: a read has nothing to put inline");
		return inline_fill(qp, wqe, wr->sg_list, (uint32_t)wr->num_sge);
	}
	wqe->sge_count = (uint32_t)wr->num_sge;
	for (int i = 0; i < wr->num_sge; i++)
		wqe->sges[i] = wr->sg_list[i];
	return 0;
}

static void longest(uint64_t *most, uint64_t chain)
{
	uint64_t now = tfd_load_relaxed(most);

	while (chain > now && !tfd_replace_seq(most, &now, chain))
		continue;
}

static void count_posts(struct soft_qp *qp, uint32_t from, uint32_t to)
{
	struct softverbs_counts *counts = &qp->context->device->counts;
	uint64_t signalled = 0, inlined = 0;

	if (from == to)
		return;
	for (uint32_t at = from; at != to; at++) {
		const struct soft_wqe *wqe = wqe_at(qp, at);

		signalled += (wqe->flags & IBV_SEND_SIGNALED) != 0;
		inlined += (wqe->flags & IBV_SEND_INLINE) != 0;
	}
	(void)tfd_add_relaxed(&counts->doorbells, 1);
	(void)tfd_add_relaxed(&counts->posted, to - from);
	(void)tfd_add_relaxed(&counts->signalled, signalled);
	(void)tfd_add_relaxed(&counts->inlined, inlined);
	longest(&counts->longest_chain, to - from);
}

/* qp->lock: what was built up to `tail` is posted. */
static void publish(struct soft_qp *qp, uint32_t tail)
{
	uint64_t delay = tfd_load_relaxed(&fabric.delay_ns);
	uint64_t due = delay ? soft_now_ns() + delay : 0;

	for (uint32_t at = qp->tail; at != tail; at++)
		wqe_at(qp, at)->due_ns = due;
	count_posts(qp, qp->tail, tail);
	qp->tail = tail;
}

int soft_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct soft_qp *soft = (struct soft_qp *)(void *)qp;
	int error = soft_fails(NULL, "ibv_post_send");
	uint32_t tail, posted;

	*bad = wr;
	if (error)
		return error;
	(void)pthread_mutex_lock(&soft->lock);
	tail = soft->tail;
	for (; wr; wr = wr->next) {
		*bad = wr;
		error = room(soft, tail);
		if (!error)
			error = checked(soft, wr, wqe_at(soft, tail));
		if (error)
			break;
		tail++;
	}
	posted = tail - soft->tail;
	publish(soft, tail); /* those before the bad one are posted */
	(void)pthread_mutex_unlock(&soft->lock);
	if (posted)
		soft_kick(soft);
	return error;
}

static struct soft_qp *building(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;

	if (!qp->building)
		soft_abort("an ibv_wr_ function outside of ibv_wr_start");
	return qp;
}

static void wr_start(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = (struct soft_qp *)(void *)ex;

	(void)pthread_mutex_lock(&qp->lock);
	qp->building = 1;
	qp->built_tail = qp->tail;
	qp->built_error = 0;
}

static void wr_begin(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode, uint32_t key, uint64_t address,
                     __be32 imm)
{
	struct soft_qp *qp = building(ex);
	struct soft_wqe *wqe;

	if (!qp->built_error)
		qp->built_error = room(qp, qp->built_tail);
	if (qp->built_error)
		return;
	wqe = wqe_at(qp, qp->built_tail++);
	wqe->wr_id = ex->wr_id;
	wqe->remote_address = address;
	wqe->remote_key = key;
	wqe->opcode = opcode;
	wqe->flags = ex->wr_flags | (qp->signal_all ? IBV_SEND_SIGNALED : 0);
	wqe->imm = imm;
	wqe->sge_count = 0;
	wqe->inline_bytes = 0;
	if (ex->wr_flags & IBV_SEND_INLINE)
		soft_abort("IBV_SEND_INLINE among wr_flags: ibv_wr_set_inline_data says it");
}

static void wr_write(struct ibv_qp_ex *ex, uint32_t key, uint64_t address)
{
	wr_begin(ex, IBV_WR_RDMA_WRITE, key, address, 0);
}

static void wr_write_imm(struct ibv_qp_ex *ex, uint32_t key, uint64_t address, __be32 imm)
{
	wr_begin(ex, IBV_WR_RDMA_WRITE_WITH_IMM, key, address, imm);
}

static void wr_read(struct ibv_qp_ex *ex, uint32_t key, uint64_t address)
{
	wr_begin(ex, IBV_WR_RDMA_READ, key, address, 0);
}

/* The one that is being built; NULL: something before went wrong. */
static struct soft_wqe *wr_last(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = building(ex);

	if (qp->built_error)
		return NULL;
	if (qp->built_tail == qp->tail)
		soft_abort("an ibv_wr_set_ function before what it is of");
	return wqe_at(qp, qp->built_tail - 1);
}

static void wr_set_sge_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_sge *sges)
{
	struct soft_qp *qp = building(ex);
	struct soft_wqe *wqe = wr_last(ex);

	if (!wqe)
		return;
	if (count > qp->cap.max_send_sge) {
		qp->built_error = soft_refuse(EINVAL, "ibv_wr_set_sge_list: %zu pieces, at most %u", count,
		                              qp->cap.max_send_sge);
		return;
	}
	wqe->sge_count = (uint32_t)count;
	memcpy(wqe->sges, sges, count * sizeof(*sges));
}

static void wr_set_sge(struct ibv_qp_ex *ex, uint32_t key, uint64_t address, uint32_t length)
{
	struct ibv_sge sge = { .addr = address, .length = length, .lkey = key };

	wr_set_sge_list(ex, 1, &sge);
}

static void wr_set_inline_data_list(struct ibv_qp_ex *ex, size_t count, const struct ibv_data_buf *list)
{
	struct soft_qp *qp = building(ex);
	struct soft_wqe *wqe = wr_last(ex);

	if (!wqe)
		return;
	wqe->flags |= IBV_SEND_INLINE;
	for (size_t i = 0; i < count && !qp->built_error; i++) {
		struct ibv_sge sge = { .addr = (uintptr_t)list[i].addr, .length = (uint32_t)list[i].length };

		qp->built_error = list[i].length > UINT32_MAX ? EINVAL : inline_fill(qp, wqe, &sge, 1);
	}
}

static void wr_set_inline_data(struct ibv_qp_ex *ex, void *address, size_t length)
{
	struct ibv_data_buf one = { .addr = address, .length = length };

	wr_set_inline_data_list(ex, 1, &one);
}

/* Posts all of it, or nothing. */
static int wr_complete(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = building(ex);
	int error = qp->built_error;
	uint32_t posted = 0;

	if (!error)
		error = soft_fails(NULL, "ibv_wr_complete");
	if (!error) {
		posted = qp->built_tail - qp->tail;
		publish(qp, qp->built_tail);
		(void)tfd_add_relaxed(&qp->context->device->counts.wr_posted, posted);
	}
	qp->building = 0;
	(void)pthread_mutex_unlock(&qp->lock);
	if (posted)
		soft_kick(qp);
	return error;
}

static void wr_abort(struct ibv_qp_ex *ex)
{
	struct soft_qp *qp = building(ex);

	qp->building = 0;
	(void)pthread_mutex_unlock(&qp->lock);
}

void soft_post_extend(struct soft_qp *qp)
{
	struct ibv_qp_ex *ex = &qp->ex;

	ex->wr_start = wr_start;
	ex->wr_complete = wr_complete;
	ex->wr_abort = wr_abort;
	ex->wr_set_sge = wr_set_sge;
	ex->wr_set_sge_list = wr_set_sge_list;
	ex->wr_set_inline_data = wr_set_inline_data;
	ex->wr_set_inline_data_list = wr_set_inline_data_list;
	/* Others are NULL, as a driver that was not asked for them has them. */
	ex->wr_rdma_write = qp->send_ops & IBV_QP_EX_WITH_RDMA_WRITE ? wr_write : NULL;
	ex->wr_rdma_write_imm = qp->send_ops & IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM ? wr_write_imm : NULL;
	ex->wr_rdma_read = qp->send_ops & IBV_QP_EX_WITH_RDMA_READ ? wr_read : NULL;
}

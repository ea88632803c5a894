/* SPDX-License-Identifier: Apache-2.0 */
/* The wire: what becomes of a work request, at both ends. All of it under fabric.lock. */
#include "soft.h"

#include <string.h>

#include "core/barrier.h"

#define WAITS (-1) /* the work request stays at the head */
#define MAX_MESSAGE (1u << 30)

/* Of min_rnr_timer, in 10 µs. */
static const uint32_t rnr_times[32] = { 65536, 1,    2,    3,    4,    6,     8,     12,    16,    24,   32,
                                        48,    64,   96,   128,  192,  256,   384,   512,   768,   1024, 1536,
                                        2048,  3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152 };

static struct soft_port *port_of(const struct soft_qp *qp)
{
	return &qp->context->device->ports[qp->attr.port_num - 1];
}

static int path_fits(const struct soft_qp *from, const struct soft_qp *to)
{
	const struct ibv_global_route *route = &from->attr.ah_attr.grh;
	const struct soft_gid *own, *far = port_of(to)->gids;

	if (!from->attr.ah_attr.is_global)
		return from->attr.ah_attr.dlid == port_of(to)->lid;
	own = &port_of(from)->gids[route->sgid_index];
	if (!own->used)
		return 0;
	for (uint32_t i = 0; i < SOFT_GIDS; i++) {
		if (far[i].used && far[i].type == own->type &&
		    memcmp(&far[i].gid, &route->dgid, sizeof(own->gid)) == 0)
			return 1;
	}
	return 0;
}

/* Who answers; NULL: nobody. */
static struct soft_qp *far_of(const struct soft_qp *qp)
{
	struct soft_qp *far = soft_qp_find(qp->attr.dest_qp_num);

	if (!far || far->context->gone || (far->state != IBV_QPS_RTR && far->state != IBV_QPS_RTS))
		return NULL;
	if (!port_of(qp)->up || !port_of(far)->up || qp->context->device->cut || far->context->device->cut)
		return NULL;
	if (far->attr.dest_qp_num != qp->number || far->attr.rq_psn != qp->attr.sq_psn)
		return NULL; /* a packet of some other connection */
	return path_fits(qp, far) && path_fits(far, qp) ? far : NULL;
}

static uint64_t wqe_bytes(const struct soft_wqe *wqe)
{
	uint64_t bytes = wqe->inline_bytes;

	for (uint32_t i = 0; i < wqe->sge_count; i++)
		bytes += wqe->sges[i].length;
	return bytes;
}

/* Between the pieces of it and `far`; moves nothing if `far` is NULL. Whether all of the pieces may be used. */
static int copy_pieces(const struct soft_qp *qp, const struct soft_wqe *wqe, uint8_t *far)
{
	uint32_t access = wqe->opcode == IBV_WR_RDMA_READ ? IBV_ACCESS_LOCAL_WRITE : 0;

	if (wqe->inline_bytes && far)
		memcpy(far, wqe->bytes, wqe->inline_bytes);
	for (uint32_t i = 0; i < wqe->sge_count; i++) {
		const struct ibv_sge *sge = &wqe->sges[i];
		uint8_t *own;

		if (!sge->length)
			continue;
		own = soft_bytes(qp->ex.qp_base.pd, sge->lkey, sge->addr, sge->length, access);
		if (!own)
			return 0;
		if (!far)
			continue;
		if (access)
			memmove(own, far, sge->length);
		else
			memmove(far, own, sge->length);
		far += sge->length;
	}
	return 1;
}

static int unanswered(struct soft_qp *qp)
{
	uint64_t wait_ns = (4096ull << qp->attr.timeout) / fabric.config.hurry;

	(void)tfd_add_relaxed(&qp->context->device->counts.timeouts, 1);
	if (fabric.config.mode != SOFT_THREADED || qp->timeouts++ >= qp->attr.retry_cnt)
		return IBV_WC_RETRY_EXC_ERR;
	qp->due_ns = qp->attr.timeout ? soft_now_ns() + wait_ns : SOFT_NEVER;
	return WAITS;
}

static int unready(struct soft_qp *qp, const struct soft_qp *far)
{
	uint64_t wait_ns = rnr_times[far->attr.min_rnr_timer] * 10000ull / fabric.config.hurry;

	(void)tfd_add_relaxed(&far->context->device->counts.rnr, 1);
	if (qp->attr.rnr_retry != 7 && qp->rnr++ >= qp->attr.rnr_retry)
		return IBV_WC_RNR_RETRY_EXC_ERR;
	if (fabric.config.mode == SOFT_THREADED) {
		qp->due_ns = soft_now_ns() + wait_ns;
	} else {
		qp->parked = 1;
		tfd_store_relaxed(&fabric.parked, fabric.parked + 1);
	}
	return WAITS;
}

/* What the far side says that it may not: both ends break. */
static int refused(struct soft_qp *far)
{
	soft_qp_break(far, IBV_EVENT_QP_ACCESS_ERR);
	return IBV_WC_REM_ACCESS_ERR;
}

static int give_immediate(struct soft_qp *qp, struct soft_qp *far, const struct soft_wqe *wqe, uint64_t bytes)
{
	struct soft_cqe cqe = { .qp = far, .receive = 1 };
	uint64_t wr_id;

	if (soft_srq_take((struct soft_srq *)far->ex.qp_base.srq, &wr_id))
		return unready(qp, far);
	cqe.wc = (struct ibv_wc){
		.wr_id = wr_id,
		.status = IBV_WC_SUCCESS,
		.opcode = IBV_WC_RECV_RDMA_WITH_IMM,
		.byte_len = (uint32_t)bytes,
		.imm_data = wqe->imm,
		.qp_num = far->number,
		.src_qp = qp->number,
		.wc_flags = IBV_WC_WITH_IMM,
	};
	(void)tfd_add_relaxed(&far->context->device->counts.immediates, 1);
	if (soft_last_keep(far, &cqe))
		return IBV_WC_SUCCESS;
	if (soft_cq_push((struct soft_cq *)far->ex.qp_base.recv_cq, &cqe,
	                 (wqe->flags & IBV_SEND_SOLICITED) != 0)) {
		soft_qp_break(far, IBV_EVENT_QP_FATAL);
		return IBV_WC_REM_OP_ERR;
	}
	return IBV_WC_SUCCESS;
}

static int carry_write(struct soft_qp *qp, struct soft_qp *far, const struct soft_wqe *wqe, uint64_t bytes)
{
	uint8_t *to = NULL;

	if (bytes) { /* of none neither key nor address is looked at */
		to = soft_bytes(far->ex.qp_base.pd, wqe->remote_key, wqe->remote_address, bytes,
		                IBV_ACCESS_REMOTE_WRITE);
		if (!to || !(far->attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE))
			return refused(far);
		(void)copy_pieces(qp, wqe, to); /* again, if the immediate then finds no entry */
		(void)tfd_add_relaxed(&far->context->device->counts.landed_bytes, bytes);
	}
	if (wqe->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
		return give_immediate(qp, far, wqe, bytes);
	return IBV_WC_SUCCESS;
}

static int carry_read(struct soft_qp *qp, struct soft_qp *far, const struct soft_wqe *wqe, uint64_t bytes)
{
	uint8_t *from;

	if (!qp->attr.max_rd_atomic)
		return IBV_WC_LOC_QP_OP_ERR;
	if (!far->attr.max_dest_rd_atomic) {
		soft_qp_break(far, IBV_EVENT_QP_REQ_ERR);
		return IBV_WC_REM_INV_REQ_ERR;
	}
	if (!bytes)
		return IBV_WC_SUCCESS;
	from = soft_bytes(far->ex.qp_base.pd, wqe->remote_key, wqe->remote_address, bytes,
	                  IBV_ACCESS_REMOTE_READ);
	if (!from || !(far->attr.qp_access_flags & IBV_ACCESS_REMOTE_READ))
		return refused(far);
	(void)copy_pieces(qp, wqe, from);
	return IBV_WC_SUCCESS;
}

/* Whether a test's order for the so manieth falls due. */
static int falls_due(uint32_t *after)
{
	return *after && !--*after;
}

/* enum ibv_wc_status, or WAITS. */
static int attempt(struct soft_qp *qp, const struct soft_wqe *wqe)
{
	struct soft_device *device = qp->context->device;
	uint64_t bytes = wqe_bytes(wqe);
	struct soft_qp *far;
	int status;

	if (bytes > MAX_MESSAGE)
		return IBV_WC_LOC_LEN_ERR;
	if (!copy_pieces(qp, wqe, NULL))
		return IBV_WC_LOC_PROT_ERR;
	if (!qp->timeouts && !qp->rnr && falls_due(&device->fail_after))
		return device->fail_status;
	far = far_of(qp);
	if (!far)
		return unanswered(qp);
	status = wqe->opcode == IBV_WR_RDMA_READ ? carry_read(qp, far, wqe, bytes) :
	                                           carry_write(qp, far, wqe, bytes);
	if (status == IBV_WC_SUCCESS && falls_due(&device->unacked_after))
		return IBV_WC_RETRY_EXC_ERR;
	return status;
}

static void complete(struct soft_qp *qp, const struct soft_wqe *wqe, int status)
{
	struct softverbs_counts *counts = &qp->context->device->counts;
	struct soft_cqe cqe = { .qp = qp, .freed = qp->head + 1 };
	int told = status != IBV_WC_SUCCESS || wqe->flags & IBV_SEND_SIGNALED;

	cqe.wc = (struct ibv_wc){ .wr_id = wqe->wr_id,
	                          .status = (enum ibv_wc_status)status,
	                          .qp_num = qp->number };
	if (status != IBV_WC_SUCCESS) /* of an error nothing else is valid */
		cqe.wc.opcode = (enum ibv_wc_opcode)0x7e;
	else
		cqe.wc.opcode = wqe->opcode == IBV_WR_RDMA_READ ? IBV_WC_RDMA_READ : IBV_WC_RDMA_WRITE;
	qp->head++;
	qp->due_ns = 0;
	qp->timeouts = qp->rnr = 0;
	if (status == IBV_WC_WR_FLUSH_ERR)
		(void)tfd_add_relaxed(&counts->flushed, 1);
	if (told && soft_cq_push((struct soft_cq *)qp->ex.qp_base.send_cq, &cqe, 0))
		soft_qp_break(qp, IBV_EVENT_QP_FATAL);
	if (status != IBV_WC_SUCCESS)
		soft_qp_break(qp, -1);
}

static void unpark(struct soft_qp *qp)
{
	if (!qp->parked)
		return;
	qp->parked = 0;
	tfd_store_relaxed(&fabric.parked, fabric.parked - 1);
}

int soft_carry(struct soft_qp *qp)
{
	struct soft_wqe *wqe = &qp->ring[qp->head % qp->cap.max_send_wr];
	uint32_t tail;
	int status;

	(void)pthread_mutex_lock(&qp->lock); /* slots below the tail are ours now */
	tail = qp->tail;
	(void)pthread_mutex_unlock(&qp->lock);
	unpark(qp);
	if (qp->context->gone)
		return 0;
	if (qp->state == IBV_QPS_ERR && qp->head != tail) {
		complete(qp, wqe, IBV_WC_WR_FLUSH_ERR);
		return 1;
	}
	if (qp->state == IBV_QPS_ERR)
		return soft_last_tell(qp);
	if (qp->head == tail)
		return 0;
	if (qp->context->device->held) {
		qp->due_ns = SOFT_NEVER;
		return 0;
	}
	if (wqe->due_ns && fabric.config.mode == SOFT_THREADED && wqe->due_ns > soft_now_ns()) {
		qp->due_ns = wqe->due_ns;
		return 0;
	}
	status = attempt(qp, wqe);
	if (status == WAITS)
		return 0;
	complete(qp, wqe, status);
	return 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Two devices of the double of libibverbs, an end on each with a queue pair, joined; without any provider. For C tests. */
#ifndef TFD_SOFTVERBS_WORLD_H
#define TFD_SOFTVERBS_WORLD_H

#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/softverbs/softverbs.h"

#define CHECK(condition)                                                                      \
	do {                                                                                  \
		if (!(condition)) {                                                           \
			(void)fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(1);                                                              \
		}                                                                             \
	} while (0)

#define END_BYTES 65536u
#define END_GID 3u /* v2:v4 of the default table */
#define END_WRS 16u

struct end {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq *send_cq;
	struct ibv_cq *recv_cq;
	struct ibv_srq *srq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	uint8_t memory[END_BYTES] __attribute__((aligned(4096)));
};

static inline struct ibv_context *open_named(const char *name)
{
	struct ibv_context *context = NULL;
	struct ibv_device **list;
	int count;

	list = ibv_get_device_list(&count);
	CHECK(list);
	for (int i = 0; i < count; i++) {
		if (strcmp(ibv_get_device_name(list[i]), name) == 0)
			context = ibv_open_device(list[i]);
	}
	ibv_free_device_list(list);
	return context;
}

static inline void srq_fill(struct end *end, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct ibv_recv_wr wr = { .wr_id = i }, *bad;

		CHECK(ibv_post_srq_recv(end->srq, &wr, &bad) == 0);
	}
}

static inline void end_qp(struct end *end, int extended)
{
	struct ibv_qp_init_attr_ex init = {
		.send_cq = end->send_cq,
		.recv_cq = end->recv_cq,
		.srq = end->srq,
		.cap = { .max_send_wr = END_WRS, .max_send_sge = 2, .max_inline_data = 64 },
		.qp_type = IBV_QPT_RC,
		.comp_mask = IBV_QP_INIT_ATTR_PD | (extended ? IBV_QP_INIT_ATTR_SEND_OPS_FLAGS : 0u),
		.pd = end->pd,
		.send_ops_flags = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM |
		                  IBV_QP_EX_WITH_RDMA_READ,
	};

	end->qp = ibv_create_qp_ex(end->context, &init);
	CHECK(end->qp);
}

static inline struct end *end_open(const char *device, uint32_t receives, uint32_t cqe, int extended)
{
	struct ibv_srq_init_attr srq = { .attr = { .max_wr = 64, .max_sge = 1 } };
	struct end *end = aligned_alloc(4096, sizeof(*end));

	CHECK(end);
	memset(end, 0, sizeof(*end));
	CHECK((end->context = open_named(device)));
	CHECK((end->pd = ibv_alloc_pd(end->context)));
	CHECK((end->channel = ibv_create_comp_channel(end->context)));
	CHECK((end->send_cq = ibv_create_cq(end->context, (int)cqe, end, NULL, 0)));
	CHECK((end->recv_cq = ibv_create_cq(end->context, 64, end, end->channel, 0)));
	CHECK((end->srq = ibv_create_srq(end->pd, &srq)));
	CHECK((end->mr = ibv_reg_mr(end->pd, end->memory, END_BYTES,
	                            IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
	                                    IBV_ACCESS_REMOTE_READ)));
	end_qp(end, extended);
	srq_fill(end, receives);
	return end;
}

static inline void end_close(struct end *end)
{
	CHECK(ibv_destroy_qp(end->qp) == 0);
	CHECK(ibv_dereg_mr(end->mr) == 0);
	CHECK(ibv_destroy_srq(end->srq) == 0);
	CHECK(ibv_destroy_cq(end->send_cq) == 0);
	CHECK(ibv_destroy_cq(end->recv_cq) == 0);
	CHECK(ibv_destroy_comp_channel(end->channel) == 0);
	CHECK(ibv_dealloc_pd(end->pd) == 0);
	CHECK(ibv_close_device(end->context) == 0);
	free(end);
}

static inline void end_init(struct end *end)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT,
	                            .port_num = 1,
	                            .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };

	CHECK(ibv_modify_qp(end->qp, &attr,
	                    IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0);
}

static inline struct ibv_qp_attr end_rtr(const struct end *far, uint32_t psn)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_4096,
		.dest_qp_num = far->qp->qp_num,
		.rq_psn = psn,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 1,
		.ah_attr = { .is_global = 1,
		             .port_num = 1,
		             .grh = { .sgid_index = END_GID, .hop_limit = 64 } },
	};

	CHECK(ibv_query_gid(far->context, 1, (int)END_GID, &attr.ah_attr.grh.dgid) == 0);
	return attr;
}

#define RTR_MASK                                                                        \
	(IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | \
	 IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)
#define RTS_MASK                                                                                        \
	(IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | \
	 IBV_QP_TIMEOUT)

static inline void end_join(struct end *end, const struct end *far, uint32_t own_psn, uint32_t far_psn)
{
	struct ibv_qp_attr attr;

	end_init(end);
	attr = end_rtr(far, far_psn);
	CHECK(ibv_modify_qp(end->qp, &attr, RTR_MASK) == 0);
	attr = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS,
	                             .sq_psn = own_psn,
	                             .max_rd_atomic = 4,
	                             .retry_cnt = 3,
	                             .rnr_retry = 3,
	                             .timeout = 4 };
	CHECK(ibv_modify_qp(end->qp, &attr, RTS_MASK) == 0);
}

static inline void ends_join(struct end *a, struct end *b)
{
	end_join(a, b, 7, 9);
	end_join(b, a, 9, 7);
}

/* The next completion, within a few seconds. */
static inline struct ibv_wc await_wc(struct ibv_cq *cq)
{
	for (int i = 0; i < 50000; i++) {
		struct ibv_wc wc;
		int found = ibv_poll_cq(cq, 1, &wc);

		CHECK(found >= 0);
		if (found)
			return wc;
		(void)usleep(100);
	}
	CHECK(!"a completion");
	abort();
}

static inline void expect_none(struct ibv_cq *cq)
{
	struct ibv_wc wc;

	CHECK(ibv_poll_cq(cq, 1, &wc) == 0);
}

static inline struct ibv_async_event await_event(struct ibv_context *context, enum ibv_event_type type)
{
	struct ibv_async_event event;

	CHECK(ibv_get_async_event(context, &event) == 0);
	CHECK(event.event_type == type);
	ibv_ack_async_event(&event);
	return event;
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The double of libibverbs itself: what it lets through, what it refuses, and what becomes of work requests, in both of its ways. */
#include <poll.h>

#include "tests/softverbs_world.h"

static struct end *a, *b;

static void open_ends(uint32_t receives, int extended)
{
	a = end_open("soft0", receives, 64, extended);
	b = end_open("soft1", receives, 64, extended);
	ends_join(a, b);
}

static void close_ends(void)
{
	struct softverbs_counts left;

	end_close(a);
	end_close(b);
	softverbs_counts("soft0", &left);
	CHECK(!left.contexts && !left.pds && !left.mrs && !left.cqs && !left.srqs && !left.qps &&
	      !left.channels);
}

/* From a's memory at 0 to b's at 4096, but for what `change` is. */
static int post(enum ibv_wr_opcode opcode, uint32_t length, unsigned int flags, uint64_t wr_id)
{
	struct ibv_sge sge = { .addr = (uintptr_t)a->memory, .length = length, .lkey = a->mr->lkey };
	struct ibv_send_wr wr = {
		.wr_id = wr_id,
		.sg_list = &sge,
		.num_sge = length != 0,
		.opcode = opcode,
		.send_flags = flags,
		.imm_data = htonl((uint32_t)wr_id),
		.wr.rdma = { .remote_addr = (uintptr_t)b->memory + 4096, .rkey = b->mr->rkey },
	};
	struct ibv_send_wr *bad;

	return ibv_post_send(a->qp, &wr, &bad);
}

static void expect_sent(uint64_t wr_id, enum ibv_wc_status status)
{
	struct ibv_wc wc = await_wc(a->send_cq);

	CHECK(wc.wr_id == wr_id && wc.status == status && wc.qp_num == a->qp->qp_num);
}

static void test_writes_land_and_immediates_count(void)
{
	struct ibv_wc wc;

	open_ends(8, 0);
	memset(a->memory, 0x5a, 4096);
	CHECK(post(IBV_WR_RDMA_WRITE, 4096, IBV_SEND_SIGNALED, 1) == 0);
	expect_sent(1, IBV_WC_SUCCESS);
	CHECK(memcmp(b->memory + 4096, a->memory, 4096) == 0 && b->memory[8192] == 0);
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, 0, 77) == 0);
	wc = await_wc(b->recv_cq);
	CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && ntohl(wc.imm_data) == 77 && wc.byte_len == 0);
	CHECK(wc.qp_num == b->qp->qp_num && wc.wc_flags == IBV_WC_WITH_IMM);
	memset(b->memory + 4096, 0x33, 64);
	CHECK(post(IBV_WR_RDMA_READ, 64, IBV_SEND_SIGNALED, 2) == 0);
	expect_sent(2, IBV_WC_SUCCESS);
	CHECK(a->memory[63] == 0x33 && a->memory[64] == 0x5a);
	expect_none(a->send_cq); /* the immediate was not signalled */
	close_ends();
}

static void test_inline_takes_its_bytes_at_once(void)
{
	struct softverbs_counts counts;

	open_ends(8, 0);
	softverbs_counts_clear("soft0");
	softverbs_hold("soft0", 1);
	memset(a->memory, 1, 64);
	CHECK(post(IBV_WR_RDMA_WRITE, 64, IBV_SEND_SIGNALED | IBV_SEND_INLINE, 1) == 0);
	CHECK(post(IBV_WR_RDMA_WRITE, 65, IBV_SEND_SIGNALED | IBV_SEND_INLINE, 1) == EINVAL);
	memset(a->memory, 2, 64);
	expect_none(a->send_cq);
	softverbs_hold("soft0", 0);
	expect_sent(1, IBV_WC_SUCCESS);
	CHECK(b->memory[4096] == 1 && b->memory[4096 + 63] == 1);
	softverbs_counts("soft0", &counts);
	CHECK(counts.inlined == 1 && counts.signalled == 1);
	close_ends();
}

static void test_lists_of_wr_functions(void)
{
	struct softverbs_counts counts;
	struct ibv_qp_ex *ex;

	open_ends(8, 1);
	ex = ibv_qp_to_qp_ex(a->qp);
	CHECK(ex && !ex->wr_send);
	softverbs_counts_clear("soft0");
	memset(a->memory, 4, 64);
	ibv_wr_start(ex);
	for (uint32_t i = 0; i < 3; i++) {
		ex->wr_id = i;
		ex->wr_flags = i == 2 ? IBV_SEND_SIGNALED : 0;
		ibv_wr_rdma_write_imm(ex, b->mr->rkey, (uintptr_t)b->memory + 64 * i, htonl(i));
		ibv_wr_set_sge(ex, a->mr->lkey, (uintptr_t)a->memory, 64);
	}
	CHECK(ibv_wr_complete(ex) == 0);
	expect_sent(2, IBV_WC_SUCCESS);
	CHECK(b->memory[0] == 4 && b->memory[191] == 4 && b->memory[192] == 0);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(ntohl(await_wc(b->recv_cq).imm_data) == i);
	softverbs_counts("soft0", &counts);
	CHECK(counts.doorbells == 1 && counts.posted == 3 && counts.longest_chain == 3 &&
	      counts.signalled == 1);
	CHECK(counts.wr_posted == 3);
	ibv_wr_start(ex);
	ibv_wr_rdma_write(ex, b->mr->rkey, (uintptr_t)b->memory);
	ibv_wr_set_sge(ex, a->mr->lkey, (uintptr_t)a->memory, 64);
	ibv_wr_abort(ex);
	ibv_wr_start(ex);
	for (uint32_t i = 0; i <= END_WRS; i++)
		ibv_wr_rdma_write(ex, b->mr->rkey, (uintptr_t)b->memory);
	CHECK(ibv_wr_complete(ex) == ENOMEM); /* and none of them is posted */
	softverbs_counts("soft0", &counts);
	CHECK(counts.doorbells == 1 && counts.posted == 3);
	close_ends();
}

static void test_the_send_queue_is_free_when_polled(void)
{
	open_ends(8, 0);
	for (uint32_t i = 0; i < END_WRS; i++)
		CHECK(post(IBV_WR_RDMA_WRITE, 8, i + 1 == END_WRS ? IBV_SEND_SIGNALED : 0, i) == 0);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 99) == ENOMEM);
	expect_sent(END_WRS - 1, IBV_WC_SUCCESS);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, IBV_SEND_SIGNALED, 99) == 0);
	expect_sent(99, IBV_WC_SUCCESS);
	close_ends();
}

/* Writes 64 bytes at b's memory with that key. */
static void expect_refused(uint32_t offset, uint32_t key_change)
{
	struct ibv_send_wr wr = { .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE }, *bad;
	struct ibv_sge sge = { .length = 64 };

	open_ends(8, 0);
	sge.addr = (uintptr_t)a->memory;
	sge.lkey = a->mr->lkey;
	wr.sg_list = &sge;
	wr.wr.rdma.remote_addr = (uintptr_t)b->memory + offset;
	wr.wr.rdma.rkey = b->mr->rkey ^ key_change;
	CHECK(ibv_post_send(a->qp, &wr, &bad) == 0);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 5) == 0);
	expect_sent(0, IBV_WC_REM_ACCESS_ERR);
	expect_sent(5, IBV_WC_WR_FLUSH_ERR);
	CHECK(softverbs_qp_state(a->qp->qp_num) == IBV_QPS_ERR);
	CHECK(softverbs_qp_state(b->qp->qp_num) == IBV_QPS_ERR);
	(void)await_event(b->context, IBV_EVENT_QP_ACCESS_ERR);
	(void)await_event(b->context, IBV_EVENT_QP_LAST_WQE_REACHED);
	(void)await_event(a->context, IBV_EVENT_QP_LAST_WQE_REACHED);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 6) == 0); /* in ERR it may, and is flushed */
	expect_sent(6, IBV_WC_WR_FLUSH_ERR);
	close_ends();
}

static void test_the_far_side_refuses(void)
{
	expect_refused(END_BYTES - 63, 0); /* one byte beyond the region */
	expect_refused(0, 1); /* another life of the key */
	expect_refused(0, 0x700); /* a key of nothing */
}

static void test_no_entry_for_an_immediate(void)
{
	struct softverbs_counts counts;

	softverbs_counts_clear("soft1");
	open_ends(1, 0);
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, 1) == 0);
	expect_sent(1, IBV_WC_SUCCESS);
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, 2) == 0);
	expect_sent(2, IBV_WC_RNR_RETRY_EXC_ERR);
	softverbs_counts("soft1", &counts);
	CHECK(counts.rnr == 4 && counts.immediates == 1 && counts.srq_low == 0); /* three times again */
	CHECK(await_wc(b->recv_cq).wr_id == 0);
	close_ends();
}

static void test_a_late_entry_is_in_time(void)
{
	struct softverbs_counts counts;

	softverbs_counts_clear("soft1");
	a = end_open("soft0", 0, 64, 0);
	b = end_open("soft1", 0, 64, 0);
	ends_join(a, b);
	softverbs_cut("soft1", 0);
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, 1) == 0);
	srq_fill(b, 2);
	expect_sent(1, IBV_WC_SUCCESS);
	softverbs_counts("soft1", &counts);
	CHECK(counts.immediates == 1);
	close_ends();
}

static void test_nobody_answers(void)
{
	open_ends(4, 0);
	softverbs_cut("soft1", 1);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == 0);
	expect_sent(1, IBV_WC_RETRY_EXC_ERR);
	CHECK(b->memory[4096] == 0);
	softverbs_cut("soft1", 0);
	close_ends();
	open_ends(4, 0);
	softverbs_lose_ack("soft0", 0);
	memset(a->memory, 9, 8);
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 8, 0, 1) == 0);
	expect_sent(1, IBV_WC_RETRY_EXC_ERR);
	CHECK(b->memory[4096] == 9 && ntohl(await_wc(b->recv_cq).imm_data) == 1);
	close_ends();
}

static void test_another_connection_is_not_heard(void)
{
	a = end_open("soft0", 4, 64, 0);
	b = end_open("soft1", 4, 64, 0);
	end_join(a, b, 7, 9);
	end_join(b, a, 9, 8); /* it expects 8 */
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == 0);
	expect_sent(1, IBV_WC_RETRY_EXC_ERR);
	close_ends();
}

static void test_a_completion_queue_overruns(void)
{
	a = end_open("soft0", 4, 2, 0);
	b = end_open("soft1", 4, 64, 0);
	ends_join(a, b);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(post(IBV_WR_RDMA_WRITE, 8, IBV_SEND_SIGNALED, i) == 0);
	(void)await_event(a->context, IBV_EVENT_CQ_ERR);
	(void)await_event(a->context, IBV_EVENT_QP_FATAL);
	expect_sent(0, IBV_WC_SUCCESS);
	expect_sent(1, IBV_WC_SUCCESS);
	expect_none(a->send_cq);
	close_ends();
}

static void test_the_limit_is_told_once(void)
{
	struct ibv_srq_attr limit = { .srq_limit = 3 };
	struct pollfd fd;

	open_ends(4, 0);
	CHECK(ibv_modify_srq(b->srq, &limit, IBV_SRQ_LIMIT) == 0);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, i) == 0);
	for (uint32_t i = 0; i < 3; i++)
		expect_sent(i, IBV_WC_SUCCESS);
	CHECK(await_event(b->context, IBV_EVENT_SRQ_LIMIT_REACHED).element.srq == b->srq);
	fd = (struct pollfd){ .fd = b->context->async_fd, .events = POLLIN };
	CHECK(poll(&fd, 1, 0) == 0);
	close_ends();
}

static void test_the_channel_tells_what_comes_after_arming(void)
{
	struct pollfd fd;
	struct ibv_cq *cq;
	void *about;

	open_ends(4, 0);
	fd = (struct pollfd){ .fd = b->channel->fd, .events = POLLIN };
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, 1) == 0);
	expect_sent(1, IBV_WC_SUCCESS);
	CHECK(ibv_req_notify_cq(b->recv_cq, 0) == 0);
	CHECK(poll(&fd, 1, 0) == 0); /* what was there before does not */
	CHECK(post(IBV_WR_RDMA_WRITE_WITH_IMM, 0, IBV_SEND_SIGNALED, 2) == 0);
	CHECK(poll(&fd, 1, 5000) == 1);
	CHECK(ibv_get_cq_event(b->channel, &cq, &about) == 0 && cq == b->recv_cq && about == b);
	ibv_ack_cq_events(cq, 1);
	expect_sent(2, IBV_WC_SUCCESS);
	close_ends();
}

static void test_states_and_masks(void)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTS };
	struct ibv_ah *ah;

	a = end_open("soft0", 4, 64, 0);
	b = end_open("soft1", 4, 64, 0);
	CHECK(ibv_modify_qp(a->qp, &attr, IBV_QP_STATE) == EINVAL);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == EINVAL);
	end_init(a);
	attr = end_rtr(b, 1);
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK & ~IBV_QP_AV) == EINVAL);
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK | IBV_QP_TIMEOUT) == EINVAL);
	attr.ah_attr.grh.sgid_index = 9;
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK) == EINVAL);
	attr.ah_attr.grh.sgid_index = END_GID;
	attr.ah_attr.is_global = 0;
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK) == EINVAL);
	attr.ah_attr.is_global = 1;
	attr.ah_attr.grh.dgid.raw[15] = 77;
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK) == ETIMEDOUT);
	CHECK(!ibv_create_ah(a->pd, &attr.ah_attr) && errno == ETIMEDOUT);
	attr = end_rtr(b, 1);
	ah = ibv_create_ah(a->pd, &attr.ah_attr);
	CHECK(ah && ibv_destroy_ah(ah) == 0);
	attr.rq_psn = 1u << 24;
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK) == EINVAL);
	attr.rq_psn = 1;
	CHECK(ibv_modify_qp(a->qp, &attr, RTR_MASK) == 0);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == EINVAL);
	attr.qp_state = IBV_QPS_RESET;
	CHECK(ibv_modify_qp(a->qp, &attr, IBV_QP_STATE) == 0);
	CHECK(ibv_destroy_cq(a->send_cq) == EBUSY && ibv_destroy_srq(a->srq) == EBUSY &&
	      ibv_dealloc_pd(a->pd) == EBUSY && ibv_destroy_comp_channel(a->channel) == EBUSY);
	close_ends();
}

static void test_registering(void)
{
	uint8_t *read_only;

	open_ends(4, 0);
	softverbs_memlock(END_BYTES * 2 + 4096);
	CHECK(!ibv_reg_mr(a->pd, a->memory, 8192, 0) && errno == ENOMEM);
	softverbs_memlock(0);
	CHECK(!ibv_reg_mr(a->pd, a->memory, 64, IBV_ACCESS_REMOTE_WRITE) && errno == EINVAL);
	read_only = (uint8_t *)(uintptr_t)sysconf(_SC_PAGESIZE); /* nothing is there */
	CHECK(!ibv_reg_mr(a->pd, read_only, 64, 0) && errno == EFAULT);
	softverbs_fail("ibv_reg_mr", 1, EAGAIN);
	CHECK(ibv_dereg_mr(a->mr) == 0);
	CHECK((a->mr = ibv_reg_mr(a->pd, a->memory, END_BYTES, IBV_ACCESS_LOCAL_WRITE)));
	CHECK(!ibv_reg_mr(a->pd, a->memory, 64, 0) && errno == EAGAIN && softverbs_failed());
	close_ends();
}

static void test_a_device_goes_away_and_comes_back(void)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_ERR };

	open_ends(4, 0);
	softverbs_remove("soft0");
	(void)await_event(a->context, IBV_EVENT_DEVICE_FATAL);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == EIO);
	CHECK(ibv_modify_qp(a->qp, &attr, IBV_QP_STATE) == EIO);
	CHECK(!open_named("soft0"));
	close_ends();
	softverbs_back("soft0");
	open_ends(4, 0);
	close_ends();
}

static void test_a_port_goes_down(void)
{
	struct ibv_port_attr port;

	open_ends(4, 0);
	softverbs_port("soft1", 1, 0);
	CHECK(await_event(b->context, IBV_EVENT_PORT_ERR).element.port_num == 1);
	CHECK(ibv_query_port(b->context, 1, &port) == 0 && port.state == IBV_PORT_DOWN);
	CHECK(post(IBV_WR_RDMA_WRITE, 8, 0, 1) == 0);
	expect_sent(1, IBV_WC_RETRY_EXC_ERR);
	softverbs_port("soft1", 1, 1);
	(void)await_event(b->context, IBV_EVENT_PORT_ACTIVE);
	close_ends();
}

static void all(const char *configuration)
{
	CHECK(softverbs_configure(configuration) == 0);
	test_writes_land_and_immediates_count();
	test_inline_takes_its_bytes_at_once();
	test_lists_of_wr_functions();
	test_the_send_queue_is_free_when_polled();
	test_the_far_side_refuses();
	test_no_entry_for_an_immediate();
	test_a_late_entry_is_in_time();
	test_nobody_answers();
	test_another_connection_is_not_heard();
	test_a_completion_queue_overruns();
	test_the_limit_is_told_once();
	test_the_channel_tells_what_comes_after_arming();
	test_states_and_masks();
	test_registering();
	test_a_device_goes_away_and_comes_back();
	test_a_port_goes_down();
}

int main(void)
{
	all("mode=inline");
	all("mode=threaded");
	CHECK(softverbs_configure("mode=sideways") && softverbs_configure("devices=99"));
	return 0;
}

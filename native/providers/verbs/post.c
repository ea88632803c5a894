/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Posting. A post becomes one work request for each of its parts, the immediate on the last; they wait in a chain of their queue pair,
 * and all chains go out when there are TFD_VERBS_CHAIN requests, or when the worker polls: one doorbell for each chain.
 *
 * Only the last of a chain is signalled: a completion tells of all posts of its queue pair before it, which complete in order.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

#include "../../core/barrier.h"
#include "verbs.h"

/* A queue pair gets an eighth of what is free of the completion queue, so that whatever others hold some is left. */
#define ROOM_PART 8u

static bool has_room(const struct tfd_verbs_queue *queue, uint32_t requests)
{
	uint32_t out = queue->requests_posted - queue->requests_done;

	return queue->tail - queue->head < queue->size && out + requests <= queue->size &&
	       requests <= queue->half->domain->send_room &&
	       (!out || out + requests <= queue->half->domain->send_room / ROOM_PART);
}

/* The next of the pool, at the end of the queue's chain. */
static struct ibv_send_wr *request_take(struct tfd_verbs_queue *queue)
{
	struct tfd_domain *domain = queue->half->domain;
	struct ibv_send_wr *request = &domain->requests[domain->chained++];

	request->next = NULL;
	if (queue->last)
		queue->last->next = request;
	else
		queue->first = request;
	queue->last = request;
	request->wr_id = (uint64_t)queue->generation << 32 | queue->tail;
	return request;
}

static void request_fill(struct tfd_verbs_queue *queue, const struct tfd_post *post, const void *local,
                         uint64_t remote, uint64_t length)
{
	struct tfd_domain *domain = queue->half->domain;
	struct ibv_send_wr *request = request_take(queue);

	request->sg_list = &domain->pieces[request - domain->requests];
	request->num_sge = length != 0;
	if (length)
		*request->sg_list = (struct ibv_sge){ .addr = (uintptr_t)local,
		                                      .length = (uint32_t)length,
		                                      .lkey = post->mr->mr->lkey };
	request->opcode = post->read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
	request->send_flags = 0;
	if (length && length <= queue->inline_bytes && !post->read && !post->mr->foreign)
		request->send_flags = IBV_SEND_INLINE;
	request->wr.rdma.remote_addr = remote;
	request->wr.rdma.rkey = (uint32_t)post->remote_key;
}

int tfd_verbs_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_verbs_queue *queue =
		&half->queues[post->traffic < TFD_VERBS_CHANNELS ? post->traffic : TFD_TRAFFIC_BULK];
	uint32_t requests = 1 + post->part_count;

	if (requests > TFD_VERBS_PARTS)
		return -EINVAL;
	if (domain->chained + requests > TFD_VERBS_CHAIN)
		tfd_verbs_chains_send(domain); /* first: what is refused now ends this queue, too */
	if (domain->dead || queue->failed || queue->refused || !half->started)
		return domain->dead ? -ENODEV : -ENOTCONN;
	if (!has_room(queue, requests))
		return -EAGAIN;
	if (!queue->first)
		tfd_list_push(&domain->chains, &queue->chain_link);
	request_fill(queue, post, post->local, post->remote_address, post->length);
	for (uint32_t i = 0; i < post->part_count; i++)
		request_fill(queue, post, post->parts[i].local, post->parts[i].remote_address,
		             post->parts[i].length);
	if (post->has_imm) {
		queue->last->opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
		queue->last->imm_data = htonl(post->imm);
	}
	queue->requests_posted += requests;
	domain->send_room -= requests;
	queue->posted[queue->tail & (queue->size - 1)] = (struct tfd_verbs_posted){
		.wr = wr, .requests_end = queue->requests_posted, .requests = requests
	};
	queue->tail++;
	return 0;
}

void tfd_verbs_queue_fail(struct tfd_verbs_queue *queue, int error)
{
	struct tfd_domain *domain = queue->half->domain;

	if (!queue->failed) {
		queue->failed = true;
		queue->failed_at = queue->done;
		queue->error = error;
		queue->remote_access = 0;
	}
	queue->done = queue->tail;
	if (queue->head != queue->done && tfd_list_empty(&queue->report_link))
		tfd_list_push(&domain->reports, &queue->report_link);
}

static void extended_fill(struct ibv_qp_ex *qp, const struct ibv_send_wr *request)
{
	const struct ibv_sge *piece = request->sg_list;

	qp->wr_id = request->wr_id;
	qp->wr_flags = request->send_flags & ~(unsigned int)IBV_SEND_INLINE; /* the setter says it */
	if (request->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
		ibv_wr_rdma_write_imm(qp, request->wr.rdma.rkey, request->wr.rdma.remote_addr,
		                      request->imm_data);
	else if (request->opcode == IBV_WR_RDMA_WRITE)
		ibv_wr_rdma_write(qp, request->wr.rdma.rkey, request->wr.rdma.remote_addr);
	else
		ibv_wr_rdma_read(qp, request->wr.rdma.rkey, request->wr.rdma.remote_addr);
	if (request->send_flags & IBV_SEND_INLINE)
		ibv_wr_set_inline_data(qp, (void *)(uintptr_t)piece->addr, piece->length);
	else if (request->num_sge)
		ibv_wr_set_sge(qp, piece->lkey, piece->addr, piece->length);
	else
		ibv_wr_set_sge(qp, 0, 0, 0);
}

static int extended_send(struct tfd_verbs_queue *queue)
{
	ibv_wr_start(queue->extended);
	for (const struct ibv_send_wr *request = queue->first; request; request = request->next)
		extended_fill(queue->extended, request);
	return ibv_wr_complete(queue->extended);
}

/*
 * What we count is wrong, and the connection is begun anew. What the device has taken is still in its hands: it is told when that comes back,
 * and the rest when the half is closed, as the core does when it is told of it.
 */
static void chain_refused(struct tfd_verbs_queue *queue, const struct ibv_send_wr *first)
{
	queue->refused = true;
	queue->refused_at = (uint32_t)first->wr_id;
	tfd_store_release(&queue->broke, 1u); /* pairs with halves_tell; it is our own */
	queue->half->domain->alarmed |= TFD_VERBS_HALF_BROKE;
}

static void chain_send(struct tfd_verbs_queue *queue)
{
	struct ibv_send_wr *first = queue->first;
	int rc;

	queue->last->send_flags |= IBV_SEND_SIGNALED;
	rc = queue->extended ? extended_send(queue) : ibv_post_send(queue->qp, queue->first, &first);
	queue->first = queue->last = NULL;
	tfd_list_remove(&queue->chain_link);
	if (rc == EIO) /* the device is gone */
		tfd_verbs_queue_fail(queue, rc);
	else if (rc)
		chain_refused(queue, first);
}

void tfd_verbs_chains_send(struct tfd_domain *domain)
{
	while (!tfd_list_empty(&domain->chains))
		chain_send(tfd_container(domain->chains.next, struct tfd_verbs_queue, chain_link));
	domain->chained = 0;
}

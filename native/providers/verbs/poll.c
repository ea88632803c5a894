/* SPDX-License-Identifier: Apache-2.0 */
/* Completions, and sleeping until there are some: ibv_poll_cq(3), ibv_req_notify_cq(3), ibv_get_cq_event(3). */
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

#include <unistd.h>

#include "../../core/barrier.h"
#include "verbs.h"

static int error_of(enum ibv_wc_status status)
{
	switch (status) {
	case IBV_WC_REM_ACCESS_ERR:
	case IBV_WC_REM_INV_REQ_ERR:
		return EACCES;
	case IBV_WC_WR_FLUSH_ERR:
		return ECANCELED;
	case IBV_WC_RETRY_EXC_ERR:
		return ETIMEDOUT;
	case IBV_WC_RNR_RETRY_EXC_ERR:
		return ENOBUFS;
	case IBV_WC_LOC_PROT_ERR:
	case IBV_WC_LOC_ACCESS_ERR:
		return EFAULT;
	case IBV_WC_LOC_LEN_ERR:
		return EMSGSIZE;
	case IBV_WC_REM_OP_ERR:
		return EREMOTEIO;
	default:
		return EIO;
	}
}

/* There is none where queues could not be made anew. */
static inline int cq_poll(struct ibv_cq *cq, struct ibv_wc *wc, int max)
{
	return cq ? ibv_poll_cq(cq, max, wc) : 0;
}

/* ---- what was posted ---- */

/* So many of the queue pair's work requests need no entry of the completion queue any more. */
static void requests_back(struct tfd_verbs_queue *queue, uint32_t end)
{
	if ((int32_t)(end - queue->requests_posted) > 0)
		end = queue->requests_posted;
	if ((int32_t)(end - queue->requests_done) <= 0)
		return;
	queue->half->domain->send_room += end - queue->requests_done;
	queue->requests_done = end;
}

/*
 * One that failed: what was posted before it has succeeded, or had told. Of what comes after it each work request has an entry of its
 * own, signalled or not.
 */
static void failed(struct tfd_verbs_queue *queue, uint32_t number, enum ibv_wc_status status)
{
	const struct tfd_verbs_posted *posted = &queue->posted[number & (queue->size - 1)];

	requests_back(queue, posted->requests_end - posted->requests);
	requests_back(queue, queue->requests_done + 1);
	if (queue->failed)
		return;
	queue->failed = true;
	queue->failed_at = number;
	queue->error = error_of(status);
	queue->remote_access = status == IBV_WC_REM_ACCESS_ERR || status == IBV_WC_REM_INV_REQ_ERR;
}

static void sent(struct tfd_domain *domain, const struct ibv_wc *wc)
{
	struct tfd_verbs_queue *queue = tfd_verbs_queue_find(domain, wc->qp_num);
	uint32_t number = (uint32_t)wc->wr_id;

	if (!queue || queue->generation != wc->wr_id >> 32) /* of one that is gone */
		return;
	if ((int32_t)(number - queue->done) < 0) { /* a further part of one that has failed */
		if (wc->status != IBV_WC_SUCCESS)
			requests_back(queue, queue->requests_done + 1);
		return;
	}
	if (wc->status == IBV_WC_SUCCESS)
		requests_back(queue, queue->posted[number & (queue->size - 1)].requests_end);
	else
		failed(queue, number, wc->status);
	queue->done = number + 1;
	if (tfd_list_empty(&queue->report_link))
		tfd_list_push(&domain->reports, &queue->report_link);
}

static int sends_take(struct tfd_domain *domain)
{
	struct ibv_wc wc[TFD_VERBS_BATCH];
	int count = cq_poll(domain->send_cq, wc, TFD_VERBS_BATCH);

	for (int i = 0; i < count; i++)
		sent(domain, &wc[i]);
	return count;
}

static int queue_report(struct tfd_verbs_queue *queue, struct tfd_wc *wc, int max)
{
	int count = 0;

	for (; count < max && queue->head != queue->done; count++, queue->head++) {
		int32_t after = (int32_t)(queue->head - queue->failed_at);

		wc[count] = (struct tfd_wc){ .type = TFD_WC_SENT,
		                             .wr = queue->posted[queue->head & (queue->size - 1)].wr };
		if (!queue->failed || after < 0)
			continue;
		wc[count].type = TFD_WC_ERROR;
		wc[count].error = after ? ECANCELED : queue->error;
		wc[count].remote_access = wc[count].unsure = !after && queue->remote_access;
	}
	if (queue->head == queue->done)
		tfd_list_remove(&queue->report_link);
	return count;
}

static int sends_report(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	while (count < max && !tfd_list_empty(&domain->reports))
		count +=
			queue_report(tfd_container(domain->reports.next, struct tfd_verbs_queue, report_link),
			             wc + count, max - count);
	return count;
}

/* A queue that gave less than was asked for is empty (ibv_poll_cq(3)): it is not asked again; nor is one that nothing can come by. */
static int sends_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = sends_report(domain, wc, max);
	int taken = TFD_VERBS_BATCH;

	while (count < max && taken == TFD_VERBS_BATCH && domain->send_room != domain->sends) {
		taken = sends_take(domain);
		count += sends_report(domain, wc + count, max - count);
	}
	return count;
}

/* ---- what arrives ---- */

int tfd_verbs_receives_post(struct tfd_domain *domain)
{
	struct ibv_recv_wr *refused;

	return -ibv_post_srq_recv(domain->srq, domain->receive_chain, &refused);
}

/* But for those that the stash is in the place of: whoever polls from it has given the far side leave to post as many. */
static void receives_renew(struct tfd_domain *domain)
{
	uint32_t stashed = domain->stash_tail - domain->stash_head;

	while (domain->receives_used - stashed >= domain->receive_batch && !domain->dead &&
	       !domain->overrun) {
		if (tfd_verbs_receives_post(domain) != 0)
			return;
		domain->receives_used -= domain->receive_batch;
	}
}

static inline bool arrived(struct tfd_domain *domain, const struct ibv_wc *wc, struct tfd_verbs_stashed *out)
{
	const struct tfd_verbs_queue *queue = tfd_verbs_queue_find(domain, wc->qp_num);

	domain->receives_used++;
	if (wc->status != IBV_WC_SUCCESS) /* of a queue pair in error, whose sender is told, too */
		return false;
	*out = (struct tfd_verbs_stashed){ .owner = queue ? queue->half->owner : NULL,
	                                   .imm = ntohl(wc->imm_data),
	                                   .order = queue ? queue->traffic : 0 };
	return true;
}

static inline struct tfd_wc imm_of(const struct tfd_verbs_stashed *from)
{
	return (struct tfd_wc){
		.type = TFD_WC_IMM, .imm = from->imm, .order = from->order, .owner = from->owner
	};
}

/* Those that are in the stash take the place of receives that are not posted again: there is always room for what arrives. */
static int imms_take(struct tfd_domain *domain)
{
	struct ibv_wc wc[TFD_VERBS_BATCH];
	int count = cq_poll(domain->recv_cq, wc, TFD_VERBS_BATCH);

	for (int i = 0; i < count; i++) {
		if (arrived(domain, &wc[i], &domain->stash[domain->stash_tail & (domain->receives - 1)]))
			domain->stash_tail++;
	}
	return count;
}

static int imms_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct ibv_wc found[TFD_VERBS_BATCH];
	int count = 0, most, taken;

	for (; count < max && domain->stash_head != domain->stash_tail; domain->stash_head++)
		wc[count++] = imm_of(&domain->stash[domain->stash_head & (domain->receives - 1)]);
	do {
		most = max - count < TFD_VERBS_BATCH ? max - count : TFD_VERBS_BATCH;
		taken = most ? cq_poll(domain->recv_cq, found, most) : 0;
		for (int i = 0; i < taken; i++) {
			struct tfd_verbs_stashed one;

			if (arrived(domain, &found[i], &one))
				wc[count++] = imm_of(&one);
		}
	} while (most && taken == most);
	receives_renew(domain);
	return count;
}

void tfd_verbs_forget(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	for (uint32_t i = domain->stash_head; i != domain->stash_tail; i++) {
		struct tfd_verbs_stashed *one = &domain->stash[i & (domain->receives - 1)];

		if (one->owner == half->owner)
			one->owner = NULL;
	}
}

/* ---- the worker's ---- */

int tfd_verbs_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	tfd_verbs_chains_send(domain);
	if (tfd_load_relaxed(&domain->alarms) || domain->alarmed)
		count = tfd_verbs_alarms_take(domain, wc, max);
	if (tfd_load_relaxed(&domain->quiet))
		return count;
	/* Each is first in turn; the other is looked at if there was nothing: what has come is told the sooner. */
	domain->imms_first = !domain->imms_first;
	if (domain->imms_first)
		count += imms_poll(domain, wc + count, max - count);
	if (!count || !domain->imms_first)
		count += sends_poll(domain, wc + count, max - count);
	if (!count && !domain->imms_first)
		count += imms_poll(domain, wc + count, max - count);
	return count;
}

bool tfd_verbs_take(struct tfd_domain *domain)
{
	bool any = false;

	while (imms_take(domain) > 0)
		any = true;
	while (sends_take(domain) > 0)
		any = true;
	return any || domain->stash_head != domain->stash_tail || !tfd_list_empty(&domain->reports);
}

void tfd_verbs_cq_events_ack(struct tfd_domain *domain)
{
	const struct tfd_verbs_library *library = domain->library;

	if (domain->events_unacked[0])
		library->ack_cq_events(domain->send_cq, domain->events_unacked[0]);
	if (domain->events_unacked[1])
		library->ack_cq_events(domain->recv_cq, domain->events_unacked[1]);
	domain->events_unacked[0] = domain->events_unacked[1] = 0;
}

/* An acknowledgement takes a lock: one for many (ibv_get_cq_event(3)). */
#define EVENTS_UNACKED_MOST 256u

int tfd_verbs_arm(struct tfd_domain *domain)
{
	struct ibv_cq *cq;
	uint64_t ignored;
	void *context;

	tfd_verbs_chains_send(domain);
	(void)!read(domain->wake_fd, &ignored, sizeof(ignored));
	if (tfd_load_seq(&domain->alarms) || domain->alarmed) /* pairs with alarm_raise */
		return -EAGAIN;
	if (tfd_load_relaxed(&domain->quiet))
		return 0;
	if (domain->dead) /* no queue of it tells anything */
		return tfd_verbs_take(domain) ? -EAGAIN : 0;
	while (domain->library->get_cq_event(domain->channel, &cq, &context) == 0)
		domain->events_unacked[cq == domain->recv_cq]++;
	if (domain->overrun) /* nor of this, but for what it had told before */
		return tfd_verbs_take(domain) ? -EAGAIN : 0;
	if (domain->events_unacked[0] + domain->events_unacked[1] >= EVENTS_UNACKED_MOST)
		tfd_verbs_cq_events_ack(domain);
	if (ibv_req_notify_cq(domain->send_cq, 0) != 0 || ibv_req_notify_cq(domain->recv_cq, 0) != 0)
		return -EAGAIN;
	/* What came before this was asked for makes no event. */
	return tfd_verbs_take(domain) ? -EAGAIN : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A half of a connection: three RC queue pairs, each with one of the far half: ibv_create_qp(3), ibv_modify_qp(3), ibv_destroy_qp(3),
 * InfiniBand Architecture Specification 10.3.1 (states of a queue pair).
 */
#include <errno.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/futex.h"
#include "../../core/parts.h"
#include "address.h"

#define SENDS_FEW 128u /* of a queue pair of messages, and of an incoming half, which posts nothing else */
#define READS_MOST 16 /* in flight on a queue pair */
#define RNR_TIMER 14 /* 1.28 ms (table 45 of the specification); there is always a receive */
#define RNR_RETRIES 6 /* 7 would be for ever */
#define TIMEOUT 14 /* 4.096 us * 2^14 = 67 ms */
#define RETRIES 7
#define HOPS 64
#define RXE_VENDOR 0xffffffu
#define FLUSH_BOUND_NS 200000000u
#define LAST_BOUND_NS 1000000000u
#define SETTLE_LOOK_NS 20000000 /* whether the device is gone, of which nothing wakes */

static int fail(const char *what, int rc, struct tfd_error *error)
{
	return tfd_fail(error, rc ? -rc : -EIO, "verbs: %s failed: %s", what, strerror(rc ? rc : EIO));
}

/* ---- queue pairs ---- */

static void map_insert(struct tfd_domain *domain, struct tfd_verbs_queue *queue)
{
	struct tfd_verbs_queue **bucket = &domain->buckets[queue->number & (TFD_VERBS_BUCKETS - 1)];

	queue->next = *bucket;
	*bucket = queue;
}

static void map_remove(struct tfd_domain *domain, struct tfd_verbs_queue *queue)
{
	struct tfd_verbs_queue **slot = &domain->buckets[queue->number & (TFD_VERBS_BUCKETS - 1)];

	while (*slot && *slot != queue)
		slot = &(*slot)->next;
	if (*slot)
		*slot = queue->next;
}

/* 0: made. Devices differ in what they cannot do, and in how they say so. */
static int pair_try(struct tfd_verbs_queue *queue, bool extended, uint32_t inline_bytes)
{
	struct tfd_domain *domain = queue->half->domain;
	struct ibv_qp_init_attr_ex attributes = {
		.qp_context = queue,
		.send_cq = domain->send_cq,
		.recv_cq = domain->recv_cq,
		.srq = domain->srq,
		.cap = { .max_send_wr = queue->size, .max_send_sge = 1, .max_inline_data = inline_bytes },
		.qp_type = IBV_QPT_RC,
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
		.pd = domain->pd,
		.send_ops_flags = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM |
		                  IBV_QP_EX_WITH_RDMA_READ,
	};
	struct verbs_context *context = verbs_get_ctx_op(domain->context, create_qp_ex);

	if (extended && (!context || !domain->library->qp_to_qp_ex))
		return EOPNOTSUPP;
	/* The plain structure is the first part of the other. */
	queue->qp = extended ? context->create_qp_ex(domain->context, &attributes) :
	                       domain->library->create_qp(domain->pd, (void *)&attributes);
	if (!queue->qp)
		return errno ? errno : EIO;
	queue->extended = extended ? domain->library->qp_to_qp_ex(queue->qp) : NULL;
	/* rxe of rdma-core 44 forgets to say in a request that ibv_wr_set_inline_data was called: it fails. */
	if (!extended || domain->attributes.vendor_id != RXE_VENDOR)
		queue->inline_bytes = attributes.cap.max_inline_data;
	queue->number = queue->qp->qp_num;
	return 0;
}

static int pair_make(struct tfd_verbs_queue *queue)
{
	bool extended = !queue->half->domain->options.plain_posts;
	int rc = EOPNOTSUPP;

	if (extended)
		rc = pair_try(queue, true, TFD_VERBS_INLINE);
	if (extended && rc)
		rc = pair_try(queue, true, 0);
	if (rc)
		rc = pair_try(queue, false, TFD_VERBS_INLINE);
	return rc ? pair_try(queue, false, 0) : 0;
}

static int pair_init(struct tfd_verbs_queue *queue)
{
	const struct tfd_domain *domain = queue->half->domain;
	struct ibv_qp_attr attributes = {
		.qp_state = IBV_QPS_INIT,
		.pkey_index = domain->port.pkey_index,
		.port_num = domain->port.number,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
	};

	return domain->library->modify_qp(
		queue->qp, &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

static int queue_open(struct tfd_half *half, uint32_t traffic, bool outgoing, struct tfd_error *error)
{
	struct tfd_verbs_queue *queue = &half->queues[traffic];
	struct tfd_domain *domain = half->domain;
	int rc;

	queue->half = half;
	queue->traffic = traffic;
	queue->generation = ++domain->last_generation;
	queue->size = outgoing && traffic != TFD_TRAFFIC_MESSAGE ? TFD_VERBS_QUEUE_SENDS : SENDS_FEW;
	while (queue->size > 1 && queue->size > (uint32_t)domain->attributes.max_qp_wr)
		queue->size /= 2;
	queue->posted = calloc(queue->size, sizeof(*queue->posted));
	if (!queue->posted)
		return tfd_fail(error, -ENOMEM, "no memory for a queue pair");
	if (getrandom(&queue->psn, sizeof(queue->psn), 0) != (ssize_t)sizeof(queue->psn))
		return tfd_fail(error, -EIO, "getrandom gave no number");
	queue->psn &= 0xffffff;
	rc = pair_make(queue);
	if (rc)
		return tfd_fail(
			error, -rc,
			"verbs: ibv_create_qp failed: %s (the device takes %d queue pairs, and pins memory "
			"for each: ulimit -l)",
			strerror(rc), domain->attributes.max_qp);
	map_insert(domain, queue);
	rc = pair_init(queue);
	return rc ? fail("ibv_modify_qp to INIT", rc, error) : 0;
}

static uint8_t reads_of(int device)
{
	return (uint8_t)(device < 0 ? 0 : device < READS_MOST ? device : READS_MOST);
}

int tfd_verbs_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                        void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_verbs_address told = { .magic = TFD_VERBS_MAGIC,
	                                  .link_layer = domain->port.link_layer,
	                                  .reads = reads_of(domain->attributes.max_qp_rd_atom) };
	struct ibv_port_attr now;
	struct tfd_half *half;
	int rc = 0;

	if (domain->dead)
		return tfd_fail(error, -ENODEV, "the rail's device is gone");
	if (domain->overrun)
		rc = tfd_verbs_queues_renew(domain, error);
	if (rc)
		return rc;
	rc = tfd_verbs_port_query(domain, domain->port.number, &now);
	if (rc)
		return fail("ibv_query_port", -rc, error);
	tfd_verbs_port_take(domain, &now);
	rc = tfd_verbs_gid_take(domain);
	if (rc)
		return tfd_fail(error, rc,
		                "port %u has no GID with index %u at present: is a subnet manager up?",
		                domain->port.number, domain->port.gid.index);
	half = calloc(1, sizeof(*half));
	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	told.lid = domain->port.lid;
	told.mtu = (uint8_t)domain->port.mtu;
	half->mtu = domain->port.mtu;
	half->domain = domain;
	half->owner = owner;
	tfd_list_push(&domain->halves, &half->link);
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		tfd_list_init(&half->queues[i].chain_link);
		tfd_list_init(&half->queues[i].report_link);
	}
	for (uint32_t i = 0; !rc && i < TFD_VERBS_CHANNELS; i++) {
		rc = queue_open(half, i, outgoing != 0, error);
		told.numbers[i] = half->queues[i].number;
		told.psns[i] = half->queues[i].psn;
	}
	if (rc) {
		tfd_verbs_half_free(half);
		return rc;
	}
	memcpy(told.gid, domain->port.gid.raw, sizeof(told.gid));
	memcpy(address, &told, sizeof(told));
	*address_bytes = sizeof(told);
	*out = half;
	return 0;
}

/* ---- joining ---- */

static struct ibv_ah_attr path_of(const struct tfd_domain *domain, const struct tfd_verbs_address *far,
                                  uint32_t traffic)
{
	const struct tfd_verbs_options *options = &domain->options;
	struct ibv_ah_attr path = {
		.dlid = far->lid,
		.sl = (uint8_t)(traffic == TFD_TRAFFIC_BULK ? options->bulk_service_level :
		                                              options->service_level),
		.port_num = domain->port.number,
		.is_global = domain->port.global,
	};

	if (!domain->port.global)
		return path;
	memcpy(path.grh.dgid.raw, far->gid, sizeof(far->gid));
	path.grh.sgid_index = (uint8_t)tfd_load_relaxed(&domain->port.gid_index);
	path.grh.hop_limit = HOPS;
	path.grh.traffic_class = (uint8_t)options->traffic_class;
	return path;
}

static int pair_receive(struct tfd_verbs_queue *queue, const struct tfd_verbs_address *far)
{
	const struct tfd_domain *domain = queue->half->domain;
	enum ibv_mtu mtu = far->mtu;
	struct ibv_qp_attr attributes = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = mtu < queue->half->mtu ? mtu : queue->half->mtu,
		.dest_qp_num = far->numbers[queue->traffic],
		.rq_psn = far->psns[queue->traffic],
		.max_dest_rd_atomic = reads_of(domain->attributes.max_qp_rd_atom),
		.min_rnr_timer = RNR_TIMER,
		.ah_attr = path_of(domain, far, queue->traffic),
	};

	return domain->library->modify_qp(queue->qp, &attributes,
	                                  IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
	                                          IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
	                                          IBV_QP_MIN_RNR_TIMER);
}

static int pair_send(struct tfd_verbs_queue *queue, const struct tfd_verbs_address *far)
{
	const struct tfd_domain *domain = queue->half->domain;
	uint8_t reads = reads_of(domain->attributes.max_qp_init_rd_atom);
	struct ibv_qp_attr attributes = {
		.qp_state = IBV_QPS_RTS,
		.sq_psn = queue->psn,
		.timeout = (uint8_t)(domain->options.timeout ? domain->options.timeout : TIMEOUT),
		.retry_cnt = (uint8_t)(domain->options.retries ? domain->options.retries : RETRIES),
		.rnr_retry = RNR_RETRIES,
		.max_rd_atomic = far->reads < reads ? far->reads : reads,
	};

	return domain->library->modify_qp(queue->qp, &attributes,
	                                  IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
	                                          IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
}

static int path_find(struct tfd_domain *domain, const struct tfd_verbs_address *far, struct tfd_error *error)
{
	struct ibv_ah_attr path = path_of(domain, far, TFD_TRAFFIC_BULK);
	struct ibv_ah *handle = domain->library->create_ah(domain->pd, &path);
	struct tfd_gid gid = { .type = domain->port.gid.type };
	char text[TFD_GID_TEXT];
	int rc;

	if (!handle) {
		rc = errno ? errno : EIO;
		memcpy(gid.raw, far->gid, sizeof(gid.raw));
		tfd_gid_text(&gid, text);
		return tfd_fail(error, -rc, "the peer's address %s cannot be reached by this rail: %s", text,
		                strerror(rc));
	}
	(void)domain->library->destroy_ah(handle);
	return 0;
}

/*
 * An address handle: to make one the kernel asks the network whose the address is, for a second perhaps, and knows it from then on. So the
 * queue pairs need not wait for it, which the worker joins.
 */
int tfd_verbs_reach(struct tfd_domain *domain, const void *address, size_t address_bytes,
                    struct tfd_error *error)
{
	struct tfd_verbs_address far;
	int rc = tfd_verbs_address_check(&domain->port, address, address_bytes, &far, error);

	if (rc || !domain->library->create_ah || !domain->library->destroy_ah)
		return rc;
	(void)pthread_rwlock_rdlock(&domain->device_lock);
	rc = tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE ?
	             tfd_fail(error, -ENODEV, "the rail's device is gone") :
	             path_find(domain, &far, error);
	(void)pthread_rwlock_unlock(&domain->device_lock);
	return rc;
}
int tfd_verbs_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                         struct tfd_error *error)
{
	struct tfd_verbs_address far;
	int rc = tfd_verbs_address_check(&half->domain->port, address, address_bytes, &far, error);

	if (rc)
		return rc;
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		rc = pair_receive(&half->queues[i], &far);
		half->queues[i].receives = !rc;
		if (rc)
			return fail("ibv_modify_qp to RTR (is the peer's address reachable from this rail?)",
			            rc, error);
		rc = pair_send(&half->queues[i], &far);
		if (rc)
			return fail("ibv_modify_qp to RTS", rc, error);
	}
	half->started = true;
	return 0;
}

/* ---- its end ---- */

/*
 * From the error state to the reset state: whatever the device, or a soft one's threads, were at is done once it returns, and nothing of theirs
 * is read or written any more (10.3.1.1). They are destroyed later, which may take long. Who refuses is destroyed at once.
 */
static void pairs_stop(struct tfd_half *half)
{
	const struct tfd_verbs_library *library = half->domain->library;
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_RESET };

	half->stopped = true;
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		struct tfd_verbs_queue *queue = &half->queues[i];
		int rc = queue->qp ? library->modify_qp(queue->qp, &attributes, IBV_QP_STATE) : 0;

		if (!rc || rc == EIO) /* of a device that is gone */
			continue;
		(void)library->destroy_qp(queue->qp);
		queue->qp = NULL;
	}
}

/*
 * In the error state a queue pair drops what comes, and completes what was posted with an error (10.3.1.7). One that cannot be put into it
 * is stopped at once.
 */
void tfd_verbs_half_close(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_ERR };
	bool stopped = true;

	tfd_verbs_chains_send(domain); /* so that all that was posted is flushed */
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		int rc = domain->library->modify_qp(half->queues[i].qp, &attributes, IBV_QP_STATE);

		stopped = stopped && !rc;
		/* What lands until it is stopped, the device may drop then; one that is gone (EIO) lets nothing land. */
		half->uncounted = half->uncounted || (rc && rc != EIO);
	}
	if (!stopped) {
		(void)tfd_verbs_take(domain); /* what has come by them leaves the queues with them */
		pairs_stop(half);
	}
	half->closed = true;
	/* Of a queue that is in error nothing comes. */
	half->deadline_ns = domain->dead || domain->overrun ? 0 : tfd_now_ns() + FLUSH_BOUND_NS;
	half->last_deadline_ns = half->deadline_ns ? half->deadline_ns - FLUSH_BOUND_NS + LAST_BOUND_NS : 0;
}

/*
 * Whether the device is still to tell "last WQE reached" of a queue: that it is done with all receives which it has taken of the SRQ for it.
 * A queue pair in the error state completes each of those, flushed or as an immediate that had landed, and only then tells (o11-5.2.5);
 * one that is reset before leaks them (10.3.1). Some devices never tell: they are waited for once. rdma_rxe does not tell (Linux 6.1), or
 * does; it need not be waited for, because it takes a receive only with the packet that it then completes it for.
 */
static bool last_awaited(const struct tfd_half *half)
{
	const struct tfd_domain *domain = half->domain;

	if (domain->attributes.vendor_id == RXE_VENDOR ||
	    (tfd_load_relaxed(&domain->lasts_missed) && !tfd_load_relaxed(&domain->lasts)))
		return false;
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		const struct tfd_verbs_queue *queue = &half->queues[i];

		if (queue->receives && !tfd_load_acquire(&queue->last_wqe)) /* pairs with queue_last */
			return true;
	}
	return false;
}

/*
 * rdma_rxe changes the state and leaves whichever processor is at a packet of the queue pair to end it, in an interrupt or in a system call of
 * the sender's. A reset beside that takes the packet away from it (rxe_qp_reset runs the tasks without their guard), and both give the same
 * reference back: the device is unusable some time later. What runs so ends within a grace period of RCU, which this waits for; where
 * the kernel has none of it (nohz_full) nothing is lost but that.
 */
static void packets_end(void)
{
	(void)syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0);
}

int tfd_verbs_half_settle(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	if (domain->attributes.vendor_id == RXE_VENDOR && !half->stopped)
		packets_end();
	for (;;) {
		uint32_t heard = tfd_load_seq(
			&domain->lasts); /* pairs with queue_last: before `last_wqe` is looked at */
		uint64_t now_ns = tfd_now_ns();
		int64_t left_ns = (int64_t)(half->last_deadline_ns - now_ns);

		if (half->stopped || now_ns >= half->last_deadline_ns || !last_awaited(half) ||
		    tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE)
			return 0;
		tfd_futex_wait(&domain->lasts, heard, left_ns < SETTLE_LOOK_NS ? left_ns : SETTLE_LOOK_NS);
	}
}

/* Whether the device may yet complete receives of it. */
static bool last_waits(const struct tfd_half *half)
{
	return !half->domain->dead && !half->domain->overrun && tfd_now_ns() < half->last_deadline_ns &&
	       last_awaited(half);
}

/* Of a device that otherwise tells, nobody knows what it had taken. */
static void last_miss(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	if (domain->dead || domain->overrun || !last_awaited(half))
		return;
	tfd_store_relaxed(&domain->lasts_missed, domain->lasts_missed + 1);
	half->uncounted = half->uncounted || tfd_load_relaxed(&domain->lasts);
}

/* Whether the device has told of all that it took; `all`: and nothing else is left to be told. */
static bool is_told(const struct tfd_half *half, bool all)
{
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		const struct tfd_verbs_queue *queue = &half->queues[i];
		uint32_t end = queue->refused && !all ? queue->refused_at : queue->tail;

		if ((int32_t)(queue->done - end) < 0)
			return false;
	}
	return true;
}

/* What was not flushed in time is told as if it had been: it is not referred to any more. */
static void unflushed_tell(struct tfd_half *half)
{
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		if (half->queues[i].done != half->queues[i].tail)
			tfd_verbs_queue_fail(&half->queues[i], ECANCELED);
	}
}

/*
 * Waits until what was posted is flushed and the device has done with the receives, tells all that has come, and only then stops the queue
 * pairs: a soft device may be in the midst of an immediate until then, which is told in a last round.
 *
 * Both are looked at before the queues are polled. "Last WQE reached" is generated when the last completion is (o11-5.2.5): that is in the
 * queue by then, because the device writes both by the same bus, in order, and the thread of events hands on what it has seen.
 */
int tfd_verbs_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	struct tfd_domain *domain = half->domain;
	int count;

	for (;;) {
		bool waits = !half->stopped && ((!is_told(half, false) && tfd_now_ns() < half->deadline_ns) ||
		                                last_waits(half));

		if (half->uncounted && max) {
			half->uncounted = false;
			*wc = (struct tfd_wc){ .type = TFD_WC_ERROR,
			                       .error = EOVERFLOW,
			                       .owner = half->owner };
			return 1;
		}
		count = tfd_verbs_poll(domain, wc, max);
		if (count || (half->stopped && is_told(half, true)))
			return count;
		if (waits) {
			(void)sched_yield();
		} else if (!half->stopped) {
			last_miss(half);
			pairs_stop(half);
		} else {
			unflushed_tell(half);
		}
	}
}

void tfd_verbs_half_free(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	/*
	 * A device may drop a queue pair's completions as it stops, and receives would be lost with those. Numbers of queue pairs are used
	 * again: none of theirs is left in the queues.
	 */
	while (!half->stopped && last_waits(half)) /* the queue was never empty while it was drained */
		(void)sched_yield();
	(void)tfd_verbs_take(domain);
	if (!half->stopped)
		pairs_stop(half);
	(void)tfd_verbs_take(domain);
	tfd_verbs_forget(half);
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		struct tfd_verbs_queue *queue = &half->queues[i];

		domain->send_room += queue->requests_posted - queue->requests_done;
		map_remove(domain, queue);
		tfd_list_remove(&queue->chain_link);
		tfd_list_remove(&queue->report_link);
	}
	tfd_list_remove(&half->link);
	tfd_verbs_reap(half);
	tfd_verbs_quiet_renew(domain);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rail: protection domain, completion channel, two completion queues, and one SRQ that the immediates of all its queue pairs
 * take their receives from; the ops table.
 *
 * Neither queue can overrun. In recv_cq is at most one entry for each receive of the SRQ, and a receive is posted again only after
 * its entry was taken. In send_cq is at most one for each work request in flight, and `send_room` counts those.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "verbs.h"

#define BATCH_PART 32u /* of the SRQ is posted again at once */
#define RECEIVES_LEAST 64u

static uint32_t power_below(uint32_t number)
{
	return number ? 1u << (31 - __builtin_clz(number)) : 0;
}

static uint32_t smaller(uint32_t a, int b)
{
	return b > 0 && (uint32_t)b < a ? (uint32_t)b : a;
}

static int fail(const char *what, struct tfd_error *error)
{
	int rc = errno ? errno : EIO;

	return tfd_fail(error, -rc, "verbs: %s failed: %s", what, strerror(rc));
}

static int channel_open(struct tfd_domain *domain, struct tfd_error *error)
{
	int flags;

	domain->channel = domain->library->create_comp_channel(domain->context);
	if (!domain->channel)
		return fail("ibv_create_comp_channel", error);
	flags = fcntl(domain->channel->fd, F_GETFL);
	if (flags < 0 || fcntl(domain->channel->fd, F_SETFL, flags | O_NONBLOCK) != 0)
		return fail("the completion channel's fcntl", error);
	return 0;
}

static int cqs_open(struct tfd_domain *domain, struct tfd_error *error)
{
	const struct tfd_verbs_library *library = domain->library;
	uint32_t sends = smaller(TFD_VERBS_SENDS, domain->attributes.max_cqe);

	domain->send_cq = library->create_cq(domain->context, (int)sends, NULL, domain->channel, 0);
	if (!domain->send_cq)
		return fail("ibv_create_cq", error);
	domain->send_room = domain->sends = sends;
	domain->recv_cq =
		library->create_cq(domain->context, (int)domain->receives, NULL, domain->channel, 0);
	return domain->recv_cq ? 0 : fail("ibv_create_cq", error);
}

static int receives_open(struct tfd_domain *domain, struct tfd_error *error)
{
	struct ibv_srq_init_attr attributes = { .attr = { .max_wr = domain->receives, .max_sge = 1 } };

	domain->srq = domain->library->create_srq(domain->pd, &attributes);
	if (!domain->srq)
		return fail("ibv_create_srq", error);
	for (uint32_t posted = 0; posted < domain->receives; posted += domain->receive_batch) {
		int rc = tfd_verbs_receives_post(domain);

		if (rc)
			return tfd_fail(error, rc, "verbs: posting receives failed: %s", strerror(-rc));
	}
	domain->receives_used = 0;
	domain->stash_head = domain->stash_tail = 0;
	tfd_verbs_srq_watch(domain);
	return 0;
}

static int queues_open(struct tfd_domain *domain, struct tfd_error *error)
{
	int rc = cqs_open(domain, error);

	return rc ? rc : receives_open(domain, error);
}

static void queues_close(struct tfd_domain *domain)
{
	const struct tfd_verbs_library *library = domain->library;

	if (domain->srq)
		(void)library->destroy_srq(domain->srq);
	tfd_verbs_cq_events_ack(domain);
	if (domain->send_cq)
		(void)library->destroy_cq(domain->send_cq);
	if (domain->recv_cq)
		(void)library->destroy_cq(domain->recv_cq);
	domain->srq = NULL;
	domain->send_cq = domain->recv_cq = NULL;
}

int tfd_verbs_queues_renew(struct tfd_domain *domain, struct tfd_error *error)
{
	int rc;

	if (!tfd_list_empty(&domain->halves) || !tfd_verbs_reap_wait(domain))
		return tfd_fail(
			error, -EAGAIN,
			"a queue of the rail has overrun: its connections are closed first, then it is "
			"made anew");
	queues_close(domain);
	/* What may have been heard again of those that are gone now. */
	domain->alarmed |= tfd_swap_seq(&domain->alarms, 0u) & ~(uint32_t)TFD_VERBS_OVERRUN;
	rc = queues_open(domain, error);
	domain->overrun = rc != 0;
	if (rc)
		queues_close(domain);
	return rc;
}

static int memory_open(struct tfd_domain *domain, struct tfd_error *error)
{
	domain->receive_chain = calloc(domain->receive_batch, sizeof(*domain->receive_chain));
	domain->stash = calloc(domain->receives, sizeof(*domain->stash));
	if (!domain->receive_chain || !domain->stash)
		return tfd_fail(error, -ENOMEM, "no memory for a rail's receives");
	for (uint32_t i = 0; i + 1 < domain->receive_batch; i++)
		domain->receive_chain[i].next = &domain->receive_chain[i + 1];
	return 0;
}

static int objects_open(struct tfd_domain *domain, struct tfd_error *error)
{
	const struct ibv_device_attr *has = &domain->attributes;
	int rc;

	domain->receives = power_below(smaller(smaller(TFD_VERBS_RECEIVES, has->max_srq_wr), has->max_cqe));
	if (has->max_srq <= 0 || domain->receives < RECEIVES_LEAST)
		return tfd_fail(error, -ENOTSUP,
		                "device %s has no shared receive queue of %u entries: use provider tcp or "
		                "libfabric",
		                domain->library->get_device_name(domain->context->device), RECEIVES_LEAST);
	domain->receive_batch = domain->receives / BATCH_PART;
	domain->pd = domain->library->alloc_pd(domain->context);
	if (!domain->pd)
		return fail("ibv_alloc_pd", error);
	rc = memory_open(domain, error);
	if (!rc)
		rc = channel_open(domain, error);
	if (!rc)
		rc = queues_open(domain, error);
	if (!rc)
		rc = tfd_verbs_reaper_open(domain, error);
	return rc ? rc : tfd_verbs_events_open(domain, error);
}

static void describe(struct tfd_domain *domain, const char *name, struct tfd_rail_info *info)
{
	bool ethernet = domain->port.link_layer == IBV_LINK_LAYER_ETHERNET;
	const char *wire = !ethernet ? "ib" : domain->port.gid.type == TFD_GID_ROCE_V2 ? "roce2" : "roce1";

	(void)snprintf(domain->protocol, sizeof(domain->protocol), "verbs/%s/1", wire);
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "verbs %.40s:%u",
	               domain->library->get_device_name(domain->context->device), domain->port.number);
	memcpy(info->protocol, domain->protocol, sizeof(info->protocol));
	info->max_message_bytes = domain->port.max_message_bytes;
	info->ordered = 1;
	info->max_parts = TFD_VERBS_PARTS;
	info->channels = TFD_VERBS_CHANNELS;
	info->queue_depth = smaller(TFD_VERBS_QUEUE_SENDS, domain->attributes.max_qp_wr);
	/* Those that were taken, and not posted again yet, are missing. */
	info->imm_depth = domain->receives - domain->receive_batch;
}

void tfd_verbs_device_release(struct tfd_domain *domain)
{
	const struct tfd_verbs_library *library = domain->library;

	(void)pthread_rwlock_wrlock(&domain->device_lock);
	for (struct tfd_list *link = domain->mrs.next; link != &domain->mrs; link = link->next) {
		struct tfd_mr *mr = tfd_container(link, struct tfd_mr, link);

		(void)library->dereg_mr(mr->mr);
		mr->mr = NULL;
	}
	queues_close(domain);
	if (domain->channel)
		(void)library->destroy_comp_channel(domain->channel);
	if (domain->pd)
		(void)library->dealloc_pd(domain->pd);
	if (domain->context)
		(void)library->close_device(domain->context);
	domain->channel = NULL;
	domain->pd = NULL;
	domain->context = NULL;
	(void)pthread_rwlock_unlock(&domain->device_lock);
}

static void domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves))
		tfd_verbs_half_free(tfd_container(domain->halves.next, struct tfd_half, link));
	tfd_verbs_reaper_close(domain); /* the thread of events acknowledges what destroying waits for */
	tfd_verbs_events_close(domain);
	if (domain->context)
		tfd_verbs_device_release(domain);
	(void)pthread_cond_destroy(&domain->reaper.some);
	(void)pthread_mutex_destroy(&domain->reaper.lock);
	(void)pthread_rwlock_destroy(&domain->device_lock);
	(void)pthread_mutex_destroy(&domain->mrs_lock);
	free(domain->receive_chain);
	free(domain->stash);
	free(domain);
}

static int domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	domain->options = options->verbs;
	domain->stop_fd = domain->wake_fd = domain->epoll_fd = -1;
	(void)pthread_rwlock_init(&domain->device_lock, NULL);
	(void)pthread_mutex_init(&domain->mrs_lock, NULL);
	(void)pthread_mutex_init(&domain->reaper.lock, NULL);
	(void)pthread_cond_init(&domain->reaper.some, NULL);
	tfd_list_init(&domain->reaper.halves);
	tfd_list_init(&domain->mrs);
	tfd_list_init(&domain->halves);
	tfd_list_init(&domain->chains);
	tfd_list_init(&domain->reports);
	rc = tfd_verbs_load(options->library, &domain->library, error);
	if (!rc)
		rc = tfd_verbs_device_open(domain, options, name, info, error);
	if (!rc)
		rc = objects_open(domain, error);
	if (rc) {
		domain_close(domain);
		return rc;
	}
	describe(domain, name, info);
	*out = domain;
	return 0;
}

static int wait_fd(struct tfd_domain *domain)
{
	return domain->epoll_fd;
}

static uint32_t rail_state(const struct tfd_domain *domain)
{
	return tfd_load_relaxed(&domain->state);
}

const struct tfd_provider_ops tfd_verbs_ops = {
	.name = "verbs",
	.path_id = TFD_PATH_VERBS,
	.domain_open = domain_open,
	.domain_close = domain_close,
	.mr_open = tfd_verbs_mr_open,
	.mr_open_dmabuf = tfd_verbs_mr_open_dmabuf,
	.mr_close = tfd_verbs_mr_close,
	.reach = tfd_verbs_reach,
	.half_open = tfd_verbs_half_open,
	.half_start = tfd_verbs_half_start,
	.half_close = tfd_verbs_half_close,
	.half_settle = tfd_verbs_half_settle,
	.half_drain = tfd_verbs_half_drain,
	.half_free = tfd_verbs_half_free,
	.post = tfd_verbs_post,
	.poll = tfd_verbs_poll,
	.rail_state = rail_state,
	.wait_fd = wait_fd,
	.arm = tfd_verbs_arm,
};

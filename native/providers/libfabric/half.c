/* SPDX-License-Identifier: Apache-2.0 */
/* Making and freeing an endpoint, with a completion queue of its own or the domain's. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "../../core/parts.h"
#include "domain.h"
#include "efa.h"

static void ring_insert(struct tfd_domain *domain, struct tfd_half *half)
{
	struct tfd_half *first = domain->halves;

	domain->half_count++;
	if (!first) {
		half->next = half->prev = half;
		domain->halves = half;
		return;
	}
	half->prev = first->prev;
	half->next = first;
	first->prev->next = half;
	first->prev = half;
}

static void ring_remove(struct tfd_domain *domain, struct tfd_half *half)
{
	if (!half->next)
		return;
	domain->half_count--;
	if (domain->halves == half)
		domain->halves = half->next == half ? NULL : half->next;
	half->prev->next = half->next;
	half->next->prev = half->prev;
	half->next = half->prev = NULL;
}

static int endpoint_open(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;
	struct fid_cq *cq = half->cq ? half->cq : domain->cq;
	int rc = fi_endpoint(domain->domain, domain->info, &half->ep, NULL);

	if (rc)
		return rc;
	rc = fi_ep_bind(half->ep, &domain->av->fid, 0);
	if (!rc)
		rc = fi_ep_bind(half->ep, &cq->fid, FI_TRANSMIT | FI_RECV);
	if (!rc && domain->takes_dmabuf)
		rc = tfd_fi_efa_leave_to_device(half);
	return rc ? rc : fi_enable(half->ep);
}

/* Those of libfabric's own, which wrap sockets or another endpoint: their size is where they begin. */
bool tfd_fi_queue_grows(const struct tfd_domain *domain)
{
	const char *name = domain->info->fabric_attr->prov_name;

	return strcmp(name, "tcp") == 0 || strcmp(name, "net") == 0 || strstr(name, "ofi_rxm");
}

int tfd_fi_queue_open(struct tfd_domain *domain, struct fid_cq **out)
{
	/* What goes out by the rail completes in the same queue. 8,192 in all is what EFA takes when one asks for none. */
	size_t size = tfd_fi_queue_grows(domain) ? TFD_FI_CQ_IMMS : TFD_FI_CQ_IMMS + TFD_WRS_PER_WORKER;
	struct fi_cq_attr attributes = { .size = size, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD };
	int rc = fi_cq_open(domain->domain, &attributes, out, NULL);

	if (rc != -FI_ENOSYS || !domain->efa)
		return rc;
	domain->polled = true;
	attributes.wait_obj = FI_WAIT_NONE;
	return fi_cq_open(domain->domain, &attributes, out, NULL);
}

static int own_queue_open(struct tfd_half *half)
{
	struct epoll_event event = { .events = EPOLLIN };
	struct tfd_domain *domain = half->domain;
	int fd;
	int rc = tfd_fi_queue_open(domain, &half->cq);

	if (rc)
		return rc;
	rc = fi_control(&half->cq->fid, FI_GETWAIT, &fd);
	if (!rc && epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
		rc = -errno;
	return rc;
}

int tfd_fi_link_take(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_half **slot;

	for (uint32_t tries = 0; tries < TFD_FI_LINKS; tries++) {
		uint32_t link = ++domain->last_link;

		slot = &domain->links[link % TFD_FI_LINKS];
		if (*slot || !link)
			continue;
		*slot = half;
		half->link = link;
		return 0;
	}
	return -ENOSPC;
}

static void link_give(struct tfd_half *half)
{
	if (half->link)
		half->domain->links[half->link % TFD_FI_LINKS] = NULL;
	half->link = 0;
}

int tfd_fi_half_make(struct tfd_domain *domain, struct tfd_half **out, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));
	int rc;

	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->domain = domain;
	half->far = FI_ADDR_UNSPEC;
	rc = domain->cq ? 0 : own_queue_open(half);
	if (!rc)
		rc = endpoint_open(half);
	if (rc) {
		tfd_fi_half_free(half);
		return tfd_fi_fail(domain, error, "opening an endpoint", rc);
	}
	ring_insert(domain, half);
	*out = half;
	return 0;
}

/*
 * tcp counts who has an address. EFA does not: who inserts one that is there gets the same again, and the first who removes it has
 * it removed for all, while posting to an address that is gone is the end of the process.
 */
static bool far_is_anothers(const struct tfd_half *half)
{
	if (!half->domain->efa || !half->next)
		return false;
	for (const struct tfd_half *other = half->next; other != half; other = other->next) {
		if (other->far == half->far)
			return true;
	}
	return false;
}

void tfd_fi_half_close(struct tfd_half *half)
{
	if (half->ep && half->domain->efa)
		tfd_fi_efa_keep(half->domain);
	if (half->ep && half->domain->links && strcmp(half->domain->info->fabric_attr->prov_name, "tcp") == 0)
		tfd_fi_hang_up(half);
	if (half->ep)
		(void)fi_close(&half->ep->fid);
	half->ep = NULL;
	if (half->domain->efa)
		tfd_fi_efa_flush(half);
	if (half->far != FI_ADDR_UNSPEC && !far_is_anothers(half))
		(void)fi_av_remove(half->domain->av, &half->far, 1, 0);
	half->far = FI_ADDR_UNSPEC;
}

void tfd_fi_half_free(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;
	int fd;

	tfd_fi_half_close(half);
	ring_remove(domain, half);
	link_give(half);
	if (half->cq) {
		if (fi_control(&half->cq->fid, FI_GETWAIT, &fd) == 0)
			(void)epoll_ctl(domain->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		(void)fi_close(&half->cq->fid);
	}
	free(half);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The libfabric provider: connections, posting, polling.
 *
 * Every half of a connection is an endpoint of its own, so that closing it is what destroying a queue pair is to verbs (and is
 * that, of EFA): nothing of it lands or is read any more, and no other connection notices.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/parts.h"
#include "domain.h"
#include "efa.h"

#define POLL_ENTRIES 64

static int half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                     void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_fi_address blob = { 0 };
	size_t name_bytes = sizeof(blob.name);
	struct tfd_half *half;
	int rc;

	(void)outgoing; /* both may be written to: the far side of an outgoing one answers */
	rc = tfd_fi_half_make(domain, &half, error);
	if (rc)
		return rc;
	half->owner = owner;
	if (domain->links && tfd_fi_link_take(half) != 0) {
		tfd_fi_half_free(half);
		return tfd_fail(error, -ENOSPC, "the rail has all its %u halves of connections",
		                TFD_FI_LINKS);
	}
	memcpy(blob.protocol, domain->protocol, sizeof(blob.protocol));
	blob.link = half->link;
	rc = fi_getname(&half->ep->fid, blob.name, &name_bytes);
	if (rc) {
		tfd_fi_half_free(half);
		return tfd_fi_fail(domain, error, "fi_getname", rc);
	}
	*address_bytes = domain->address_bytes = offsetof(struct tfd_fi_address, name) + name_bytes;
	memcpy(address, &blob, *address_bytes);
	*out = half;
	return 0;
}

static int half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                      struct tfd_error *error)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_fi_address blob = { 0 };
	int rc;

	if (address_bytes <= offsetof(struct tfd_fi_address, name) || address_bytes > sizeof(blob))
		return tfd_fail(error, -EPROTO, "a fabric address of %zu bytes is malformed", address_bytes);
	memcpy(&blob, address, address_bytes);
	blob.protocol[sizeof(blob.protocol) - 1] = 0;
	if (strcmp(blob.protocol, domain->protocol) != 0)
		return tfd_fail(error, -EPROTO,
		                "the peer speaks %s, this rail %s: use the same provider on both hosts",
		                blob.protocol, domain->protocol);
	if (address_bytes != domain->address_bytes) /* one protocol, one form of names */
		return tfd_fail(error, -EPROTO, "a %s address of %zu bytes is malformed: it has %zu",
		                domain->protocol, address_bytes, domain->address_bytes);
	half->far_link = blob.link; /* 0: the far half has a queue of its own (rxm 1.17 speaks to 2.x) */
	rc = fi_av_insert(domain->av, blob.name, 1, &half->far, 0, NULL);
	if (rc != 1) {
		half->far = FI_ADDR_UNSPEC;
		return tfd_fi_fail(domain, error, "fi_av_insert", rc < 0 ? rc : -EINVAL);
	}
	return 0;
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	/* DELIVERY_COMPLETE: a completion means "visible at the far side", not "in a local socket buffer". */
	uint64_t flags = FI_COMPLETION | FI_DELIVERY_COMPLETE | (post->has_imm ? FI_REMOTE_CQ_DATA : 0);
	struct iovec local = { .iov_base = (void *)(uintptr_t)post->local, .iov_len = post->length };
	struct fi_rma_iov remote = { .addr = post->remote_address,
	                             .len = post->length,
	                             .key = post->remote_key };
	const struct tfd_mr *mr = post->mr ? post->mr : half->domain->nothing;
	void *descriptor = mr ? mr->descriptor : NULL;
	struct fi_msg_rma message = { .msg_iov = &local,
	                              .desc = &descriptor,
	                              .iov_count = 1,
	                              .addr = half->far,
	                              .rma_iov = &remote,
	                              .rma_iov_count = 1,
	                              .context = half->domain->efa ? tfd_fi_efa_op(half, wr) : wr->context,
	                              .data = (uint64_t)half->far_link << 32 | post->imm };
	ssize_t rc;

	if (!message.context)
		return -EAGAIN;
	rc = post->read ? fi_readmsg(half->ep, &message, FI_COMPLETION) :
	                  fi_writemsg(half->ep, &message, flags);
	if (rc && half->domain->efa)
		(void)tfd_fi_efa_op_done(half->domain->efa, message.context);
	return rc == -FI_EAGAIN ? -EAGAIN : (int)rc;
}

static bool is_access_error(int error)
{
	return error == FI_EACCES || error == FI_EKEYREJECTED || error == FI_EPERM;
}

static struct tfd_wr *wr_of(const struct tfd_domain *domain, void *context)
{
	return domain->efa ? tfd_fi_efa_op_done(domain->efa, context) : context;
}

static int cq_poll_error(const struct tfd_domain *domain, const struct tfd_half *queue_of, struct fid_cq *cq,
                         struct tfd_wc *wc)
{
	/* From API 1.20 on it is longer than our headers may say. */
	union {
		struct fi_cq_err_entry entry;
		uint64_t room[sizeof(struct fi_cq_err_entry) / sizeof(uint64_t) + 8];
	} told = { 0 };
	const struct fi_cq_err_entry *entry = &told.entry;
	struct tfd_wr *wr;

	if (fi_cq_readerr(cq, &told.entry, 0) != 1)
		return 0;
	if (entry->err == FI_EOVERRUN) { /* of the queue, whatever the entry names */
		*wc = (struct tfd_wc){ .type = TFD_WC_ERROR,
		                       .error = EOVERFLOW,
		                       .owner = queue_of ? queue_of->owner : NULL };
		return 1;
	}
	wr = entry->op_context ? wr_of(domain, entry->op_context) : NULL;
	/* But of EFA prov_errno is not looked at, nor fi_cq_strerror called: stale and, in rxm 1.17, fatal after a close. */
	*wc = (struct tfd_wc){ .type = TFD_WC_ERROR,
	                       .wr = wr,
	                       .error = wr || !domain->efa ? entry->err :
		                                             ESTALE, /* no errno that means more */
	                       .remote_access = is_access_error(entry->err) ||
		                                (domain->efa && tfd_fi_efa_refused(entry->prov_errno)),
	                       .owner = queue_of ? queue_of->owner : NULL };
	return 1;
}

/* Of the half that an immediate came by; NULL: nobody knows, or it came by one that is gone. */
static void *owner_of(const struct tfd_domain *domain, const struct tfd_half *queue_of, uint64_t data)
{
	uint32_t link = (uint32_t)(data >> 32);
	const struct tfd_half *half = queue_of;

	if (domain->links) {
		half = domain->links[link % TFD_FI_LINKS];
		if (half && half->link != link)
			half = NULL;
	}
	return half ? half->owner : NULL;
}

/* One that comes of a half which is closed, though its post was told as flushed, is counted as an error of the domain. */
static struct tfd_wc sent_of(const struct tfd_domain *domain, void *context)
{
	struct tfd_wr *wr = wr_of(domain, context);

	return wr ? (struct tfd_wc){ .type = TFD_WC_SENT, .wr = wr } :
	            (struct tfd_wc){ .type = TFD_WC_ERROR, .error = ESTALE };
}

int tfd_fi_queue_poll(const struct tfd_domain *domain, const struct tfd_half *queue_of, struct tfd_wc *wc,
                      int max)
{
	struct fid_cq *cq = queue_of ? queue_of->cq : domain->cq;
	struct fi_cq_data_entry entries[POLL_ENTRIES];
	ssize_t count = fi_cq_read(cq, entries, max < POLL_ENTRIES ? (size_t)max : POLL_ENTRIES);

	if (count == -FI_EAVAIL)
		return cq_poll_error(domain, queue_of, cq, wc);
	if (count <= 0)
		return 0;
	for (ssize_t i = 0; i < count; i++) {
		if (entries[i].flags & FI_REMOTE_WRITE)
			wc[i] = (struct tfd_wc){ .type = TFD_WC_IMM,
			                         .imm = (uint32_t)entries[i].data,
			                         .owner = owner_of(domain, queue_of, entries[i].data) };
		else
			wc[i] = sent_of(domain, entries[i].op_context);
	}
	return (int)count;
}

static int half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	return half->domain->efa ? tfd_fi_efa_poll(half->domain, wc, max) :
	                           tfd_fi_queue_poll(half->domain, half->cq ? half : NULL, wc, max);
}

static int cq_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct tfd_half *half = domain->halves;
	uint32_t left = domain->half_count;
	int total = 0;

	if (domain->efa)
		return tfd_fi_efa_poll(domain, wc, max);
	if (domain->cq)
		return tfd_fi_queue_poll(domain, NULL, wc, max);
	for (; left && total < max; left--) {
		total += tfd_fi_queue_poll(domain, half, wc + total, max - total);
		half = half->next;
	}
	domain->halves = half; /* begin with those that had no turn */
	return total;
}

static int wait_fd(struct tfd_domain *domain)
{
	int fd;

	if (!domain->cq)
		return domain->epoll_fd;
	if (domain->polled)
		return -1;
	return fi_control(&domain->cq->fid, FI_GETWAIT, &fd) == 0 ? fd : -1;
}

static int queue_arm(struct tfd_domain *domain, struct fid_cq *cq)
{
	struct fid *fid = &cq->fid;

	return fi_trywait(domain->fabric, &fid, 1) == 0 ? 0 : -EAGAIN;
}

static int arm(struct tfd_domain *domain)
{
	struct tfd_half *half = domain->halves;

	if (domain->efa && tfd_fi_efa_kept(domain->efa))
		return -EAGAIN;
	if (domain->cq)
		return domain->polled ? 0 : queue_arm(domain, domain->cq);
	for (uint32_t i = 0; i < domain->half_count; i++, half = half->next) {
		if (queue_arm(domain, half->cq) != 0)
			return -EAGAIN;
	}
	return 0;
}

const struct tfd_provider_ops tfd_libfabric_ops = {
	.name = "libfabric",
	.path_id = TFD_PATH_LIBFABRIC,
	.domain_open = tfd_fi_domain_open,
	.domain_close = tfd_fi_domain_close,
	.mr_open = tfd_fi_mr_open,
	.mr_open_dmabuf = tfd_fi_mr_open_dmabuf,
	.mr_close = tfd_fi_mr_close,
	.half_open = half_open,
	.half_start = half_start,
	.half_close = tfd_fi_half_close,
	.half_drain = half_drain,
	.half_free = tfd_fi_half_free,
	.post = post,
	.poll = cq_poll,
	.wait_fd = wait_fd,
	.arm = arm,
};

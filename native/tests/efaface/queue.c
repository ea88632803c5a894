/* SPDX-License-Identifier: Apache-2.0 */
/* Completion queues of EFA's face: a ring of a fixed size, as the device's is, that loses what does not fit. */
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "face.h"

#define WAIT_DIRECT_SINCE FI_VERSION(2, 3) /* FI_WAIT_FD */
#define WAIT_EFA_SINCE FI_VERSION(2, 5) /* and only without shm */

void face_cq_push(struct face_cq *cq, const struct face_entry *entry)
{
	if (cq->count == cq->size) {
		cq->overrun = true;
		face_stats.overruns++;
		return;
	}
	cq->ring[(cq->head + cq->count) % cq->size] = *entry;
	cq->count++;
	if (cq->count > face_stats.queued_most)
		face_stats.queued_most = cq->count;
}

void face_cq_purge(struct face_cq *cq, const struct face_ep *ep)
{
	size_t kept = 0;

	for (size_t i = 0; i < cq->count; i++) {
		const struct face_entry *entry = &cq->ring[(cq->head + i) % cq->size];

		if (entry->ep != ep)
			cq->ring[(cq->head + kept++) % cq->size] = *entry;
	}
	face_stats.purged += cq->count - kept;
	cq->count = kept;
}

/* A device fills the queue whether it is read or not; here everything that has come is put in before any is taken out. */
static ssize_t cq_read(struct fid_cq *fid, void *buf, size_t count)
{
	struct face_cq *cq = (struct face_cq *)fid;
	struct fi_cq_data_entry *out = buf;
	ssize_t taken = 0;

	face_lock();
	for (struct face_ep *ep = cq->eps; ep; ep = ep->next)
		face_ep_progress(ep);
	while (!cq->overrun && cq->count && (size_t)taken < count && !cq->ring[cq->head].err) {
		out[taken++] = cq->ring[cq->head].entry;
		cq->head = (cq->head + 1) % cq->size;
		cq->count--;
	}
	if (!taken)
		taken = cq->overrun || cq->count ? -FI_EAVAIL : -FI_EAGAIN;
	face_unlock();
	return taken;
}

static ssize_t cq_readerr(struct fid_cq *fid, struct fi_cq_err_entry *out, uint64_t flags)
{
	static const char unused[] = "efaface: an error";
	struct face_cq *cq = (struct face_cq *)fid;
	const struct face_entry *entry = &cq->ring[cq->head];
	ssize_t rc = -FI_EAGAIN;

	(void)flags;
	face_lock();
	if (cq->overrun) {
		cq->overrun = false;
		out->op_context = cq; /* of the queue, not of an op: nobody may take it for one */
		out->err = FI_EOVERRUN;
		rc = 1;
	} else if (cq->count && entry->err) {
		out->op_context = entry->entry.op_context;
		out->flags = entry->entry.flags;
		out->err = entry->err;
		out->prov_errno = entry->prov_errno;
		cq->head = (cq->head + 1) % cq->size;
		cq->count--;
		rc = 1;
	}
	if (rc == 1 && !out->err_data_size) {
		out->err_data = (void *)(uintptr_t)unused;
		out->err_data_size = sizeof(unused);
	}
	face_unlock();
	return rc;
}

int face_cq_trywait(struct face_cq *cq)
{
	if (!cq->waits)
		return -FI_EINVAL;
	if (cq->count || cq->overrun)
		return -FI_EAGAIN;
	for (struct face_ep *ep = cq->eps; ep; ep = ep->next) {
		struct fid *tcp = &ep->tcp_cq->fid;

		if (face_ep_waits(ep) || fi_trywait(cq->domain->tcp_fabric, &tcp, 1) != 0)
			return -FI_EAGAIN;
	}
	return 0;
}

static int cq_control(struct fid *fid, int command, void *argument)
{
	struct face_cq *cq = (struct face_cq *)fid;

	if (command != FI_GETWAIT)
		return -FI_ENOSYS;
	if (!cq->waits)
		return -FI_ENODATA;
	*(int *)argument = cq->epoll_fd;
	return 0;
}

static int cq_close(struct fid *fid)
{
	struct face_cq *cq = (struct face_cq *)fid;

	if (cq->eps)
		return -FI_EBUSY;
	if (cq->tcp)
		(void)fi_close(&cq->tcp->fid);
	while (cq->ended) {
		struct face_op *op = cq->ended;

		cq->ended = op->next;
		free(op);
	}
	if (cq->epoll_fd >= 0)
		(void)close(cq->epoll_fd);
	free(cq->ring);
	free(cq);
	return 0;
}

static int no_bind(struct fid *fid, struct fid *other, uint64_t flags)
{
	(void)fid;
	(void)other;
	(void)flags;
	return -FI_ENOSYS;
}

static struct fi_ops cq_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = cq_close,
	.bind = no_bind,
	.control = cq_control,
};

static struct fi_ops_cq cq_ops = {
	.size = sizeof(struct fi_ops_cq),
	.read = cq_read,
	.readerr = cq_readerr,
};

static bool may_wait(const struct face_domain *domain)
{
	const char *shm = getenv("FI_EFA_ENABLE_SHM_TRANSFER");

	if (domain->fabric->direct)
		return FI_VERSION_GE(face_version(), WAIT_DIRECT_SINCE);
	return FI_VERSION_GE(face_version(), WAIT_EFA_SINCE) && shm && strcmp(shm, "0") == 0;
}

/* tcp's own queue, in the wait fd of ours. */
static int tcp_open(struct face_cq *cq)
{
	struct fi_cq_attr attributes = { .size = 4096, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD };
	struct epoll_event event = { .events = EPOLLIN };
	int fd;
	int rc = fi_cq_open(cq->domain->tcp, &attributes, &cq->tcp, NULL);

	if (!rc)
		rc = fi_control(&cq->tcp->fid, FI_GETWAIT, &fd);
	if (!rc && epoll_ctl(cq->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
		rc = -FI_ENOMEM;
	return rc;
}

int face_cq_open(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **out, void *context)
{
	struct face_domain *of = (struct face_domain *)domain;
	struct face_cq *cq;
	int rc = 0;

	if (attr->format != FI_CQ_FORMAT_DATA || (attr->wait_obj != FI_WAIT_NONE && !may_wait(of)))
		return -FI_ENOSYS;
	cq = calloc(1, sizeof(*cq));
	if (!cq)
		return -FI_ENOMEM;
	cq->domain = of;
	cq->waits = attr->wait_obj != FI_WAIT_NONE;
	cq->size = face_control.cq_size ? face_control.cq_size : attr->size;
	cq->ring = calloc(cq->size, sizeof(*cq->ring));
	cq->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (!cq->ring || cq->epoll_fd < 0)
		rc = -FI_ENOMEM;
	if (!rc && !face_is_rxm())
		rc = tcp_open(cq);
	if (rc) {
		(void)cq_close(&cq->fid.fid);
		return rc;
	}
	cq->fid = (struct fid_cq){
		.fid = { .fclass = FI_CLASS_CQ, .context = context, .ops = &cq_fid_ops },
		.ops = &cq_ops,
	};
	*out = &cq->fid;
	return 0;
}

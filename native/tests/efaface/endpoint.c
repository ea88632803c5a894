/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Endpoints of EFA's face. What is posted waits for a random time and goes out by tcp in an order of its own, some writes cut into
 * pieces that do; an immediate goes when the bytes of its own write are there, and tells nothing of any other.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>

#include "face.h"

#define UNREACHABLE_MS 3000 /* tcp says nothing but -FI_EAGAIN of an address where nobody listens */
#define CONTEXT_MAGIC 0xefaface0c0ffee00ull
#define DRAIN 16

static struct face_ep *all_eps;

/* ---- the ops ---- */

static void context_take(struct fi_context2 *context)
{
	for (size_t i = 0; i < 8; i++)
		context->internal[i] = (void *)(uintptr_t)(CONTEXT_MAGIC ^ (uintptr_t)context ^ i);
}

static void context_check(const struct fi_context2 *context)
{
	for (size_t i = 0; i < 8; i++) {
		if (context->internal[i] != (void *)(uintptr_t)(CONTEXT_MAGIC ^ (uintptr_t)context ^ i))
			face_abort("the context of an op was written to while that was in flight");
	}
}

static void op_fail(struct face_op *op, int err, int prov_errno)
{
	if (!op->err) {
		op->err = err;
		op->prov_errno = prov_errno;
	}
	for (uint32_t i = 0; i < op->pieces; i++) {
		if (!op->piece[i].posted && !op->piece[i].done) {
			op->piece[i].done = true;
			op->left--;
		}
	}
}

static void piece_done(struct face_piece *piece, int err)
{
	struct face_op *op = piece->op;

	if (!op->ep)
		return;
	piece->done = true;
	op->left--;
	op->told_at = op->ep->tick + face_random(face_control.delay + 1);
	if (!err)
		return;
	op_fail(op, FI_ECONNABORTED, FACE_ABORT);
}

/* 0: it is out, or will never be. */
static int piece_post(struct face_ep *ep, struct face_op *op, struct face_piece *piece)
{
	bool last = op->left == 1;
	struct iovec local = { .iov_base = op->local + piece->offset, .iov_len = piece->length };
	struct fi_rma_iov remote = { .addr = op->remote + piece->offset,
	                             .len = piece->length,
	                             .key = op->key };
	struct fi_msg_rma message = { .msg_iov = &local,
	                              .desc = &op->tcp_desc,
	                              .iov_count = 1,
	                              .addr = ep->av->entry[op->to].tcp,
	                              .rma_iov = &remote,
	                              .rma_iov_count = 1,
	                              .context = &piece->context,
	                              .data = op->data };
	uint64_t flags = FI_COMPLETION | FI_DELIVERY_COMPLETE | (op->has_imm && last ? FI_REMOTE_CQ_DATA : 0);
	ssize_t rc = op->read ? fi_readmsg(ep->tcp, &message, FI_COMPLETION) :
	                        fi_writemsg(ep->tcp, &message, flags);

	if (rc == -FI_EAGAIN) {
		if (face_now_ms() - op->since_ms > UNREACHABLE_MS)
			op_fail(op, FI_EHOSTUNREACH, FACE_UNREACHABLE);
		return -FI_EAGAIN;
	}
	if (rc) {
		op_fail(op, FI_ENOTCONN, FACE_BAD_QPN);
		return 0;
	}
	piece->posted = true;
	if (op->number < ep->last_released)
		face_stats.overtaken++;
	else
		ep->last_released = op->number;
	return 0;
}

/* An immediate's own piece waits for all others of its write. */
static void op_release(struct face_ep *ep, struct face_op *op)
{
	for (uint32_t i = 0; i < op->pieces; i++) {
		struct face_piece *piece = &op->piece[i];

		if (piece->posted || piece->done || piece->due > ep->tick)
			continue;
		if (op->has_imm && op->pieces > 1 && i == op->pieces - 1 && op->left > 1)
			continue;
		if (face_control.delay && face_random(2))
			continue; /* others that are due as well may be first */
		if (piece_post(ep, op, piece) != 0)
			return;
	}
}

static void op_told(struct face_ep *ep, struct face_op *op)
{
	struct face_entry entry = {
		.entry = { .op_context = op->context, .flags = op->flags, .len = op->length },
		.ep = ep,
		.err = op->err,
		.prov_errno = op->prov_errno
	};

	context_check(op->context);
	face_cq_push(ep->cq, &entry);
}

static void op_gone(struct face_ep *ep, const struct face_op *op)
{
	face_av_done(ep->av, op->to);
	ep->op_count--;
}

/* ---- progress ---- */

/* tcp carries along for which life of which endpoint it is. */
static void immediate(struct face_cq *cq, uint64_t data)
{
	struct face_entry entry = { .entry = { .flags = FI_REMOTE_CQ_DATA | FI_RMA | FI_REMOTE_WRITE,
	                                       .data = (uint32_t)data } };

	entry.ep = cq->eps;
	while (entry.ep && entry.ep->name.qkey != (uint32_t)(data >> 32))
		entry.ep = entry.ep->next;
	if (entry.ep)
		face_cq_push(cq, &entry);
	else
		face_stats.strays++;
}

static void tcp_drain(struct face_ep *ep)
{
	struct fi_cq_data_entry entries[DRAIN];

	for (;;) {
		ssize_t count = fi_cq_read(ep->tcp_cq, entries, DRAIN);

		if (count == -FI_EAVAIL) {
			struct fi_cq_err_entry error = { 0 };

			if (fi_cq_readerr(ep->tcp_cq, &error, 0) != 1)
				return;
			if (error.op_context)
				piece_done(error.op_context, error.err);
			continue;
		}
		if (count <= 0)
			return;
		for (ssize_t i = 0; i < count; i++) {
			if (entries[i].flags & FI_REMOTE_WRITE)
				immediate(ep->cq, entries[i].data);
			else
				piece_done(entries[i].op_context, 0);
		}
	}
}

void face_ep_progress(struct face_ep *ep)
{
	if (face_control.mute)
		return;
	ep->tick++;
	tcp_drain(ep);
	for (struct face_op *op = ep->ops; op; op = op->next) {
		if (op->left)
			op_release(ep, op);
	}
	for (struct face_op **at = &ep->ops; *at;) {
		struct face_op *op = *at;

		if (op->left || op->told_at > ep->tick) {
			at = &op->next;
			continue;
		}
		*at = op->next;
		if (!*at)
			ep->last = at;
		op_told(ep, op);
		op_gone(ep, op);
		free(op);
	}
}

/* Whether progress is to be made though nothing comes by tcp. */
bool face_ep_waits(const struct face_ep *ep)
{
	return ep->ops != NULL;
}

/* ---- posting ---- */

/* The endpoint of an address, if it is in this process. */
static const struct face_ep *far_of(const struct face_address *to)
{
	for (const struct face_ep *far = all_eps; far; far = far->all) {
		if (far->name.qpn == to->qpn && far->name.qkey == to->qkey)
			return far;
	}
	return NULL;
}

/* Of a device: who wants to read or write must be known to the far side's address vector. */
static bool is_stranger(const struct face_ep *ep, const struct face_ep *far)
{
	for (uint32_t i = 0; i < FACE_TABLE; i++) {
		if (far->av->entry[i].used && !far->av->entry[i].stale &&
		    memcmp(far->av->entry[i].address.gid, ep->name.gid, 16) == 0)
			return false;
	}
	return true;
}

static void op_cut(struct face_op *op)
{
	uint32_t pieces = 1;

	if (op->length >= 64 && face_random(100) < face_control.cut)
		pieces = 2 + face_random(FACE_PIECES - 1 - (op->has_imm ? 1 : 0));
	op->pieces = op->left = pieces;
	for (uint32_t i = 0; i < pieces; i++) {
		op->piece[i].op = op;
		op->piece[i].offset = op->length / pieces * i;
		op->piece[i].length =
			i == pieces - 1 ? op->length - op->piece[i].offset : op->length / pieces;
		op->piece[i].due = op->ep->tick + face_random(face_control.delay + 1);
	}
	if (pieces > 1)
		face_stats.cut++;
}

/* Errors that a test has asked for. */
static void op_inject(struct face_op *op)
{
	if (op->read || !face_control.fail_count)
		return;
	if (face_control.fail_after) {
		face_control.fail_after -= op->has_imm;
		return;
	}
	face_control.fail_count--;
	face_stats.failed++;
	if (face_control.fail_lands) {
		op->err = (int)face_control.fail_error;
		op->prov_errno = (int)face_control.fail_prov_errno;
	} else {
		op_fail(op, (int)face_control.fail_error, (int)face_control.fail_prov_errno);
	}
}

/* tcp knows the far memory by where it is mapped. */
static void op_aim(struct face_op *op, const struct face_mr *far)
{
	if (far)
		op->remote = (uint64_t)(uintptr_t)face_mr_bytes(far, op->remote);
	else
		op_fail(op, FI_EINVAL, FACE_BAD_ADDRESS);
}

/*
 * What the far device would refuse, and go on: tcp would end the connection, and not say why. Of other processes' that is not
 * seen here.
 */
static void op_refuse(struct face_ep *ep, struct face_op *op)
{
	const struct face_address *to = &ep->av->entry[op->to].address;
	const struct face_ep *far = far_of(to);
	uint64_t access = op->read ? FI_REMOTE_READ : FI_REMOTE_WRITE;

	if (!face_control.loopback && memcmp(to->gid, ep->name.gid, 16) == 0)
		op_fail(op, FI_EHOSTUNREACH, FACE_UNREACHABLE);
	else if (far && ep->domain->fabric->direct && is_stranger(ep, far))
		op_fail(op, FI_ENOTCONN, FACE_UNKNOWN_PEER);
	else if (far && op->length)
		op_aim(op, face_mr_find(far->domain, op->key, op->remote, op->length, access));
}

static void message_check(const struct face_ep *ep, const struct fi_msg_rma *message)
{
	if (message->iov_count != 1 || message->rma_iov_count != 1 ||
	    message->msg_iov->iov_len != message->rma_iov->len)
		face_abort("a post is not of one local and one remote range of one length");
	if (message->addr >= FACE_TABLE || !ep->av->entry[message->addr].used ||
	    ep->av->entry[message->addr].stale)
		face_abort("a post goes to an address that is not in the address vector");
	if (message->msg_iov->iov_len > FACE_MAX_RDMA)
		face_abort("a post is longer than the device takes");
	if (!message->context)
		face_abort("a post without context");
}

/* Where the bytes are that a post names. */
static uint8_t *local_bytes(const struct face_ep *ep, const struct iovec *local, const struct face_mr *mr,
                            bool read)
{
	uint64_t address = (uint64_t)(uintptr_t)local->iov_base;

	if (!mr || !mr->mapping || !local->iov_len)
		return local->iov_base;
	if (address < mr->address || address - mr->address > mr->length - local->iov_len)
		face_abort("a post reaches beyond the dma-buf that it names");
	if (!read && local->iov_len <= ep->inject)
		face_abort("a short write of a dma-buf is left to the processor");
	return face_mr_bytes(mr, address);
}

static ssize_t post(struct fid_ep *fid, const struct fi_msg_rma *message, uint64_t flags, bool read)
{
	struct face_ep *ep = (struct face_ep *)fid;
	const struct face_mr *mr = message->desc ? message->desc[0] : NULL;
	struct face_op *op;

	message_check(ep, message);
	if (ep->domain->fabric->direct && message->msg_iov->iov_len && !mr)
		return -FI_EINVAL;
	if (ep->op_count >= face_control.tx_size || face_random(100) < face_control.eagain) {
		face_stats.refused++;
		return -FI_EAGAIN;
	}
	op = calloc(1, sizeof(*op));
	if (!op)
		return -FI_EAGAIN;
	*op = (struct face_op){
		.ep = ep,
		.context = message->context,
		.flags = FI_RMA | (read ? FI_READ : FI_WRITE),
		.local = local_bytes(ep, message->msg_iov, mr, read),
		.tcp_desc = mr ? fi_mr_desc(mr->tcp) : NULL,
		.length = message->msg_iov->iov_len,
		.remote = message->rma_iov->addr,
		.key = message->rma_iov->key,
		.data = (uint64_t)ep->av->entry[message->addr].address.qkey << 32 | (uint32_t)message->data,
		.to = message->addr,
		.number = face_stats.writes + face_stats.reads,
		.since_ms = face_now_ms(),
		.read = read,
		.has_imm = (flags & FI_REMOTE_CQ_DATA) != 0,
	};
	op_cut(op);
	*(read ? &face_stats.reads : &face_stats.writes) += 1;
	face_stats.more += (flags & FI_MORE) != 0;
	ep->av->entry[op->to].ops++;
	ep->op_count++;
	context_take(op->context);
	op_inject(op);
	op_refuse(ep, op);
	*ep->last = op;
	ep->last = &op->next;
	return 0;
}

static ssize_t writemsg(struct fid_ep *fid, const struct fi_msg_rma *message, uint64_t flags)
{
	ssize_t rc;

	face_lock();
	rc = post(fid, message, flags, false);
	face_unlock();
	return rc;
}

static ssize_t readmsg(struct fid_ep *fid, const struct fi_msg_rma *message, uint64_t flags)
{
	ssize_t rc;

	face_lock();
	rc = post(fid, message, flags, true);
	face_unlock();
	return rc;
}

/* ---- the object ---- */

/* With rxm each endpoint has a queue of its own. */
static int own_queue(struct face_ep *ep)
{
	struct fi_cq_attr attributes = { .size = 4096, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD };
	struct epoll_event event = { .events = EPOLLIN };
	int fd;
	int rc = fi_cq_open(ep->domain->tcp, &attributes, &ep->tcp_cq, NULL);

	if (!rc)
		rc = fi_control(&ep->tcp_cq->fid, FI_GETWAIT, &fd);
	if (!rc && epoll_ctl(ep->cq->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
		rc = -FI_ENOMEM;
	return rc;
}

static int ep_enable(struct face_ep *ep)
{
	struct sockaddr_in name;
	size_t bytes = sizeof(name);
	int rc = 0;

	if (face_control.max_eps && face_stats.eps >= face_control.max_eps)
		return -FI_ENOMEM;
	ep->tcp_cq = ep->cq->tcp;
	if (!ep->tcp_cq)
		rc = own_queue(ep);
	if (!rc)
		rc = fi_ep_bind(ep->tcp, &ep->tcp_cq->fid, FI_TRANSMIT | FI_RECV);
	if (!rc)
		rc = fi_enable(ep->tcp);
	if (!rc)
		rc = fi_getname(&ep->tcp->fid, &name, &bytes);
	if (rc)
		return rc;
	memcpy(ep->name.gid, ep->domain->gid, 16);
	ep->name.qpn = ntohs(name.sin_port);
	if (getrandom(&ep->name.qkey, sizeof(ep->name.qkey), 0) != (ssize_t)sizeof(ep->name.qkey))
		return -FI_EIO;
	ep->enabled = true;
	face_stats.eps++;
	ep->next = ep->cq->eps;
	ep->cq->eps = ep;
	ep->all = all_eps;
	all_eps = ep;
	return 0;
}

static int ep_control(struct fid *fid, int command, void *argument)
{
	struct face_ep *ep = (struct face_ep *)fid;
	int rc;

	(void)argument;
	if (command != FI_ENABLE)
		return -FI_ENOSYS;
	if (!ep->av || !ep->cq || ep->enabled)
		return -FI_EINVAL;
	face_lock();
	rc = ep_enable(ep);
	face_unlock();
	return rc;
}

static int ep_bind(struct fid *fid, struct fid *other, uint64_t flags)
{
	struct face_ep *ep = (struct face_ep *)fid;

	if (other->fclass == FI_CLASS_AV) {
		ep->av = (struct face_av *)other;
		return fi_ep_bind(ep->tcp, &ep->av->tcp->fid, 0);
	}
	if (other->fclass != FI_CLASS_CQ || flags != (FI_TRANSMIT | FI_RECV))
		return -FI_EINVAL;
	ep->cq = (struct face_cq *)other;
	return 0;
}

static void ep_disable(struct face_ep *ep)
{
	struct face_ep **at;
	int fd;

	for (at = &ep->cq->eps; *at != ep;)
		at = &(*at)->next;
	*at = ep->next;
	for (at = &all_eps; *at != ep;)
		at = &(*at)->all;
	*at = ep->all;
	if (!ep->cq->tcp && fi_control(&ep->tcp_cq->fid, FI_GETWAIT, &fd) == 0)
		(void)epoll_ctl(ep->cq->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	face_stats.eps--;
	face_cq_purge(ep->cq, ep);
}

static void tell_late(struct face_cq *cq, const struct face_op *op)
{
	struct face_entry entry = { .entry = { .op_context = op->context, .flags = FI_RMA | FI_WRITE },
	                            .err = face_control.late > 1 ? FI_ECONNABORTED : 0,
	                            .prov_errno = FACE_ABORT };

	face_cq_push(cq, &entry);
}

/* What is in flight ends untold, as of a queue pair that is destroyed. */
static int ep_close(struct fid *fid)
{
	struct face_ep *ep = (struct face_ep *)fid;

	face_lock();
	if (ep->enabled)
		ep_disable(ep);
	(void)fi_close(&ep->tcp->fid);
	if (ep->tcp_cq && ep->tcp_cq != ep->cq->tcp)
		(void)fi_close(&ep->tcp_cq->fid);
	while (ep->ops) {
		struct face_op *op = ep->ops;

		ep->ops = op->next;
		if (face_control.late)
			tell_late(ep->cq, op);
		op_gone(ep, op);
		op->ep = NULL;
		op->next = ep->cq->ended;
		ep->cq->ended = op;
	}
	face_unlock();
	free(ep);
	return 0;
}

static int ep_getname(fid_t fid, void *out, size_t *bytes)
{
	const struct face_ep *ep = (struct face_ep *)fid;
	size_t room = *bytes;

	*bytes = sizeof(ep->name);
	if (room < sizeof(ep->name))
		return -FI_ETOOSMALL;
	memcpy(out, &ep->name, sizeof(ep->name));
	return 0;
}

static struct fi_ops ep_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = ep_close,
	.bind = ep_bind,
	.control = ep_control,
};

static struct fi_ops_ep ep_ops = {
	.size = sizeof(struct fi_ops_ep),
	.getopt = face_ep_getopt,
	.setopt = face_ep_setopt,
};

static struct fi_ops_cm cm_ops = { .size = sizeof(struct fi_ops_cm), .getname = ep_getname };

static struct fi_ops_rma rma_ops = {
	.size = sizeof(struct fi_ops_rma),
	.readmsg = readmsg,
	.writemsg = writemsg,
};

int face_ep_open(struct fid_domain *domain, struct fi_info *info, struct fid_ep **out, void *context)
{
	struct face_ep *ep = calloc(1, sizeof(*ep));
	int rc;

	(void)info;
	if (!ep)
		return -FI_ENOMEM;
	ep->domain = (struct face_domain *)domain;
	ep->last = &ep->ops;
	ep->inject = ep->domain->fabric->direct ? face_control.inject : 0;
	rc = fi_endpoint(ep->domain->tcp, ep->domain->info, &ep->tcp, NULL);
	if (rc) {
		free(ep);
		return rc;
	}
	ep->fid = (struct fid_ep){
		.fid = { .fclass = FI_CLASS_EP, .context = context, .ops = &ep_fid_ops },
		.ops = &ep_ops,
		.cm = &cm_ops,
		.rma = &rma_ops,
	};
	*out = &ep->fid;
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sending. A post is noted down; the next pass hands all that is noted to the kernel at once, straight from the memory that it is in.
 * Where the stream stands is one number: so many bytes of the oldest frame, or of the control message, have gone. The two never mix:
 * a control message goes out between frames.
 */
#include <errno.h>
#include <string.h>

#include "tcp.h"

#define BATCH_BYTES (1u << 20)   /* in one call */
#define SLICE_BYTES (256u << 10) /* of what a read has asked for, in one message */

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

void tfd_tcp_send_soon(struct tfd_half *half)
{
	if (half->fd >= 0 && !half->blocked && tfd_list_empty(&half->send_link))
		tfd_list_push(&half->domain->sending, &half->send_link);
}

/* ---- posting ---- */

static int post_check(const struct tfd_half *half, const struct tfd_post *post, uint64_t *total)
{
	if (half->lost || half->deaf)
		return -ENOTCONN;
	*total = post->length;
	for (uint32_t i = 0; i < post->part_count; i++)
		*total += post->parts[i].length;
	if (*total > TFD_TCP_TOTAL_MAX || post->part_count >= TFD_TCP_PARTS_MAX)
		return -EMSGSIZE;
	if (post->part_count && (post->read || !post->length))
		return -EINVAL;
	return post->read && post->length && !post->mr->writable ? -EACCES : 0;
}

static bool has_room(const struct tfd_half *half, const struct tfd_post *post)
{
	const struct tfd_tcp_send *send = &half->send;

	if (!half->started || !half->greeted || send->tail - send->head == TFD_TCP_FRAMES ||
	    post->part_count > TFD_TCP_PARTS - (send->part_tail - send->part_head))
		return false;
	return post->read ? send->reads - send->reads_told < TFD_TCP_READS :
	                    send->writes - send->writes_told < TFD_TCP_WRITES;
}

static void parts_add(struct tfd_tcp_send *send, const struct tfd_post *post)
{
	for (uint32_t i = 0; i < post->part_count; i++) {
		uint32_t at = send->part_tail++ % TFD_TCP_PARTS;

		send->part_local[at] = post->parts[i].local;
		send->part_remote[at] = (struct tfd_tcp_range){ .address = post->parts[i].remote_address,
		                                                .length = post->parts[i].length };
	}
}

int tfd_tcp_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_tcp_send *send = &half->send;
	struct tfd_tcp_frame *frame;
	uint64_t total;
	int rc = post_check(half, post, &total);

	if (rc)
		return rc;
	if (!has_room(half, post))
		return -EAGAIN;
	frame = &send->frames[send->tail++ % TFD_TCP_FRAMES];
	frame->header = (struct tfd_tcp_header){ .magic = TFD_TCP_MAGIC,
	                                         .type = post->read ? TFD_TCP_READ : TFD_TCP_WRITE,
	                                         .flags = post->has_imm ? TFD_TCP_HAS_IMM : 0,
	                                         .parts = (uint16_t)post->part_count,
	                                         .imm = post->has_imm ? post->imm : 0,
	                                         .key = post->remote_key,
	                                         .address = post->remote_address,
	                                         .length = post->length,
	                                         .total = total };
	frame->local = post->local;
	frame->first_part = send->part_tail;
	parts_add(send, post);
	if (post->read) {
		send->read_wrs[send->reads % TFD_TCP_READS] = (struct tfd_tcp_read){
			.wr = wr,
			.local = (uint8_t *)(uintptr_t)post->local,
			.broken = post->length ? post->mr->broken : NULL,
			.length = post->length,
		};
		frame->header.number = ++send->reads;
	} else {
		send->write_wrs[send->writes % TFD_TCP_WRITES] = wr;
		frame->header.number = ++send->writes;
	}
	tfd_tcp_send_soon(half);
	return 0;
}

/* ---- what goes out ---- */

/* A list of ranges that goes to the kernel; `skip` bytes of what is added first have gone already. */
struct batch {
	struct iovec *iov;
	uint32_t count;
	uint64_t bytes;
	uint64_t skip;
};

static bool batch_full(const struct batch *batch)
{
	return batch->count == TFD_TCP_IOVS || batch->bytes >= BATCH_BYTES;
}

static void batch_add(struct batch *batch, const void *base, uint64_t length)
{
	if (batch->skip >= length) {
		batch->skip -= length;
		return;
	}
	if (batch_full(batch))
		return;
	length = smaller(length - batch->skip, BATCH_BYTES - batch->bytes);
	batch->iov[batch->count++] =
		(struct iovec){ .iov_base = (uint8_t *)(uintptr_t)base + batch->skip, .iov_len = length };
	batch->bytes += length;
	batch->skip = 0;
}

static uint64_t frame_bytes(const struct tfd_tcp_frame *frame)
{
	const struct tfd_tcp_header *header = &frame->header;

	return sizeof(*header) + header->parts * sizeof(struct tfd_tcp_range) +
	       (header->type == TFD_TCP_WRITE ? header->total : 0);
}

static void frame_add(const struct tfd_tcp_send *send, const struct tfd_tcp_frame *frame, struct batch *batch)
{
	uint32_t parts = frame->header.parts;
	uint32_t at = frame->first_part % TFD_TCP_PARTS;
	uint32_t straight = parts < TFD_TCP_PARTS - at ? parts : TFD_TCP_PARTS - at;

	batch_add(batch, &frame->header, sizeof(frame->header));
	if (frame->header.type != TFD_TCP_WRITE)
		return;
	if (parts) { /* the table lies in a ring */
		batch_add(batch, &send->part_remote[at], straight * sizeof(struct tfd_tcp_range));
		batch_add(batch, send->part_remote, (parts - straight) * sizeof(struct tfd_tcp_range));
	}
	batch_add(batch, frame->local, frame->header.length);
	for (uint32_t i = 0; i < parts && !batch_full(batch); i++) {
		at = (frame->first_part + i) % TFD_TCP_PARTS;
		batch_add(batch, send->part_local[at], send->part_remote[at].length);
	}
}

/* -EACCES: the memory that the far side is being given is gone. */
static int control_add(struct tfd_half *half, struct batch *batch)
{
	const struct tfd_tcp_control *control = &half->send.control;
	const struct tfd_mr *mr;

	if (!control->bytes)
		return 0;
	batch->skip = control->sent;
	batch_add(batch, &control->hello, control->bytes);
	if (!control->length)
		return 0;
	mr = tfd_mr_find_hot(&half->domain->memory, control->key);
	if (!mr)
		return -EACCES;
	batch_add(batch, mr->base + control->address, control->length);
	return 0;
}

void tfd_tcp_hello_queue(struct tfd_half *half)
{
	struct tfd_tcp_control *control = &half->send.control;

	control->hello = half->far;
	control->bytes = sizeof(control->hello);
	control->length = control->sent = 0;
	tfd_tcp_send_soon(half);
}

static void slice_make(struct tfd_half *half)
{
	struct tfd_tcp_control *control = &half->send.control;
	struct tfd_tcp_receive *receive = &half->receive;
	struct tfd_tcp_request *request = &receive->requests[receive->reads_answered % TFD_TCP_READS];

	control->header.type = TFD_TCP_DATA;
	control->header.number = receive->reads_answered + 1;
	control->key = request->key;
	control->address = request->address + request->sent;
	control->length = smaller(request->length - request->sent, SLICE_BYTES);
	control->header.length = control->header.total = control->length;
	request->sent += control->length;
	if (request->sent == request->length)
		receive->reads_answered++;
}

/* What is to be said beside the frames, if it is said in this call: an acknowledgement rides on a frame where one begins. */
static void control_make(struct tfd_half *half)
{
	struct tfd_tcp_send *send = &half->send;
	struct tfd_tcp_control *control = &send->control;
	const struct tfd_tcp_receive *receive = &half->receive;
	bool rides = send->tail - send->head > (send->sent != 0);

	if (control->bytes || !half->started)
		return;
	*control = (struct tfd_tcp_control){ .header = { .magic = TFD_TCP_MAGIC, .type = TFD_TCP_ACK } };
	if (receive->refused) {
		control->header.type = TFD_TCP_REFUSED;
		control->header.flags = receive->refused_read ? TFD_TCP_OF_READ : 0;
		control->header.number = receive->refused;
	} else if (receive->reads_answered < receive->reads) {
		slice_make(half);
	} else if (rides || send->acked_out == receive->writes) {
		return;
	}
	control->bytes = sizeof(control->header);
}

static bool control_begins(const struct tfd_tcp_control *control)
{
	return control->bytes == sizeof(control->header) && !control->sent;
}

/* The rest of the frame that has begun; the control message; whole frames. */
static int batch_make(struct tfd_half *half, struct batch *batch)
{
	struct tfd_tcp_send *send = &half->send;
	uint32_t at = send->head;
	int rc;

	control_make(half);
	if (send->sent) {
		batch->skip = send->sent;
		frame_add(send, &send->frames[at++ % TFD_TCP_FRAMES], batch);
	}
	batch->skip = 0;
	if (control_begins(&send->control))
		send->control.header.ack = half->receive.writes;
	rc = control_add(half, batch);
	if (rc || half->receive.refused || !half->greeted)
		return rc;
	for (; at != send->tail && !batch_full(batch); at++) {
		struct tfd_tcp_frame *frame = &send->frames[at % TFD_TCP_FRAMES];

		frame->header.ack = half->receive.writes;
		batch->skip = 0;
		frame_add(send, frame, batch);
	}
	return 0;
}

/* ---- what has gone out ---- */

static uint64_t frame_sent(struct tfd_half *half, uint64_t count)
{
	struct tfd_tcp_send *send = &half->send;
	const struct tfd_tcp_frame *frame = &send->frames[send->head % TFD_TCP_FRAMES];
	uint64_t left = frame_bytes(frame) - send->sent;

	if (!send->sent && count)
		send->acked_out = frame->header.ack;
	if (count < left) {
		send->sent += count;
		return 0;
	}
	send->sent = 0;
	send->head++;
	send->part_head += frame->header.parts;
	if (frame->header.type == TFD_TCP_WRITE)
		send->writes_sent++;
	else
		send->reads_sent++;
	return count - left;
}

static uint64_t control_sent(struct tfd_half *half, uint64_t count)
{
	struct tfd_tcp_control *control = &half->send.control;
	uint64_t left = control->bytes + control->length - control->sent;

	if (control_begins(control) && count)
		half->send.acked_out = control->header.ack;
	if (count < left) {
		control->sent += count;
		return 0;
	}
	if (control->bytes == sizeof(control->header) && control->header.type == TFD_TCP_REFUSED)
		half->deaf = true;
	control->bytes = 0;
	return count - left;
}

static void advance(struct tfd_half *half, uint64_t count)
{
	if (half->send.sent)
		count = frame_sent(half, count);
	if (half->send.sent)
		return;
	if (half->send.control.bytes)
		count = control_sent(half, count);
	while (count)
		count = frame_sent(half, count);
}

static bool has_more(const struct tfd_half *half)
{
	const struct tfd_tcp_send *send = &half->send;

	if (half->deaf)
		return false;
	return send->control.bytes || (half->greeted && send->head != send->tail) ||
	       (half->started && (half->receive.refused || send->acked_out != half->receive.writes ||
	                          half->receive.reads_answered < half->receive.reads));
}

uint64_t tfd_tcp_flush(struct tfd_half *half)
{
	struct batch batch = { .iov = half->domain->iov };
	struct msghdr message = { .msg_iov = batch.iov };
	ssize_t count = 0;
	int rc;

	tfd_list_remove(&half->send_link);
	if (!has_more(half))
		return 0;
	rc = batch_make(half, &batch);
	if (rc) {
		tfd_tcp_half_lose(half, -rc);
		return 0;
	}
	message.msg_iovlen = batch.count;
	do
		count = sendmsg(half->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (count < 0 && errno == EINTR);
	if (count < 0 && errno == EAGAIN) {
		half->blocked = true;
		return 0;
	}
	if (count < 0) { /* EFAULT: pages of ours were taken away */
		tfd_tcp_half_lose(half, errno);
		return 0;
	}
	advance(half, (uint64_t)count);
	if (has_more(half))
		tfd_tcp_send_soon(half);
	return (uint64_t)count;
}

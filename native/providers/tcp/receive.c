/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Receiving. One call of the kernel fills what is left of the message that is coming in, where it belongs, and then a small buffer with
 * the beginning of what follows. Nothing that the far side says is believed: a table is checked as a whole before a byte of its payload
 * is taken, and the key is looked up anew in every pass, since the memory may be gone.
 */
#include <errno.h>
#include <string.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "tcp.h"

#define CALL_BYTES (512u << 10) /* of payload, in one call */
#define LARGE_BYTES (64u << 10) /* what follows such a message goes through the buffer as little as can be */

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static void garbled(struct tfd_half *half)
{
	half->garbled = true;
	tfd_tcp_half_lose(half, EPROTO);
}

/* ---- what a message may be ---- */

static bool ack_take(struct tfd_half *half, uint64_t ack)
{
	/* What is not with the kernel to the last byte cannot have landed. */
	if (ack < half->send.writes_acked || ack > half->send.writes_sent)
		return false;
	half->send.writes_acked = ack;
	return true;
}

static bool write_fits(const struct tfd_half *half, const struct tfd_tcp_header *header)
{
	return header->number == half->receive.writes + 1 && header->parts < TFD_TCP_PARTS_MAX &&
	       !(header->flags & ~TFD_TCP_HAS_IMM) && header->total <= TFD_TCP_TOTAL_MAX &&
	       (header->parts ? header->length != 0 : header->length == header->total);
}

static bool read_fits(const struct tfd_half *half, const struct tfd_tcp_header *header)
{
	const struct tfd_tcp_receive *receive = &half->receive;

	return header->number == receive->reads + 1 && !header->parts && !header->flags &&
	       receive->reads - receive->reads_answered < TFD_TCP_READS && header->length == header->total &&
	       header->total <= TFD_TCP_TOTAL_MAX;
}

static bool data_fits(const struct tfd_half *half, const struct tfd_tcp_header *header)
{
	const struct tfd_tcp_send *send = &half->send;
	const struct tfd_tcp_read *read = &send->read_wrs[send->reads_landed % TFD_TCP_READS];

	return header->number == send->reads_landed + 1 && header->number <= send->reads_sent &&
	       !header->parts && !header->flags && header->length == header->total &&
	       header->total <= read->length - read->landed && (header->total || !read->length);
}

static bool refusal_fits(const struct tfd_half *half, const struct tfd_tcp_header *header)
{
	const struct tfd_tcp_send *send = &half->send;
	bool read = header->flags & TFD_TCP_OF_READ;

	return !header->parts && !(header->flags & ~TFD_TCP_OF_READ) && !header->total &&
	       header->number > (read ? send->reads_landed : send->writes_acked) &&
	       header->number <=
	               (read ? send->reads : send->writes); /* perhaps refused before it was sent whole */
}

static bool reaches(const struct tfd_mr *mr, uint64_t address, uint64_t length)
{
	return address <= mr->length && length <= mr->length - address;
}

/* It lands nothing more: says so once, and waits for the far side to go. */
static void refuse(struct tfd_half *half, uint64_t number, bool read)
{
	half->receive.refused = number;
	half->receive.refused_read = read;
	tfd_tcp_send_soon(half);
}

static void request_take(struct tfd_half *half, const struct tfd_tcp_header *header)
{
	struct tfd_tcp_receive *receive = &half->receive;
	const struct tfd_mr *mr;

	if (header->total) {
		mr = tfd_mr_find_hot(&half->domain->memory, header->key);
		if (!mr || !mr->readable || !reaches(mr, header->address, header->length)) {
			refuse(half, header->number, true);
			return;
		}
	}
	receive->requests[receive->reads++ % TFD_TCP_READS] = (struct tfd_tcp_request){
		.key = header->key, .address = header->address, .length = header->length
	};
	tfd_tcp_send_soon(half);
}

/* All ranges of a write, before a byte of it lands. */
static void table_check(struct tfd_half *half)
{
	struct tfd_tcp_receive *receive = &half->receive;
	const struct tfd_tcp_header *header = &receive->header;
	const struct tfd_mr *mr;
	uint64_t sum = 0;

	if (!header->total && !header->parts)
		return;
	mr = tfd_mr_find_hot(&half->domain->memory, header->key);
	for (uint32_t i = 0; i < receive->range_count; i++) {
		const struct tfd_tcp_range *range = &receive->ranges[i];

		if (!range->length || range->length > header->total) {
			garbled(half);
			return;
		}
		if (!mr || !mr->writable || !reaches(mr, range->address, range->length)) {
			refuse(half, header->number, false);
			return;
		}
		sum += range->length;
	}
	if (sum != header->total)
		garbled(half);
}

static void payload_begin(struct tfd_tcp_receive *receive)
{
	receive->state = TFD_TCP_PAYLOAD_NEXT;
	receive->left = receive->header.total;
	receive->range = 0;
	receive->range_landed = 0;
}

static void header_take(struct tfd_half *half, const struct tfd_tcp_header *header)
{
	struct tfd_tcp_receive *receive = &half->receive;
	const struct tfd_tcp_send *send = &half->send;
	const struct tfd_tcp_read *read;

	if (header->magic != TFD_TCP_MAGIC || header->_zero || !ack_take(half, header->ack)) {
		garbled(half);
		return;
	}
	receive->header = *header;
	receive->ranges[0] = (struct tfd_tcp_range){ .address = header->address, .length = header->length };
	receive->range_count = 1;
	if (header->type == TFD_TCP_WRITE && write_fits(half, header)) {
		receive->state = TFD_TCP_TABLE_NEXT;
	} else if (header->type == TFD_TCP_READ && read_fits(half, header)) {
		request_take(half, header);
	} else if (header->type == TFD_TCP_DATA && data_fits(half, header)) {
		read = &send->read_wrs[send->reads_landed % TFD_TCP_READS];
		receive->ranges[0].address = (uint64_t)(uintptr_t)(read->local + read->landed);
		payload_begin(receive);
	} else if (header->type == TFD_TCP_REFUSED && refusal_fits(half, header)) {
		half->send.refused = header->number;
		half->send.refused_read = header->flags & TFD_TCP_OF_READ;
		tfd_tcp_half_lose(half, ECONNRESET);
	} else if (header->type != TFD_TCP_ACK || header->flags || header->parts || header->total) {
		garbled(half);
	}
}

static void hello_take(struct tfd_half *half, const struct tfd_tcp_hello *hello)
{
	if (hello->magic != TFD_TCP_MAGIC || hello->number != half->number ||
	    memcmp(hello->token, half->token, sizeof(half->token)) != 0) {
		garbled(half);
		return;
	}
	half->greeted = true;
	half->receive.state = TFD_TCP_HEADER_NEXT;
	tfd_tcp_send_soon(half);
}

/* ---- landing ---- */

/* Where the payload goes. */
struct target {
	uintptr_t base; /* the ranges count from here */
	const uint32_t *broken; /* as of its tfd_mr */
};

/* False: the memory is gone. */
static bool target_find(struct tfd_half *half, struct target *target)
{
	const struct tfd_tcp_header *header = &half->receive.header;
	const struct tfd_tcp_send *send = &half->send;
	const struct tfd_mr *mr;

	*target = (struct target){ 0 };
	if (half->receive.state != TFD_TCP_PAYLOAD_NEXT || !header->total)
		return true;
	if (header->type == TFD_TCP_DATA) {
		target->broken = send->read_wrs[send->reads_landed % TFD_TCP_READS].broken;
		return true;
	}
	mr = tfd_mr_find_hot(&half->domain->memory, header->key);
	if (!mr)
		return false;
	*target = (struct target){ .base = (uintptr_t)mr->base, .broken = mr->broken };
	return true;
}

static bool is_broken(const struct target *target)
{
	return target->broken && tfd_load_seq(target->broken);
}

static void landed(struct tfd_tcp_receive *receive, uint64_t count)
{
	receive->left -= count;
	while (count) {
		uint64_t rest = receive->ranges[receive->range].length - receive->range_landed;

		if (count < rest) {
			receive->range_landed += count;
			return;
		}
		count -= rest;
		receive->range++;
		receive->range_landed = 0;
	}
}

/* From the buffer; a page that its owner has taken away costs the connection, as it does where the kernel copies. */
static void copy_in(struct tfd_half *half, const struct target *target)
{
	struct tfd_tcp_receive *receive = &half->receive;
	bool was_broken = is_broken(target);

	while (receive->left && receive->begin < receive->end) {
		const struct tfd_tcp_range *range = &receive->ranges[receive->range];
		uint64_t count =
			smaller(range->length - receive->range_landed, receive->end - receive->begin);

		memcpy((void *)(target->base + range->address + receive->range_landed),
		       receive->buffer + receive->begin, count);
		receive->begin += (uint32_t)count;
		landed(receive, count);
	}
	if (is_broken(target) && !was_broken)
		tfd_tcp_half_lose(half, EFAULT);
}

static void message_done(struct tfd_half *half, struct tfd_tcp_out *out)
{
	struct tfd_tcp_receive *receive = &half->receive;
	struct tfd_tcp_send *send = &half->send;
	struct tfd_tcp_read *read;

	receive->state = TFD_TCP_HEADER_NEXT;
	if (receive->header.type == TFD_TCP_DATA) {
		read = &send->read_wrs[send->reads_landed % TFD_TCP_READS];
		read->landed += receive->header.total;
		if (read->landed == read->length)
			send->reads_landed++;
		return;
	}
	receive->writes++;
	tfd_tcp_send_soon(
		half); /* acknowledged in the next pass: the core may have something that it can ride on */
	if (receive->header.flags & TFD_TCP_HAS_IMM)
		tfd_tcp_tell(out, &(struct tfd_wc){ .type = TFD_WC_IMM,
		                                    .imm = receive->header.imm,
		                                    .owner = half->owner });
}

static bool speaks(const struct tfd_half *half)
{
	return !half->lost && !half->receive.refused;
}

/* The next `bytes` of the buffer, if they are all there. */
static const void *take(struct tfd_tcp_receive *receive, uint32_t bytes, void *copy)
{
	if (receive->end - receive->begin < bytes)
		return NULL;
	memcpy(copy, receive->buffer + receive->begin, bytes);
	receive->begin += bytes;
	return copy;
}

/* One step with what the buffer holds; false: more is needed first, or room for what there is to tell. */
static bool step(struct tfd_half *half, struct tfd_tcp_out *out)
{
	struct tfd_tcp_receive *receive = &half->receive;
	struct tfd_tcp_header header;
	struct tfd_tcp_hello hello;
	struct target target;

	switch (receive->state) {
	case TFD_TCP_HELLO_NEXT:
		if (!take(receive, sizeof(hello), &hello))
			return false;
		hello_take(half, &hello);
		return true;
	case TFD_TCP_HEADER_NEXT:
		if (!take(receive, sizeof(header), &header))
			return false;
		header_take(half, &header);
		return true;
	case TFD_TCP_TABLE_NEXT:
		if (!take(receive, receive->header.parts * (uint32_t)sizeof(struct tfd_tcp_range),
		          &receive->ranges[1]))
			return false;
		receive->range_count = receive->header.parts + 1u;
		table_check(half);
		payload_begin(receive);
		return true;
	default:
		if (!target_find(half, &target))
			refuse(half, receive->header.number, false);
		else
			copy_in(half, &target);
		if (!speaks(half))
			return false;
		if (receive->left || (receive->header.flags & TFD_TCP_HAS_IMM && !tfd_tcp_room(out)))
			return false;
		message_done(half, out);
		return true;
	}
}

/* ---- from the kernel ---- */

/* What is left of the payload, as much as one call takes; then, if that is all of it, the buffer. */
static uint64_t targets_make(struct tfd_half *half, uintptr_t base, uint32_t *count, uint64_t *payload)
{
	struct tfd_tcp_receive *receive = &half->receive;
	struct iovec *iov = half->domain->iov;
	uint32_t range = receive->range;
	uint64_t skip = receive->range_landed;
	uint64_t room = sizeof(receive->buffer) - receive->end;
	uint32_t used = 0;

	*payload = 0;
	if (receive->state == TFD_TCP_PAYLOAD_NEXT) {
		uint64_t most = smaller(receive->left, CALL_BYTES);

		for (; *payload < most; range++, skip = 0) {
			const struct tfd_tcp_range *at = &receive->ranges[range];
			uint64_t length = smaller(at->length - skip, most - *payload);

			iov[used++] = (struct iovec){ .iov_base = (void *)(base + at->address + skip),
			                              .iov_len = length };
			*payload += length;
		}
		if (receive->header.total >= LARGE_BYTES)
			room = smaller(room, sizeof(receive->header) +
			                             receive->header.parts * sizeof(struct tfd_tcp_range));
	}
	if (*payload < receive->left && receive->state == TFD_TCP_PAYLOAD_NEXT)
		room = 0;
	else
		iov[used++] = (struct iovec){ .iov_base = receive->buffer + receive->end, .iov_len = room };
	*count = used;
	return *payload + room;
}

static void buffer_pack(struct tfd_tcp_receive *receive)
{
	uint32_t held = receive->end - receive->begin;

	if (!receive->begin)
		return;
	memmove(receive->buffer, receive->buffer + receive->begin, held);
	receive->begin = 0;
	receive->end = held;
}

enum came {
	CAME_ALL, /* no more for now: an event will tell */
	CAME_PART, /* perhaps no more for now: only the next call tells */
	CAME_ENOUGH, /* as much as was asked for */
};

static enum came came_of(const struct tfd_half *half, uint64_t count, uint64_t asked, uint64_t payload)
{
	if (count == asked)
		return CAME_ENOUGH;
	/*
	 * In the midst of a payload fewer bytes than asked for may also mean a page that is gone, and after a hang-up the end: only the
	 * next call tells, and no event would come.
	 */
	return count < payload || half->hung_up ? CAME_PART : CAME_ALL;
}

static enum came call(struct tfd_half *half, uint64_t *total)
{
	struct tfd_tcp_receive *receive = &half->receive;
	struct msghdr message = { .msg_iov = half->domain->iov };
	uint64_t payload, asked, count;
	struct target target;
	uint32_t iovs;
	ssize_t rc;

	if (!target_find(half, &target)) {
		refuse(half, receive->header.number, false);
		return CAME_ALL;
	}
	buffer_pack(receive);
	asked = targets_make(half, target.base, &iovs, &payload);
	message.msg_iovlen = iovs;
	do
		rc = recvmsg(half->fd, &message, MSG_DONTWAIT);
	while (rc < 0 && errno == EINTR);
	if (rc < 0 && errno == EAGAIN)
		return CAME_ALL;
	if (rc <= 0) { /* EFAULT: pages of ours were taken away */
		tfd_tcp_half_lose(half, rc ? errno : ECONNRESET);
		return CAME_ALL;
	}
	count = (uint64_t)rc;
	*total += count;
	landed(receive, smaller(count, payload));
	if (count > payload)
		receive->end += (uint32_t)(count - payload);
	return came_of(half, count, asked, payload);
}

/* A message has landed that there is no room to tell of. */
static bool stalled(const struct tfd_half *half)
{
	return half->receive.state == TFD_TCP_PAYLOAD_NEXT && !half->receive.left;
}

uint64_t tfd_tcp_half_receive(struct tfd_half *half, struct tfd_tcp_out *out)
{
	enum came came = CAME_ENOUGH;
	uint64_t total = 0;

	half->drained = false;
	for (;;) {
		while (speaks(half) && step(half, out))
			continue;
		if (!speaks(half) || stalled(half) || came != CAME_ENOUGH || total >= CALL_BYTES)
			break;
		came = call(half, &total);
	}
	half->drained = !speaks(half) || (came == CAME_ALL && !stalled(half));
	return total;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tcp provider: kernel sockets, a connection for each pair of halves. A pass sends what is noted down, asks which sockets have
 * something, and takes it in, within bounds and by turns.
 */
#include <errno.h>
#include <sys/epoll.h>

#include "../../core/parts.h"
#include "tcp.h"

#define EVENTS 64
#define PASS_BYTES \
	(1u << 20) /* taken in, and sent, by one pass, of all halves: rings and other rails wait meanwhile */
#define SENDS 256 /* calls of the kernel for that */
/* While halves are being read, events are asked for after so many bytes, or passes: what is small must not wait behind what is long. */
#define LOOK_BYTES (128u << 10)
#define LOOKS 8u

static void half_event(struct tfd_half *half, uint32_t events)
{
	if (half->fd < 0)
		return;
	if (events & EPOLLOUT) {
		half->blocked = false;
		tfd_tcp_send_soon(half);
	}
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		half->hung_up = true;
	if (tfd_list_empty(&half->ready_link))
		tfd_list_push(&half->domain->ready, &half->ready_link);
}

static void events_take(struct tfd_domain *domain)
{
	struct epoll_event events[EVENTS];
	int count = epoll_wait(domain->epoll_fd, events, EVENTS, 0);

	domain->unlooked_bytes = 0;
	for (int i = 0; i < count; i++) {
		struct tfd_tcp_watch *watch = events[i].data.ptr;

		if (watch->kind == TFD_TCP_HALF)
			half_event(tfd_container(watch, struct tfd_half, watch), events[i].events);
		else if (watch->kind == TFD_TCP_STRANGER)
			tfd_tcp_stranger_read(domain, tfd_container(watch, struct tfd_tcp_stranger, watch));
		else
			tfd_tcp_accept(domain);
	}
}

/* By turns: one that has more goes behind the others. */
static void send_all(struct tfd_domain *domain)
{
	uint64_t bytes = 0;

	for (int i = 0; i < SENDS && bytes < PASS_BYTES && !tfd_list_empty(&domain->sending); i++)
		bytes += tfd_tcp_flush(tfd_container(domain->sending.next, struct tfd_half, send_link));
}

/* Whether it has to have another turn without an event. */
static bool half_turn(struct tfd_half *half, struct tfd_tcp_out *out, uint64_t *bytes)
{
	bool told;

	if (half->fd >= 0)
		*bytes += tfd_tcp_half_receive(half, out);
	if (half->receive.refused && half->hung_up)
		tfd_tcp_half_lose(half, ECONNRESET);
	told = tfd_tcp_half_tell(half, out);
	return !told || (half->fd >= 0 && !half->drained);
}

static void receive_all(struct tfd_domain *domain, struct tfd_tcp_out *out)
{
	struct tfd_list *last = domain->ready.prev;
	uint64_t bytes = 0;

	while (!tfd_list_empty(&domain->ready) && bytes < PASS_BYTES && tfd_tcp_room(out)) {
		struct tfd_list *link = domain->ready.next;
		struct tfd_half *half = tfd_container(link, struct tfd_half, ready_link);

		tfd_list_remove(link);
		if (half_turn(half, out, &bytes) && tfd_list_empty(link))
			tfd_list_push(&domain->ready, link);
		if (link == last)
			break;
	}
	domain->unlooked_bytes += bytes;
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct tfd_tcp_out out = { .wc = wc, .max = max };

	tfd_memory_pass_begin(&domain->memory);
	send_all(domain);
	if (tfd_list_empty(&domain->ready) || domain->unlooked_bytes >= LOOK_BYTES ||
	    ++domain->passes % LOOKS == 0)
		events_take(domain);
	receive_all(domain, &out);
	tfd_tcp_strangers_check(domain);
	tfd_memory_pass_end(&domain->memory);
	return out.count;
}

static int wait_fd(struct tfd_domain *domain)
{
	return domain->epoll_fd;
}

/* Of what is not noted down here, the epoll knows. */
static int arm(struct tfd_domain *domain)
{
	return tfd_list_empty(&domain->sending) && tfd_list_empty(&domain->ready) ? 0 : -EAGAIN;
}

static int mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	const struct tfd_memory_range range = { address, length, access, 0, 0 };
	int rc = tfd_memory_add(&domain->memory, &range, out, error);

	if (!rc)
		*key = (struct tfd_region_key){ .key = (*out)->key };
	return rc;
}

static void mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	tfd_memory_remove(&domain->memory, mr);
}

const struct tfd_provider_ops tfd_tcp_ops = {
	.name = "tcp",
	.path_id = TFD_PATH_TCP,
	.domain_open = tfd_tcp_domain_open,
	.domain_close = tfd_tcp_domain_close,
	.mr_open = mr_open,
	.mr_close = mr_close,
	.half_open = tfd_tcp_half_open,
	.half_start = tfd_tcp_half_start,
	.half_close = tfd_tcp_half_close,
	.half_drain = tfd_tcp_half_drain,
	.half_free = tfd_tcp_half_free,
	.post = tfd_tcp_post,
	.poll = poll,
	.wait_fd = wait_fd,
	.arm = arm,
};

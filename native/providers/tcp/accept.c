/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Strangers: accepted connections that have not said yet which half they mean. Anybody may connect; who does not show the token of a
 * half in time is closed, and nobody notices.
 */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "../../core/parts.h"
#include "tcp.h"

#define HELLO_BOUND_NS 5000000000u
#define NO_FD_PAUSE_NS 100000000u
#define ACCEPTS 16 /* in one pass */

static void stranger_close(struct tfd_domain *domain, struct tfd_tcp_stranger *stranger)
{
	(void)epoll_ctl(domain->epoll_fd, EPOLL_CTL_DEL, stranger->fd, NULL); /* as that of a half */
	(void)close(stranger->fd);
	stranger->fd = -1;
	domain->stranger_count--;
}

/* A free place, or that of the one who has been silent for longest. */
static struct tfd_tcp_stranger *place_find(struct tfd_domain *domain)
{
	struct tfd_tcp_stranger *oldest = &domain->strangers[0];

	for (uint32_t i = 0; i < TFD_TCP_STRANGERS; i++) {
		struct tfd_tcp_stranger *stranger = &domain->strangers[i];

		if (stranger->fd < 0)
			return stranger;
		if (stranger->deadline_ns < oldest->deadline_ns)
			oldest = stranger;
	}
	stranger_close(domain, oldest);
	return oldest;
}

static void stranger_open(struct tfd_domain *domain, int fd)
{
	struct tfd_tcp_stranger *stranger = place_find(domain);
	struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.ptr = &stranger->watch };

	if (epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
		(void)close(fd);
		return;
	}
	stranger->fd = fd;
	stranger->bytes = 0;
	stranger->deadline_ns = tfd_now_ns() + HELLO_BOUND_NS;
	domain->stranger_count++;
}

static void listen_watch(struct tfd_domain *domain, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.ptr = &domain->listener };

	(void)epoll_ctl(domain->epoll_fd, EPOLL_CTL_MOD, domain->listen_fd, &event);
}

void tfd_tcp_accept(struct tfd_domain *domain)
{
	for (int i = 0; i < ACCEPTS; i++) {
		int fd = accept4(domain->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			stranger_open(domain, fd);
			continue;
		}
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
			/* It stays readable: looked at again later, or the worker would never sleep. */
			domain->accept_ns = tfd_now_ns() + NO_FD_PAUSE_NS;
			listen_watch(domain, 0);
		}
		if (errno != EINTR && errno != ECONNABORTED)
			return;
	}
}

/* NULL: nobody, or one that is connected already. */
static struct tfd_half *half_named(struct tfd_domain *domain, const struct tfd_tcp_hello *hello)
{
	struct tfd_half *half = hello->number < domain->number_count ? domain->numbers[hello->number] : NULL;

	if (hello->magic != TFD_TCP_MAGIC || !half || half->outgoing || half->fd >= 0 || half->lost)
		return NULL;
	return memcmp(half->token, hello->token, sizeof(half->token)) == 0 ? half : NULL;
}

void tfd_tcp_stranger_read(struct tfd_domain *domain, struct tfd_tcp_stranger *stranger)
{
	struct tfd_half *half;
	ssize_t count;

	while (stranger->fd >= 0 && stranger->bytes < sizeof(stranger->hello)) {
		count = recv(stranger->fd, (uint8_t *)&stranger->hello + stranger->bytes,
		             sizeof(stranger->hello) - stranger->bytes, 0);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0 && errno == EAGAIN)
			return;
		if (count <= 0) {
			stranger_close(domain, stranger);
			return;
		}
		stranger->bytes += (uint32_t)count;
	}
	if (stranger->fd < 0)
		return;
	half = half_named(domain, &stranger->hello);
	if (!half) {
		stranger_close(domain, stranger);
		return;
	}
	tfd_tcp_half_attach(half, stranger->fd);
	stranger->fd = -1;
	domain->stranger_count--;
}

void tfd_tcp_strangers_check(struct tfd_domain *domain)
{
	uint64_t now;

	if (!domain->stranger_count && !domain->accept_ns)
		return;
	now = tfd_now_ns();
	if (domain->accept_ns && now >= domain->accept_ns) {
		domain->accept_ns = 0;
		listen_watch(domain, EPOLLIN);
	}
	for (uint32_t i = 0; i < TFD_TCP_STRANGERS && domain->stranger_count; i++) {
		if (domain->strangers[i].fd >= 0 && now >= domain->strangers[i].deadline_ns)
			stranger_close(domain, &domain->strangers[i]);
	}
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A half: one end of a TCP connection of its own. The outgoing one connects, from its rail's address, and each greets the other with
 * the token that it was told. Closing the socket is what destroying a queue pair is to verbs.
 */
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

#include "../../core/parts.h"
#include "tcp.h"

/*
 * To a far side on this host: what the kernel holds is read while it is still in the cache (tcp/README.md). The kernel takes twice as
 * much; by default it allows no more than this (net.core.wmem_max).
 */
#define NEAR_SEND_BYTES 212992
#define NUMBERS_FIRST 64u
#define NUMBERS_MAX (1u << 20)

/* On the peer service. */
struct half_address {
	char protocol[TFD_NAME_MAX];
	uint32_t number;
	uint16_t family; /* 4 or 6 */
	uint16_t port;   /* in network order, as is `ip` */
	uint8_t token[TFD_TCP_TOKEN_BYTES];
	uint8_t ip[16];
};

_Static_assert(sizeof(struct half_address) == TFD_NAME_MAX + 40, "no padding goes out");

/* ---- numbers ---- */

static int numbers_grow(struct tfd_domain *domain)
{
	uint32_t count = domain->number_count ? 2 * domain->number_count : NUMBERS_FIRST;
	struct tfd_half **numbers;

	if (count > NUMBERS_MAX)
		return -ENOSPC;
	numbers = realloc(domain->numbers, count * sizeof(struct tfd_half *));
	if (!numbers)
		return -ENOMEM;
	memset(numbers + domain->number_count, 0, (count - domain->number_count) * sizeof(struct tfd_half *));
	domain->next_number = domain->number_count;
	domain->numbers = numbers;
	domain->number_count = count;
	return 0;
}

static int number_take(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	for (;;) {
		for (uint32_t i = 0; i < domain->number_count; i++) {
			uint32_t number = domain->next_number++ % domain->number_count;

			if (domain->numbers[number])
				continue;
			domain->numbers[number] = half;
			half->number = number;
			return 0;
		}
		if (numbers_grow(domain) != 0)
			return -ENOSPC;
	}
}

/* ---- its life ---- */

static void address_fill(const struct tfd_half *half, struct half_address *out)
{
	const struct sockaddr_in *four = (const void *)&half->domain->address;
	const struct sockaddr_in6 *six = (const void *)&half->domain->address;

	memset(out, 0, sizeof(*out));
	memcpy(out->protocol, TFD_TCP_PROTOCOL, sizeof(TFD_TCP_PROTOCOL));
	out->number = half->number;
	memcpy(out->token, half->token, sizeof(out->token));
	if (four->sin_family == AF_INET) {
		out->family = 4;
		out->port = four->sin_port;
		memcpy(out->ip, &four->sin_addr, sizeof(four->sin_addr));
	} else {
		out->family = 6;
		out->port = six->sin6_port;
		memcpy(out->ip, &six->sin6_addr, sizeof(six->sin6_addr));
	}
}

int tfd_tcp_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                      void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));
	struct half_address blob;

	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->watch.kind = TFD_TCP_HALF;
	half->domain = domain;
	half->owner = owner;
	half->outgoing = outgoing != 0;
	half->fd = -1;
	if (getrandom(half->token, sizeof(half->token), 0) != (ssize_t)sizeof(half->token)) {
		free(half);
		return tfd_fail(error, -EIO, "getrandom gave no token");
	}
	if (number_take(half) != 0) {
		free(half);
		return tfd_fail(error, -ENOSPC, "the rail has no room for another connection");
	}
	tfd_list_push(&domain->halves, &half->link);
	tfd_list_init(&half->send_link);
	tfd_list_init(&half->ready_link);
	address_fill(half, &blob);
	memcpy(address, &blob, sizeof(blob));
	*address_bytes = sizeof(blob);
	*out = half;
	return 0;
}

static int half_watch(struct tfd_half *half, int operation)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
	                             .data.ptr = &half->watch };

	return epoll_ctl(half->domain->epoll_fd, operation, half->fd, &event) ? -errno : 0;
}

static void ready(struct tfd_half *half)
{
	if (tfd_list_empty(&half->ready_link))
		tfd_list_push(&half->domain->ready, &half->ready_link);
}

static bool is_this_host(const struct tfd_domain *domain, const struct sockaddr_storage *far)
{
	const struct sockaddr_in *four = (const void *)far, *own = (const void *)&domain->address;
	const struct sockaddr_in6 *six = (const void *)far, *own_six = (const void *)&domain->address;

	if (far->ss_family == AF_INET)
		return ntohl(four->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET ||
		       four->sin_addr.s_addr == own->sin_addr.s_addr;
	return IN6_IS_ADDR_LOOPBACK(&six->sin6_addr) ||
	       IN6_ARE_ADDR_EQUAL(&six->sin6_addr, &own_six->sin6_addr);
}

static void socket_tune(const struct tfd_domain *domain, int fd, const struct sockaddr_storage *far)
{
	int on = 1, bytes = NEAR_SEND_BYTES;

	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)); /* messages are whole when we send */
	if (is_this_host(domain, far))
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/* From our rail's address, so that it is this rail that carries. */
static int connect_from(const struct tfd_domain *domain, int fd, const struct sockaddr_storage *to)
{
	struct sockaddr_storage from = domain->address;
	int on = 1;

	if (from.ss_family == AF_INET)
		((struct sockaddr_in *)(void *)&from)->sin_port = 0;
	else
		((struct sockaddr_in6 *)(void *)&from)->sin6_port = 0;
	(void)setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
	if (bind(fd, (const struct sockaddr *)&from, domain->address_bytes) != 0)
		return -errno;
	if (connect(fd, (const struct sockaddr *)to, domain->address_bytes) != 0 && errno != EINPROGRESS)
		return -errno;
	return 0;
}

/* What goes wrong here is this connection's loss: posts tell. */
static void half_connect(struct tfd_half *half, const struct sockaddr_storage *to)
{
	int rc;

	half->fd = socket(to->ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	rc = half->fd < 0 ? -errno : 0;
	if (!rc) {
		socket_tune(half->domain, half->fd, to);
		rc = connect_from(half->domain, half->fd, to);
	}
	if (!rc)
		rc = half_watch(half, EPOLL_CTL_ADD);
	if (rc)
		tfd_tcp_half_lose(half, -rc);
	else
		tfd_tcp_hello_queue(half);
}

static void address_read(const struct tfd_domain *domain, const struct half_address *blob,
                         struct sockaddr_storage *out)
{
	struct sockaddr_in *four = (void *)out;
	struct sockaddr_in6 *six = (void *)out;

	*out = domain->address; /* with its scope: that of the link that both are on */
	if (blob->family == 4) {
		four->sin_port = blob->port;
		memcpy(&four->sin_addr, blob->ip, sizeof(four->sin_addr));
	} else {
		six->sin6_port = blob->port;
		memcpy(&six->sin6_addr, blob->ip, sizeof(six->sin6_addr));
	}
}

int tfd_tcp_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                       struct tfd_error *error)
{
	struct sockaddr_storage to;
	struct half_address blob = { 0 };

	if (address_bytes > TFD_NAME_MAX)
		memcpy(&blob, address, address_bytes < sizeof(blob) ? address_bytes : sizeof(blob));
	blob.protocol[sizeof(blob.protocol) - 1] = 0;
	if (blob.protocol[0] && strcmp(blob.protocol, TFD_TCP_PROTOCOL) != 0)
		return tfd_fail(error, -EPROTO,
		                "the peer speaks %s, this rail %s: use the same provider on both hosts",
		                blob.protocol, TFD_TCP_PROTOCOL);
	if (address_bytes != sizeof(blob) || !blob.protocol[0])
		return tfd_fail(error, -EPROTO, "a tcp address of %zu bytes is malformed", address_bytes);
	if (blob.family != (half->domain->address.ss_family == AF_INET ? 4 : 6))
		return tfd_fail(error, -EPROTO,
		                "the peer's rail has an IPv%u address, this one not: give both rails the "
		                "same kind",
		                blob.family);
	half->far = (struct tfd_tcp_hello){ .magic = TFD_TCP_MAGIC, .number = blob.number };
	memcpy(half->far.token, blob.token, sizeof(blob.token));
	half->started = true;
	if (half->outgoing) {
		address_read(half->domain, &blob, &to);
		half_connect(half, &to);
	} else if (half->fd >= 0) {
		tfd_tcp_hello_queue(half);
	}
	return 0;
}

void tfd_tcp_half_attach(struct tfd_half *half, int fd)
{
	struct sockaddr_storage far = { 0 };
	socklen_t far_bytes = sizeof(far);

	half->fd = fd;
	if (getpeername(fd, (struct sockaddr *)&far, &far_bytes) == 0)
		socket_tune(half->domain, fd, &far);
	if (half_watch(half, EPOLL_CTL_MOD) != 0) {
		tfd_tcp_half_lose(half, ENOMEM);
		return;
	}
	half->greeted = true;
	half->receive.state = TFD_TCP_HEADER_NEXT;
	ready(half);
	if (half->started)
		tfd_tcp_hello_queue(half);
}

static bool has_posted(const struct tfd_half *half)
{
	return half->send.writes != half->send.writes_acked || half->send.reads != half->send.reads_landed;
}

static void disconnect(struct tfd_half *half)
{
	struct linger none = { .l_onoff = 1 };

	if (half->fd < 0)
		return;
	/* What is posted and not acknowledged has failed: the kernel need not go on trying to deliver it. */
	if (has_posted(half))
		(void)setsockopt(half->fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
	/* Closing does not end its events while a process that was forked just now holds it, too. */
	(void)epoll_ctl(half->domain->epoll_fd, EPOLL_CTL_DEL, half->fd, NULL);
	(void)close(half->fd);
	half->fd = -1;
}

void tfd_tcp_half_lose(struct tfd_half *half, int error)
{
	if (half->lost)
		return;
	disconnect(half);
	half->lost = true;
	half->error = error;
	tfd_list_remove(&half->send_link);
	ready(half);
}

void tfd_tcp_half_close(struct tfd_half *half)
{
	tfd_tcp_half_lose(half, ECANCELED);
	half->garbled = false;
	tfd_list_remove(&half->ready_link); /* what is left to tell is asked for by half_drain */
	half->domain->numbers[half->number] = NULL;
}

int tfd_tcp_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	struct tfd_tcp_out out = { .wc = wc, .max = max };

	(void)tfd_tcp_half_tell(half, &out);
	return out.count;
}

void tfd_tcp_half_free(struct tfd_half *half)
{
	tfd_list_remove(&half->link);
	free(half);
}

/* ---- completions ---- */

static void tell_failed(const struct tfd_half *half, struct tfd_wr *wr, uint64_t number, bool read,
                        struct tfd_tcp_out *out)
{
	bool refused = half->send.refused == number && half->send.refused_read == read;

	tfd_tcp_tell(out, &(struct tfd_wc){ .type = TFD_WC_ERROR,
	                                    .wr = wr,
	                                    .error = refused ? EACCES : half->error,
	                                    .remote_access = refused });
}

bool tfd_tcp_half_tell(struct tfd_half *half, struct tfd_tcp_out *out)
{
	struct tfd_tcp_send *send = &half->send;

	while (send->writes_told < (half->lost ? send->writes : send->writes_acked) && tfd_tcp_room(out)) {
		struct tfd_wr *wr = send->write_wrs[send->writes_told++ % TFD_TCP_WRITES];

		if (send->writes_told <= send->writes_acked)
			tfd_tcp_tell(out, &(struct tfd_wc){ .type = TFD_WC_SENT, .wr = wr });
		else
			tell_failed(half, wr, send->writes_told, false, out);
	}
	while (send->reads_told < (half->lost ? send->reads : send->reads_landed) && tfd_tcp_room(out)) {
		struct tfd_wr *wr = send->read_wrs[send->reads_told++ % TFD_TCP_READS].wr;

		if (send->reads_told <= send->reads_landed)
			tfd_tcp_tell(out, &(struct tfd_wc){ .type = TFD_WC_SENT, .wr = wr });
		else
			tell_failed(half, wr, send->reads_told, true, out);
	}
	if (half->garbled && tfd_tcp_room(out)) {
		half->garbled = false;
		tfd_tcp_tell(out,
		             &(struct tfd_wc){ .type = TFD_WC_ERROR, .error = EPROTO, .owner = half->owner });
	}
	return tfd_tcp_room(out);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Far sides of the tcp provider's connections that are sockets of a test's own. */
#ifndef TFD_TCP_PEER_H
#define TFD_TCP_PEER_H

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>

#include "tcp_pair.h"

#define UNTOUCHED 0x5a

static struct joined good;

/* The far side: a socket of the test's, and the half that it speaks to. */
struct peer {
	struct tfd_half *half; /* incoming, of b; its owner is the peer */
	int fd;
	struct tfd_tcp_hello hello;
	uint64_t sent; /* writes */
	int owner;
};

/* As half.c tells it. */
struct address {
	char protocol[TFD_NAME_MAX];
	uint32_t number;
	uint16_t family;
	uint16_t port;
	uint8_t token[TFD_TCP_TOKEN_BYTES];
	uint8_t ip[16];
};

static inline int dial(const struct address *address)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = address->port };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int on = 1;

	memcpy(&to.sin_addr, address->ip, sizeof(to.sin_addr));
	CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0);
	CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0);
	return fd;
}

static inline void put(int fd, const void *bytes, size_t count)
{
	CHECK(send(fd, bytes, count, MSG_NOSIGNAL) == (ssize_t)count);
}

/* Whether b has closed it; polls until it has, or for a while. */
static inline bool is_closed(int fd, bool expected)
{
	struct pollfd look = { .fd = fd, .events = POLLIN | POLLRDHUP };

	for (int round = 0; round < (expected ? ROUNDS : 300); round++) {
		char scrap[4096];

		(void)both_poll();
		look.revents = 0;
		CHECK(poll(&look, 1, 0) >= 0);
		if (look.revents & (POLLRDHUP | POLLHUP | POLLERR))
			return true;
		if (look.revents & POLLIN)
			CHECK(recv(fd, scrap, sizeof(scrap), MSG_DONTWAIT) > 0);
	}
	return false;
}

static inline void peer_half_open(struct peer *peer, struct address *address)
{
	uint8_t far[TFD_ADDRESS_MAX] = { 0 };
	size_t bytes;

	memset(peer, 0, sizeof(*peer));
	CHECK_OK(ops->half_open(b.domain, 0, &peer->owner, &peer->half, far, &bytes, &error));
	memcpy(address, far, sizeof(*address));
	peer->hello = (struct tfd_tcp_hello){ .magic = TFD_TCP_MAGIC, .number = address->number };
	memcpy(peer->hello.token, address->token, sizeof(peer->hello.token));
	CHECK_OK(ops->half_start(peer->half, far, bytes, &error)); /* whom it greets does not matter to it */
}

/* Connected, greeted by both. */
static inline void peer_open(struct peer *peer)
{
	struct tfd_tcp_hello hello;
	struct address address;

	peer_half_open(peer, &address);
	peer->fd = dial(&address);
	put(peer->fd, &peer->hello, sizeof(peer->hello));
	for (int round = 0; recv(peer->fd, &hello, sizeof(hello), MSG_DONTWAIT) != sizeof(hello); round++) {
		CHECK(round < ROUNDS);
		(void)both_poll();
	}
	CHECK(hello.magic == TFD_TCP_MAGIC && hello.number == address.number);
}

static inline void peer_close(struct peer *peer)
{
	half_end(&peer->half);
	(void)close(peer->fd);
}

static inline struct tfd_tcp_header header_of(struct peer *peer, uint8_t type, uint64_t length)
{
	return (struct tfd_tcp_header){ .magic = TFD_TCP_MAGIC,
	                                .type = type,
	                                .number = type == TFD_TCP_WRITE ? ++peer->sent : 1,
	                                .key = b.key.key,
	                                .length = length,
	                                .total = length };
}

static inline void check_untouched(void)
{
	CHECK(b.memory[0] == UNTOUCHED && memcmp(b.memory, b.memory + 1, BYTES - 1) == 0);
}

static inline void check_good(void)
{
	write_imm(&good, 5000, 77);
	memset(b.memory, UNTOUCHED, BYTES);
	told_clear();
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The tcp provider against strangers, who know no half's token: they are sent away, and nobody waits for them. */
#include "tcp_peer.h"

static void test_strangers(void)
{
	const char *const speeches[] = { "", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tcp1",
	                                 "\377\377\377\377" };
	struct tfd_tcp_hello hello;
	struct address address;
	struct peer peer;
	int fd;

	peer_half_open(&peer, &address);
	for (uint32_t i = 0; i < 4; i++) { /* says little and goes, or says nonsense and is sent away */
		fd = dial(&address);
		put(fd, speeches[i], strlen(speeches[i]));
		if (strlen(speeches[i]) < sizeof(hello)) {
			CHECK(!is_closed(fd, false));
			CHECK(shutdown(fd, SHUT_WR) == 0);
		}
		CHECK(is_closed(fd, true));
		(void)close(fd);
	}
	for (uint32_t i = 0; i < 4; i++) { /* magic, number, token wrong; the number of nobody */
		hello = peer.hello;
		if (i == 0)
			hello.magic ^= 1;
		else if (i == 1)
			hello.number ^= 1;
		else if (i == 2)
			hello.token[15] ^= 0x80;
		else
			hello.number = UINT32_MAX;
		fd = dial(&address);
		put(fd, &hello, sizeof(hello));
		CHECK(is_closed(fd, true));
		(void)close(fd);
	}
	/* The right one, byte by byte; then a second one of the same name is sent away. */
	peer.fd = dial(&address);
	for (size_t i = 0; i < sizeof(peer.hello); i++) {
		put(peer.fd, (const uint8_t *)&peer.hello + i, 1);
		poll_quiet();
	}
	CHECK(!is_closed(peer.fd, false));
	fd = dial(&address);
	put(fd, &peer.hello, sizeof(peer.hello));
	CHECK(is_closed(fd, true));
	(void)close(fd);
	CHECK(!is_closed(peer.fd, false));
	peer_close(&peer);
	check_good();
}

/* More silent ones than there is room for: the oldest go, and who is meant still gets in. */
static void test_flood_of_strangers(void)
{
	int fds[3 * TFD_TCP_STRANGERS];
	struct address address;
	struct peer peer, late;

	peer_half_open(&peer, &address);
	for (uint32_t i = 0; i < 3 * TFD_TCP_STRANGERS; i++) {
		fds[i] = dial(&address);
		(void)both_poll();
	}
	CHECK(is_closed(fds[0], true));
	CHECK(!is_closed(fds[3 * TFD_TCP_STRANGERS - 1], false));
	peer_open(&late);
	CHECK(!is_closed(late.fd, false));
	for (uint32_t i = 0; i < 3 * TFD_TCP_STRANGERS; i++)
		(void)close(fds[i]);
	peer_close(&late);
	peer.fd = -1;
	peer_close(&peer);
	check_good();
}

int main(void)
{
	sides_open();
	pair_open(&good);
	check_good();
	test_strangers();
	test_flood_of_strangers();
	pair_close(&good);
	sides_close();
	return 0;
}

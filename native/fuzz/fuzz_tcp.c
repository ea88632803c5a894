/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzz target: a far side that sends anything by a connection of the tcp provider. Input: what follows its hello, each piece of it after a
 * byte that says how much of it comes at once. Nothing may be written outside of the one registered, writable range; what is posted ends
 * once; a crash, a hang or a sanitizer report is a find.
 *
 *   clang -fsanitize=fuzzer,address … fuzz/fuzz_tcp.c       coverage-guided
 *   make -C native fuzz                                     gcc: random inputs by a driver of its own
 */
#include <sys/epoll.h>
#include <sys/socket.h>

#include "providers/tcp/tcp.h"
#include "tests/core_fixture.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define MEMORY_BYTES 16384u
#define OPEN_AT 4096u /* registered, and may be written to */
#define OPEN_BYTES 8192u
#define LOCAL_BYTES 300u /* that our own read lands in, behind it */
#define UNTOUCHED 0x5a

static const struct tfd_provider_ops *const ops = &tfd_tcp_ops;
static struct tfd_domain *domain;
static struct tfd_mr *mr, *local_mr;
static struct tfd_region_key key, local_key;
static uint8_t *memory;

static void start(void)
{
	struct tfd_group_options options = { .provider = "tcp" };
	struct tfd_rail_info info;

	CHECK_OK(ops->domain_open(&options, "127.0.0.1", &info, &domain, &error));
	memory = malloc(MEMORY_BYTES);
	CHECK(memory);
	memset(memory, UNTOUCHED, MEMORY_BYTES);
	CHECK_OK(ops->mr_open(domain, memory + OPEN_AT, OPEN_BYTES, 1, &mr, &key, &error));
	CHECK_OK(ops->mr_open(domain, memory, MEMORY_BYTES, 0, &local_mr, &local_key, &error));
	local_mr->writable = true; /* for our own reads; the far side does not know its key */
	local_mr->key ^= 1ull << 63;
}

/* An incoming half that a socket of ours speaks to, as if it had said its hello. */
static struct tfd_half *half_make(int *fd)
{
	struct epoll_event event = { .events = EPOLLIN };
	uint8_t address[TFD_ADDRESS_MAX];
	struct tfd_half *half;
	size_t address_bytes;
	int fds[2];

	CHECK_OK(ops->half_open(domain, 0, NULL, &half, address, &address_bytes, &error));
	CHECK_OK(ops->half_start(half, address, address_bytes, &error));
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	event.data.ptr = &half->watch;
	CHECK(epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, fds[0], &event) == 0);
	tfd_tcp_half_attach(half, fds[0]);
	*fd = fds[1];
	return half;
}

static uint32_t polled;
static uint64_t landed; /* writes, of all inputs */

static void poll_some(void)
{
	struct tfd_wc wc[4];

	for (int idle = 0; idle < 3; idle++) {
		int count = ops->poll(domain, wc, 1 + idle);

		for (int i = 0; i < count; i++)
			polled += wc[i].wr != NULL;
	}
}

static void check_untouched(void)
{
	for (uint32_t i = 0; i < MEMORY_BYTES; i++) {
		if (i < OPEN_AT || i >= OPEN_AT + OPEN_BYTES + LOCAL_BYTES)
			CHECK(memory[i] == UNTOUCHED);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct tfd_post read = { .length = LOCAL_BYTES, .remote_key = 1, .read = 1 };
	struct tfd_post write = { .length = 10, .remote_key = 1 };
	struct tfd_wr wrs[2] = { 0 };
	struct tfd_half *half;
	struct tfd_wc wc[4];
	int count, fd;

	if (!domain)
		start();
	half = half_make(&fd);
	read.mr = write.mr = local_mr;
	read.local = write.local = memory + OPEN_AT + OPEN_BYTES;
	CHECK_OK(ops->post(half, &read, &wrs[0]));
	CHECK_OK(ops->post(half, &write, &wrs[1]));
	polled = 0;
	poll_some();
	while (bytes > 1 && half->fd >= 0) {
		size_t part = 1u + data[0] * 16u;

		data++;
		bytes--;
		part = part < bytes ? part : bytes;
		if (send(fd, data, part, MSG_NOSIGNAL) != (ssize_t)part)
			break;
		data += part;
		bytes -= part;
		poll_some();
	}
	(void)close(fd);
	poll_some();
	ops->half_close(half);
	while ((count = ops->half_drain(half, wc, 4)) > 0) {
		for (int i = 0; i < count; i++)
			polled += wc[i].wr != NULL;
	}
	CHECK(polled == 2);
	landed += half->receive.writes;
	ops->half_free(half);
	check_untouched();
	return 0;
}

#ifdef TFD_FUZZ_DRIVER
static uint64_t state;

static uint32_t chance(uint32_t below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(state >> 33) % below;
}

static uint64_t odd_number(void)
{
	static const uint64_t odd[] = { 0,          1,          UINT64_MAX,    UINT64_MAX - 7,
	                                1ull << 63, OPEN_BYTES, OPEN_BYTES + 1 };

	return odd[chance(7)];
}

/* A message that may be right, with one thing wrong now and then; returns its bytes. */
static size_t near_valid(uint8_t *out, uint64_t *writes, uint64_t *reads)
{
	struct tfd_tcp_header header = { .magic = TFD_TCP_MAGIC, .type = (uint8_t)(1 + chance(5)) };
	struct tfd_tcp_range table[40];
	uint64_t left = 0;

	header.key = key.key;
	header.address = chance(OPEN_BYTES);
	header.length = 1 + chance((uint32_t)(OPEN_BYTES - header.address));
	header.total = header.length;
	if (header.type == TFD_TCP_WRITE || chance(2)) {
		header.type = TFD_TCP_WRITE;
		header.number = ++*writes;
		header.parts = chance(3) ? 0 : (uint16_t)(1 + chance(40));
		header.flags = (uint8_t)chance(2);
		for (uint32_t i = 0; i < header.parts; i++) {
			table[i].address = chance(OPEN_BYTES - 100);
			table[i].length = 1 + chance(100);
			header.total += table[i].length;
		}
	} else if (header.type == TFD_TCP_READ) {
		header.number = ++*reads;
	} else if (header.type == TFD_TCP_DATA) {
		header.number = 1;
		header.length = header.total = 1 + chance(LOCAL_BYTES);
	} else {
		header.length = header.total = 0;
		header.ack = chance(3);
		header.number = chance(3);
	}
	left = header.type == TFD_TCP_WRITE || header.type == TFD_TCP_DATA ? header.total : 0;
	switch (chance(30)) {
	case 0:
		((uint8_t *)&header)[chance(sizeof(header))] = (uint8_t)chance(256);
		break;
	case 1:
		header.total = odd_number();
		break;
	case 2:
		header.address = odd_number();
		break;
	case 3:
		header.length = odd_number();
		break;
	case 4:
		if (header.parts)
			table[chance(header.parts)].length = odd_number();
		break;
	case 5:
		if (header.parts)
			table[chance(header.parts)].address = odd_number();
		break;
	default:
		break;
	}
	memcpy(out, &header, sizeof(header));
	memcpy(out + sizeof(header), table, header.parts <= 40 ? header.parts * sizeof(table[0]) : 0);
	if (header.parts > 40)
		return sizeof(header);
	memset(out + sizeof(header) + header.parts * sizeof(table[0]), 0x11, left);
	return sizeof(header) + header.parts * sizeof(table[0]) + left;
}

int main(int argc, char **argv)
{
	static uint8_t messages[8 * (OPEN_BYTES + 8192)];
	static uint8_t input[2 * sizeof(messages)];
	long runs = argc > 1 ? strtol(argv[1], NULL, 10) : 20000;

	state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
	for (long run = 0; run < runs; run++) {
		uint64_t writes = 0, reads = 0;
		size_t bytes = 0, filled = 0;

		for (uint32_t i = chance(8) + 1; i; i--)
			bytes += near_valid(messages + bytes, &writes, &reads);
		for (size_t at = 0; at < bytes;) { /* cut anywhere */
			size_t part = 1u + (input[filled++] = (uint8_t)(chance(4) ? 255 : chance(256))) * 16u;

			part = part < bytes - at ? part : bytes - at;
			memcpy(input + filled, messages + at, part);
			filled += part;
			at += part;
		}
		(void)LLVMFuzzerTestOneInput(input, filled);
	}
	(void)printf("fuzz_tcp: %ld inputs, %llu writes landed\n", runs, (unsigned long long)landed);
	CHECK(landed > (uint64_t)runs / 2 && landed < 8 * (uint64_t)runs);
	ops->mr_close(domain, mr);
	local_mr->key = 0;
	ops->mr_close(domain, local_mr);
	ops->domain_close(domain);
	free(memory);
	return 0;
}
#endif

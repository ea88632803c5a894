/* SPDX-License-Identifier: Apache-2.0 */
/* The life of the tcp provider's halves: in which order they come up, what wakes a sleeping worker, closing, memory that goes. */
#include <poll.h>
#include <sys/epoll.h>
#include <sys/wait.h>

#include "core/parts.h"
#include "tcp_pair.h"

static void test_bad_addresses(void)
{
	uint8_t address[TFD_ADDRESS_MAX] = { 0 };
	struct joined pair;

	halves_open(&pair);
	memcpy(address, pair.in_address, pair.in_bytes);
	address[0] ^= 1;
	CHECK(ops->half_start(pair.out, address, pair.in_bytes, &error) == -EPROTO);
	CHECK(strstr(error.text, "same provider"));
	address[0] ^= 1;
	CHECK(ops->half_start(pair.out, address, pair.in_bytes - 1, &error) == -EPROTO);
	CHECK(ops->half_start(pair.out, address, pair.in_bytes + 1, &error) == -EPROTO);
	CHECK(ops->half_start(pair.out, address, 0, &error) == -EPROTO);
	memset(address, 0, sizeof(address));
	CHECK(ops->half_start(pair.out, address, pair.in_bytes, &error) == -EPROTO);
	CHECK_OK(ops->half_start(pair.in, pair.out_address, pair.out_bytes, &error));
	CHECK_OK(ops->half_start(pair.out, pair.in_address, pair.in_bytes, &error));
	write_imm(&pair, 10, 3);
	pair_close(&pair);
}

/* ---- coming up ---- */

/* Nothing can be posted before both are started and have greeted each other; the order does not matter. */
static void test_start_order(void)
{
	struct tfd_post write = piece(100);
	struct tfd_wr wr = { 0 };
	struct joined pair;

	halves_open(&pair);
	CHECK(ops->post(pair.out, &write, &wr) == -EAGAIN && ops->post(pair.in, &write, &wr) == -EAGAIN);
	CHECK_OK(ops->half_start(pair.out, pair.in_address, pair.in_bytes, &error));
	told_clear();
	poll_quiet();
	CHECK(ops->post(pair.out, &write, &wr) == -EAGAIN && ops->post(pair.in, &write, &wr) == -EAGAIN);
	CHECK_OK(ops->half_start(pair.in, pair.out_address, pair.out_bytes, &error));
	write_imm(&pair, 100, 1);
	pair_close(&pair);
}

/* Nobody listens there, or not the one that was meant: a loss like any other. */
static void test_nobody(struct joined *good)
{
	struct tfd_wr wr = { 0 };
	struct tfd_post write = piece(100);
	struct joined pair, other;
	int rc = -EAGAIN;

	halves_open(&pair);
	halves_open(&other);
	half_end(&other.in); /* its number and token are known to nobody now */
	CHECK_OK(ops->half_start(other.out, other.in_address, other.in_bytes, &error));
	for (int round = 0; round < ROUNDS && rc == -EAGAIN; round++) {
		(void)both_poll();
		rc = ops->post(other.out, &write, &wr);
	}
	CHECK(rc == -ENOTCONN);
	pair_close(&other);
	/* The incoming half was told another outgoing one: it greets that one, and ours does not take it for itself. */
	halves_open(&other);
	CHECK_OK(ops->half_start(pair.in, other.out_address, other.out_bytes, &error));
	CHECK_OK(ops->half_start(pair.out, pair.in_address, pair.in_bytes, &error));
	rc = -EAGAIN;
	for (int round = 0; round < ROUNDS && rc == -EAGAIN; round++) {
		(void)both_poll();
		rc = ops->post(pair.out, &write, &wr);
	}
	CHECK(rc == -ENOTCONN);
	pair_close(&other);
	pair_close(&pair);
	write_imm(good, 100, 2);
}

/* The worker sleeps on this fd: it tells of what comes, once arm has said that it may. */
static void test_sleep(struct joined *pair)
{
	struct epoll_event event = { .events = EPOLLIN };
	int fd = epoll_create1(EPOLL_CLOEXEC);
	struct tfd_post write = piece(300000);
	struct tfd_wr wr = { 0 };

	CHECK(fd >= 0 && epoll_ctl(fd, EPOLL_CTL_ADD, ops->wait_fd(b.domain), &event) == 0);
	for (uint32_t i = 0; i < 20; i++) {
		told_clear();
		poll_quiet();
		CHECK(ops->arm(b.domain) == 0 && ops->arm(a.domain) == 0);
		CHECK(epoll_wait(fd, &event, 1, 0) == 0); /* idle: nothing keeps it awake */
		write.has_imm = 1;
		post_when_up(pair->out, &write, &wr);
		CHECK(ops->arm(a.domain) == -EAGAIN);
		while (!b_told.count) { /* b polls when it is told to */
			(void)side_poll(&a, &a_told);
			if (ops->arm(b.domain) == 0)
				CHECK(epoll_wait(fd, &event, 1, i % 2 ? 1000 : 0) >= 0);
			(void)side_poll(&b, &b_told);
		}
		while (ops->arm(b.domain) != 0) /* the acknowledgement */
			(void)side_poll(&b, &b_told);
		await_told(1, 1);
	}
	(void)close(fd);
}

/* ---- closing ---- */

/* What had landed before the close was told, and by whom; afterwards nothing lands, and what was posted is told failed. */
static void test_close(struct joined *good)
{
	enum { WRITES = 8 };
	struct tfd_wr wrs[WRITES] = { 0 };
	struct joined pair;
	uint32_t landed;

	pair_open(&pair);
	write_imm(&pair, 10, 1);
	told_clear();
	for (uint32_t i = 0; i < WRITES; i++) {
		struct tfd_post write = piece(BYTES / WRITES);

		write.local = a.memory + i * (BYTES / WRITES);
		write.remote_address += i * (BYTES / WRITES);
		write.has_imm = 1;
		write.imm = i;
		memset(a.memory + i * (BYTES / WRITES), (int)i + 1, BYTES / WRITES);
		CHECK_OK(ops->post(pair.out, &write, &wrs[i]));
	}
	memset(b.memory, 0, BYTES);
	while (!b_told.count)
		(void)both_poll();
	half_end(&pair.in);
	landed = b_told.count;
	memset(b.memory, 0xcc, BYTES);
	await_told(WRITES, landed);
	for (uint32_t i = 0; i < WRITES; i++)
		CHECK(a_told.wc[i].wr == &wrs[i] && (i < landed || a_told.wc[i].type == TFD_WC_ERROR) &&
		      !a_told.wc[i].remote_access);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(b.memory[i] == 0xcc);
	pair_close(&pair);
	write_imm(good, 4096, 6);
}

/* Its own close tells what it had posted: all of it, once. */
static void test_close_own(struct joined *good)
{
	struct tfd_wr wrs[40] = { 0 };
	struct tfd_wc wc[64];
	struct joined pair;
	int count, all = 0;

	pair_open(&pair);
	write_imm(&pair, 10, 1);
	for (uint32_t i = 0; i < 40; i++) {
		struct tfd_post post = piece(100000);

		post.read = i % 2;
		CHECK_OK(ops->post(pair.out, &post, &wrs[i]));
	}
	told_clear();
	(void)side_poll(&a, &a_told);
	CHECK(!a_told.count);
	ops->half_close(pair.out);
	memset(a.memory, 0xdd, 100000);
	while ((count = ops->half_drain(pair.out, wc, 7)) > 0) {
		all += count;
		for (int i = 0; i < count; i++)
			CHECK(wc[i].type == TFD_WC_ERROR && wc[i].error == ECANCELED && wc[i].wr >= wrs &&
			      wc[i].wr < wrs + 40);
	}
	CHECK(all == 40);
	ops->half_free(pair.out);
	pair.out = NULL;
	poll_quiet();
	for (uint32_t i = 0; i < 100000; i++)
		CHECK(a.memory[i] == 0xdd);
	pair_close(&pair);
	write_imm(good, 4096, 6);
}

/* Memory that goes while a message is coming in, or is being read: the connection ends, and nothing of it is touched any more. */
static void test_memory_gone(struct joined *good, uint32_t read)
{
	uint8_t *memory = calloc(1, BYTES);
	struct tfd_post post = piece(BYTES);
	struct tfd_wr wr = { 0 };
	struct tfd_region_key key;
	struct joined pair;
	struct tfd_mr *mr;

	CHECK(memory);
	CHECK_OK(ops->mr_open(b.domain, memory, BYTES, 1, &mr, &key, &error));
	pair_open(&pair);
	write_imm(&pair, 10, 1);
	post.remote_key = key.key;
	post.read = read;
	told_clear();
	memset(a.memory, 9, BYTES);
	CHECK_OK(ops->post(pair.out, &post, &wr));
	for (int i = 0; i < 4; i++) {
		(void)side_poll(&a, &a_told);
		(void)side_poll(&b, &b_told);
	}
	CHECK(!a_told.count);
	ops->mr_close(b.domain, mr);
	memset(memory, 0x33, BYTES);
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_ERROR && a_told.wc[0].wr == &wr);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(memory[i] == 0x33);
	pair_close(&pair);
	free(memory);
	write_imm(good, 4096, 6);
}

/* A process that was forked holds the sockets, too, until it runs something else: a closed half is not heard of again. */
static void test_forked(struct joined *good)
{
	struct tfd_post write = piece(100);
	struct tfd_wr wr = { 0 };
	struct joined pair;
	struct pollfd look = { .fd = ops->wait_fd(b.domain), .events = POLLIN };
	int hold[2];
	pid_t child;

	pair_open(&pair);
	write_imm(&pair, 10, 1);
	poll_quiet();
	CHECK(pipe(hold) == 0);
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		char byte;

		(void)close(hold[1]);
		(void)!read(hold[0], &byte, 1);
		_exit(0);
	}
	(void)close(hold[0]);
	half_end(&pair.in);
	CHECK_OK(ops->post(pair.out, &write, &wr));
	(void)side_poll(&a, &a_told); /* it is with the kernel, and, on loopback, there */
	CHECK(poll(&look, 1, 0) == 0);
	(void)side_poll(&b, &b_told);
	(void)close(hold[1]);
	CHECK(waitpid(child, NULL, 0) == child);
	pair_close(&pair);
	write_imm(good, 4096, 6);
}

/* ---- pages that are taken away ---- */

/*
 * Of other memory than what is written to, while that is being copied: nothing to this connection. So that it happens every time the other
 * memory is a page in the midst of what is written to; on a daemon it is any client's, in any worker.
 */
static void test_pages_taken_elsewhere(struct joined *good)
{
	struct tfd_region other = { .base = b.memory + 2 * 4096 - (uintptr_t)b.memory % 4096,
	                            .map_bytes = 4096 };
	int fd = memfd_create("taken", MFD_CLOEXEC);
	uint32_t hits = tfd_guard_hits();

	CHECK(fd >= 0 && ftruncate(fd, 4096) == 0 && tfd_guard_install() == 0);
	CHECK(mmap(other.base, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == other.base);
	CHECK(tfd_guard_add(&other) == 0 && ftruncate(fd, 0) == 0);
	write_imm(good, 20000, 5);
	CHECK(tfd_guard_hits() == hits + 1 && other.broken);
	tfd_guard_remove(&other);
	(void)close(fd);
	write_imm(good, 4096, 6);
}

/* Of what is written to: the connection ends. */
static void test_pages_taken(struct joined *good)
{
	struct tfd_region region = { .map_bytes = 8192 };
	int fd = memfd_create("taken", MFD_CLOEXEC);
	struct tfd_post write = piece(8192);
	struct tfd_wr wr = { 0 };
	struct tfd_region_key key;
	struct joined pair;
	struct tfd_mr *mr;

	CHECK(fd >= 0 && ftruncate(fd, 8192) == 0);
	region.base = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(region.base != MAP_FAILED && tfd_guard_add(&region) == 0);
	CHECK_OK(ops->mr_open(b.domain, region.base, 8192, 1, &mr, &key, &error));
	pair_open(&pair);
	write_imm(&pair, 10, 1);
	CHECK(ftruncate(fd, 4096) == 0);
	write.remote_key = key.key;
	told_clear();
	CHECK_OK(ops->post(pair.out, &write, &wr));
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_ERROR && a_told.wc[0].wr == &wr && region.broken);
	pair_close(&pair);
	ops->mr_close(b.domain, mr);
	tfd_guard_remove(&region);
	(void)munmap(region.base, 8192);
	(void)close(fd);
	write_imm(good, 4096, 6);
}

int main(void)
{
	struct joined good;

	sides_open();
	pair_open(&good);
	test_bad_addresses();
	test_start_order();
	test_nobody(&good);
	test_sleep(&good);
	test_close(&good);
	test_close_own(&good);
	test_memory_gone(&good, 0);
	test_memory_gone(&good, 1);
	test_sleep(&good);
	test_forked(&good);
	test_pages_taken_elsewhere(&good);
	test_pages_taken(&good);
	pair_close(&good);
	sides_close();
	return 0;
}

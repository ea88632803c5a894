/* SPDX-License-Identifier: Apache-2.0 */
/* The verbs provider on devices that are small, or break: the double of libibverbs (softverbs/). */
#include <poll.h>

#include "verbs_soft.h"

static void await_let_go(void)
{
	uint64_t until = tfd_now_ns() + PATIENCE_NS;

	while (counts().contexts) {
		CHECK(tfd_now_ns() < until);
		(void)usleep(1000);
	}
	nothing_is_left();
}

/* ---- a device with little: nothing is lost, it only takes more rounds ---- */

#define FLOOD 2000

static void flood(struct joined *pairs, uint32_t count, bool polled)
{
	static struct tfd_wr wrs[FLOOD];
	uint32_t posted = 0, sent = 0, landed = 0, granted = a.info.imm_depth;
	uint64_t until = tfd_now_ns() + PATIENCE_NS;

	while (sent < FLOOD || landed < FLOOD) {
		struct tfd_post post = piece_of(&a, &b, 8);
		struct tfd_wc wc[16];
		int got;

		CHECK(tfd_now_ns() < until);
		post.has_imm = 1;
		while (posted < FLOOD && posted - landed < granted) { /* as the core's credits see to */
			int rc = ops->post(pairs[posted % count].out, &post, &wrs[posted]);

			if (rc == -EAGAIN)
				break;
			CHECK_OK(rc);
			posted++;
		}
		got = ops->poll(a.domain, wc, 16);
		for (int i = 0; i < got; i++, sent++)
			CHECK(wc[i].type == TFD_WC_SENT);
		/* Of what was granted all may arrive before anybody looks. */
		if (!polled && sent < posted)
			continue;
		while ((got = ops->poll(b.domain, wc, 16)) > 0) {
			for (int i = 0; i < got; i++, landed++)
				CHECK(wc[i].type == TFD_WC_IMM);
		}
	}
}

static void test_small(void)
{
	struct joined pairs[5];
	struct softverbs_counts counted;

	configure("max_srq_wr=100; max_cqe=160; max_qp_wr=40; max_inline=0");
	side_open_at(&a, DEVICE);
	side_open_at(&b, DEVICE);
	CHECK(a.info.imm_depth < 64 && a.info.imm_depth > 48);
	for (uint32_t i = 0; i < 5; i++)
		pair_open(&pairs[i]);
	flood(pairs, 5, false);
	flood(pairs, 5, true);
	counted = counts();
	CHECK(counted.rnr == 0 && counted.cq_high <= 160 && !counted.inlined);
	for (uint32_t i = 0; i < 5; i++)
		pair_close(&pairs[i]);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* What is posted between two polls goes out together, and little of it is signalled; by either way of posting. */
static void test_chains(const char *device, uint32_t plain)
{
	struct softverbs_counts counted;
	struct joined pair;

	configure(device);
	side_open_with(&a, DEVICE, (struct tfd_verbs_options){ .plain_posts = plain });
	side_open_at(&b, DEVICE);
	pair_open(&pair);
	SOFT(softverbs_counts_clear)(DEVICE);
	flood(&pair, 1, true);
	counted = counts();
	CHECK(counted.posted == FLOOD && counted.inlined == FLOOD && counted.immediates == FLOOD);
	CHECK(counted.longest_chain == TFD_VERBS_CHAIN && counted.doorbells < FLOOD / 2);
	CHECK(counted.signalled == counted.doorbells && counted.rnr == 0);
	CHECK(counted.wr_posted == (plain || device[0] ? 0 : FLOOD));
	pair_close(&pair);
	side_close(&a);
	side_close(&b);
}

/* ---- what breaks ---- */

static void world_open(void)
{
	configure("hurry=100");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
}

static void world_close(void)
{
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

static void test_port(void)
{
	struct joined pair;
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;

	world_open();
	pair_open(&pair);
	SOFT(softverbs_port)(DEVICE, 1, 0);
	await_state(&a, TFD_RAIL_DOWN);
	CHECK(ops->rail_state(b.domain) == TFD_RAIL_UP);
	post = piece_of(&a, &b, 8);
	CHECK_OK(ops->post(pair.out, &post, &wr));
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && wc.error == ETIMEDOUT && !wc.remote_access);
	pair_close(&pair);
	SOFT(softverbs_port)(DEVICE, 1, 1);
	await_state(&a, TFD_RAIL_UP);
	pair_open(&pair);
	write_passes(&pair, 1);
	pair_close(&pair);
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 3, "-") == 0);
	await_state(&a, TFD_RAIL_DOWN); /* its address has gone */
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 0, "v2:v4") == 0);
	await_state(&a, TFD_RAIL_UP); /* it is back, elsewhere */
	pair_open(&pair);
	write_passes(&pair, 2);
	pair_close(&pair);
	world_close();
}

/* Told once, with the worker asleep; every op is taken still. */
static void test_removed(void)
{
	struct joined pair;
	struct tfd_post post;
	struct tfd_wr wrs[2] = { 0 };
	struct pollfd fd;
	struct tfd_wc wc[4];
	struct tfd_mr *mr;
	struct tfd_region_key key;
	int back = 0, count;

	world_open();
	pair_open(&pair);
	SOFT(softverbs_hold)(DEVICE, 1);
	post = piece_of(&a, &b, 8);
	CHECK_OK(ops->post(pair.out, &post, &wrs[0]));
	CHECK_OK(ops->post(pair.out, &post, &wrs[1]));
	CHECK(ops->arm(a.domain) == 0);
	SOFT(softverbs_remove)(DEVICE);
	fd = (struct pollfd){ .fd = ops->wait_fd(a.domain), .events = POLLIN };
	CHECK(poll(&fd, 1, 30000) == 1 && ops->arm(a.domain) == -EAGAIN);
	CHECK(ops->rail_state(a.domain) == TFD_RAIL_GONE && ops->rail_state(b.domain) == TFD_RAIL_UP);
	wc[0] = next_of(&a);
	CHECK(wc[0].type == TFD_WC_ERROR && !wc[0].wr && !wc[0].owner && wc[0].error == ENODEV);
	CHECK(ops->post(pair.out, &post, &wrs[1]) == -ENODEV && ops->arm(a.domain) == 0);
	CHECK(poll(&fd, 1, 0) == 0); /* it sleeps, does not spin */
	CHECK(ops->half_open(a.domain, 1, NULL, &pair.in, pair.in_address, &pair.in_bytes, &error) ==
	      -ENODEV);
	CHECK(ops->mr_open(a.domain, a.memory, BYTES, 1, &mr, &key, &error) == -ENODEV);
	ops->half_close(pair.out);
	while ((count = ops->half_drain(pair.out, wc, 4)) > 0) {
		for (int i = 0; i < count; i++)
			CHECK(wc[i].type == TFD_WC_ERROR && wc[i].wr == &wrs[back++]);
	}
	CHECK(back == 2);
	ops->half_free(pair.out);
	await_let_go(); /* though its memory was not given back yet */
	CHECK(ops->poll(a.domain, wc, 4) == 0 && ops->arm(a.domain) == 0);
	SOFT(softverbs_back)(DEVICE);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

static void test_queue_pair_breaks(void)
{
	struct joined pairs[2];
	struct tfd_wc wc;

	world_open();
	pair_open(&pairs[0]);
	pair_open(&pairs[1]);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(SOFT(softverbs_qp_fatal)(pairs[0].in->queues[i].number) == 0);
	wc = next_of(&b);
	CHECK(wc.type == TFD_WC_ERROR && !wc.wr && wc.owner == &pairs[0].owner && wc.error == ECONNRESET);
	write_passes(&pairs[1], 4);
	CHECK(ops->poll(b.domain, &wc, 1) == 0); /* once */
	pair_close(&pairs[0]);
	pair_close(&pairs[1]);
	world_close();
}

/* How often the piece is told while its half is closed. */
static int close_and_count(struct tfd_half **half, const struct tfd_wr *wr)
{
	struct tfd_wc wc[4];
	int count, told = 0;

	ops->half_close(*half);
	while ((count = ops->half_drain(*half, wc, 4)) > 0) {
		for (int i = 0; i < count; i++)
			told += wc[i].wr == wr;
	}
	ops->half_free(*half);
	*half = NULL;
	return told;
}

/* Of either queue: all connections of the rail end, and the next ones have new queues. */
static void test_overrun(int receive)
{
	struct joined pairs[2], next;
	struct side *side = receive ? &b : &a;
	struct tfd_post post;
	struct pollfd fd;
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;

	world_open();
	pair_open(&pairs[0]);
	pair_open(&pairs[1]);
	while (ops->arm(side->domain) != 0)
		CHECK(ops->poll(side->domain, &wc, 1) == 0);
	write_passes(&pairs[0], 1); /* it makes an event, that nobody takes before the overrun */
	SOFT(softverbs_overrun)(receive ? "soft1" : DEVICE, receive);
	post = piece_of(&a, &b, 8);
	post.has_imm = 1;
	CHECK_OK(ops->post(pairs[0].out, &post, &wr));
	(void)ops->poll(a.domain, &wc, 0);
	do {
		wc = next_of(side);
	} while (wc.type != TFD_WC_ERROR || wc.wr);
	CHECK(wc.error == EOVERFLOW && !wc.owner);
	error.text[0] = 0;
	CHECK(ops->half_open(side->domain, 1, NULL, &next.out, next.out_address, &next.out_bytes, &error) ==
	      -EAGAIN);
	CHECK(strstr(error.text, "overrun"));
	while (ops->arm(side->domain) != 0)
		(void)ops->poll(side->domain, &wc, 1);
	fd = (struct pollfd){ .fd = ops->wait_fd(side->domain), .events = POLLIN };
	CHECK(poll(&fd, 1, 0) == 0); /* it sleeps, does not spin */
	if (!receive)
		CHECK(close_and_count(&pairs[0].out, &wr) == 1); /* it was lost, and is told all the same */
	pair_close(&pairs[0]);
	pair_close(&pairs[1]);
	pair_open(&next);
	write_passes(&next, 2);
	pair_close(&next);
	world_close();
}

/* Both queues of a rail, one after the other: what is heard of them later does not end what has new ones. */
static void test_overrun_twice(void)
{
	struct tfd_post post;
	struct tfd_wr wrs[2] = { 0 };
	struct joined pair;
	struct tfd_wc wc;
	uint64_t until = tfd_now_ns() + PATIENCE_NS;

	world_open();
	pair_open(&pair);
	SOFT(softverbs_overrun)(DEVICE, 0);
	post = piece_of(&a, &b, 8);
	CHECK_OK(ops->post(pair.out, &post, &wrs[0]));
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && !wc.wr && wc.error == EOVERFLOW);
	SOFT(softverbs_overrun)(DEVICE, 1);
	post = piece_of(&b, &a, 8);
	post.has_imm = 1;
	post.traffic = TFD_TRAFFIC_MESSAGE;
	CHECK_OK(ops->post(pair.in, &post, &wrs[1]));
	(void)ops->poll(b.domain, &wc, 0);
	while (!tfd_load_seq(&a.domain->alarms)) {
		CHECK(tfd_now_ns() < until);
		(void)usleep(100);
	}
	ops->half_close(pair.out);
	ops->half_free(pair.out);
	half_end(&pair.in);
	pair_open(&pair);
	CHECK(ops->poll(a.domain, &wc, 1) == 0);
	write_passes(&pair, 3);
	pair_close(&pair);
	world_close();
}

/* The queues cannot be made anew, and only then it is heard that the last one was low. */
static void test_alarm_of_no_queue(void)
{
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	struct joined pair;
	struct tfd_wc wc;

	world_open();
	pair_open(&pair);
	SOFT(softverbs_overrun)(DEVICE, 0);
	post = piece_of(&a, &b, 8);
	CHECK_OK(ops->post(pair.out, &post, &wr));
	wc = next_of(&a);
	CHECK(wc.error == EOVERFLOW);
	pair_close(&pair);
	SOFT(softverbs_fail)("ibv_create_cq", 0, ENOMEM);
	CHECK(ops->half_open(a.domain, 1, NULL, &pair.out, pair.out_address, &pair.out_bytes, &error) ==
	      -ENOMEM);
	(void)tfd_or_seq(&a.domain->alarms, (uint32_t)TFD_VERBS_SRQ_LOW);
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.error == ENOBUFS && ops->arm(a.domain) == 0);
	pair_open(&pair);
	write_passes(&pair, 4);
	pair_close(&pair);
	world_close();
}

/* Halves that are freed with immediates in the queue do not take receives along. */
static void test_receives_stay(void)
{
	struct tfd_wr wrs[16] = { 0 };
	struct tfd_post post;
	struct tfd_wc wc;

	configure("hurry=100; max_srq_wr=64");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	post = piece_of(&a, &b, 0);
	post.has_imm = 1;
	for (uint32_t round = 0; round < 8; round++) {
		struct joined pair;

		pair_open(&pair);
		for (uint32_t i = 0; i < 16; i++)
			CHECK_OK(ops->post(pair.out, &post, &wrs[i]));
		for (uint32_t i = 0; i < 16; i++) {
			wc = next_of(&a);
			CHECK(wc.type == TFD_WC_SENT && wc.wr == &wrs[i]);
		}
		ops->half_close(pair.in);
		ops->half_free(pair.in);
		pair.in = NULL;
		for (uint32_t i = 0; i < 16; i++)
			CHECK(next_of(&b).type == TFD_WC_IMM);
		pair_close(&pair);
	}
	world_close();
}

static void send_immediates(struct joined *pair, uint32_t count)
{
	static struct tfd_wr wrs[128];
	struct tfd_post post = piece_of(&a, &b, 0);

	post.has_imm = 1;
	for (uint32_t i = 0; i < count; i++)
		CHECK_OK(ops->post(pair->out, &post, &wrs[i]));
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_wc wc = next_of(&a);

		CHECK(wc.type == TFD_WC_SENT && wc.wr == &wrs[i]);
	}
}

/* All that was granted is in the stash. What of it was polled may be posted again, and finds receives. */
static void test_stash_and_receives(void)
{
	struct softverbs_counts counted;
	struct joined pair;
	uint32_t depth;

	configure("hurry=100; max_srq_wr=128");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	pair_open(&pair);
	depth = b.info.imm_depth;
	CHECK(depth > 64 && depth < 128);
	send_immediates(&pair, depth);
	CHECK(ops->arm(b.domain) == -EAGAIN);
	for (uint32_t i = 0; i < depth / 2; i++)
		CHECK(next_of(&b).type == TFD_WC_IMM);
	send_immediates(&pair, depth / 2);
	for (uint32_t i = 0; i < depth; i++)
		CHECK(next_of(&b).type == TFD_WC_IMM);
	SOFT(softverbs_counts)("soft1", &counted);
	CHECK(!counted.rnr);
	pair_close(&pair);
	world_close();
}

/* What the device says of a work request, and what is told of it and of those behind it. */
static void test_statuses(void)
{
	static const struct {
		int status;
		int error;
		uint32_t remote_access;
	} cases[] = {
		{ IBV_WC_REM_ACCESS_ERR, EACCES, 1 },   { IBV_WC_REM_INV_REQ_ERR, EACCES, 1 },
		{ IBV_WC_RETRY_EXC_ERR, ETIMEDOUT, 0 }, { IBV_WC_RNR_RETRY_EXC_ERR, ENOBUFS, 0 },
		{ IBV_WC_LOC_PROT_ERR, EFAULT, 0 },     { IBV_WC_LOC_LEN_ERR, EMSGSIZE, 0 },
		{ IBV_WC_REM_OP_ERR, EREMOTEIO, 0 },    { IBV_WC_FATAL_ERR, EIO, 0 },
	};
	struct tfd_wr wrs[4] = { 0 };

	world_open();
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct tfd_post post = piece_of(&a, &b, 8);
		struct joined pair;

		pair_open(&pair);
		SOFT(softverbs_wc_fail)(DEVICE, 2, cases[i].status);
		for (uint32_t j = 0; j < 4; j++)
			CHECK_OK(ops->post(pair.out, &post, &wrs[j]));
		for (uint32_t j = 0; j < 4; j++) {
			struct tfd_wc wc = next_of(&a);

			CHECK(wc.wr == &wrs[j] && wc.type == (j < 2 ? TFD_WC_SENT : TFD_WC_ERROR));
			CHECK(wc.error == (j < 2 ? 0 : j == 2 ? cases[i].error : ECANCELED));
			CHECK(wc.remote_access == (j == 2 && cases[i].remote_access));
		}
		CHECK(ops->post(pair.out, &post, &wrs[0]) == -ENOTCONN);
		pair_close(&pair);
	}
	world_close();
}

/* One part of several fails: the post fails, once, and the room of all is back. */
static void test_part_fails(void)
{
	struct tfd_post_part parts[3];
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	uint32_t room;

	world_open();
	room = a.domain->send_room;
	for (uint32_t skip = 0; skip < 4; skip++) {
		struct joined pair;
		struct tfd_wc wc;

		pair_open(&pair);
		post = piece_of(&a, &b, 8);
		post.part_count = 3;
		post.parts = parts;
		for (uint32_t i = 0; i < 3; i++)
			parts[i] = (struct tfd_post_part){ a.memory, post.remote_address, 8 };
		SOFT(softverbs_wc_fail)(DEVICE, skip, IBV_WC_REM_OP_ERR);
		CHECK_OK(ops->post(pair.out, &post, &wr));
		wc = next_of(&a);
		CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && wc.error == EREMOTEIO);
		CHECK(ops->poll(a.domain, &wc, 1) == 0);
		pair_close(&pair);
		CHECK(a.domain->send_room == room);
	}
	world_close();
}

static void test_memlock(void)
{
	struct tfd_region_key key;
	struct tfd_mr *mr = NULL;

	world_open();
	SOFT(softverbs_memlock)(4096);
	CHECK(ops->mr_open(a.domain, a.memory, BYTES, 1, &mr, &key, &error) == -ENOMEM && !mr);
	CHECK(strstr(error.text, "memlock limit") || strstr(error.text, "no memory to pin"));
	SOFT(softverbs_memlock)(0);
	world_close();
}

/* Memory that is not mapped here, at both ends. A page that is not its first; and nothing of it is read for a request's own payload. */
static void test_dmabuf(void)
{
	const uint64_t address = 0x7000000000;
	struct tfd_dmabuf dmabuf = { .offset = 4096, .length = 8192, .address = address };
	struct tfd_region_key key;
	struct joined pair;
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	struct tfd_mr *mr = NULL;
	struct tfd_wc wc;
	uint8_t bytes[64];

	world_open();
	pair_open(&pair);
	dmabuf.fd = memfd_create("dmabuf", MFD_CLOEXEC);
	CHECK(dmabuf.fd >= 0 && ftruncate(dmabuf.fd, 1 << 20) == 0);
	CHECK_OK(ops->mr_open_dmabuf(a.domain, &dmabuf, 1, &mr, &key, &error));
	CHECK(key.address == address);
	memset(bytes, 0x5a, sizeof(bytes));
	CHECK(pwrite(dmabuf.fd, bytes, sizeof(bytes), 4096 + 100) == sizeof(bytes));
	memset(b.memory, 0, BYTES);
	post = piece_of(&a, &b, 64);
	post.local = (void *)(uintptr_t)(address + 100);
	post.mr = mr;
	CHECK_OK(ops->post(pair.out, &post, &wr));
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_SENT && memcmp(b.memory, bytes, 64) == 0 && b.memory[64] == 0);
	memset(b.memory, 0x33, 64);
	post = piece_of(&b, &a, 64);
	post.remote_address = address + 8192 - 64;
	post.remote_key = key.key;
	CHECK_OK(ops->post(pair.in, &post, &wr));
	wc = next_of(&b);
	CHECK(wc.type == TFD_WC_SENT && pread(dmabuf.fd, bytes, 64, 4096 + 8192 - 64) == 64);
	CHECK(memcmp(b.memory, bytes, 64) == 0);
	ops->mr_close(a.domain, mr);
	pair_close(&pair);
	world_close();
	(void)close(dmabuf.fd);
	configure("dmabuf=0");
	side_open_at(&a, DEVICE);
	CHECK(ops->mr_open_dmabuf(a.domain, &dmabuf, 1, &mr, &key, &error) == -EOPNOTSUPP);
	CHECK(strstr(error.text, "dma-buf"));
	side_close(&a);
}

/* Each verb that makes or changes something fails once: it is told, nothing stays behind, and the next try works. */
static void test_each_failure(void)
{
	configure("");
	for (uint32_t skip = 0;; skip++) {
		struct tfd_group_options options = rail_options();
		struct tfd_rail_info info = { 0 };
		struct tfd_domain *domain = NULL;
		struct joined pair = { 0 };
		int rc;

		SOFT(softverbs_fail)(NULL, skip, ENOMEM);
		rc = ops->domain_open(&options, DEVICE, &info, &domain, &error);
		if (!rc) {
			rc = ops->half_open(domain, 1, NULL, &pair.out, pair.out_address, &pair.out_bytes,
			                    &error);
			if (!rc)
				rc = ops->half_open(domain, 0, NULL, &pair.in, pair.in_address,
				                    &pair.in_bytes, &error);
			if (!rc)
				rc = ops->half_start(pair.out, pair.in_address, pair.in_bytes, &error);
			half_end(&pair.in);
			half_end(&pair.out);
		}
		ops->domain_close(domain);
		nothing_is_left();
		if (!SOFT(softverbs_failed)())
			break;
		CHECK(!rc || error.text[0]);
	}
	SOFT(softverbs_fail)(NULL, 0, 0);
}

int main(void)
{
	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	test_small();
	test_chains("", 0);
	test_chains("", 1);
	test_chains("extended=0", 0);
	test_dmabuf();
	test_port();
	test_removed();
	test_queue_pair_breaks();
	test_overrun(0);
	test_overrun(1);
	test_overrun_twice();
	test_alarm_of_no_queue();
	test_receives_stay();
	test_stash_and_receives();
	test_statuses();
	test_part_fails();
	test_memlock();
	test_each_failure();
	return 0;
}

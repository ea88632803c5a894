/* SPDX-License-Identifier: Apache-2.0 */
/* The verbs provider by itself, on a device of this host (verbs_pair.h). */
#include <poll.h>

#include "verbs_pair.h"

#define PAIRS 3
#define FLOOD 3000

static void expect_imm(struct side *side, uint32_t imm, uint32_t order, const void *owner)
{
	struct tfd_wc wc = next_of(side);

	CHECK(wc.type == TFD_WC_IMM && wc.imm == imm && wc.order == order && wc.owner == owner);
}

static void expect_sent(struct side *side, const struct tfd_wr *wr)
{
	struct tfd_wc wc = next_of(side);

	CHECK(wc.type == TFD_WC_SENT && wc.wr == wr);
}

static void write_imm(struct joined *pair, uint64_t length, uint32_t imm, uint32_t traffic)
{
	struct tfd_post write = piece_of(&a, &b, length);
	struct tfd_wr wr = { 0 };

	for (uint64_t i = 0; i < length; i++)
		a.memory[i] = (uint8_t)(i * 31 + imm);
	write.has_imm = 1;
	write.imm = imm;
	write.traffic = traffic;
	CHECK_OK(ops->post(pair->out, &write, &wr));
	expect_sent(&a, &wr);
	expect_imm(&b, imm, traffic, &pair->owner);
	CHECK(memcmp(a.memory, b.memory, length) == 0);
}

static void test_choice(void)
{
	(void)printf("%s, %s: %s\n", a.info.provider, a.info.protocol, a.info.why);
	CHECK(strcmp(a.info.protocol, b.info.protocol) == 0);
	CHECK(a.info.ordered && a.info.channels == TFD_VERBS_CHANNELS && a.info.max_parts > 1);
	CHECK(ops->rail_state(a.domain) == TFD_RAIL_UP);
	CHECK(a.info.imm_depth >= 32 && a.info.max_message_bytes >= BYTES);
	CHECK(strstr(a.info.why, "GID index") && ops->wait_fd(a.domain) >= 0);
}

static void test_owners(struct joined *pairs)
{
	const uint64_t lengths[] = { 0, 1, 64, 65, 4096, BYTES };

	for (uint32_t i = 0; i < 54; i++)
		write_imm(&pairs[i % PAIRS], lengths[i / PAIRS % 6], 0xf0000000u + i, i / 18 % 3);
}

static void test_answers(struct joined *pair)
{
	struct tfd_post answer = piece_of(&b, &a, 64);
	struct tfd_wr wr = { 0 };

	memset(b.memory, 77, 64);
	answer.has_imm = 1;
	answer.imm = 5;
	answer.traffic = TFD_TRAFFIC_MESSAGE;
	CHECK_OK(ops->post(pair->in, &answer, &wr));
	expect_sent(&b, &wr);
	expect_imm(&a, 5, TFD_TRAFFIC_MESSAGE, &pair->writer);
	CHECK(memcmp(a.memory, b.memory, 64) == 0);
}

static void test_read(struct joined *pair)
{
	struct tfd_post read = piece_of(&a, &b, 100000);
	struct tfd_wr wr = { 0 };

	memset(b.memory, 3, BYTES);
	memset(a.memory, 0, BYTES);
	read.read = 1;
	CHECK_OK(ops->post(pair->out, &read, &wr));
	expect_sent(&a, &wr);
	CHECK(memcmp(a.memory, b.memory, 100000) == 0 && a.memory[100000] == 0);
}

static void test_parts(struct joined *pair)
{
	struct tfd_post_part parts[TFD_VERBS_PARTS];
	struct tfd_post post = piece_of(&a, &b, 512);
	struct tfd_wr wr = { 0 };

	for (uint32_t i = 0; i < BYTES; i++)
		a.memory[i] = (uint8_t)(i / 512 + 1);
	memset(b.memory, 0, BYTES);
	post.parts = parts;
	post.has_imm = 1;
	post.imm = 9;
	for (uint32_t i = 0; i < TFD_VERBS_PARTS; i++)
		parts[i] = (struct tfd_post_part){ .local = a.memory + 512 * (i + 1),
		                                   .remote_address = b.key.address + 1024 * (i + 1),
		                                   .length = 512 };
	post.part_count = TFD_VERBS_PARTS;
	CHECK(ops->post(pair->out, &post, &wr) == -EINVAL);
	post.part_count = TFD_VERBS_PARTS - 1;
	CHECK_OK(ops->post(pair->out, &post, &wr));
	expect_sent(&a, &wr);
	expect_imm(&b, 9, TFD_TRAFFIC_BULK, &pair->owner);
	for (uint32_t i = 0; i < TFD_VERBS_PARTS; i++) {
		CHECK(memcmp(a.memory + 512 * i, b.memory + 1024 * i, 512) == 0);
		CHECK(b.memory[1024 * i + 512] == 0);
	}
}

/* More than fits, and more than its completions are asked for: refused for a while, told in order, each once. */
static void test_flood(struct joined *pair)
{
	static struct tfd_wr wrs[FLOOD];
	uint32_t posted = 0, sent = 0, arrived = 0, refused = 0;
	uint64_t until = tfd_now_ns() + 4 * PATIENCE_NS;

	while (sent < FLOOD || arrived < FLOOD) {
		struct tfd_post write = piece_of(&a, &b, 8);
		struct tfd_wc wc[5];
		int count;

		CHECK(tfd_now_ns() < until);
		write.has_imm = 1;
		for (; posted < FLOOD; posted++) {
			int rc;

			write.imm = posted;
			rc = ops->post(pair->out, &write, &wrs[posted]);
			refused += rc == -EAGAIN;
			if (rc == -EAGAIN)
				break;
			CHECK_OK(rc);
		}
		count = ops->poll(a.domain, wc, 5);
		for (int i = 0; i < count; i++)
			CHECK(wc[i].type == TFD_WC_SENT && wc[i].wr == &wrs[sent++]);
		count = ops->poll(b.domain, wc, 5);
		for (int i = 0; i < count; i++)
			CHECK(wc[i].type == TFD_WC_IMM && wc[i].imm == arrived++ &&
			      wc[i].owner == &pair->owner);
	}
	CHECK(refused > 0);
}

/* The fd tells of what comes after arm has said 0; nothing that came before is lost. */
static void test_sleep(struct joined *pair)
{
	struct pollfd fds[] = { { .fd = ops->wait_fd(a.domain), .events = POLLIN },
	                        { .fd = ops->wait_fd(b.domain), .events = POLLIN } };

	for (uint32_t i = 0; i < 200; i++) {
		struct tfd_post write = piece_of(&a, &b, 8);
		struct tfd_wr wr = { 0 };
		struct tfd_wc wc;

		write.has_imm = 1;
		write.imm = i;
		if (i % 2) { /* asked for first, or posted first */
			while (ops->arm(b.domain) != 0)
				CHECK(ops->poll(b.domain, &wc, 1) == 0);
		}
		CHECK_OK(ops->post(pair->out, &write, &wr));
		CHECK(ops->arm(a.domain) == 0 || ops->poll(a.domain, &wc, 0) == 0);
		if (i % 2 == 0 && ops->arm(b.domain) != 0)
			fds[1].events = 0;
		CHECK(!fds[1].events || poll(&fds[1], 1, 30000) == 1);
		fds[1].events = POLLIN;
		expect_imm(&b, i, TFD_TRAFFIC_BULK, &pair->owner);
		expect_sent(&a, &wr);
	}
}

/* An immediate alone. */
static struct tfd_post imm_of(const struct side *from, const struct side *to)
{
	struct tfd_post write = piece_of(from, to, 0);

	write.has_imm = 1;
	return write;
}

/* With both there, and room for one, what arrived does not wait for all that was sent. */
static void test_turns(struct joined *pair)
{
	struct tfd_post there = imm_of(&a, &b), here = imm_of(&b, &a);
	static struct tfd_wr wrs[2][20];
	uint32_t of_a[2] = { 0 }; /* sent, arrived */

	for (uint32_t i = 0; i < 20; i++) {
		CHECK_OK(ops->post(pair->out, &there, &wrs[0][i]));
		CHECK_OK(ops->post(pair->in, &here, &wrs[1][i]));
	}
	tfd_verbs_chains_send(a.domain);
	for (uint32_t i = 0; i < 40; i++) /* of b: then all of its immediates are at a */
		(void)next_of(&b);
	for (uint32_t i = 0; i < 40; i++) {
		struct tfd_wc wc = next_of(&a);

		of_a[wc.type == TFD_WC_IMM]++;
		CHECK(i != 1 || of_a[1]);
	}
	CHECK(of_a[0] == 20 && of_a[1] == 20);
}

/* Immediates that nobody has polled yet when their half is freed are nobody's. */
static void test_forgotten(void)
{
	struct tfd_post write = imm_of(&a, &b);
	struct tfd_wr wr = { 0 };
	struct joined pair;
	struct tfd_wc wc;

	pair_open(&pair);
	CHECK_OK(ops->post(pair.out, &write, &wr));
	expect_sent(&a, &wr);
	CHECK(ops->arm(b.domain) == -EAGAIN); /* it was looked for, and is kept */
	ops->half_close(pair.in);
	ops->half_free(pair.in);
	pair.in = NULL;
	wc = next_of(&b);
	CHECK(wc.type == TFD_WC_IMM && !wc.owner);
	pair_close(&pair);
}

/* A key that is none: told as such; what came before it has landed; the others go on. */
static void test_refusal(void)
{
	struct joined bad, other;
	struct tfd_post post = piece_of(&a, &b, 8);
	struct tfd_wr wrs[3] = { 0 };
	struct tfd_wc wc;

	halves_open(&bad);
	halves_open(&other);
	join(&bad);
	join(&other);
	CHECK_OK(ops->post(bad.out, &post, &wrs[0]));
	post.remote_address += BYTES;
	CHECK_OK(ops->post(bad.out, &post, &wrs[1]));
	post.remote_address -= BYTES;
	CHECK_OK(ops->post(bad.out, &post, &wrs[2]));
	expect_sent(&a, &wrs[0]);
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wrs[1] && wc.remote_access && wc.error == EACCES);
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wrs[2] && !wc.remote_access && wc.error == ECANCELED);
	CHECK(ops->post(bad.out, &post, &wrs[2]) == -ENOTCONN);
	pair_close(&bad);
	write_imm(&other, 4096, 1, TFD_TRAFFIC_LATENCY);
	pair_close(&other);
}

/* Each post of a half that is closed comes back once, and nothing lands any more. */
static void test_close(void)
{
	static struct tfd_wr wrs[100];
	struct joined pair;
	uint32_t back = 0, landed = 0;
	struct tfd_wc wc[8];
	int count;

	pair_open(&pair);
	for (uint32_t i = 0; i < 100; i++) {
		struct tfd_post post = piece_of(&a, &b, 8);

		post.has_imm = 1;
		post.traffic = i % 3;
		CHECK_OK(ops->post(pair.out, &post, &wrs[i]));
		wrs[i].message = 0;
	}
	ops->half_close(pair.in);
	while ((count = ops->half_drain(pair.in, wc, 8)) > 0) {
		for (int i = 0; i < count; i++) {
			CHECK(wc[i].type == TFD_WC_IMM && wc[i].owner == &pair.owner);
			landed++;
		}
	}
	ops->half_free(pair.in);
	memset(b.memory, 0, BYTES);
	ops->half_close(pair.out);
	while ((count = ops->half_drain(pair.out, wc, 8)) > 0) {
		for (int i = 0; i < count; i++) {
			CHECK(wc[i].wr >= wrs && wc[i].wr < wrs + 100 && !wc[i].wr->message++);
			CHECK(wc[i].type == TFD_WC_SENT || wc[i].type == TFD_WC_ERROR);
			back++;
		}
	}
	ops->half_free(pair.out);
	CHECK(back == 100 && landed <= 100);
	CHECK(ops->poll(a.domain, wc, 8) == 0 && ops->poll(b.domain, wc, 8) == 0);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(b.memory[i] == 0);
}

/* Connections come and go, with posts in flight or not, and those that stay do not notice. */
static void test_life(struct joined *stays)
{
	for (uint32_t i = 0; i < 40; i++) {
		struct tfd_post post = piece_of(&a, &b, 8);
		struct joined pair;
		struct tfd_wr wr = { 0 };

		halves_open(&pair);
		if (i % 4)
			join(&pair);
		if (i % 4 == 2) {
			CHECK_OK(ops->post(pair.out, &post, &wr));
			expect_sent(&a, &wr);
		}
		pair_close(&pair);
		if (i % 8 == 0)
			write_imm(stays, 64, i, TFD_TRAFFIC_MESSAGE);
	}
}

static void test_names(void)
{
	struct tfd_group_options options = rail_options();
	struct tfd_rail_info info = { 0 };
	struct tfd_domain *domain = NULL;

	CHECK(ops->domain_open(&options, "nosuch0", &info, &domain, &error) == -ENODEV && !domain);
	CHECK(strstr(error.text, "nosuch0") && strstr(error.text, rail_name()));
	options.verbs.gid_given = 1;
	options.verbs.gid_index = 1023;
	CHECK(ops->domain_open(&options, rail_name(), &info, &domain, &error) == -ENOENT && !domain);
	CHECK(strstr(error.text, "1023"));
	options.verbs = (struct tfd_verbs_options){ .mtu = 1000 };
	CHECK(ops->domain_open(&options, rail_name(), &info, &domain, &error) == -EINVAL && !domain);
	options.verbs = (struct tfd_verbs_options){ .pkey = 0x1234 };
	CHECK(ops->domain_open(&options, rail_name(), &info, &domain, &error) == -ENOENT && !domain);
	CHECK(strstr(error.text, "0x1234"));
	options.verbs = (struct tfd_verbs_options){ .mtu = 256 };
	CHECK_OK(ops->domain_open(&options, rail_name(), &info, &domain, &error));
	CHECK(strstr(info.why, "MTU 256"));
	ops->domain_close(domain);
}

/* In a guest the log is all that there is of a failure. */
#define RUN(test, ...)                       \
	do {                                 \
		(void)printf("%s\n", #test); \
		(void)fflush(stdout);        \
		test(__VA_ARGS__);           \
	} while (0)

/* All of it by ibv_wr_start and its like where the device has them, or (`plain`) by ibv_post_send. */
static void run(uint32_t plain)
{
	struct joined pairs[PAIRS];

	(void)printf("plain posts: %u\n", plain);
	side_open_with(&a, rail_name(), (struct tfd_verbs_options){ .plain_posts = plain });
	side_open_with(&b, rail_name(), (struct tfd_verbs_options){ .plain_posts = plain });
	RUN(test_choice);
	RUN(test_names);
	for (uint32_t i = 0; i < PAIRS; i++) {
		pair_open(&pairs[i]);
	}
	RUN(test_owners, pairs);
	RUN(test_answers, &pairs[0]);
	RUN(test_read, &pairs[0]);
	RUN(test_parts, &pairs[0]);
	RUN(test_flood, &pairs[0]);
	RUN(test_sleep, &pairs[1]);
	RUN(test_turns, &pairs[1]);
	RUN(test_forgotten);
	RUN(test_refusal);
	RUN(test_close);
	RUN(test_life, &pairs[2]);
	for (uint32_t i = 0; i < PAIRS; i++)
		pair_close(&pairs[i]);
	side_close(&a);
	side_close(&b);
}

int main(void)
{
	run(0);
	run(1);
	return 0;
}

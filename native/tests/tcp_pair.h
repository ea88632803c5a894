/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails of the tcp provider on loopback, both polled by the test. */
#ifndef TFD_TCP_PAIR_H
#define TFD_TCP_PAIR_H

#include "providers/tcp/tcp.h"

#define BYTES (4u << 20)
#define ROUNDS 200000 /* of polling, with a pause where nothing is told; then a test gives up */
#define QUIET 50      /* rounds without a word after which nothing more is expected */

static const struct tfd_provider_ops *const ops = &tfd_tcp_ops;
typedef uint8_t pair_address[TFD_ADDRESS_MAX];

#include "provider_pair.h"

/* What a side has told, in order. */
struct told {
	struct tfd_wc wc[4096];
	uint32_t count;
};

static struct told a_told, b_told;

static inline void side_open_at(struct side *side, const char *rail)
{
	struct tfd_group_options options = { .provider = "tcp" };

	side_open_as(side, &options, rail);
}

static inline void sides_open(void)
{
	side_open_at(&a, "127.0.0.1");
	side_open_at(&b, "127.0.0.1");
}

static inline void sides_close(void)
{
	side_close(&a);
	side_close(&b);
}

static inline int side_poll(struct side *side, struct told *told)
{
	int count = ops->poll(side->domain, told->wc + told->count, 16);

	CHECK(count >= 0 && count <= 16);
	told->count += (uint32_t)count;
	CHECK(told->count + 16 <= sizeof(told->wc) / sizeof(told->wc[0]));
	return count;
}

static inline int both_poll(void)
{
	int count = side_poll(&a, &a_told) + side_poll(&b, &b_told);

	if (!count)
		(void)usleep(20);
	return count;
}

static inline void told_clear(void)
{
	a_told.count = b_told.count = 0;
}

/* Polls both sides until they have told so much. */
static inline void await_told(uint32_t of_a, uint32_t of_b)
{
	for (int round = 0; round < ROUNDS && (a_told.count < of_a || b_told.count < of_b); round++)
		(void)both_poll();
	if (a_told.count != of_a || b_told.count != of_b)
		(void)fprintf(stderr, "told: %u of %u, %u of %u\n", a_told.count, of_a, b_told.count, of_b);
	CHECK(a_told.count == of_a && b_told.count == of_b);
}

static inline void poll_quiet(void)
{
	for (int quiet = 0; quiet < QUIET; quiet++) {
		if (both_poll())
			quiet = 0;
	}
}

static inline void post_when_up(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	int rc = ops->post(half, post, wr);

	for (int round = 0; round < ROUNDS && rc == -EAGAIN; round++) {
		(void)both_poll();
		rc = ops->post(half, post, wr);
	}
	CHECK_OK(rc);
}

static inline void write_imm(struct joined *pair, uint64_t length, uint32_t imm)
{
	struct tfd_post write = piece(length);
	struct tfd_wr wr = { 0 };

	for (uint64_t i = 0; i < length; i++)
		a.memory[i] = (uint8_t)(i * 31 + imm);
	write.has_imm = 1;
	write.imm = imm;
	told_clear();
	post_when_up(pair->out, &write, &wr);
	await_told(1, 1);
	CHECK(a_told.wc[0].type == TFD_WC_SENT && a_told.wc[0].wr == &wr);
	CHECK(b_told.wc[0].type == TFD_WC_IMM && b_told.wc[0].imm == imm &&
	      b_told.wc[0].owner == &pair->owner);
	CHECK(memcmp(a.memory, b.memory, length) == 0);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails of the tcp provider on loopback, both polled by the test. */
#ifndef TFD_TCP_PAIR_H
#define TFD_TCP_PAIR_H

#include "core_fixture.h"
#include "providers/tcp/tcp.h"

#define BYTES (4u << 20)
#define ROUNDS 200000 /* of polling, with a pause where nothing is told; then a test gives up */
#define QUIET 50      /* rounds without a word after which nothing more is expected */

static const struct tfd_provider_ops *const ops = &tfd_tcp_ops;

struct side {
	struct tfd_domain *domain;
	struct tfd_rail_info info;
	uint8_t *memory;
	struct tfd_mr *mr;
	struct tfd_region_key key;
};

struct joined {
	struct tfd_half *out, *in;
	uint8_t out_address[TFD_ADDRESS_MAX], in_address[TFD_ADDRESS_MAX];
	size_t out_bytes, in_bytes;
	int owner;  /* its address is what the incoming half names */
	int writer; /* what the outgoing one names */
};

/* What a side has told, in order. */
struct told {
	struct tfd_wc wc[4096];
	uint32_t count;
};

static struct side a, b;
static struct told a_told, b_told;

static inline void side_open_at(struct side *side, const char *rail)
{
	struct tfd_group_options options = { .provider = "tcp" };

	memset(side, 0, sizeof(*side));
	CHECK_OK(ops->domain_open(&options, rail, &side->info, &side->domain, &error));
	side->memory = calloc(1, BYTES);
	CHECK(side->memory);
	CHECK_OK(ops->mr_open(side->domain, side->memory, BYTES, 1, &side->mr, &side->key, &error));
}

static inline void sides_open(void)
{
	side_open_at(&a, "127.0.0.1");
	side_open_at(&b, "127.0.0.1");
}

static inline void side_close(struct side *side)
{
	ops->mr_close(side->domain, side->mr);
	ops->domain_close(side->domain);
	free(side->memory);
}

static inline void sides_close(void)
{
	side_close(&a);
	side_close(&b);
}

static inline void halves_open(struct joined *pair)
{
	memset(pair, 0, sizeof(*pair));
	CHECK_OK(ops->half_open(a.domain, 1, &pair->writer, &pair->out, pair->out_address, &pair->out_bytes,
	                        &error));
	CHECK_OK(ops->half_open(b.domain, 0, &pair->owner, &pair->in, pair->in_address, &pair->in_bytes,
	                        &error));
	CHECK(pair->in_bytes <= TFD_ADDRESS_MAX && pair->out_bytes == pair->in_bytes);
}

static inline void join(struct joined *pair)
{
	halves_open(pair);
	CHECK_OK(ops->half_start(pair->in, pair->out_address, pair->out_bytes, &error));
	CHECK_OK(ops->half_start(pair->out, pair->in_address, pair->in_bytes, &error));
}

static inline void half_end(struct tfd_half **half)
{
	struct tfd_wc wc[8];

	if (!*half)
		return;
	ops->half_close(*half);
	while (ops->half_drain(*half, wc, 8) > 0)
		continue;
	ops->half_free(*half);
	*half = NULL;
}

static inline void joined_close(struct joined *pair)
{
	half_end(&pair->in);
	half_end(&pair->out);
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

/* From a to b, from the beginning. */
static inline struct tfd_post piece(uint64_t length)
{
	return (struct tfd_post){ .local = a.memory,
	                          .mr = length ? a.mr : NULL,
	                          .length = length,
	                          .remote_address = b.key.address,
	                          .remote_key = b.key.key };
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

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two rails of one provider in this process, both polled by the test, and the halves between them. Whoever includes it has defined what
 * they are: `ops`, its table; `pair_address`, the type of a half's address; BYTES, the memory of each.
 */
#ifndef TFD_PROVIDER_PAIR_H
#define TFD_PROVIDER_PAIR_H

#include "core_fixture.h"

struct side {
	struct tfd_domain *domain;
	struct tfd_rail_info info;
	uint8_t *memory;
	struct tfd_mr *mr;
	struct tfd_region_key key;
};

struct joined {
	struct tfd_half *out, *in;
	pair_address out_address, in_address;
	size_t out_bytes, in_bytes;
	int owner;  /* its address is what the incoming half names */
	int writer; /* what the outgoing one names */
};

static struct side a, b;

static inline void side_open_as(struct side *side, const struct tfd_group_options *options, const char *rail)
{
	memset(side, 0, sizeof(*side));
	CHECK_OK(ops->domain_open(options, rail, &side->info, &side->domain, &error));
	side->memory = calloc(1, BYTES);
	CHECK(side->memory);
	CHECK_OK(ops->mr_open(side->domain, side->memory, BYTES, 1, &side->mr, &side->key, &error));
}

static inline void side_close(struct side *side)
{
	ops->mr_close(side->domain, side->mr);
	ops->domain_close(side->domain);
	free(side->memory);
}

static inline void halves_open(struct joined *pair)
{
	memset(pair, 0, sizeof(*pair));
	CHECK_OK(ops->half_open(a.domain, 1, &pair->writer, &pair->out, &pair->out_address, &pair->out_bytes,
	                        &error));
	CHECK_OK(ops->half_open(b.domain, 0, &pair->owner, &pair->in, &pair->in_address, &pair->in_bytes,
	                        &error));
	CHECK(pair->out_bytes <= sizeof(pair->out_address) && pair->in_bytes <= sizeof(pair->in_address));
}

static inline void join(struct joined *pair)
{
	CHECK_OK(ops->half_start(pair->in, &pair->out_address, pair->out_bytes, &error));
	CHECK_OK(ops->half_start(pair->out, &pair->in_address, pair->in_bytes, &error));
}

static inline void pair_open(struct joined *pair)
{
	halves_open(pair);
	join(pair);
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

static inline void pair_close(struct joined *pair)
{
	half_end(&pair->in);
	half_end(&pair->out);
}

static inline struct tfd_post piece_of(const struct side *from, const struct side *to, uint64_t length)
{
	return (struct tfd_post){ .local = from->memory,
	                          .mr = length ? from->mr : NULL,
	                          .length = length,
	                          .remote_address = to->key.address,
	                          .remote_key = to->key.key };
}

/* From a to b. */
static inline struct tfd_post piece(uint64_t length)
{
	return piece_of(&a, &b, length);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two rails of the verbs provider on one device, both polled by the test: TFD_TEST_RAIL of TFD_TEST_LIBRARY, or of the system's library
 * where that is not set; without either a device of the double (softverbs/).
 */
#ifndef TFD_VERBS_PAIR_H
#define TFD_VERBS_PAIR_H

#include "core/parts.h"
#include "core_fixture.h"
#include "providers/verbs/verbs.h"

#define BYTES (1u << 20)
#define PATIENCE_NS 30000000000u /* a soft device in an emulated machine may need some of it */

static const struct tfd_provider_ops *const ops = &tfd_verbs_ops;

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

static struct side a, b;

static inline const char *rail_name(void)
{
	const char *rail = getenv("TFD_TEST_RAIL");

	return rail ? rail : "soft0";
}

/* The double, which is built beside the tests. */
static inline const char *soft_library(char *path, size_t bytes)
{
	ssize_t length = readlink("/proc/self/exe", path, bytes);
	char *name;

	CHECK(length > 0 && (size_t)length < bytes);
	path[length] = 0;
	name = strrchr(path, '/') + 1;
	CHECK((size_t)(name - path) + sizeof("libsoftverbs.so") <= bytes);
	(void)strcpy(name, "libsoftverbs.so");
	return path;
}

static inline struct tfd_group_options rail_options(void)
{
	const char *library = getenv("TFD_TEST_LIBRARY");
	char path[200];
	struct tfd_group_options options = { .provider = "verbs" };

	if (!library)
		library = getenv("TFD_TEST_RAIL") ? "" : soft_library(path, sizeof(path));
	(void)strcpy(options.library, library);
	return options;
}

static inline void side_open_with(struct side *side, const char *rail, struct tfd_verbs_options verbs)
{
	struct tfd_group_options options = rail_options();

	options.verbs = verbs;
	memset(side, 0, sizeof(*side));
	CHECK_OK(ops->domain_open(&options, rail, &side->info, &side->domain, &error));
	side->memory = calloc(1, BYTES);
	CHECK(side->memory);
	CHECK_OK(ops->mr_open(side->domain, side->memory, BYTES, 1, &side->mr, &side->key, &error));
}

static inline void side_open_at(struct side *side, const char *rail)
{
	side_open_with(side, rail, (struct tfd_verbs_options){ 0 });
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
	CHECK_OK(ops->half_open(a.domain, 1, &pair->writer, &pair->out, pair->out_address, &pair->out_bytes,
	                        &error));
	CHECK_OK(ops->half_open(b.domain, 0, &pair->owner, &pair->in, pair->in_address, &pair->in_bytes,
	                        &error));
}

static inline void join(struct joined *pair)
{
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

static inline void pair_close(struct joined *pair)
{
	half_end(&pair->in);
	half_end(&pair->out);
}

/* One completion of that side. */
static inline struct tfd_wc next_of(struct side *side)
{
	uint64_t until = tfd_now_ns() + PATIENCE_NS;
	struct tfd_wc wc;

	while (ops->poll(side->domain, &wc, 1) == 0) {
		CHECK(tfd_now_ns() < until);
		(void)usleep(20);
	}
	return wc;
}

static inline struct tfd_post piece_of(const struct side *from, const struct side *to, uint64_t length)
{
	return (struct tfd_post){ .local = from->memory,
	                          .mr = length ? from->mr : NULL,
	                          .length = length,
	                          .remote_address = to->key.address,
	                          .remote_key = to->key.key };
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two rails of the verbs provider on one device, both polled by the test: TFD_TEST_RAIL of TFD_TEST_LIBRARY, or of the system's library
 * where that is not set; without either a device of the double (softverbs/).
 */
#ifndef TFD_VERBS_PAIR_H
#define TFD_VERBS_PAIR_H

#include "core/parts.h"
#include "providers/verbs/verbs.h"

#define BYTES (1u << 20)
#define PATIENCE_NS 30000000000u /* a soft device in an emulated machine may need some of it */

static const struct tfd_provider_ops *const ops = &tfd_verbs_ops;
typedef uint8_t pair_address[TFD_ADDRESS_MAX];

#include "provider_pair.h"

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
	side_open_as(side, &options, rail);
}

static inline void side_open_at(struct side *side, const char *rail)
{
	side_open_with(side, rail, (struct tfd_verbs_options){ 0 });
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

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails of EFA's face in one process, by the provider's own table, and the face's knobs. For C tests. */
#ifndef TFD_EFA_PAIR_H
#define TFD_EFA_PAIR_H

#include <dlfcn.h>
#include <stdbool.h>

#include "core_fixture.h"
#include "efaface/efaface.h"
#include "providers/libfabric/domain.h"

#define BYTES (1u << 20)
#define ROUNDS 200000 /* of polling, with a pause in each; then a test gives up */
#define NEAR "rdmap16s27"
#define FAR "rdmap32s27"

static const struct tfd_provider_ops *const ops = &tfd_libfabric_ops;
static char face_path[256];
static struct efaface_control *knobs, plain_knobs;
static struct efaface_stats *counts;
static void (*knobs_set)(const struct efaface_control *to);
static void (*counts_get)(struct efaface_stats *out);

struct side {
	struct tfd_domain *domain;
	struct tfd_rail_info info;
	uint8_t *memory;
	struct tfd_mr *mr;
	struct tfd_region_key key;
};

struct joined {
	struct tfd_half *out, *in;
	struct tfd_fi_address out_address, in_address;
	size_t out_bytes, in_bytes;
};

static struct side a, b;

static inline void find(void *handle, const char *name, void *slot)
{
	void *symbol = dlsym(handle, name);

	CHECK(symbol);
	memcpy(slot, &symbol, sizeof(symbol));
}

/* The library lies beside this program. */
static inline void face_load(void)
{
	struct efaface_control *(*find_knobs)(void);
	struct efaface_stats *(*find_counts)(void);
	ssize_t length = readlink("/proc/self/exe", face_path, sizeof(face_path) - 32);
	void *handle;

	CHECK(length > 0);
	face_path[length] = 0;
	(void)strcpy(strrchr(face_path, '/') + 1, "efaface/libefaface.so");
	(void)setenv("FI_OFI_RXM_ENABLE_PASSTHRU", "1",
	             0); /* as the loader does, before the library reads it */
	(void)setenv("FI_PROVIDER", "efa,verbs,tcp,ofi_rxm", 0);
	handle = dlopen(face_path, RTLD_NOW);
	if (!handle)
		(void)fprintf(stderr, "%s\n", dlerror());
	CHECK(handle);
	find(handle, "efaface_knobs", &find_knobs);
	find(handle, "efaface_counts", &find_counts);
	find(handle, "efaface_set", &knobs_set);
	find(handle, "efaface_get", &counts_get);
	knobs = find_knobs();
	counts = find_counts();
	plain_knobs = *knobs;
}

static inline int try_open(const char *fabric, const char *device, struct tfd_rail_info *info,
                           struct tfd_domain **domain)
{
	struct tfd_group_options options = { .provider = "libfabric" };

	(void)strcpy(options.fabric, fabric);
	(void)strcpy(options.library, face_path);
	memset(info, 0, sizeof(*info));
	return ops->domain_open(&options, device, info, domain, &error);
}

static inline void side_open(struct side *side, const char *device)
{
	memset(side, 0, sizeof(*side));
	CHECK_OK(try_open("", device, &side->info, &side->domain));
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
	CHECK_OK(ops->half_open(a.domain, 1, pair, &pair->out, &pair->out_address, &pair->out_bytes, &error));
	CHECK_OK(ops->half_open(b.domain, 0, pair, &pair->in, &pair->in_address, &pair->in_bytes, &error));
}

static inline void join(struct joined *pair)
{
	halves_open(pair);
	CHECK_OK(ops->half_start(pair->in, &pair->out_address, pair->out_bytes, &error));
	CHECK_OK(ops->half_start(pair->out, &pair->in_address, pair->in_bytes, &error));
}

/* Closes a half and tells what its drain says. */
static inline int half_end(struct tfd_half **half, struct tfd_wc *wc, int max)
{
	struct tfd_wc one;
	int count = 0;

	ops->half_close(*half);
	while (ops->half_drain(*half, &one, 1) > 0) {
		CHECK(count < max);
		wc[count++] = one;
	}
	ops->half_free(*half);
	*half = NULL;
	return count;
}

static inline void part(struct joined *pair)
{
	struct tfd_wc wc[64];

	if (pair->in)
		(void)half_end(&pair->in, wc, 64);
	if (pair->out)
		(void)half_end(&pair->out, wc, 64);
}

static inline struct tfd_post piece(uint64_t offset, uint64_t length)
{
	return (struct tfd_post){ .local = a.memory + offset,
	                          .mr = length ? a.mr : NULL,
	                          .length = length,
	                          .remote_address = b.key.address + offset,
	                          .remote_key = b.key.key };
}

/* Polls until a completion of `a` is there; what comes to `b` meanwhile goes to `came`. */
static inline struct tfd_wc await_done(void (*came)(const struct tfd_wc *wc))
{
	struct tfd_wc wc;

	for (int round = 0; round < ROUNDS; round++) {
		if (ops->poll(b.domain, &wc, 1) && came)
			came(&wc);
		if (ops->poll(a.domain, &wc, 1))
			return wc;
		(void)usleep(20);
	}
	CHECK(!"no completion came");
	return wc;
}

#endif

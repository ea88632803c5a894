/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails of EFA's face in one process, by the provider's own table, and the face's knobs. For C tests. */
#ifndef TFD_EFA_PAIR_H
#define TFD_EFA_PAIR_H

#include <dlfcn.h>
#include <stdbool.h>

#include "efaface/efaface.h"
#include "providers/libfabric/domain.h"

#define BYTES (1u << 20)
#define ROUNDS 200000 /* of polling, with a pause in each; then a test gives up */
#define NEAR "rdmap16s27"
#define FAR "rdmap32s27"

static const struct tfd_provider_ops *const ops = &tfd_libfabric_ops;
typedef struct tfd_fi_address pair_address;

#include "provider_pair.h"

static char face_path[256];
static struct efaface_control *knobs, plain_knobs;
static struct efaface_stats *counts;
static void (*knobs_set)(const struct efaface_control *to);
static void (*counts_get)(struct efaface_stats *out);

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

static inline struct tfd_group_options face_options(const char *fabric)
{
	struct tfd_group_options options = { .provider = "libfabric" };

	(void)strcpy(options.fabric, fabric);
	(void)strcpy(options.library, face_path);
	return options;
}

static inline int try_open(const char *fabric, const char *device, struct tfd_rail_info *info,
                           struct tfd_domain **domain)
{
	struct tfd_group_options options = face_options(fabric);

	memset(info, 0, sizeof(*info));
	return ops->domain_open(&options, device, info, domain, &error);
}

static inline void side_open(struct side *side, const char *device)
{
	struct tfd_group_options options = face_options("");

	side_open_as(side, &options, device);
}

/* Closes a half and tells what its drain says. */
static inline int half_end_telling(struct tfd_half **half, struct tfd_wc *wc, int max)
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

static inline struct tfd_post piece_at(uint64_t offset, uint64_t length)
{
	struct tfd_post post = piece(length);

	post.local = a.memory + offset;
	post.remote_address += offset;
	return post;
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

/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails of the verbs provider on devices of the double of libibverbs (softverbs/), which does as it is told. */
#ifndef TFD_VERBS_SOFT_H
#define TFD_VERBS_SOFT_H

#include <dlfcn.h>

#include "softverbs/softverbs.h"
#include "verbs_pair.h"

#define DEVICE "soft0"

static inline void *soft(const char *name)
{
	static void *handle;
	char path[200];
	void *symbol;

	if (!handle)
		handle = dlopen(soft_library(path, sizeof(path)), RTLD_NOW);
	CHECK(handle);
	symbol = dlsym(handle, name);
	CHECK(symbol);
	return symbol;
}

/* A function of the double. */
#define SOFT(function) ((__typeof__(&function))soft(#function))

static inline void configure(const char *text)
{
	CHECK(SOFT(softverbs_configure)(text) == 0);
}

static inline struct softverbs_counts counts(void)
{
	struct softverbs_counts counted;

	SOFT(softverbs_counts)(DEVICE, &counted);
	return counted;
}

static inline void nothing_is_left(void)
{
	struct softverbs_counts now = counts();

	CHECK(!now.contexts && !now.pds && !now.mrs && !now.channels && !now.cqs && !now.srqs && !now.qps);
}

static inline void await_state(const struct side *side, uint32_t state)
{
	uint64_t until = tfd_now_ns() + PATIENCE_NS;

	while (ops->rail_state(side->domain) != state) {
		CHECK(tfd_now_ns() < until);
		(void)usleep(100);
	}
}

static inline void write_passes(struct joined *pair, uint32_t imm)
{
	struct tfd_post post = piece_of(&a, &b, 100);
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;

	a.memory[99] = (uint8_t)imm;
	post.has_imm = 1;
	post.imm = imm;
	CHECK_OK(ops->post(pair->out, &post, &wr));
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_SENT && wc.wr == &wr);
	wc = next_of(&b);
	CHECK(wc.type == TFD_WC_IMM && wc.imm == imm && wc.owner == &pair->owner &&
	      b.memory[99] == (uint8_t)imm);
}

#endif

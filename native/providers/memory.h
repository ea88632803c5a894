/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registered memory of a rail, by key, for providers whose worker copies. Addresses count from the beginning of the memory.
 */
#ifndef TFD_MEMORY_H
#define TFD_MEMORY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "provider.h"

#define TFD_MR_PAGES 4096u
#define TFD_MR_PAGE_SLOTS 64u
#define TFD_MR_INDEX_BITS 18u /* of a key; the rest is random */

/* A slot of the table. Constant between mr_open and mr_close, but for the key. */
struct tfd_mr {
	uint64_t key; /* shared; 0: free */
	uint8_t *base;
	uint64_t length;
	bool writable;
	bool readable; /* by the far side */
	const uint32_t *broken; /* shared; not 0 once its owner has taken pages away; NULL: nobody can */
	uint64_t
		device; /* `staged`: number of the allocation on a device that it is in; 0: the host's memory */
	uint64_t device_offset; /* into that */
	uint32_t index;
	struct tfd_mr *next_free;
};

struct tfd_memory_range {
	void *address;
	size_t length;
	uint32_t access; /* TFD_MR_* */
	uint64_t device;
	uint64_t device_offset;
};

/*
 * Control threads change it under `lock`, the worker looks keys up without: pages are never moved or freed before the end. The worker
 * uses what it has found within one *pass* only, and whoever closes a registration waits for the end of the pass.
 */
struct tfd_memory {
	pthread_mutex_t lock;
	uint64_t pass; /* shared; odd: the worker may be using what it has looked up */
	uint32_t used; /* slots below this have been in use */
	struct tfd_mr *first_free;
	struct tfd_mr *pages[TFD_MR_PAGES]; /* shared; owned; NULL: not needed yet */
};

void tfd_memory_init(struct tfd_memory *memory);
void tfd_memory_fini(struct tfd_memory *memory);
int tfd_memory_add(struct tfd_memory *memory, const struct tfd_memory_range *range, struct tfd_mr **out,
                   struct tfd_error *error);
/* Once it returns, the worker uses it no more. */
void tfd_memory_remove(struct tfd_memory *memory, struct tfd_mr *mr);

/* worker */
void tfd_memory_pass_begin(struct tfd_memory *memory);
void tfd_memory_pass_end(struct tfd_memory *memory);
/* Within a pass. NULL: nobody's key. */
const struct tfd_mr *tfd_mr_find_hot(struct tfd_memory *memory, uint64_t key);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of this provider share: the table of registered memory. */
#ifndef TFD_LOCAL_H
#define TFD_LOCAL_H

#include <pthread.h>
#include <stdbool.h>

#include "../provider.h"

#define TFD_LOCAL_PAGES 1024u
#define TFD_LOCAL_PAGE_SLOTS 64u

/* A slot of the table. Constant between mr_open and mr_close, but for the key. */
struct tfd_mr {
	uint64_t key; /* shared; generation << 32 | index + 1; 0: free */
	uint8_t *base;
	uint64_t length;
	bool writable;
	const uint32_t *broken; /* shared; borrowed; not 0 once pages were taken away; NULL: they cannot be */
	uint32_t index;
	uint32_t generation; /* of the last key; counts up, so that a key of before finds nothing */
	struct tfd_mr *next_free;
};

/* Control threads change it under `lock`, the worker looks keys up without: pages are never moved or freed before the end. */
struct tfd_local_memory {
	pthread_mutex_t lock;
	uint32_t used; /* slots below this have been in use */
	struct tfd_mr *first_free;
	struct tfd_mr *pages[TFD_LOCAL_PAGES]; /* shared; owned; NULL: not needed yet */
};

void tfd_local_memory_init(struct tfd_local_memory *memory);
void tfd_local_memory_fini(struct tfd_local_memory *memory);
int tfd_local_mr_open(struct tfd_domain *domain, void *address, size_t length, int writable,
                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
void tfd_local_mr_close(struct tfd_domain *domain, struct tfd_mr *mr);
/* NULL: nobody's key. */
const struct tfd_mr *tfd_local_mr_find_hot(struct tfd_local_memory *memory, uint64_t key);

struct tfd_local_memory *tfd_local_memory_of(struct tfd_domain *domain);

#endif

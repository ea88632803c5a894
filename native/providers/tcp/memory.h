/* SPDX-License-Identifier: Apache-2.0 */
/* Registered memory of a rail, by key. Addresses count from the beginning of the memory. */
#ifndef TFD_TCP_MEMORY_H
#define TFD_TCP_MEMORY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "../provider.h"

#define TFD_TCP_MR_PAGES 4096u
#define TFD_TCP_MR_PAGE_SLOTS 64u
#define TFD_TCP_MR_INDEX_BITS 18u /* of a key; the rest is random */

/* A slot of the table. Constant between mr_open and mr_close, but for the key. */
struct tfd_mr {
	uint64_t key; /* shared; 0: free */
	uint8_t *base;
	uint64_t length;
	bool writable;
	const uint32_t *broken; /* shared; not 0 once its owner has taken pages away; NULL: nobody can */
	uint32_t index;
	struct tfd_mr *next_free;
};

/*
 * Control threads change it under `lock`, the worker looks keys up without: pages are never moved or freed before the end. The worker
 * uses what it has found within one *pass* only, and whoever closes a registration waits for the end of the pass.
 */
struct tfd_tcp_memory {
	pthread_mutex_t lock;
	uint64_t pass; /* shared; odd: the worker may be using what it has looked up */
	uint32_t used; /* slots below this have been in use */
	struct tfd_mr *first_free;
	struct tfd_mr *pages[TFD_TCP_MR_PAGES]; /* shared; owned; NULL: not needed yet */
};

void tfd_tcp_memory_init(struct tfd_tcp_memory *memory);
void tfd_tcp_memory_fini(struct tfd_tcp_memory *memory);
int tfd_tcp_memory_add(struct tfd_tcp_memory *memory, void *address, size_t length, bool writable,
                       struct tfd_mr **out, struct tfd_error *error);
/* Once it returns, the worker uses it no more. */
void tfd_tcp_memory_remove(struct tfd_tcp_memory *memory, struct tfd_mr *mr);

/* worker */
void tfd_tcp_pass_begin(struct tfd_tcp_memory *memory);
void tfd_tcp_pass_end(struct tfd_tcp_memory *memory);
/* Within a pass. NULL: nobody's key. */
const struct tfd_mr *tfd_tcp_mr_find_hot(struct tfd_tcp_memory *memory, uint64_t key);

#endif

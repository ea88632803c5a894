/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who has which part of the arena: first fit over free extents that are kept in order. All of it is private memory; the segment
 * holds the tables alone. The owner's lock guards it.
 */
#ifndef TFD_SHM_ARENA_H
#define TFD_SHM_ARENA_H

#include <stdint.h>

struct tfd_extent {
	uint64_t offset;
	uint64_t bytes;
};

struct tfd_arena {
	struct tfd_extent *free; /* owned; by offset, no two touch */
	uint32_t free_count;
	uint32_t taken; /* extents given out */
	uint32_t most;  /* of them at once: there are at most that many free ones, and one */
	uint64_t bytes;
};

/* -ENOMEM. `most`: extents given out at once. */
int tfd_arena_init(struct tfd_arena *arena, uint64_t bytes, uint32_t most);
void tfd_arena_fini(struct tfd_arena *arena);

/* What a table of `bytes` takes: whole cache lines. */
uint64_t tfd_arena_size(uint64_t bytes);

/* Fills *offset. -EAGAIN: no room now; -EMSGSIZE: larger than the whole arena. `bytes` is a tfd_arena_size above 0. */
int tfd_arena_alloc(struct tfd_arena *arena, uint64_t bytes, uint64_t *offset);
void tfd_arena_release(struct tfd_arena *arena, uint64_t offset, uint64_t bytes);

#endif

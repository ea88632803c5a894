/* SPDX-License-Identifier: Apache-2.0 */
#include "arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "transferd/abi.h"

int tfd_arena_init(struct tfd_arena *arena, uint64_t bytes, uint32_t most)
{
	*arena = (struct tfd_arena){ .bytes = bytes / TFD_LINE * TFD_LINE, .most = most };
	arena->free = calloc((size_t)most + 1, sizeof(*arena->free));
	if (!arena->free)
		return -ENOMEM;
	if (arena->bytes)
		arena->free[arena->free_count++] = (struct tfd_extent){ 0, arena->bytes };
	return 0;
}

void tfd_arena_fini(struct tfd_arena *arena)
{
	free(arena->free);
	arena->free = NULL;
}

uint64_t tfd_arena_size(uint64_t bytes)
{
	return (bytes + TFD_LINE - 1) / TFD_LINE * TFD_LINE;
}

static void extent_remove(struct tfd_arena *arena, uint32_t at)
{
	arena->free_count--;
	memmove(&arena->free[at], &arena->free[at + 1], (arena->free_count - at) * sizeof(arena->free[0]));
}

int tfd_arena_alloc(struct tfd_arena *arena, uint64_t bytes, uint64_t *offset)
{
	if (bytes > arena->bytes)
		return -EMSGSIZE;
	if (arena->taken == arena->most)
		return -EAGAIN;
	for (uint32_t i = 0; i < arena->free_count; i++) {
		struct tfd_extent *extent = &arena->free[i];

		if (extent->bytes < bytes)
			continue;
		*offset = extent->offset;
		extent->offset += bytes;
		extent->bytes -= bytes;
		if (!extent->bytes)
			extent_remove(arena, i);
		arena->taken++;
		return 0;
	}
	return -EAGAIN;
}

/* The first free extent that begins after `offset`. */
static uint32_t extent_after(const struct tfd_arena *arena, uint64_t offset)
{
	uint32_t low = 0, high = arena->free_count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (arena->free[middle].offset < offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

void tfd_arena_release(struct tfd_arena *arena, uint64_t offset, uint64_t bytes)
{
	uint32_t at = extent_after(arena, offset);
	struct tfd_extent *next = at < arena->free_count ? &arena->free[at] : NULL;
	struct tfd_extent *previous = at ? &arena->free[at - 1] : NULL;

	arena->taken--;
	if (previous && previous->offset + previous->bytes == offset) {
		previous->bytes += bytes;
		if (next && previous->offset + previous->bytes == next->offset) {
			previous->bytes += next->bytes;
			extent_remove(arena, at);
		}
		return;
	}
	if (next && offset + bytes == next->offset) {
		next->offset = offset;
		next->bytes += bytes;
		return;
	}
	memmove(&arena->free[at + 1], &arena->free[at], (arena->free_count - at) * sizeof(arena->free[0]));
	arena->free[at] = (struct tfd_extent){ offset, bytes };
	arena->free_count++;
}

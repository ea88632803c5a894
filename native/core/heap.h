/* SPDX-License-Identifier: Apache-2.0 */
/* A binary heap of things that hold their place in it: the smallest key is first, of equal ones the smallest order. */
#ifndef TFD_HEAP_H
#define TFD_HEAP_H

#include <stdint.h>

struct tfd_heap_item {
	uint64_t key;
	uint64_t order;
	uint32_t at; /* place in the heap, from 1 on; 0: not there */
};

struct tfd_heap {
	struct tfd_heap_item **items; /* owned; what they point to is borrowed while it is there */
	uint32_t count;
	uint32_t capacity;
};

int tfd_heap_reserve(struct tfd_heap *heap, uint32_t count); /* room for so many; -ENOMEM */
void tfd_heap_fini(struct tfd_heap *heap);
void tfd_heap_add(struct tfd_heap *heap, struct tfd_heap_item *item); /* there is room */
void tfd_heap_remove(struct tfd_heap *heap, struct tfd_heap_item *item); /* idempotent */

static inline struct tfd_heap_item *tfd_heap_first(const struct tfd_heap *heap) /* NULL: none */
{
	return heap->count ? heap->items[0] : 0;
}

#endif

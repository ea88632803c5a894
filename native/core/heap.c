/* SPDX-License-Identifier: Apache-2.0 */
#include "heap.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define CAPACITY_LEAST 64u

int tfd_heap_reserve(struct tfd_heap *heap, uint32_t count)
{
	uint32_t capacity = heap->capacity ? heap->capacity : CAPACITY_LEAST;
	struct tfd_heap_item **items;

	if (count <= heap->capacity)
		return 0;
	while (capacity < count)
		capacity *= 2;
	items = realloc(heap->items, capacity * sizeof(*items)); /* NOLINT: pointers are meant */
	if (!items)
		return -ENOMEM;
	heap->items = items;
	heap->capacity = capacity;
	return 0;
}

void tfd_heap_fini(struct tfd_heap *heap)
{
	free(heap->items);
	*heap = (struct tfd_heap){ 0 };
}

static bool before(const struct tfd_heap_item *a, const struct tfd_heap_item *b)
{
	return a->key < b->key || (a->key == b->key && a->order < b->order);
}

static void place(struct tfd_heap *heap, uint32_t at, struct tfd_heap_item *item)
{
	heap->items[at] = item;
	item->at = at + 1;
}

static void rise(struct tfd_heap *heap, uint32_t at, struct tfd_heap_item *item)
{
	while (at) {
		uint32_t parent = (at - 1) / 2;

		if (!before(item, heap->items[parent]))
			break;
		place(heap, at, heap->items[parent]);
		at = parent;
	}
	place(heap, at, item);
}

static void sink(struct tfd_heap *heap, uint32_t at, struct tfd_heap_item *item)
{
	for (;;) {
		uint32_t child = 2 * at + 1;

		if (child >= heap->count)
			break;
		if (child + 1 < heap->count && before(heap->items[child + 1], heap->items[child]))
			child++;
		if (!before(heap->items[child], item))
			break;
		place(heap, at, heap->items[child]);
		at = child;
	}
	place(heap, at, item);
}

void tfd_heap_add(struct tfd_heap *heap, struct tfd_heap_item *item)
{
	rise(heap, heap->count++, item);
}

void tfd_heap_remove(struct tfd_heap *heap, struct tfd_heap_item *item)
{
	uint32_t at = item->at - 1;
	struct tfd_heap_item *last;

	if (!item->at)
		return;
	item->at = 0;
	last = heap->items[--heap->count];
	if (last == item)
		return;
	if (at && before(last, heap->items[(at - 1) / 2]))
		rise(heap, at, last);
	else
		sink(heap, at, last);
}

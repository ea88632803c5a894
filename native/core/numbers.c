/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include "parts.h"

#define NUMBERS_FIRST 64u

static int numbers_grow(struct tfd_numbers *numbers, uint32_t limit)
{
	uint32_t capacity = numbers->capacity ? numbers->capacity * 2 : NUMBERS_FIRST;
	void **items;

	if (numbers->capacity >= limit)
		return -ENOSPC;
	if (capacity > limit)
		capacity = limit;
	items = realloc(numbers->items, capacity * sizeof(*items));
	if (!items)
		return -ENOMEM;
	for (uint32_t i = numbers->capacity; i < capacity; i++)
		items[i] = NULL;
	numbers->next = numbers->capacity;
	numbers->items = items;
	numbers->capacity = capacity;
	return 0;
}

int tfd_numbers_take(struct tfd_numbers *numbers, uint32_t limit, void *item, uint32_t *number)
{
	int rc;

	for (uint32_t i = 0; i < numbers->capacity; i++) {
		uint32_t candidate = (numbers->next + i) % numbers->capacity;

		if (numbers->items[candidate])
			continue;
		numbers->items[candidate] = item;
		numbers->next = candidate + 1;
		*number = candidate;
		return 0;
	}
	rc = numbers_grow(numbers, limit);
	return rc ? rc : tfd_numbers_take(numbers, limit, item, number);
}

void tfd_numbers_give(struct tfd_numbers *numbers, uint32_t number)
{
	numbers->items[number] = NULL;
}

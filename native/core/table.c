/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <stdlib.h>

#include "barrier.h"

/* One count for all tables of the process: a handle names one thing, whatever table it is in. */
static uint32_t next_generation;

void tfd_table_fini(struct tfd_table *table)
{
	free(table->items);
	free(table->generations);
	*table = (struct tfd_table){ 0 };
}

static int table_grow(struct tfd_table *table)
{
	uint32_t capacity = table->capacity ? table->capacity * 2 : 16;
	void **items = realloc(table->items, capacity * sizeof(*items));
	uint32_t *generations;

	if (!items)
		return -ENOMEM;
	table->items = items;
	generations = realloc(table->generations, capacity * sizeof(*generations));
	if (!generations)
		return -ENOMEM;
	table->generations = generations;
	for (uint32_t i = table->capacity; i < capacity; i++) {
		items[i] = NULL;
		generations[i] = 0;
	}
	table->capacity = capacity;
	return 0;
}

int tfd_table_add(struct tfd_table *table, void *item, uint64_t *handle)
{
	uint32_t index = 0;
	int rc;

	if (table->count == table->capacity) {
		index = table->capacity;
		rc = table_grow(table);
		if (rc)
			return rc;
	}
	while (table->items[index])
		index++;
	table->items[index] = item;
	table->generations[index] = tfd_add_relaxed(&next_generation, 1) + 1;
	table->count++;
	*handle = (uint64_t)table->generations[index] << 32 | (index + 1);
	return 0;
}

void *tfd_table_remove(struct tfd_table *table, uint64_t handle)
{
	void *item = tfd_table_get(table, handle);

	if (!item)
		return NULL;
	table->items[(uint32_t)handle - 1] = NULL;
	table->count--;
	return item;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Handles to pointers. A handle is generation << 32 | index + 1; generations are counted over all tables, so no handle
 * is used twice (before 2^32 things were named). Its owner locks.
 */
#ifndef TFD_TABLE_H
#define TFD_TABLE_H

#include <stddef.h>
#include <stdint.h>

struct tfd_table {
	void **items;          /* borrowed */
	uint32_t *generations;
	uint32_t capacity;
	uint32_t count;
};

/* Small numbers for things, to be told on the wire. Owner: worker. */
struct tfd_numbers {
	void **items; /* borrowed; NULL: free */
	uint32_t capacity;
	uint32_t next; /* where to look for a free one: the longest unused, about */
};

void tfd_table_fini(struct tfd_table *table);
int tfd_table_add(struct tfd_table *table, void *item, uint64_t *handle); /* -ENOMEM */
void *tfd_table_remove(struct tfd_table *table, uint64_t handle);         /* NULL: not there */

static inline void *tfd_table_get(const struct tfd_table *table, uint64_t handle)
{
	uint32_t index = (uint32_t)handle - 1;

	if (index >= table->capacity || table->generations[index] != (uint32_t)(handle >> 32))
		return NULL;
	return table->items[index];
}

#endif

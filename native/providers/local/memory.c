/* SPDX-License-Identifier: Apache-2.0 */
/* Registered memory of a local rail, by key. Addresses count from the beginning of the memory. */
#include <errno.h>
#include <stdlib.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "local.h"

void tfd_local_memory_init(struct tfd_local_memory *memory)
{
	(void)pthread_mutex_init(&memory->lock, NULL);
}

void tfd_local_memory_fini(struct tfd_local_memory *memory)
{
	for (uint32_t i = 0; i < TFD_LOCAL_PAGES; i++)
		free(memory->pages[i]);
	(void)pthread_mutex_destroy(&memory->lock);
}

/* NULL: no memory, or all slots are in use. */
static struct tfd_mr *slot_take_locked(struct tfd_local_memory *memory)
{
	struct tfd_mr *mr = memory->first_free;
	uint32_t index = memory->used;
	struct tfd_mr *page;

	if (mr) {
		memory->first_free = mr->next_free;
		return mr;
	}
	if (index == TFD_LOCAL_PAGES * TFD_LOCAL_PAGE_SLOTS)
		return NULL;
	page = memory->pages[index / TFD_LOCAL_PAGE_SLOTS];
	if (!page) {
		page = calloc(TFD_LOCAL_PAGE_SLOTS, sizeof(*page));
		if (!page)
			return NULL;
		/* pairs with tfd_local_mr_find_hot: whoever sees the page sees it empty */
		tfd_store_release(&memory->pages[index / TFD_LOCAL_PAGE_SLOTS], page);
	}
	memory->used++;
	mr = &page[index % TFD_LOCAL_PAGE_SLOTS];
	mr->index = index;
	return mr;
}

int tfd_local_mr_open(struct tfd_domain *domain, void *address, size_t length, int writable,
                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_local_memory *memory = tfd_local_memory_of(domain);
	struct tfd_mr *mr;

	(void)pthread_mutex_lock(&memory->lock);
	mr = slot_take_locked(memory);
	(void)pthread_mutex_unlock(&memory->lock);
	if (!mr)
		return tfd_fail(error, -ENOMEM,
		                "no memory for a registration, or the group has all its %u regions",
		                TFD_LOCAL_PAGES * TFD_LOCAL_PAGE_SLOTS);
	mr->base = address;
	mr->length = length;
	mr->writable = writable != 0;
	mr->broken = tfd_guard_flag(address);
	mr->generation++;
	key->key = (uint64_t)mr->generation << 32 | (mr->index + 1);
	key->address = 0;
	tfd_store_release(&mr->key,
	                  key->key); /* pairs with tfd_local_mr_find_hot: then the rest is there, too */
	*out = mr;
	return 0;
}

void tfd_local_mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	struct tfd_local_memory *memory = tfd_local_memory_of(domain);

	tfd_store_release(&mr->key, 0);
	(void)pthread_mutex_lock(&memory->lock);
	mr->next_free = memory->first_free;
	memory->first_free = mr;
	(void)pthread_mutex_unlock(&memory->lock);
}

const struct tfd_mr *tfd_local_mr_find_hot(struct tfd_local_memory *memory, uint64_t key)
{
	uint32_t index = (uint32_t)key - 1;
	struct tfd_mr *page;
	struct tfd_mr *mr;

	if (index >= TFD_LOCAL_PAGES * TFD_LOCAL_PAGE_SLOTS)
		return NULL;
	page = tfd_load_acquire(&memory->pages[index / TFD_LOCAL_PAGE_SLOTS]);
	if (!page)
		return NULL;
	mr = &page[index % TFD_LOCAL_PAGE_SLOTS];
	return tfd_load_acquire(&mr->key) == key ? mr : NULL;
}

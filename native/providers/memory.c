/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/random.h>

#include "../core/barrier.h"
#include "../core/parts.h"

#define SLOTS (TFD_MR_PAGES * TFD_MR_PAGE_SLOTS)

_Static_assert(SLOTS == 1u << TFD_MR_INDEX_BITS, "a key holds the number of its slot");

void tfd_memory_init(struct tfd_memory *memory)
{
	(void)pthread_mutex_init(&memory->lock, NULL);
}

void tfd_memory_fini(struct tfd_memory *memory)
{
	for (uint32_t i = 0; i < TFD_MR_PAGES; i++)
		free(memory->pages[i]);
	(void)pthread_mutex_destroy(&memory->lock);
}

/* NULL: no memory, or all slots are in use. */
static struct tfd_mr *slot_take_locked(struct tfd_memory *memory)
{
	struct tfd_mr *mr = memory->first_free;
	uint32_t index = memory->used;
	struct tfd_mr *page;

	if (mr) {
		memory->first_free = mr->next_free;
		return mr;
	}
	if (index == SLOTS)
		return NULL;
	page = memory->pages[index / TFD_MR_PAGE_SLOTS];
	if (!page) {
		page = calloc(TFD_MR_PAGE_SLOTS, sizeof(*page));
		if (!page)
			return NULL;
		/* pairs with tfd_mr_find_hot: whoever sees the page sees it empty */
		tfd_store_release(&memory->pages[index / TFD_MR_PAGE_SLOTS], page);
	}
	memory->used++;
	mr = &page[index % TFD_MR_PAGE_SLOTS];
	mr->index = index;
	return mr;
}

static void slot_give(struct tfd_memory *memory, struct tfd_mr *mr)
{
	(void)pthread_mutex_lock(&memory->lock);
	mr->next_free = memory->first_free;
	memory->first_free = mr;
	(void)pthread_mutex_unlock(&memory->lock);
}

/* A key is a secret: nobody guesses his way into a region. */
static uint64_t key_make(const struct tfd_mr *mr)
{
	uint64_t random = 0;

	while (!(random >> TFD_MR_INDEX_BITS)) {
		if (getrandom(&random, sizeof(random), 0) != (ssize_t)sizeof(random))
			return 0;
	}
	return random >> TFD_MR_INDEX_BITS << TFD_MR_INDEX_BITS | mr->index;
}

int tfd_memory_add(struct tfd_memory *memory, const struct tfd_memory_range *range, struct tfd_mr **out,
                   struct tfd_error *error)
{
	struct tfd_mr *mr;
	uint64_t key;

	(void)pthread_mutex_lock(&memory->lock);
	mr = slot_take_locked(memory);
	(void)pthread_mutex_unlock(&memory->lock);
	if (!mr)
		return tfd_fail(error, -ENOMEM,
		                "no memory for a registration, or the rail has all its %u regions", SLOTS);
	key = key_make(mr);
	if (!key) {
		slot_give(memory, mr);
		return tfd_fail(error, -EIO, "getrandom gave no key");
	}
	mr->base = range->address;
	mr->length = range->length;
	mr->writable = range->access & TFD_MR_WRITABLE;
	mr->readable = !(range->access & TFD_MR_UNREADABLE);
	mr->device = range->device;
	mr->device_offset = range->device_offset;
	mr->broken = range->device ? NULL : tfd_guard_flag(range->address);
	tfd_store_release(&mr->key, key); /* pairs with tfd_mr_find_hot: then the rest is there, too */
	*out = mr;
	return 0;
}

void tfd_memory_remove(struct tfd_memory *memory, struct tfd_mr *mr)
{
	uint64_t pass;

	/* pairs with tfd_memory_pass_begin: it stores the pass, then looks at keys; we see it, or it does not find us */
	tfd_store_seq(&mr->key, 0);
	pass = tfd_load_seq(&memory->pass);
	while (pass & 1 && tfd_load_seq(&memory->pass) == pass)
		(void)sched_yield(); /* bounded: a pass moves a few MiB */
	slot_give(memory, mr);
}

void tfd_memory_pass_begin(struct tfd_memory *memory)
{
	tfd_store_seq(&memory->pass, memory->pass + 1); /* pairs with tfd_memory_remove */
}

void tfd_memory_pass_end(struct tfd_memory *memory)
{
	tfd_store_seq(&memory->pass, memory->pass + 1); /* pairs with tfd_memory_remove */
}

const struct tfd_mr *tfd_mr_find_hot(struct tfd_memory *memory, uint64_t key)
{
	uint32_t index = (uint32_t)key & (SLOTS - 1);
	struct tfd_mr *page = tfd_load_acquire(&memory->pages[index / TFD_MR_PAGE_SLOTS]);
	struct tfd_mr *mr;

	if (!page || !key)
		return NULL;
	mr = &page[index % TFD_MR_PAGE_SLOTS];
	return tfd_load_seq(&mr->key) == key ? mr : NULL;
}

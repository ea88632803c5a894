/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SIGBUS guard. A client may take pages away from memory that we have mapped (ftruncate of a POSIX shm object, a
 * hugetlbfs file without pages left). A copy that touches such a page gets SIGBUS: the handler puts an anonymous page
 * in its place, marks the region broken, and the copy goes on; the job fails, nobody else notices. Kernel copies
 * (send, recv) report EFAULT instead and are handled where they return.
 *
 * The handler reads a fixed table of atomics: sigaction(2), mmap(2) (async-signal-safe as a bare system call).
 */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

#define GUARD_SLOTS 65536

/*
 * A slot is written under guard_lock and read by a handler that can wait for nobody: `version` is odd while it changes, and
 * a reader that sees it change looks again.
 */
struct guard_slot {
	uint32_t version;
	uintptr_t base; /* 0: free */
	uintptr_t end;
	uint32_t *broken;
};

static struct guard_slot guard_slots[GUARD_SLOTS];
static uint32_t guard_used; /* slots below this may be taken */
static uint32_t guard_count; /* faults mended */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER; /* guards changes of slots */
static struct sigaction guard_previous;

static void slot_set(struct guard_slot *slot, uintptr_t base, uintptr_t end, uint32_t *broken)
{
	(void)tfd_add_seq(&slot->version, 1); /* pairs with slot_read */
	tfd_store_seq(&slot->base, base);
	tfd_store_seq(&slot->end, end);
	tfd_store_seq(&slot->broken, broken);
	(void)tfd_add_seq(&slot->version, 1);
}

static struct guard_slot slot_read(struct guard_slot *slot)
{
	struct guard_slot copy;

	do {
		copy.version = tfd_load_seq(&slot->version);
		copy.base = tfd_load_seq(&slot->base);
		copy.end = tfd_load_seq(&slot->end);
		copy.broken = tfd_load_seq(&slot->broken);
	} while (copy.version & 1 || copy.version != tfd_load_seq(&slot->version));
	return copy;
}

static bool guard_mend(uintptr_t address)
{
	uint32_t used = tfd_load_acquire(&guard_used);

	for (uint32_t i = 0; i < used; i++) {
		struct guard_slot slot = slot_read(&guard_slots[i]);

		if (!slot.base || address < slot.base || address >= slot.end)
			continue;
		/* The region is in use by whoever faulted, so it and its slot stay meanwhile. */
		tfd_store_seq(slot.broken, 1);
		(void)tfd_add_seq(&guard_count, 1);
		/* The whole region: a hugetlbfs mapping cannot be replaced by the small page. */
		return mmap((void *)slot.base, slot.end - slot.base, PROT_READ | PROT_WRITE,
		            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
	}
	return false;
}

static void guard_handler(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	if (!guard_mend((uintptr_t)info->si_addr)) {
		if (guard_previous.sa_flags & SA_SIGINFO)
			guard_previous.sa_sigaction(number, info, context);
		else if (guard_previous.sa_handler != SIG_DFL && guard_previous.sa_handler != SIG_IGN)
			guard_previous.sa_handler(number);
		else if (info->si_code > 0) /* a fault of our own: the next try ends the process */
			(void)sigaction(number, &guard_previous, NULL);
	}
	errno = saved;
}

const uint32_t *tfd_guard_flag(const void *address)
{
	uint32_t used = tfd_load_acquire(&guard_used);

	for (uint32_t i = 0; i < used; i++) {
		struct guard_slot slot = slot_read(&guard_slots[i]);

		if (slot.base && (uintptr_t)address >= slot.base && (uintptr_t)address < slot.end)
			return slot.broken;
	}
	return NULL;
}

uint32_t tfd_guard_hits(void)
{
	return tfd_load_relaxed(&guard_count);
}

int tfd_guard_install(void)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigaction before;

	action.sa_sigaction = guard_handler;
	(void)sigemptyset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, &before) != 0)
		return -errno;
	if (before.sa_sigaction != guard_handler)
		guard_previous = before;
	return 0;
}

int tfd_guard_add(struct tfd_region *region)
{
	uint32_t i = 0;

	(void)pthread_mutex_lock(&guard_lock);
	while (i < GUARD_SLOTS && guard_slots[i].base)
		i++;
	if (i < GUARD_SLOTS) {
		slot_set(&guard_slots[i], (uintptr_t)region->base,
		         (uintptr_t)region->base + region->map_bytes, &region->broken);
		if (i >= guard_used)
			tfd_store_release(&guard_used, i + 1);
		region->guard = (int)i;
	}
	(void)pthread_mutex_unlock(&guard_lock);
	return i < GUARD_SLOTS ? 0 : -ENOSPC;
}

void tfd_guard_remove(struct tfd_region *region)
{
	(void)pthread_mutex_lock(&guard_lock);
	slot_set(&guard_slots[region->guard], 0, 0, NULL);
	(void)pthread_mutex_unlock(&guard_lock);
}

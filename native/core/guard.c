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

struct guard_slot {
	uintptr_t base; /* 0: free; published last */
	uintptr_t end;
	uint32_t *broken;
};

static struct guard_slot guard_slots[GUARD_SLOTS];
static uint32_t guard_used; /* slots below this may be taken */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER; /* guards taking and freeing slots */
static struct sigaction guard_previous;

static int guard_mend(uintptr_t address)
{
	uint32_t used = tfd_load_acquire(&guard_used);

	for (uint32_t i = 0; i < used; i++) {
		uintptr_t base = tfd_load_acquire(&guard_slots[i].base); /* pairs with tfd_guard_add */

		if (!base || address < base || address >= tfd_load_relaxed(&guard_slots[i].end))
			continue;
		tfd_store_relaxed(tfd_load_relaxed(&guard_slots[i].broken), 1);
		/* The whole region: a hugetlbfs mapping cannot be replaced by the small page. */
		return mmap((void *)base, tfd_load_relaxed(&guard_slots[i].end) - base,
		            PROT_READ | PROT_WRITE,
		            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
		            0) == MAP_FAILED;
	}
	return -1;
}

static void guard_handler(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	(void)context;
	if (guard_mend((uintptr_t)info->si_addr) != 0)
		(void)sigaction(number, &guard_previous, NULL); /* not ours: the next try meets the old handler */
	errno = saved;
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
		tfd_store_relaxed(&guard_slots[i].end, (uintptr_t)region->base + region->length);
		tfd_store_relaxed(&guard_slots[i].broken, &region->broken);
		tfd_store_release(&guard_slots[i].base, (uintptr_t)region->base); /* pairs with guard_mend */
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
	tfd_store_release(&guard_slots[region->guard].base, 0);
	(void)pthread_mutex_unlock(&guard_lock);
}

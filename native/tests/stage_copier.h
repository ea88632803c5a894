/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread that plays the helper process of a GPU: what it calls memory of a device is the test's own. It takes requests, copies,
 * tells; as this process has the rings and the pool mapped, since ThreadSanitizer knows words by their addresses. Whoever includes it has
 * CHECK.
 */
#ifndef TFD_STAGE_COPIER_H
#define TFD_STAGE_COPIER_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/barrier.h"
#include "providers/staged/stages.h"
#include "transferd/stage.h"

#define COPIER_MEMORIES 8u
#define COPIER_SPINS 4

/*
 * What orders a client's bytes before a copy of them, and after it, are words of memory that is mapped twice in this process, which
 * ThreadSanitizer does not know. So the test says `copier_hands` when it has written, and `copier_has` before it looks.
 */
static uint32_t copier_handed;

static inline void copier_hands(void)
{
	(void)tfd_add_seq(&copier_handed, 1);
}

struct copier_memory {
	uint64_t number; /* 0: free */
	uint8_t *bytes;
	uint64_t length;
};

struct copier {
	struct tfd_stage_fds fds; /* owned */
	struct tfd_stage *stage;
	uint8_t *pool; /* borrowed, as is `stage` */
	pthread_t thread;
	struct copier_memory memories[COPIER_MEMORIES]; /* constant while it runs */
	bool engine; /* constant: as gpu/copy.c: it writes no single byte */
	uint32_t stop; /* shared */
	uint32_t hold; /* shared; not 0: takes requests of no ring below */
	uint32_t fail_next; /* shared; status of so many requests to come is EIO */
	uint64_t copied[TFD_STAGE_RINGS]; /* shared; requests */
};

static inline struct copier_memory *copier_find(struct copier *copier, uint64_t number)
{
	for (uint32_t i = 0; i < COPIER_MEMORIES; i++) {
		if (copier->memories[i].number == number)
			return &copier->memories[i];
	}
	return NULL;
}

static inline uint32_t copier_copy(struct copier *copier, const struct tfd_stage_copy *copy, uint32_t ring)
{
	const struct copier_memory *memory = copier_find(copier, copy->memory);
	uint64_t bytes = (uint64_t)copy->bytes * copy->rows;
	uint64_t extent = copy->rows ? (copy->rows - 1) * copy->stride + copy->bytes : 0;

	if (!copy->memory || !memory)
		return ENOENT;
	if (!bytes || (copy->rows > 1 && copy->stride < copy->bytes))
		return EINVAL;
	if (copier->engine && bytes == 1 && ring == TFD_STAGE_H2D)
		return EIO;
	if (copy->offset > memory->length || extent > memory->length - copy->offset ||
	    copy->pool_offset > copier->stage->pool_bytes ||
	    bytes > copier->stage->pool_bytes - copy->pool_offset)
		return ERANGE;
	for (uint32_t i = 0; i < copy->rows; i++) {
		uint8_t *there = memory->bytes + copy->offset + i * copy->stride;
		uint8_t *here = copier->pool + copy->pool_offset + (uint64_t)i * copy->bytes;

		memcpy(ring == TFD_STAGE_D2H ? here : there, ring == TFD_STAGE_D2H ? there : here,
		       copy->bytes);
	}
	return 0;
}

static inline bool copier_take(struct copier *copier, uint32_t which)
{
	struct tfd_stage_ring *ring = &copier->stage->rings[which];
	uint64_t head = tfd_load_relaxed(&ring->done);
	uint32_t status;

	if (head == tfd_load_acquire(&ring->tail)) /* pairs with tfd_stages_copy: the entries are there */
		return false;
	if (tfd_load_relaxed(&copier->fail_next)) {
		(void)tfd_sub_seq(&copier->fail_next, 1);
		status = EIO;
	} else {
		(void)tfd_load_seq(&copier_handed);
		status = copier_copy(copier, &ring->entries[head % TFD_STAGE_ENTRIES], which);
	}
	tfd_store_relaxed(&ring->status[head % TFD_STAGE_ENTRIES], status);
	(void)tfd_add_seq(&copier->copied[which], 1);
	tfd_store_release(&ring->done, head + 1); /* pairs with queue_poll */
	return true;
}

static inline void copier_sleep(struct copier *copier)
{
	struct pollfd fd = { .fd = copier->fds.wake_fd, .events = POLLIN };
	uint64_t ignored;

	tfd_store_seq(&copier->stage->sleeps, 1); /* pairs with tfd_stages_copy */
	if (!tfd_load_seq(&copier->stop) &&
	    tfd_load_seq(&copier->stage->rings[0].tail) == copier->stage->rings[0].done &&
	    tfd_load_seq(&copier->stage->rings[1].tail) == copier->stage->rings[1].done)
		(void)poll(&fd, 1, -1);
	tfd_store_seq(&copier->stage->sleeps, 0);
	(void)!read(copier->fds.wake_fd, &ignored, sizeof(ignored));
}

static inline void *copier_run(void *argument)
{
	struct copier *copier = argument;
	int idle = 0;

	while (!tfd_load_seq(&copier->stop)) {
		bool did = false;

		for (uint32_t i = 0; i < TFD_STAGE_RINGS && !tfd_load_seq(&copier->hold); i++)
			did = copier_take(copier, i) || did;
		if (did) {
			idle = 0;
		} else if (++idle < COPIER_SPINS || tfd_load_seq(&copier->hold)) {
			(void)sched_yield();
		} else {
			copier_sleep(copier);
			idle = 0;
		}
	}
	return NULL;
}

/* What a process of its own would find behind the fds is what is mapped here. */
static inline void copier_look(const struct copier *copier)
{
	const struct tfd_stage *theirs;
	struct stat pool;

	CHECK(fstat(copier->fds.pool_fd, &pool) == 0);
	theirs = mmap(NULL, sizeof(*theirs), PROT_READ, MAP_SHARED, copier->fds.ring_fd, 0);
	CHECK(theirs != MAP_FAILED && theirs->magic == TFD_STAGE_MAGIC &&
	      theirs->version == TFD_STAGE_VERSION && theirs->generation == copier->stage->generation);
	CHECK((uint64_t)pool.st_size == theirs->pool_bytes && theirs->pool_bytes);
	(void)munmap((void *)(uintptr_t)theirs, sizeof(*theirs));
}

/* Its fds, and its memories, are there; `name` of what they share. */
static inline void copier_start(struct copier *copier, const struct tfd_stages *stages, uint64_t name)
{
	copier->stage = tfd_stage_helper_find(stages, name)->shared;
	copier->pool = stages->pool;
	copier_look(copier);
	tfd_store_release(&copier->stage->state, TFD_STAGE_READY);
	CHECK(pthread_create(&copier->thread, NULL, copier_run, copier) == 0);
}

static inline uint64_t copier_has(const struct copier *copier, uint32_t which)
{
	return tfd_load_seq(&copier->copied[which]);
}

/* Idempotent. As if its process had ended. */
static inline void copier_stop(struct copier *copier)
{
	uint64_t one = 1;

	if (!copier->stage)
		return;
	tfd_store_seq(&copier->stop, 1); /* pairs with copier_sleep */
	(void)!write(copier->fds.wake_fd, &one, sizeof(one));
	CHECK(pthread_join(copier->thread, NULL) == 0);
	(void)close(copier->fds.ring_fd);
	(void)close(copier->fds.pool_fd);
	(void)close(copier->fds.wake_fd);
	copier->stage = NULL;
}

#endif

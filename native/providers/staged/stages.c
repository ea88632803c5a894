/* SPDX-License-Identifier: Apache-2.0 */
#include "stages.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "staged.h"

#define SLOTS_LEAST 8u
#define SENT_PART 8u /* of the pool are for what is sent, whatever halves hold */
#define SILENT_NS 3000000000u /* with something under way */

/* ---- the pool ---- */

static void *shared_make(const char *name, uint64_t bytes, int *fd)
{
	void *memory;

	*fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (*fd < 0)
		return NULL;
	if (ftruncate(*fd, (off_t)bytes) == 0 &&
	    fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
		memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
		if (memory != MAP_FAILED)
			return memory;
	}
	(void)close(*fd);
	*fd = -1;
	return NULL;
}

static int slots_make(struct tfd_stages *stages, uint64_t bytes, struct tfd_error *error)
{
	uint64_t count = bytes / TFD_STAGES_SLOT_BYTES;

	if (count < SLOTS_LEAST || count > UINT16_MAX)
		return tfd_fail(error, -EINVAL,
		                "a staging pool of %llu bytes: it has to be %u to %llu, a slot takes %zu",
		                (unsigned long long)bytes, (unsigned)(SLOTS_LEAST * TFD_STAGES_SLOT_BYTES),
		                (unsigned long long)UINT16_MAX * TFD_STAGES_SLOT_BYTES,
		                (size_t)TFD_STAGES_SLOT_BYTES);
	stages->pool_bytes = count * TFD_STAGES_SLOT_BYTES;
	stages->pool = shared_make("transferd-staging", stages->pool_bytes, &stages->pool_fd);
	stages->slots = calloc(count, sizeof(*stages->slots));
	if (!stages->pool || !stages->slots)
		return tfd_fail(error, -ENOMEM, "no memory for a staging pool of %llu bytes",
		                (unsigned long long)stages->pool_bytes);
	stages->slot_count = (uint32_t)count;
	stages->run_count = stages->slot_count - stages->slot_count / SENT_PART;
	for (uint32_t i = 0; i < stages->slot_count; i++) {
		stages->slots[i].offset = i * (uint64_t)TFD_STAGES_SLOT_BYTES;
		tfd_list_init(&stages->slots[i].link);
		if (i >= stages->run_count)
			tfd_list_push(&stages->free, &stages->slots[i].link);
	}
	return 0;
}

int tfd_stages_open(uint64_t bytes, struct tfd_stages **out, struct tfd_error *error)
{
	struct tfd_stages *stages = calloc(1, sizeof(*stages));
	int rc;

	if (!stages)
		return tfd_fail(error, -ENOMEM, "no memory for staging");
	stages->pool_fd = -1;
	tfd_list_init(&stages->free);
	tfd_list_init(&stages->helpers);
	for (uint32_t i = 0; i < TFD_STAGES_MEMORY_BUCKETS; i++)
		tfd_list_init(&stages->memories[i]);
	rc = slots_make(stages, bytes, error);
	if (rc) {
		tfd_stages_close(stages);
		return rc;
	}
	*out = stages;
	return 0;
}

void tfd_stages_close(struct tfd_stages *stages)
{
	if (!stages)
		return;
	while (!tfd_list_empty(&stages->helpers)) {
		struct tfd_stage_helper *helper =
			tfd_container(stages->helpers.next, struct tfd_stage_helper, link);

		tfd_list_remove(&helper->link);
		tfd_stage_helper_free(helper);
	}
	for (uint32_t i = 0; i < TFD_STAGES_MEMORY_BUCKETS; i++) {
		while (!tfd_list_empty(&stages->memories[i])) {
			struct tfd_list *link = stages->memories[i].next;

			tfd_list_remove(link);
			free(tfd_container(link, struct tfd_stage_memory, link));
		}
	}
	if (stages->pool)
		(void)munmap(stages->pool, stages->pool_bytes);
	if (stages->pool_fd >= 0)
		(void)close(stages->pool_fd);
	free(stages->slots);
	free(stages);
}

/* ---- slots ---- */

static bool is_of_runs(const struct tfd_stages *stages, const struct tfd_stage_slot *slot)
{
	return slot < stages->slots + stages->run_count;
}

/* The first run of `most`, or else the longest one. */
static struct tfd_stage_slot *run_find(struct tfd_stages *stages, uint32_t most, uint32_t *count)
{
	struct tfd_stage_slot *best = NULL;
	uint32_t length = 0;

	*count = 0;
	for (uint32_t i = 0; i < stages->run_count && *count < most; i++) {
		length = stages->slots[i].half || stages->slots[i].left ? 0 : length + 1;
		if (length > *count) {
			*count = length;
			best = &stages->slots[i + 1 - length];
		}
	}
	return best;
}

bool tfd_stage_run_take(struct tfd_stages *stages, struct tfd_half *half, uint32_t least, uint32_t most)
{
	uint32_t count;
	struct tfd_stage_slot *run = run_find(stages, most, &count);

	if (count < least)
		return false;
	half->run = run;
	half->run_count = count;
	stages->held += count;
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_stage_slot *slot = &run[i];

		if (slot->used) /* nobody but whom this half leads to writes there from now on */
			memset(tfd_stage_slot_at(stages, slot), 0, TFD_STAGES_SLOT_BYTES);
		slot->used = true;
		slot->half = half;
		slot->error = 0;
		tfd_list_push(&half->own, &slot->link);
	}
	return true;
}

struct tfd_stage_slot *tfd_stage_slot_take(struct tfd_stages *stages, struct tfd_half *half, bool own)
{
	struct tfd_list *from = own || !tfd_list_empty(&half->own) ? &half->own : &stages->free;
	struct tfd_stage_slot *slot;

	if (tfd_list_empty(from))
		return NULL;
	/* The one that was used last: it may be in a cache yet. */
	slot = tfd_container(from->prev, struct tfd_stage_slot, link);
	tfd_list_remove(&slot->link);
	tfd_list_push(&half->slots, &slot->link);
	slot->half = half;
	slot->left = false;
	slot->error = 0;
	return slot;
}

static void free_if_idle(struct tfd_stages *stages, struct tfd_stage_slot *slot)
{
	if (!slot->left || slot->posted || slot->copies)
		return;
	tfd_list_remove(&slot->link);
	slot->left = false;
	if (!is_of_runs(stages, slot)) {
		slot->half = NULL;
		tfd_list_push(&stages->free, &slot->link);
	} else if (slot->half) {
		tfd_list_push(&slot->half->own, &slot->link);
	}
}

void tfd_stage_slot_put(struct tfd_stages *stages, struct tfd_stage_slot *slot)
{
	slot->left = true;
	free_if_idle(stages, slot);
}

static void abandon_all(struct tfd_stages *stages, struct tfd_list *slots)
{
	while (!tfd_list_empty(slots)) {
		struct tfd_stage_slot *slot = tfd_container(slots->next, struct tfd_stage_slot, link);

		tfd_list_remove(&slot->link);
		slot->half = NULL;
		slot->posted = false;
		tfd_stage_slot_put(stages, slot);
	}
}

void tfd_stage_slots_abandon(struct tfd_stages *stages, struct tfd_half *half)
{
	abandon_all(stages, &half->slots);
	abandon_all(stages, &half->own);
	stages->held -= half->run_count;
	half->run_count = 0;
}

void tfd_stage_slot_posted(struct tfd_stages *stages, struct tfd_stage_slot *slot)
{
	slot->posted = false;
	free_if_idle(stages, slot);
}

/* ---- helpers ---- */

static void close_if_open(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

int tfd_stage_helper_make(const struct tfd_stages *stages, uint64_t name, struct tfd_stage_helper **out,
                          struct tfd_stage_fds *fds, struct tfd_error *error)
{
	struct tfd_stage_helper *helper = calloc(1, sizeof(*helper));

	*fds = (struct tfd_stage_fds){ -1, -1, -1 };
	if (!helper)
		return tfd_fail(error, -ENOMEM, "no memory for a helper");
	tfd_list_init(&helper->link);
	helper->name = name;
	helper->shared = shared_make("transferd-stage", sizeof(*helper->shared), &fds->ring_fd);
	helper->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	fds->pool_fd = fcntl(stages->pool_fd, F_DUPFD_CLOEXEC, 0);
	fds->wake_fd = helper->wake_fd < 0 ? -1 : fcntl(helper->wake_fd, F_DUPFD_CLOEXEC, 0);
	if (!helper->shared || fds->pool_fd < 0 || fds->wake_fd < 0) {
		close_if_open(fds->ring_fd);
		close_if_open(fds->pool_fd);
		close_if_open(fds->wake_fd);
		tfd_stage_helper_free(helper);
		return tfd_fail(error, -EMFILE,
		                "no memory or no file descriptor is left for a helper's rings");
	}
	helper->shared->magic = TFD_STAGE_MAGIC;
	helper->shared->version = TFD_STAGE_VERSION;
	helper->shared->pool_bytes = stages->pool_bytes;
	helper->shared->generation = name;
	*out = helper;
	return 0;
}

void tfd_stage_helper_free(struct tfd_stage_helper *helper)
{
	if (helper->shared)
		(void)munmap(helper->shared, sizeof(*helper->shared));
	close_if_open(helper->wake_fd);
	free(helper);
}

void tfd_stage_helper_add(struct tfd_stages *stages, struct tfd_stage_helper *helper)
{
	tfd_list_push(&stages->helpers, &helper->link);
}

struct tfd_stage_helper *tfd_stage_helper_find(const struct tfd_stages *stages, uint64_t name)
{
	for (struct tfd_list *link = stages->helpers.next; link != &stages->helpers; link = link->next) {
		struct tfd_stage_helper *helper = tfd_container(link, struct tfd_stage_helper, link);

		if (helper->name == name)
			return helper;
	}
	return NULL;
}

static void request_told(struct tfd_stages *stages, struct tfd_stage_queue *queue, int error)
{
	const struct tfd_stage_request *request = &queue->requests[queue->told++ % TFD_STAGE_ENTRIES];
	struct tfd_stage_slot *slot = request->slot;

	if (error)
		slot->error = error;
	slot->copies--;
	stages->under_way--;
	if (request->place != slot) {
		request->place->copies--;
		free_if_idle(stages, request->place);
	}
	if (slot->half) /* pairs with half_settle, which waits for it */
		tfd_store_release(&slot->half->copying, slot->half->copying - 1);
	free_if_idle(stages, slot);
}

void tfd_stage_helper_remove(struct tfd_stages *stages, struct tfd_stage_helper *helper)
{
	tfd_list_remove(&helper->link);
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++) {
		while (helper->queues[i].told != helper->queues[i].tail)
			request_told(stages, &helper->queues[i], EIO);
	}
	for (uint32_t i = 0; i < TFD_STAGES_MEMORY_BUCKETS; i++) {
		struct tfd_list *memories = &stages->memories[i];

		for (struct tfd_list *link = memories->next; link != memories; link = link->next) {
			struct tfd_stage_memory *memory = tfd_container(link, struct tfd_stage_memory, link);

			if (memory->helper == helper)
				memory->helper = NULL;
		}
	}
}

/* ---- memories ---- */

static struct tfd_list *bucket_of(struct tfd_stages *stages, uint64_t number)
{
	return &stages->memories[number % TFD_STAGES_MEMORY_BUCKETS];
}

static struct tfd_stage_memory *memory_find(struct tfd_stages *stages, uint64_t number)
{
	struct tfd_list *bucket = bucket_of(stages, number);

	for (struct tfd_list *link = bucket->next; link != bucket; link = link->next) {
		struct tfd_stage_memory *memory = tfd_container(link, struct tfd_stage_memory, link);

		if (memory->number == number)
			return memory;
	}
	return NULL;
}

static struct tfd_stage_memory *memory_make(struct tfd_stages *stages, uint64_t number)
{
	struct tfd_stage_memory *memory = memory_find(stages, number);

	if (memory)
		return memory;
	memory = calloc(1, sizeof(*memory));
	if (!memory)
		return NULL;
	memory->number = number;
	tfd_list_push(bucket_of(stages, number), &memory->link);
	return memory;
}

int tfd_stage_memory_tell(struct tfd_stages *stages, uint64_t number, struct tfd_stage_helper *helper)
{
	/* Of what was forgotten meanwhile there is nothing to fail. */
	struct tfd_stage_memory *memory = helper ? memory_make(stages, number) : memory_find(stages, number);

	if (!memory)
		return helper ? -ENOMEM : 0;
	memory->failed = !helper && memory->wanted; /* nobody else waits */
	memory->helper = helper;
	memory->wanted = false;
	return 0;
}

void tfd_stage_memory_drop(struct tfd_stages *stages, uint64_t number)
{
	struct tfd_stage_memory *memory = memory_find(stages, number);

	if (!memory)
		return;
	tfd_list_remove(&memory->link);
	free(memory);
}

/* The helper that has it open; else as tfd_stages_ask. */
static int helper_of(struct tfd_stages *stages, uint64_t number, bool waited, struct tfd_stage_helper **out)
{
	struct tfd_stage_memory *memory = memory_make(stages, number); /* the first time only it allocates */

	if (!memory)
		return -EBUSY;
	*out = memory->helper;
	if (memory->helper)
		return memory->helper->silent ? -EIO : 0;
	if (memory->failed && waited)
		return -EIO;
	memory->failed = false; /* who has not waited for that asks anew */
	if (!memory->wanted && stages->tell)
		stages->tell(stages->context, TFD_EVENT_STAGE_NEEDED, number);
	memory->wanted = true;
	return -EBUSY;
}

int tfd_stages_ask(struct tfd_stages *stages, uint64_t memory, bool waited)
{
	struct tfd_stage_helper *helper;

	return helper_of(stages, memory, waited, &helper);
}

/* ---- requests ---- */

int tfd_stages_copy(struct tfd_stages *stages, uint32_t ring, struct tfd_stage_slot *slot,
                    const struct tfd_stage_copy *copies, uint32_t count, bool waited)
{
	struct tfd_stage_helper *helper;
	struct tfd_stage_queue *queue;
	struct tfd_stage_ring *shared;
	struct tfd_stage_slot *place = tfd_stage_slot_of(stages, copies[0].pool_offset);
	uint64_t one = 1;
	int rc = helper_of(stages, copies[0].memory, waited, &helper);

	if (rc)
		return rc;
	queue = &helper->queues[ring];
	shared = &helper->shared->rings[ring];
	if (queue->tail + count - queue->told > TFD_STAGE_ENTRIES)
		return -EAGAIN;
	for (uint32_t i = 0; i < count; i++) {
		queue->requests[queue->tail % TFD_STAGE_ENTRIES] = (struct tfd_stage_request){ slot, place };
		shared->entries[queue->tail++ % TFD_STAGE_ENTRIES] = copies[i];
		helper->info.bytes[ring] += (uint64_t)copies[i].bytes * copies[i].rows;
	}
	helper->info.copies[ring] += count;
	slot->copies += count;
	if (place != slot) /* it may be given back first */
		place->copies += count;
	stages->under_way += count;
	slot->half->copying += count;
	/* pairs with the helper, which stores `sleeps`, then looks at both tails */
	tfd_store_seq(&shared->tail, queue->tail);
	if (tfd_load_seq(&helper->shared->sleeps))
		(void)!write(helper->wake_fd, &one, sizeof(one));
	return 0;
}

/* Whether anything came back. */
static bool queue_poll(struct tfd_stages *stages, struct tfd_stage_helper *helper, uint32_t ring)
{
	struct tfd_stage_queue *queue = &helper->queues[ring];
	struct tfd_stage_ring *shared = &helper->shared->rings[ring];
	/* pairs with the GPU's write behind the copies: their bytes and their status are there */
	uint64_t done = tfd_load_acquire(&shared->done);

	if (done == queue->told || done - queue->told > queue->tail - queue->told) /* it is not believed */
		return false;
	while (queue->told != done) {
		uint32_t status = tfd_load_relaxed(&shared->status[queue->told % TFD_STAGE_ENTRIES]);

		helper->info.failed += status != 0;
		request_told(stages, queue, status ? EIO : 0);
	}
	return true;
}

static bool is_idle(const struct tfd_stage_helper *helper)
{
	return helper->queues[0].told == helper->queues[0].tail &&
	       helper->queues[1].told == helper->queues[1].tail;
}

/* Something is under way, and nothing came back. */
static void check_silence(struct tfd_stages *stages, struct tfd_stage_helper *helper)
{
	uint64_t now_ns;

	if (helper->silent)
		return;
	now_ns = tfd_now_ns();
	if (!helper->waits_ns)
		helper->waits_ns = now_ns;
	/* pairs with the helper's store of DEAD */
	if (now_ns - helper->waits_ns < SILENT_NS &&
	    tfd_load_acquire(&helper->shared->state) != TFD_STAGE_DEAD)
		return;
	helper->silent = true;
	if (stages->tell)
		stages->tell(stages->context, TFD_EVENT_STAGE_SILENT, helper->name);
}

void tfd_stages_poll(struct tfd_stages *stages)
{
	if (!stages->under_way)
		return;
	for (struct tfd_list *link = stages->helpers.next; link != &stages->helpers; link = link->next) {
		struct tfd_stage_helper *helper = tfd_container(link, struct tfd_stage_helper, link);
		bool came = false;

		if (is_idle(helper))
			continue;
		for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++)
			came = queue_poll(stages, helper, i) || came;
		if (came)
			helper->waits_ns = 0;
		else
			check_silence(stages, helper);
	}
}

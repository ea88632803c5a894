/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's side of a segment for tests of the client half: lays a segment out and, on a thread, takes entries from
 * ring 0 and ends their jobs as their fields ask. Also CHECK, which the tests of this folder's client half share.
 *
 * What the fake does with an entry: length 7777 is never ended until fake_flush; anything else ends OK at once with
 * `bytes` = length and `detail` = imm % 21, after which an IMM or WRITE adds 1 to counter `imm`.
 */
#ifndef TFD_TESTS_FAKE_DAEMON_H
#define TFD_TESTS_FAKE_DAEMON_H

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../core/barrier.h"
#include "transferd/abi.h"
#include "transferd/client.h"

#define CHECK(what)                                                                        \
	do {                                                                               \
		if (!(what)) {                                                             \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

#define HELD_LENGTH 7777u
#define FAKE_MAX_HELD 4096u
#define FAKE_WATCHERS 4u
#define FAKE_PLANS 4u

struct fake_daemon {
	uint32_t entries;
	uint32_t records;
	uint32_t counters;
	int segment_fd;
	int doorbell_fd;
	int event_fd;
	uint8_t *base;
	size_t bytes;
	struct tfd_segment_header *header;
	struct tfd_ring *ring;
	struct tfd_entry *ring_entries;
	struct tfd_record *record;
	struct tfd_counter *counter;

	pthread_t thread;
	uint32_t stop;
	uint32_t flush;
	uint32_t taken;
	uint32_t check_pages; /* all pages of one table are of the same number: nobody else wrote there */
	struct tfd_entry held[FAKE_MAX_HELD];
	uint32_t held_count;
};

static inline void fake_layout(struct fake_daemon *fake, uint32_t entries, uint32_t records,
                               uint32_t counters)
{
	struct tfd_segment_header h = {
		.magic = TFD_ABI_MAGIC,
		.abi_version = TFD_ABI_VERSION,
		.header_bytes = sizeof(h),
		.session_id = 1,
		.ring_count = 1,
		.ring_entries = entries,
		.record_count = records,
		.counter_count = counters,
		.state = TFD_SESSION_OPEN,
	};
	uint64_t at = sizeof(h);

	h.ring_offset = at;
	h.ring_stride = sizeof(struct tfd_ring) + entries * sizeof(struct tfd_entry);
	at += h.ring_stride;
	h.record_offset = at;
	at += records * sizeof(struct tfd_record);
	h.counter_offset = at;
	at += counters * sizeof(struct tfd_counter);
	h.watcher_offset = at;
	h.watcher_count = FAKE_WATCHERS;
	h.plan_count = FAKE_PLANS;
	at += FAKE_WATCHERS * sizeof(struct tfd_watcher);
	h.arena_offset = at;
	h.arena_bytes = 4096;
	h.segment_bytes = at + h.arena_bytes;

	memset(fake, 0, sizeof(*fake));
	fake->entries = entries;
	fake->records = records;
	fake->counters = counters;
	fake->bytes = h.segment_bytes;
	fake->segment_fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(fake->segment_fd >= 0);
	CHECK(ftruncate(fake->segment_fd, (off_t)fake->bytes) == 0);
	CHECK(fcntl(fake->segment_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
	fake->base = mmap(NULL, fake->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fake->segment_fd, 0);
	CHECK(fake->base != MAP_FAILED);
	memcpy(fake->base, &h, sizeof(h));
	fake->header = (void *)fake->base;
	fake->ring = (void *)(fake->base + h.ring_offset);
	fake->ring_entries = (void *)(fake->base + h.ring_offset + sizeof(struct tfd_ring));
	fake->record = (void *)(fake->base + h.record_offset);
	fake->counter = (void *)(fake->base + h.counter_offset);
	fake->doorbell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	fake->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	CHECK(fake->doorbell_fd >= 0 && fake->event_fd >= 0);
}

/* The wake-up half of the protocol in native/shm/wait.c. */
static inline void fake_tell(struct fake_daemon *fake, uint32_t *event, const uint32_t *waiters)
{
	uint64_t one = 1;

	if (tfd_load_seq(waiters)) {
		tfd_add_seq(event, 1u);
		syscall(SYS_futex, event, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
	}
	if (tfd_load_seq(&fake->header->event_waiters))
		CHECK(write(fake->event_fd, &one, sizeof(one)) == sizeof(one));
}

static inline void fake_count(struct fake_daemon *fake, uint32_t slot)
{
	struct tfd_counter *counter = &fake->counter[slot];

	tfd_store_seq(&counter->value, tfd_load_relaxed(&counter->value) + 1);
	fake_tell(fake, &counter->event, &counter->waiters);
}

static inline void fake_fault(struct fake_daemon *fake, uint32_t slot, uint64_t lost)
{
	struct tfd_counter *counter = &fake->counter[slot];

	tfd_store_release(&counter->lost, tfd_load_relaxed(&counter->lost) + lost);
	tfd_store_seq(&counter->faults, tfd_load_relaxed(&counter->faults) + 1);
	fake_tell(fake, &counter->event, &counter->waiters);
}

static inline void fake_end(struct fake_daemon *fake, const struct tfd_entry *entry, uint32_t status)
{
	struct tfd_record *record = &fake->record[entry->record];

	CHECK(entry->record < fake->records);
	CHECK(entry->job_id != 0);
	record->status = status;
	record->detail = entry->imm % TFD_DETAIL_COUNT;
	record->bytes = entry->length;
	record->accepted_ns = tfd_client_now_ns();
	record->posted_ns = record->accepted_ns;
	record->ended_ns = record->accepted_ns;
	record->path = TFD_PATH_LIBFABRIC | 1u << TFD_PATH_RAILS_SHIFT;
	tfd_store_seq(&record->done_id, entry->job_id);
	fake_tell(fake, &record->event, &record->waiters);
	if (entry->op != TFD_OP_ACKNOWLEDGE && entry->op != TFD_OP_CANCEL && entry->imm < fake->counters)
		fake_count(fake, entry->imm);
}

static inline void fake_check_pages(const struct fake_daemon *fake, const struct tfd_entry *entry)
{
	const struct tfd_page *pages =
		(const void *)(fake->base + fake->header->arena_offset + entry->table_offset);

	CHECK(entry->table_offset + entry->table_count * sizeof(*pages) <= fake->header->arena_bytes);
	for (uint32_t i = 0; i < entry->table_count; i++)
		CHECK(pages[i].src == pages[0].src && pages[i].dst == pages[0].src);
}

static inline void fake_do(struct fake_daemon *fake, const struct tfd_entry *entry)
{
	if (fake->check_pages && entry->op == TFD_OP_WRITE_PAGES)
		fake_check_pages(fake, entry);
	if (entry->length == HELD_LENGTH) {
		CHECK(fake->held_count < FAKE_MAX_HELD);
		fake->held[fake->held_count++] = *entry;
	} else if (entry->op == TFD_OP_ACKNOWLEDGE) {
		struct tfd_counter *counter = &fake->counter[entry->imm];

		tfd_store_seq(&counter->acknowledged, tfd_load_relaxed(&counter->faults));
		fake_end(fake, entry, TFD_JOB_OK);
	} else {
		fake_end(fake, entry, TFD_JOB_OK);
	}
}

static inline uint32_t fake_drain(struct fake_daemon *fake)
{
	uint32_t tail = tfd_load_acquire(&fake->ring->tail);
	uint32_t head = fake->ring->head;
	uint32_t n = tail - head;

	CHECK(n <= fake->entries);
	for (; head != tail; head++) {
		struct tfd_entry entry = fake->ring_entries[head & (fake->entries - 1)];

		tfd_store_release(&fake->ring->head, head + 1);
		fake_do(fake, &entry);
	}
	if (tfd_load_acquire(&fake->flush)) {
		for (uint32_t i = 0; i < fake->held_count; i++)
			fake_end(fake, &fake->held[i], TFD_JOB_CANCELLED);
		fake->held_count = 0;
		tfd_store_release(&fake->flush, 0u);
	}
	tfd_add_seq(&fake->taken, n);
	return n;
}

/* Sleeps as the real worker does, so that a missed doorbell shows as a hang. */
static inline void *fake_run(void *argument)
{
	struct fake_daemon *fake = argument;
	struct pollfd doorbell = { .fd = fake->doorbell_fd, .events = POLLIN };
	uint64_t count;

	while (!tfd_load_seq(&fake->stop)) {
		if (fake_drain(fake))
			continue;
		tfd_store_seq(&fake->ring->need_wakeup, 1u);
		if (tfd_load_seq(&fake->ring->tail) == fake->ring->head && !tfd_load_seq(&fake->flush) &&
		    !tfd_load_seq(&fake->stop)) {
			CHECK(poll(&doorbell, 1, 20000) != 0);
			(void)!read(fake->doorbell_fd, &count, sizeof(count));
		}
		tfd_store_seq(&fake->ring->need_wakeup, 0u);
	}
	return NULL;
}

static inline void fake_start(struct fake_daemon *fake)
{
	CHECK(pthread_create(&fake->thread, NULL, fake_run, fake) == 0);
}

static inline void fake_poke(struct fake_daemon *fake)
{
	uint64_t one = 1;

	CHECK(write(fake->doorbell_fd, &one, sizeof(one)) == sizeof(one));
}

/* Ends the held jobs, CANCELLED. */
static inline void fake_flush(struct fake_daemon *fake)
{
	tfd_store_seq(&fake->flush, 1u);
	fake_poke(fake);
}

static inline void fake_stop(struct fake_daemon *fake)
{
	tfd_store_seq(&fake->stop, 1u);
	fake_poke(fake);
	CHECK(pthread_join(fake->thread, NULL) == 0);
}

static inline void fake_fini(struct fake_daemon *fake)
{
	munmap(fake->base, fake->bytes);
	close(fake->segment_fd);
	close(fake->doorbell_fd);
	close(fake->event_fd);
}

static inline struct tfd_client *fake_attach(struct fake_daemon *fake)
{
	struct tfd_client *client = NULL;

	CHECK(tfd_client_open(fake->segment_fd, &fake->doorbell_fd, 1, &client) == 0);
	CHECK(client);
	return client;
}

#endif

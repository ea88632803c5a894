/* SPDX-License-Identifier: Apache-2.0 */
/* Opening and closing the client half: the segment is mapped once, checked once and then known by private copies. */
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../core/barrier.h"
#include "lane.h"

#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 0x0002
#endif

#define PARTS 5 /* rings, records, counters, watchers, arena */

struct extent {
	uint64_t offset;
	uint64_t bytes;
};

/* Fills *out if count things of `stride` bytes at `offset` lie behind the header and inside `total` bytes. */
static bool extent_init(struct extent *out, uint64_t offset, uint64_t stride, uint64_t count, uint64_t total)
{
	if (offset % TFD_LINE || offset < sizeof(struct tfd_segment_header) || offset > total)
		return false;
	if (stride && count > (total - offset) / stride)
		return false;
	*out = (struct extent){ offset, stride * count };
	return true;
}

static bool extents_overlap(const struct extent *a, const struct extent *b)
{
	return a->bytes && b->bytes && a->offset < b->offset + b->bytes && b->offset < a->offset + a->bytes;
}

static bool counts_are_sane(const struct tfd_segment_header *h)
{
	return h->ring_count >= 1 && h->ring_count <= TFD_CLIENT_MAX_RINGS && h->ring_entries >= 1 &&
	       h->ring_entries <= TFD_CLIENT_MAX_ENTRIES && (h->ring_entries & (h->ring_entries - 1)) == 0 &&
	       h->record_count >= 1 && h->record_count <= TFD_CLIENT_MAX_RECORDS &&
	       h->counter_count <= TFD_CLIENT_MAX_COUNTERS && h->watcher_count <= TFD_CLIENT_MAX_WATCHERS &&
	       h->plan_count <= TFD_CLIENT_MAX_PLANS;
}

/* Whether the header describes a segment of this ABI that lies within `total` bytes. */
static bool header_is_sane(const struct tfd_segment_header *h, uint64_t total)
{
	struct extent parts[PARTS];
	uint64_t ring_bytes;

	if (h->magic != TFD_ABI_MAGIC || h->abi_version != TFD_ABI_VERSION || h->header_bytes != sizeof(*h) ||
	    h->features != 0 || h->segment_bytes > total)
		return false;
	if (!counts_are_sane(h))
		return false;
	ring_bytes = sizeof(struct tfd_ring) + (uint64_t)h->ring_entries * sizeof(struct tfd_entry);
	if (h->ring_stride < ring_bytes || h->ring_stride % TFD_LINE)
		return false;
	total = h->segment_bytes;
	if (!extent_init(&parts[0], h->ring_offset, h->ring_stride, h->ring_count, total) ||
	    !extent_init(&parts[1], h->record_offset, sizeof(struct tfd_record), h->record_count, total) ||
	    !extent_init(&parts[2], h->counter_offset, sizeof(struct tfd_counter), h->counter_count, total) ||
	    !extent_init(&parts[3], h->watcher_offset, sizeof(struct tfd_watcher), h->watcher_count, total) ||
	    !extent_init(&parts[4], h->arena_offset, 1, h->arena_bytes, total))
		return false;
	for (int i = 0; i < PARTS; i++)
		for (int j = i + 1; j < PARTS; j++)
			if (extents_overlap(&parts[i], &parts[j]))
				return false;
	return true;
}

/* Maps the whole file. A file that its maker could shrink would kill this process by SIGBUS: refused. */
static int segment_map(struct tfd_client *client, int segment_fd)
{
	struct stat info;
	int seals = fcntl(segment_fd, F_GET_SEALS);
	void *base;

	if (seals < 0 || !(seals & F_SEAL_SHRINK))
		return -EPROTO;
	if (fstat(segment_fd, &info))
		return -errno;
	if (info.st_size < (off_t)sizeof(struct tfd_segment_header))
		return -EPROTO;
	base = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, segment_fd, 0);
	if (base == MAP_FAILED)
		return -errno;
	client->base = base;
	client->mapped_bytes = (size_t)info.st_size;
	return 0;
}

static void segment_locate(struct tfd_client *client, const struct tfd_segment_header *h,
                           const int *doorbell_fds)
{
	client->header = (struct tfd_segment_header *)(void *)client->base;
	client->ring_count = h->ring_count;
	client->ring_entries = h->ring_entries;
	client->record_count = h->record_count;
	client->counter_count = h->counter_count;
	client->records = (struct tfd_record *)(void *)(client->base + h->record_offset);
	client->counters = (struct tfd_counter *)(void *)(client->base + h->counter_offset);
	client->watcher_count = h->watcher_count;
	client->plan_count = h->plan_count;
	client->watchers = (struct tfd_watcher *)(void *)(client->base + h->watcher_offset);
	client->arena_base = client->base + h->arena_offset;
	for (uint32_t i = 0; i < h->ring_count; i++) {
		struct tfd_client_ring *ring = &client->rings[i];
		uint8_t *at = client->base + h->ring_offset + i * h->ring_stride;

		ring->shared = (struct tfd_ring *)(void *)at;
		ring->entries = (struct tfd_entry *)(void *)(at + sizeof(struct tfd_ring));
		ring->tail = tfd_load_relaxed(&ring->shared->tail);
		ring->doorbell_fd = doorbell_fds[i];
	}
}

static int slots_init(struct tfd_client *client)
{
	uint32_t buckets = 64;

	while (buckets < client->record_count)
		buckets *= 2;
	client->slots = calloc(client->record_count, sizeof(*client->slots));
	client->saved = calloc(buckets, sizeof(*client->saved)); /* NOLINT: pointers are meant */
	client->saved_buckets = buckets;
	client->watcher_next = calloc((size_t)client->watcher_count + 1, sizeof(*client->watcher_next));
	client->plans = calloc((size_t)client->plan_count + 1, sizeof(*client->plans));
	if (!client->slots || !client->saved || !client->watcher_next || !client->plans)
		return -ENOMEM;
	for (uint32_t i = 0; i < client->plan_count; i++)
		client->plans[i].next_free = i + 1 < client->plan_count ? i + 1 : TFD_NO_PLAN;
	client->plan_free = client->plan_count ? 0 : TFD_NO_PLAN;
	for (uint32_t i = 0; i < client->watcher_count; i++)
		client->watcher_next[i] = i + 1 < client->watcher_count ? i + 1 : TFD_NO_WATCHER;
	client->watcher_free = client->watcher_count ? 0 : TFD_NO_WATCHER;
	for (uint32_t i = 0; i < client->record_count; i++) {
		client->slots[i].next_free = i + 1 < client->record_count ? i + 1 : TFD_NO_RECORD;
		client->slots[i].plan = TFD_NO_PLAN;
	}
	client->free_head = 0;
	client->free_count = client->record_count;
	return 0;
}

int tfd_client_open(int segment_fd, const int *doorbell_fds, uint32_t doorbell_count, struct tfd_client **out)
{
	struct tfd_segment_header header;
	struct tfd_client *client = calloc(1, sizeof(*client));
	int rc;

	if (!client)
		return -ENOMEM;
	rc = segment_map(client, segment_fd);
	if (rc)
		goto err_free;
	/* The daemon is not expected to change it under us, but only what was checked is used. */
	memcpy(&header, client->base, sizeof(header));
	rc = -EPROTO;
	if (!header_is_sane(&header, client->mapped_bytes))
		goto err_unmap;
	rc = -EINVAL;
	if (doorbell_count < header.ring_count)
		goto err_unmap;
	segment_locate(client, &header, doorbell_fds);
	rc = slots_init(client);
	if (rc)
		goto err_slots;
	/* As many tables as jobs in flight, those that are about to be, and those of plans. */
	rc = tfd_arena_init(&client->arena, header.arena_bytes, 2 * header.record_count + header.plan_count);
	if (rc)
		goto err_slots;
	rc = -pthread_mutex_init(&client->lock, NULL);
	if (rc)
		goto err_slots;
	*out = client;
	return 0;

err_slots:
	tfd_arena_fini(&client->arena);
	free(client->saved);
	free(client->slots);
	free(client->watcher_next);
	free(client->plans);
err_unmap:
	munmap(client->base, client->mapped_bytes);
err_free:
	free(client);
	return rc;
}

void tfd_client_close(struct tfd_client *client)
{
	if (!client)
		return;
	tfd_client_saved_fini(client);
	tfd_lanes_fini(client);
	pthread_mutex_destroy(&client->lock);
	tfd_arena_fini(&client->arena);
	free(client->saved);
	free(client->slots);
	free(client->watcher_next);
	free(client->plans);
	munmap(client->base, client->mapped_bytes);
	free(client);
}

const struct tfd_segment_header *tfd_client_header(const struct tfd_client *client)
{
	return client->header;
}

int tfd_client_over(const struct tfd_client *client)
{
	/* pairs with tfd_client_set_dead, and with the daemon's store of the state: nothing else is published by either */
	if (tfd_load_seq(&client->dead))
		return -EPIPE;
	return tfd_load_acquire(&client->header->state) == TFD_SESSION_ENDED ? -EPIPE : 0;
}

void tfd_client_set_event_waiters(struct tfd_client *client, uint32_t value)
{
	/* Sequential: the caller looks at its conditions next (pairs with the daemon's load after its store). */
	tfd_store_seq(&client->header->event_waiters, value);
}

/* As the daemon does for a fault: streams and kernels that wait for a gate are released, and look at what became of the session. */
static void gates_open(struct tfd_client *client)
{
	for (uint32_t i = 0; i < client->counter_count; i++) {
		struct tfd_counter *counter = &client->counters[i];

		if (tfd_load_relaxed(&counter->in_use) && tfd_load_relaxed(&counter->gate) < TFD_GATE_FAULT)
			tfd_add_seq(&counter->gate, TFD_GATE_FAULT);
	}
}

void tfd_client_set_dead(struct tfd_client *client)
{
	if (!tfd_swap_seq(&client->dead, 1u))
		gates_open(client);
	tfd_client_wake_all(client);
}

int tfd_client_is_dead(const struct tfd_client *client)
{
	return tfd_client_over(client) ? 1 : 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A core on loopback with sessions whose submit rings the test writes by hand. For C tests. */
#ifndef TFD_CORE_FIXTURE_H
#define TFD_CORE_FIXTURE_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/barrier.h"
#include "transferd/core.h"

#define CHECK(condition)                                                                      \
	do {                                                                                  \
		if (!(condition)) {                                                           \
			(void)fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			exit(1);                                                              \
		}                                                                             \
	} while (0)
#define CHECK_OK(call)                                                                           \
	do {                                                                                     \
		int check_rc = (call);                                                           \
		if (check_rc != 0) {                                                             \
			(void)fprintf(stderr, "%s:%d: %s: %s (%s)\n", __FILE__, __LINE__, #call, \
			              strerror(-check_rc), error.text);                          \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

#define REGION_BYTES (8u << 20)

static struct tfd_error error;

struct host {
	struct tfd_core *core;
	uint32_t group;
};

struct user { /* a session and one region */
	struct host *host;
	uint64_t session;
	struct tfd_session_fds fds;
	uint8_t *segment;
	size_t segment_bytes;
	struct tfd_segment_header *header;
	struct tfd_ring *ring;
	struct tfd_entry *entries;
	struct tfd_record *records;
	struct tfd_counter *counters;
	struct tfd_watcher *watchers;
	uint64_t region;
	uint8_t *memory;
	uint64_t next_job;
	uint64_t grant; /* a test's own */
};

static inline void host_open_rails(struct host *host, uint32_t rails, uint32_t segment_bytes)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	struct tfd_group_options group = { .rail_count = rails };
	const char *provider = getenv("TFD_TEST_PROVIDER"); /* what these tests run on, and by which rail */
	const char *rail = getenv("TFD_TEST_RAIL");
	const char *fabric = getenv("TFD_TEST_FABRIC");
	const char *library = getenv("TFD_TEST_LIBRARY");

	(void)strcpy(group.provider, provider ? provider : "tcp");
	(void)strcpy(group.fabric, fabric ? fabric : "");
	(void)strcpy(group.library, library ? library : "");
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	for (uint32_t i = 0; i < rails; i++)
		(void)strcpy(group.rails[i], rail ? rail : "127.0.0.1");
	group.segment_bytes = segment_bytes;
	group.cut_bytes = 1;
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static inline void host_open(struct host *host)
{
	host_open_rails(host, 1, 256u << 10);
}

static inline void user_open_as(struct host *host, struct user *user, struct tfd_session_options options)
{
	struct tfd_region_options region = { .writable = 1, .length = REGION_BYTES };
	struct stat info;

	memset(user, 0, sizeof(*user));
	user->host = host;
	options.group = host->group;
	CHECK_OK(tfd_session_open(host->core, &options, &user->session, &user->fds, &error));
	CHECK(fstat(user->fds.segment_fd, &info) == 0);
	user->segment_bytes = (size_t)info.st_size;
	user->segment =
		mmap(NULL, user->segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, user->fds.segment_fd, 0);
	CHECK(user->segment != MAP_FAILED);
	user->header = (void *)user->segment;
	user->ring = (void *)(user->segment + user->header->ring_offset);
	user->entries = (void *)(user->ring + 1);
	user->records = (void *)(user->segment + user->header->record_offset);
	user->counters = (void *)(user->segment + user->header->counter_offset);
	user->watchers = (void *)(user->segment + user->header->watcher_offset);
	region.fd = memfd_create("test", MFD_CLOEXEC);
	CHECK(region.fd >= 0 && ftruncate(region.fd, REGION_BYTES) == 0);
	user->memory = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd, 0);
	CHECK_OK(tfd_region_add(host->core, user->session, &region, &user->region, &error));
	(void)close(region.fd);
}

/* `records`: entries of its ring, too. */
static inline void user_open_sized(struct host *host, struct user *user, uint32_t records)
{
	struct tfd_session_options options = {
		.ring_entries = records,
		.record_count = records,
		.counter_count = 64,
		.watcher_count = 8,
		.plan_count = 24,
		.arena_bytes = 131072,
	};

	user_open_as(host, user, options);
}

static inline void user_open(struct host *host, struct user *user)
{
	user_open_sized(host, user, 64);
}

/* Waits for an event of that type and id; others are dropped. */
static inline struct tfd_event wait_event(struct host *host, uint32_t type, uint64_t id)
{
	for (int i = 0; i < 5000; i++) {
		struct tfd_event event;

		while (tfd_core_events(host->core, &event, 1)) {
			if (event.type == type && (!id || event.id == id))
				return event;
		}
		(void)usleep(1000);
	}
	(void)fprintf(stderr, "no event %u for %llx\n", type, (unsigned long long)id);
	exit(1);
}

/* The client's side of it. */
static inline void user_unmap(struct user *user)
{
	(void)munmap(user->segment, user->segment_bytes);
	(void)munmap(user->memory, REGION_BYTES);
	(void)close(user->fds.segment_fd);
	(void)close(user->fds.doorbell_fd);
	(void)close(user->fds.event_fd);
}

/* Once it is quiet. */
static inline void user_free(struct user *user)
{
	CHECK_OK(tfd_session_close(user->host->core, user->session));
	user_unmap(user);
}

static inline void user_close(struct user *user)
{
	CHECK_OK(tfd_session_end(user->host->core, user->session, TFD_DETAIL_SESSION_ENDED));
	(void)wait_event(user->host, TFD_EVENT_SESSION_QUIET, user->session);
	user_free(user);
}

/* An outgoing half at `from` joined to an incoming one at `to`. */
static inline void connect_rails(struct host *from, uint32_t from_rail, struct host *to, uint32_t to_rail,
                                 uint64_t *out, uint64_t *in)
{
	uint8_t a[TFD_ADDRESS_MAX], b[TFD_ADDRESS_MAX];
	size_t na = sizeof(a), nb = sizeof(b);

	CHECK_OK(tfd_conn_open(from->core, from->group, from_rail, 1, 1, out, a, &na, &error));
	CHECK_OK(tfd_conn_open(to->core, to->group, to_rail, 0, 1, in, b, &nb, &error));
	CHECK_OK(tfd_conn_start(to->core, *in, a, na, &error));
	CHECK_OK(tfd_conn_start(from->core, *out, b, nb, &error));
}

static inline void connect_hosts(struct host *from, struct host *to, uint64_t *out, uint64_t *in)
{
	connect_rails(from, 0, to, 0, out, in);
}

/* `from` may write into the whole region of `to`, imms 0 to 15. */
static inline uint64_t open_grant(struct user *from, struct user *to, uint64_t conn)
{
	struct tfd_open_options options = {
		.path_count = 1, .rights = TFD_RIGHT_WRITE, .length = REGION_BYTES, .imm_count = 16
	};
	struct tfd_region_key key;
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(to->host->core, to->session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(to->host->core, to->session, to->region, &key, 1));
	CHECK_OK(tfd_session_name_space(to->host->core, to->session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = conn, .key = key.key, .address = key.address };
	CHECK_OK(tfd_open_add(from->host->core, from->session, &options, &open));
	return open;
}

static inline struct tfd_record *user_submit(struct user *user, struct tfd_entry entry)
{
	uint32_t tail = user->ring->tail;
	uint64_t one = 1;

	entry.job_id = ++user->next_job;
	entry.record = (uint32_t)(entry.job_id % user->header->record_count);
	user->entries[tail % user->header->ring_entries] = entry;
	tfd_store_seq(&user->ring->tail, tail + 1);
	if (tfd_load_seq(&user->ring->need_wakeup))
		(void)!write(user->fds.doorbell_fd, &one, sizeof(one));
	return &user->records[entry.record];
}

static inline void wait_done(struct tfd_record *record, uint64_t job)
{
	for (int i = 0; i < 50000; i++) {
		if (tfd_load_acquire(&record->done_id) == job)
			return;
		(void)usleep(100);
	}
	(void)fprintf(stderr, "job %llu does not end\n", (unsigned long long)job);
	exit(1);
}

static inline struct tfd_record *user_run(struct user *user, struct tfd_entry entry)
{
	struct tfd_record *record = user_submit(user, entry);

	wait_done(record, user->next_job);
	return record;
}

#endif

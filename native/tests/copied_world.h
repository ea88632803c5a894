/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One stepped host with the local rail alone; sender and receivers each have a region of host memory and one of a device. No device is
 * there: what its client copies the core must never touch. For C tests.
 */
#ifndef TFD_COPIED_WORLD_H
#define TFD_COPIED_WORLD_H

#include "core/parts.h"
#include "core_fixture.h"

#define DEVICE_ADDRESS 0x700000000000ull /* nothing is mapped there */
#define STEPS 100000
#define RECEIVERS 3u
#define COPY_NS 500000000ull
#define COPIED_FLAGS (TFD_FLAG_COPIED | TFD_FLAG_ARMED | TFD_FLAG_POLLED)

struct party {
	struct user user;
	uint64_t device; /* region */
};

struct world {
	struct host host;
	uint64_t now;
	uint64_t out, in;
	struct party from, to[RECEIVERS];
	uint64_t on_host, on_device[RECEIVERS]; /* grants, of all of to[i]'s; imms 0 to 15 */
};

static inline uint64_t device_region(struct user *user, uint32_t writable)
{
	struct tfd_region_options options = {
		.fd = -1, .writable = writable, .length = REGION_BYTES, .address = DEVICE_ADDRESS, .device = 1
	};
	uint64_t region;

	CHECK_OK(tfd_region_add(user->host->core, user->session, &options, &region, &error));
	return region;
}

/* `rights` 0: all. */
static inline uint64_t grant_on(struct world *w, struct user *to, uint64_t region, uint32_t device,
                                uint32_t rights, uint64_t expires_ns)
{
	struct tfd_open_options options = { .path_count = 1,
	                                    .rights = rights ? rights : TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16,
	                                    .device = device,
	                                    .expires_ns = expires_ns };
	struct tfd_region_key key;
	uint32_t slots[16];
	uint64_t open;

	if (device && !rights)
		options.rights |= TFD_RIGHT_MAP;
	CHECK_OK(tfd_counters_add(w->host.core, to->session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(w->host.core, to->session, region, &key, 1));
	CHECK(!device == (key.key != 0));
	CHECK_OK(tfd_session_name_space(w->host.core, to->session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = w->out, .key = key.key, .address = key.address };
	CHECK_OK(tfd_open_add(w->host.core, w->from.user.session, &options, &open));
	return open;
}

static inline void party_open(struct world *w, struct party *party)
{
	struct tfd_session_options options = { .ring_entries = 64,
	                                       .record_count = 64,
	                                       .counter_count = 64,
	                                       .watcher_count = 8,
	                                       .plan_count = 8,
	                                       .arena_bytes = 1u << 20 };

	user_open_as(&w->host, &party->user, options);
	party->device = device_region(&party->user, 1);
}

static inline void world_open(struct world *w)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1, .copy_ns = COPY_NS };
	struct tfd_group_options group = { .provider = "local", .rails = { "local" }, .rail_count = 1 };

	memset(w, 0, sizeof(*w));
	w->now = 1000000;
	CHECK_OK(tfd_core_open(&core, &w->host.core, &error));
	CHECK_OK(tfd_group_open(w->host.core, &group, &w->host.group, &error));
	party_open(w, &w->from);
	connect_hosts(&w->host, &w->host, &w->out, &w->in);
	for (uint32_t i = 0; i < RECEIVERS; i++) {
		party_open(w, &w->to[i]);
		w->on_device[i] = grant_on(w, &w->to[i].user, w->to[i].device, 1, 0, 0);
	}
	w->on_host = grant_on(w, &w->to[0].user, w->to[0].user.region, 0, 0, 0);
}

static inline void world_close(struct world *w)
{
	tfd_core_close(w->host.core);
	user_unmap(&w->from.user);
	for (uint32_t i = 0; i < RECEIVERS; i++)
		user_unmap(&w->to[i].user);
}

static inline void step(struct world *w, int count)
{
	for (int i = 0; i < count; i++)
		(void)tfd_core_step(w->host.core, w->now += 10000);
}

static inline uint8_t *arena_of(struct world *w)
{
	return w->from.user.segment + w->from.user.header->arena_offset;
}

struct running {
	const struct tfd_record *record;
	uint64_t id;
};

static inline struct running submit(struct world *w, struct tfd_entry entry)
{
	struct running running;

	running.record = user_submit(&w->from.user, entry);
	running.id = w->from.user.next_job;
	step(w, 2);
	return running;
}

static inline bool over(const struct running *running)
{
	return tfd_load_acquire(&running->record->done_id) == running->id;
}

static inline void ends(struct world *w, const struct running *running, uint32_t status, uint32_t detail)
{
	for (int i = 0; i < STEPS && !over(running); i++)
		step(w, 1);
	CHECK(over(running));
	if (running->record->status == status && running->record->detail == detail)
		return;
	(void)fprintf(stderr, "status %u detail %u, not %u and %u\n", running->record->status,
	              running->record->detail, status, detail);
	exit(1);
}

static inline void refused(struct world *w, struct tfd_entry entry, uint32_t detail)
{
	struct running running = submit(w, entry);

	ends(w, &running, TFD_JOB_INVALID, detail);
}

/* What the client's stream does once its kernel is over. */
static inline void bump_to(struct world *w, uint64_t value)
{
	tfd_store_release(&w->from.user.watchers[0].value, value);
	step(w, 2);
}

static inline uint64_t value_of(const struct world *w, uint32_t receiver, uint32_t imm)
{
	return tfd_load_acquire(&w->to[receiver].user.counters[imm].value);
}

static inline const struct tfd_session *session_of(const struct world *w)
{
	return tfd_table_get(&w->host.core->sessions, w->from.user.session);
}

/* The bound of what waits for a stream. */
static inline void bound_pass(struct world *w)
{
	w->now += COPY_NS;
	step(w, 2);
}

/* The next event of that type; others are dropped. */
static inline bool next_event(struct world *w, uint32_t type, struct tfd_event *event)
{
	while (tfd_core_events(w->host.core, event, 1)) {
		if (event->type == type)
			return true;
	}
	return false;
}

static inline void drop_events(struct world *w)
{
	while (tfd_core_events(w->host.core, &(struct tfd_event){ 0 }, 1))
		continue;
}

/* Nothing is left of any job. */
static inline void rests(const struct world *w)
{
	CHECK(session_of(w)->armed_count == 0 && session_of(w)->job_count == 0);
	CHECK(session_of(w)->group->worker->polled == 0);
}

#endif

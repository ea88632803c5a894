/* SPDX-License-Identifier: Apache-2.0 */
/* The staged world, and a second session at one end whose memory no helper has open yet. */
#ifndef TFD_SLOW_WORLD_H
#define TFD_SLOW_WORLD_H

#include "core/parts.h"
#include "staged_world.h"

#define SLOW_MEMORY 8u /* of the session that has to wait */
#define SLOW_IMM 5u

/* A second session at one end, whose memory is on the same GPU. */
struct slow {
	struct end *end; /* where its memory is not open */
	struct user user;
	uint8_t *bytes;
	uint64_t region;
	struct tfd_region_key keys[PATHS];
	uint64_t open; /* what it writes to, or others of the near end write to it by */
};

static struct slow slow;
static uint64_t device_open; /* of the near session's: all of the far device */

static inline void slow_region_add(void)
{
	struct tfd_region_options options = { .fd = -1,
	                                      .writable = 1,
	                                      .length = DEVICE_BYTES,
	                                      .address = DEVICE_ADDRESS + (1ull << 32),
	                                      .device = 1,
	                                      .memory = SLOW_MEMORY };
	struct tfd_core *core = slow.end->host.core;

	CHECK_OK(tfd_region_add(core, slow.user.session, &options, &slow.region, &error));
	CHECK_OK(tfd_region_keys(core, slow.user.session, slow.region, slow.keys, PATHS));
}

/* It writes from its memory to the far device; or its memory is what the near session writes to. */
static inline uint64_t slow_open(uint32_t right)
{
	bool at_far = slow.end == &far;
	struct tfd_open_options options = {
		.path_count = PATHS, .rights = right, .length = DEVICE_BYTES, .imm_count = 16, .device = 1
	};
	const struct tfd_region_key *keys = at_far ? slow.keys : far.device_keys;
	uint64_t owner = at_far ? slow.user.session : far.user.session;
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(far.host.core, owner, 0, 16, slots));
	CHECK_OK(tfd_session_name_space(far.host.core, owner, &options.name_space));
	for (uint32_t i = 0; i < PATHS; i++)
		options.paths[i] = (struct tfd_open_path){ out[i], keys[i].key, keys[i].address };
	CHECK_OK(tfd_open_add(near.host.core, at_far ? near.user.session : slow.user.session, &options,
	                      &open));
	return open;
}

static inline void slow_world_open(bool at_far)
{
	world_open(false);
	memset(&slow, 0, sizeof(slow));
	slow.end = at_far ? &far : &near;
	slow.bytes = calloc(1, DEVICE_BYTES);
	CHECK(slow.bytes);
	slow.end->copier.memories[1] = (struct copier_memory){ SLOW_MEMORY, slow.bytes, DEVICE_BYTES };
	end_helper_open(&near);
	end_helper_open(&far);
	user_open(&slow.end->host, &slow.user);
	slow_region_add();
	device_open = grant_open(true);
	slow.open = slow_open(TFD_RIGHT_WRITE | TFD_RIGHT_READ);
}

static inline void slow_world_close(void)
{
	user_close(&slow.user);
	CHECK_OK(tfd_stage_memory_forget(slow.end->host.core, slow.end->host.group, SLOW_MEMORY));
	world_close();
	free(slow.bytes);
}

static inline struct user *slow_writer(void)
{
	return slow.end == &near ? &slow.user : &near.user;
}

static inline uint64_t slow_count(void)
{
	struct tfd_counter_state state;

	CHECK_OK(tfd_counter_read(far.host.core, slow.end == &far ? slow.user.session : far.user.session,
	                          SLOW_IMM, &state));
	return state.value;
}

static inline bool is_pending(const struct tfd_record *record, uint64_t job)
{
	return tfd_load_acquire(&record->done_id) != job;
}

#endif

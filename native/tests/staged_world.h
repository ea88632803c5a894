/* SPDX-License-Identifier: Apache-2.0 */
/* Two hosts, each with one rail, a staged one over it, and memory of a "GPU" that a thread copies. For tests of the core. */
#ifndef TFD_STAGED_WORLD_H
#define TFD_STAGED_WORLD_H

#include "core_fixture.h"
#include "stage_copier.h"

#define DEVICE_BYTES (4u << 20)
#define DEVICE_ADDRESS 0x700000000000ull /* nothing is mapped there */
#define DEVICE_OFFSET 12288u /* of the region in its allocation */
#define DIRECT 0u /* rails, and paths */
#define STAGED 1u
#define PATHS 2u

/* One end: a host with a session, and its GPU. */
struct end {
	struct host host;
	struct user user;
	struct copier copier;
	uint64_t stage;
	uint64_t memory; /* number of its allocation */
	uint8_t *allocation;
	uint8_t *device; /* where the region begins */
	uint64_t region; /* of the device */
	struct tfd_region_key keys[PATHS], device_keys[PATHS];
};

static struct end near, far;
static uint64_t out[PATHS], in[PATHS];

static inline void staged_host_open_as(struct host *host, struct tfd_group_options group)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	const char *provider = getenv("TFD_TEST_PROVIDER");
	const char *rail = getenv("TFD_TEST_RAIL");
	const char *fabric = getenv("TFD_TEST_FABRIC");

	(void)strcpy(group.provider, provider ? provider : "tcp");
	(void)strcpy(group.fabric, fabric ? fabric : "");
	(void)strcpy(group.rails[0], rail ? rail : "127.0.0.1");
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static inline void staged_host_open(struct host *host)
{
	staged_host_open_as(host, (struct tfd_group_options){
					  .rail_count = 1, .cut_bytes = 1, .staging_bytes = 64u << 20 });
}

/* Its rails: the one, local, and a staged one over each. */
static inline void local_host_open(struct host *host)
{
	staged_host_open_as(
		host, (struct tfd_group_options){
			      .rail_count = 1, .cut_bytes = 1, .with_local = 1, .staging_bytes = 64u << 20 });
}

static inline void end_open(struct end *end, uint64_t memory)
{
	struct tfd_region_options options = { .fd = -1,
	                                      .writable = 1,
	                                      .length = DEVICE_BYTES,
	                                      .address = DEVICE_ADDRESS,
	                                      .device = 1,
	                                      .memory = memory,
	                                      .memory_offset = DEVICE_OFFSET };

	memset(end, 0, sizeof(*end));
	staged_host_open(&end->host);
	user_open(&end->host, &end->user);
	end->memory = memory;
	end->allocation = calloc(1, DEVICE_OFFSET + DEVICE_BYTES);
	CHECK(end->allocation);
	end->device = end->allocation + DEVICE_OFFSET;
	CHECK_OK(tfd_region_add(end->host.core, end->user.session, &options, &end->region, &error));
	CHECK_OK(tfd_region_keys(end->host.core, end->user.session, end->user.region, end->keys, PATHS));
	CHECK_OK(tfd_region_keys(end->host.core, end->user.session, end->region, end->device_keys, PATHS));
	CHECK(end->keys[DIRECT].key && end->keys[STAGED].key);
	CHECK(!end->device_keys[DIRECT].key && end->device_keys[STAGED].key);
}

/* A helper that has its memory open, as control would have started. */
static inline void end_helper_open(struct end *end)
{
	CHECK_OK(tfd_stage_open(end->host.core, end->host.group, &end->stage, &end->copier.fds, &error));
	end->copier.stop = 0;
	end->copier.engine = true;
	end->copier.memories[0] =
		(struct copier_memory){ end->memory, end->allocation, DEVICE_OFFSET + DEVICE_BYTES };
	copier_start(&end->copier, end->host.core->groups[end->host.group]->stages, end->stage);
	CHECK_OK(tfd_stage_memory_set(end->host.core, end->host.group, end->memory, end->stage));
}

static inline void end_helper_close(struct end *end)
{
	if (!end->copier.stage)
		return;
	copier_stop(&end->copier);
	CHECK_OK(tfd_stage_close(end->host.core, end->host.group, end->stage));
}

static inline void end_close(struct end *end)
{
	CHECK_OK(tfd_region_remove(end->host.core, end->user.session, end->region));
	CHECK_OK(tfd_stage_memory_forget(end->host.core, end->host.group, end->memory));
	end_helper_close(end);
	user_close(&end->user);
	tfd_core_close(end->host.core);
	free(end->allocation);
}

static inline void world_open(bool helpers)
{
	end_open(&near, 7);
	end_open(&far, 9);
	for (uint32_t i = 0; i < PATHS; i++)
		connect_rails(&near.host, i, &far.host, i, &out[i], &in[i]);
	if (!helpers)
		return;
	end_helper_open(&near);
	end_helper_open(&far);
}

static inline void world_close(void)
{
	end_close(&near);
	end_close(&far);
}

/* Of all of the far device, or of the far host's region, by both paths. */
static inline uint64_t grant_open(bool device)
{
	struct tfd_open_options options = { .path_count = PATHS,
	                                    .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = DEVICE_BYTES,
	                                    .imm_count = 16,
	                                    .device = device };
	const struct tfd_region_key *keys = device ? far.device_keys : far.keys;
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(far.host.core, far.user.session, 0, 16, slots));
	CHECK_OK(tfd_session_name_space(far.host.core, far.user.session, &options.name_space));
	for (uint32_t i = 0; i < PATHS; i++)
		options.paths[i] = (struct tfd_open_path){ .conn = out[i],
		                                           .key = keys[i].key,
		                                           .address = keys[i].address };
	CHECK_OK(tfd_open_add(near.host.core, near.user.session, &options, &open));
	return open;
}

static inline uint64_t counter_value(uint32_t imm)
{
	struct tfd_counter_state state;

	CHECK_OK(tfd_counter_read(far.host.core, far.user.session, imm, &state));
	return state.value;
}

static inline void wait_counter(uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && counter_value(imm) != value; i++)
		(void)usleep(100);
	CHECK(counter_value(imm) == value);
}

static inline uint32_t path_of(const struct tfd_record *record)
{
	return record->path & TFD_PATH_PROVIDER_MASK;
}

/* Before bytes are looked at, or written to once more, that helpers have copied. */
static inline void copiers_have(void)
{
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++)
		(void)(copier_has(&near.copier, i) + copier_has(&far.copier, i));
}

static inline void fill(uint8_t *bytes, uint64_t length, uint32_t seed)
{
	for (uint64_t i = 0; i < length; i++)
		bytes[i] = (uint8_t)((i * 31 + seed * 17) ^ (i >> 8));
	copier_hands();
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of devices through the core, staged: what goes by it, what does not, both ways, pages, reads; what is waited for. */
#include "providers/provider.h"
#include "staged_world.h"

#define PAGE 4096u

static struct tfd_entry write_entry(uint64_t region, uint64_t grant, uint64_t length)
{
	return (struct tfd_entry){
		.op = TFD_OP_WRITE, .src_region = region, .dst_grant = grant, .length = length, .imm = 3
	};
}

static void is_ok(const struct tfd_record *record, uint32_t path, uint64_t bytes)
{
	if (record->status != TFD_JOB_OK)
		(void)fprintf(stderr, "status %u detail %u\n", record->status, record->detail);
	CHECK(record->status == TFD_JOB_OK && record->bytes == bytes);
	CHECK(path_of(record) == path);
	copiers_have();
}

static uint32_t direct_path(void)
{
	return tfd_provider_find(getenv("TFD_TEST_PROVIDER") ? getenv("TFD_TEST_PROVIDER") : "tcp")->path_id;
}

/* Nothing has been asked of helpers before the first copy, which waits for control to have started one. */
static void test_needed(void)
{
	struct tfd_stage_info info;
	struct tfd_record *record;
	struct tfd_event event;
	uint64_t open;

	world_open(false);
	CHECK(tfd_core_events(near.host.core, &event, 1) == 0);
	open = grant_open(true);
	fill(near.device, 100000, 1);
	record = user_submit(&near.user, write_entry(near.region, open, 100000));
	event = wait_event(&near.host, TFD_EVENT_STAGE_NEEDED, near.memory);
	CHECK(event.count == near.host.group);
	end_helper_open(&near);
	(void)wait_event(&far.host, TFD_EVENT_STAGE_NEEDED, far.memory);
	CHECK(counter_value(3) == 0);
	end_helper_open(&far);
	wait_done(record, near.user.next_job);
	is_ok(record, TFD_PATH_STAGED, 100000);
	wait_counter(3, 1);
	CHECK(memcmp(near.device, far.device, 100000) == 0);
	CHECK_OK(tfd_stage_stat(near.host.core, near.host.group, near.stage, &info));
	CHECK(info.copies[TFD_STAGE_D2H] && info.bytes[TFD_STAGE_D2H] >= 100000 &&
	      info.copies[TFD_STAGE_H2D] == 0 && !info.waiting && !info.failed);
	world_close();
}

/* Every pair of ends, and lengths around a slot. */
static void test_writes(void)
{
	static const uint64_t lengths[] = {
		2, 4096, (256u << 10) - 1, 256u << 10, (256u << 10) + 1, 3000001
	};
	uint64_t opens[2];
	uint64_t counted = 0;

	world_open(true);
	opens[0] = grant_open(false);
	opens[1] = grant_open(true);
	for (uint32_t ends = 0; ends < 4; ends++) {
		uint8_t *from = ends & 1 ? near.device : near.user.memory;
		uint8_t *to = ends & 2 ? far.device : far.user.memory;

		for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
			uint64_t region = ends & 1 ? near.region : near.user.region;
			struct tfd_record *record;

			to[lengths[i]] = 0xee;
			fill(from, lengths[i], i + ends);
			record = user_run(&near.user, write_entry(region, opens[ends >> 1], lengths[i]));
			is_ok(record, ends ? TFD_PATH_STAGED : direct_path(), lengths[i]);
			wait_counter(3, ++counted);
			CHECK(memcmp(from, to, lengths[i]) == 0 && to[lengths[i]] == 0xee);
		}
	}
	world_close();
}

/* Back from the far device into ours, and into the host's memory. */
static void test_reads(void)
{
	uint64_t open;

	world_open(true);
	open = grant_open(true);
	fill(far.device, 1000000, 5);
	for (uint32_t device = 0; device < 2; device++) {
		struct tfd_entry entry = write_entry(device ? near.region : near.user.region, open, 1000000);

		entry.op = TFD_OP_READ;
		entry.imm = 0;
		is_ok(user_run(&near.user, entry), TFD_PATH_STAGED, 1000000);
		CHECK(memcmp(device ? near.device : near.user.memory, far.device, 1000000) == 0);
	}
	world_close();
}

/* Pages in and out of order: runs of equal distance are one request, of several rows. */
static void test_pages(void)
{
	struct tfd_page *table;
	struct tfd_stage_info info;
	struct tfd_record *record;
	uint32_t count = 256;
	uint64_t open;

	world_open(true);
	open = grant_open(true);
	table = (void *)(near.user.segment + near.user.header->arena_offset);
	for (uint32_t shuffled = 0; shuffled < 2; shuffled++) {
		struct tfd_entry entry = write_entry(near.region, open, PAGE);
		struct tfd_stage_info before;

		CHECK_OK(tfd_stage_stat(near.host.core, near.host.group, near.stage, &before));
		for (uint32_t i = 0; i < count; i++)
			table[i] = (struct tfd_page){ 2 * i, 2 * (shuffled ? i * 37 % count : i) };
		entry.op = TFD_OP_WRITE_PAGES;
		entry.table_count = count;
		entry.src_stride = entry.dst_stride = PAGE;
		fill(near.device, 2 * count * PAGE, 3 + shuffled);
		record = user_run(&near.user, entry);
		is_ok(record, TFD_PATH_STAGED, count * PAGE);
		CHECK(record->path & TFD_PATH_PACKED);
		wait_counter(3, (uint64_t)count * (shuffled + 1));
		for (uint32_t i = 0; i < count; i++)
			CHECK(memcmp(near.device + (size_t)table[i].src * PAGE,
			             far.device + (size_t)table[i].dst * PAGE, PAGE) == 0);
		CHECK_OK(tfd_stage_stat(near.host.core, near.host.group, near.stage, &info));
		CHECK(info.copies[TFD_STAGE_D2H] - before.copies[TFD_STAGE_D2H] <= count / 4);
	}
	world_close();
}

/* No copy engine writes a single byte to a GPU: it is refused, and nothing else leaves one behind. */
static void test_one_byte(void)
{
	struct tfd_page *table;
	struct tfd_target *targets;
	struct tfd_entry entry;
	uint64_t open;

	world_open(true);
	open = grant_open(true);
	table = (void *)(near.user.segment + near.user.header->arena_offset);
	targets = (void *)table;
	for (uint32_t i = 0; i < 3; i++) {
		struct tfd_record *record;

		entry = write_entry(near.region, open, 1);
		entry.op = i == 0 ? TFD_OP_WRITE : i == 1 ? TFD_OP_WRITE_PAGES : TFD_OP_SCATTER;
		entry.table_count = i;
		entry.src_stride = entry.dst_stride = i == 1 ? 1 : 0;
		if (i == 1)
			table[0] = (struct tfd_page){ 3, 5 };
		for (uint32_t j = 0; i == 2 && j < 2; j++)
			targets[j] = (struct tfd_target){ .dst_grant = open, .length = 2 - j };
		entry.length = i == 2 ? 0 : 1;
		record = user_run(&near.user, entry);
		CHECK(record->status == TFD_JOB_INVALID && record->detail == TFD_DETAIL_ONE_BYTE);
	}
	CHECK(counter_value(3) == 0 && !copier_has(&near.copier, TFD_STAGE_D2H));
	/* From the far device into the host's memory, as into memory of ours by another path. */
	entry = write_entry(near.user.region, open, 1);
	entry.op = TFD_OP_READ;
	entry.imm = 0;
	is_ok(user_run(&near.user, entry), TFD_PATH_STAGED, 1);
	entry.src_region = near.region;
	CHECK(user_run(&near.user, entry)->detail == TFD_DETAIL_ONE_BYTE);
	world_close();
}

/* What has no bytes, and what another path reaches, does not go by it. */
static void test_last_resort(void)
{
	struct tfd_entry imm;
	uint64_t open;

	world_open(true);
	open = grant_open(true);
	imm = (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = open, .imm = 4 };
	for (uint32_t i = 1; i < 5; i++) {
		is_ok(user_run(&near.user, imm), direct_path(), 0);
		wait_counter(4, i);
	}
	open = grant_open(false);
	for (uint32_t i = 1; i < 5; i++) {
		is_ok(user_run(&near.user, write_entry(near.user.region, open, 600000)), direct_path(),
		      600000);
		wait_counter(3, i);
	}
	CHECK(!copier_has(&near.copier, 0) && !copier_has(&near.copier, 1));
	world_close();
}

/* The path that reaches it is down while it is opened: that is no error of the request. */
static void test_path_that_comes_later(void)
{
	static const uint32_t unreached[] = { 0, TFD_DETAIL_CONNECTION, TFD_DETAIL_STAGING };
	struct tfd_open_options options = { .path_count = 1,
	                                    .rights = TFD_RIGHT_WRITE,
	                                    .length = DEVICE_BYTES,
	                                    .imm_count = 16,
	                                    .device = 1 };
	struct tfd_open_path path;
	struct tfd_record *record;
	uint32_t slots[16];
	uint64_t open;

	world_open(true);
	path = (struct tfd_open_path){ out[STAGED], far.device_keys[STAGED].key,
	                               far.device_keys[STAGED].address };
	options.paths[0].conn = out[DIRECT];
	CHECK_OK(tfd_counters_add(far.host.core, far.user.session, 0, 16, slots));
	CHECK_OK(tfd_session_name_space(far.host.core, far.user.session, &options.name_space));
	for (uint32_t i = 0; i < 3; i++) {
		options.unreached = unreached[i];
		CHECK_OK(tfd_open_add(near.host.core, near.user.session, &options, &open));
		record = user_run(&near.user, write_entry(near.region, open, 5000));
		CHECK(record->status == (i ? TFD_JOB_PEER_LOST : TFD_JOB_INVALID) &&
		      record->detail == (i ? unreached[i] : TFD_DETAIL_DEVICE_MEMORY));
	}
	CHECK_OK(tfd_open_path_set(near.host.core, near.user.session, open, 1, &path));
	is_ok(user_run(&near.user, write_entry(near.region, open, 5000)), TFD_PATH_STAGED, 5000);
	world_close();
}

/* Two sessions of one host, whose GPU memory is near.allocation, one behind the other. */
enum { LOCAL = 1, STAGED_LOCAL = 3, RAILS = 4 };
static struct user from, to;
static uint64_t regions[2];

static void one_host_open(void)
{
	struct tfd_region_options options = { .fd = -1, .writable = 1, .length = DEVICE_BYTES, .device = 1 };

	memset(&near, 0, sizeof(near));
	local_host_open(&near.host);
	user_open(&near.host, &from);
	user_open(&near.host, &to);
	near.allocation = calloc(2, DEVICE_BYTES);
	CHECK(near.allocation);
	for (uint32_t i = 0; i < 2; i++) {
		options.address = DEVICE_ADDRESS + i * DEVICE_BYTES;
		options.memory = 20 + i;
		near.copier.memories[i] =
			(struct copier_memory){ 20 + i, near.allocation + i * DEVICE_BYTES, DEVICE_BYTES };
		CHECK_OK(tfd_region_add(near.host.core, i ? to.session : from.session, &options, &regions[i],
		                        &error));
	}
	CHECK_OK(tfd_stage_open(near.host.core, near.host.group, &near.stage, &near.copier.fds, &error));
	copier_start(&near.copier, near.host.core->groups[near.host.group]->stages, near.stage);
	for (uint32_t i = 0; i < 2; i++)
		CHECK_OK(tfd_stage_memory_set(near.host.core, near.host.group, 20 + i, near.stage));
}

static uint64_t one_host_grant(void)
{
	static const uint32_t rails[2] = { LOCAL, STAGED_LOCAL };
	struct tfd_open_options open = { .path_count = 2,
	                                 .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                 .length = DEVICE_BYTES,
	                                 .imm_count = 16,
	                                 .device = 1 };
	struct tfd_region_key keys[RAILS];
	uint64_t outgoing, incoming, grant;
	uint32_t slots[16];

	CHECK_OK(tfd_region_keys(near.host.core, to.session, regions[1], keys, RAILS));
	CHECK(!keys[LOCAL].key && keys[STAGED_LOCAL].key);
	for (uint32_t i = 0; i < 2; i++) {
		connect_rails(&near.host, rails[i], &near.host, rails[i], &outgoing, &incoming);
		open.paths[i] =
			(struct tfd_open_path){ outgoing, keys[rails[i]].key, keys[rails[i]].address };
	}
	CHECK_OK(tfd_counters_add(near.host.core, to.session, 0, 16, slots));
	CHECK_OK(tfd_session_name_space(near.host.core, to.session, &open.name_space));
	CHECK_OK(tfd_open_add(near.host.core, from.session, &open, &grant));
	return grant;
}

/* Over the host's own rail: bytes stay in the slot that they were copied into. */
static void test_one_host(void)
{
	uint64_t grant;

	one_host_open();
	grant = one_host_grant();
	for (uint32_t read = 0; read < 2; read++) {
		struct tfd_entry entry = write_entry(regions[0], grant, 3000000);

		entry.op = read ? TFD_OP_READ : TFD_OP_WRITE;
		entry.imm = read ? 0 : 3;
		fill(near.allocation + read * DEVICE_BYTES, 3000000, read + 11);
		is_ok(user_run(&from, entry), TFD_PATH_STAGED, 3000000);
		CHECK(memcmp(near.allocation, near.allocation + DEVICE_BYTES, 3000000) == 0);
	}
	user_close(&from);
	user_close(&to);
	end_helper_close(&near);
	tfd_core_close(near.host.core);
	free(near.allocation);
}

int main(void)
{
	test_needed();
	test_writes();
	test_reads();
	test_pages();
	test_one_byte();
	test_last_resort();
	test_path_that_comes_later();
	test_one_host();
	return 0;
}

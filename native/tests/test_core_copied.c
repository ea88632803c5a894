/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs whose bytes their client's stream moves: the worker checks them as any others, counts exactly what the same job over `local` counts, and
 * touches no byte. What is not theirs to say is refused.
 */
#include "copied_world.h"

#define PAGE 64u /* bytes */
#define PAGES (REGION_BYTES / PAGE)

static struct tfd_entry write_entry(const struct world *w, uint64_t length)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .dst_grant = w->on_device[0],
	                           .length = length,
	                           .imm = 1,
	                           .fire_at = 1 };
}

static struct tfd_entry pages_entry(struct world *w, uint32_t count)
{
	struct tfd_page *pages = (void *)arena_of(w);
	struct tfd_entry entry = write_entry(w, PAGE);

	entry.op = TFD_OP_WRITE_PAGES;
	entry.table_count = count;
	entry.src_stride = entry.dst_stride = PAGE;
	for (uint32_t i = 0; i < count; i++)
		pages[i] = (struct tfd_page){ .src = i * 7 % PAGES, .dst = i * 13 % PAGES };
	return entry;
}

static struct tfd_entry scatter_entry(struct world *w, uint32_t count)
{
	struct tfd_target *targets = (void *)arena_of(w);
	struct tfd_entry entry = { .op = TFD_OP_SCATTER,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .imm = 1,
	                           .fire_at = 1,
	                           .table_count = count };

	for (uint32_t i = 0; i < count; i++)
		targets[i] = (struct tfd_target){ .dst_grant = w->on_device[i % RECEIVERS],
		                                  .src_offset = 4096 * i,
		                                  .dst_offset = 512 * i,
		                                  .length = 512 * (i % 3) };
	return entry;
}

/* The same job on memory of the host, which the worker copies. */
static struct tfd_entry over_local(struct world *w, struct tfd_entry entry)
{
	struct tfd_target *targets = (void *)arena_of(w);

	entry.flags &= (uint8_t)~TFD_FLAG_COPIED;
	entry.src_region = w->from.user.region;
	entry.imm = 2;
	if (entry.op != TFD_OP_SCATTER)
		entry.dst_grant = w->on_host;
	for (uint32_t i = 0; entry.op == TFD_OP_SCATTER && i < entry.table_count; i++)
		targets[i].dst_grant = w->on_host;
	return entry;
}

struct told {
	struct tfd_record end;
	uint64_t counted, lost, losses, units;
};

static struct told run(struct world *w, struct tfd_entry entry)
{
	struct told told = { 0 };
	struct tfd_event event;
	struct running running;
	uint64_t before = 0;

	for (uint32_t i = 0; i < RECEIVERS; i++)
		before += value_of(w, i, entry.imm);
	drop_events(w);
	bump_to(w, 0);
	running = submit(w, entry);
	step(w, 4);
	CHECK(!over(&running));
	for (uint32_t i = 0; i < RECEIVERS; i++)
		told.counted += value_of(w, i, entry.imm);
	CHECK(told.counted == before); /* the bytes are not there yet */
	bump_to(w, 1);
	for (int i = 0; i < STEPS && !over(&running); i++)
		step(w, 1);
	CHECK(over(&running));
	told.counted = 0;
	for (uint32_t i = 0; i < RECEIVERS; i++)
		told.counted += value_of(w, i, entry.imm);
	told.counted -= before;
	told.end = *running.record;
	while (next_event(w, TFD_EVENT_LOST, &event)) {
		CHECK(event.imm == entry.imm);
		told.losses++;
		told.lost += event.count;
		told.units += event.units;
	}
	return told;
}

/* Runs it both ways. */
static struct told same(struct world *w, struct tfd_entry entry)
{
	struct told copied = run(w, entry);
	struct told local = run(w, over_local(w, entry));

	if (copied.end.status != local.end.status || copied.end.detail != local.end.detail ||
	    copied.end.bytes != local.end.bytes || copied.counted != local.counted ||
	    copied.lost != local.lost || copied.losses != local.losses || copied.units != local.units) {
		(void)fprintf(
			stderr,
			"op %u: status %u/%u detail %u/%u bytes %llu/%llu counted %llu/%llu lost %llu/%llu\n",
			entry.op, copied.end.status, local.end.status, copied.end.detail, local.end.detail,
			(unsigned long long)copied.end.bytes, (unsigned long long)local.end.bytes,
			(unsigned long long)copied.counted, (unsigned long long)local.counted,
			(unsigned long long)copied.lost, (unsigned long long)local.lost);
		exit(1);
	}
	return copied;
}

static void test_writes(struct world *w)
{
	const uint64_t lengths[] = { 0, 1, PAGE, (1u << 20) + 3, REGION_BYTES };

	for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_entry entry = write_entry(w, lengths[i]);
		struct told told = same(w, entry);

		CHECK(told.end.status == TFD_JOB_OK && told.counted == 1 && told.end.bytes == lengths[i]);
		CHECK((told.end.path & TFD_PATH_PROVIDER_MASK) == TFD_PATH_CUDA);
		CHECK(told.end.posted_ns && told.end.ended_ns);
		entry.flags |= TFD_FLAG_EXACT;
		entry.priority = TFD_PRIORITY_LATENCY;
		CHECK(same(w, entry).counted == 1);
	}
}

static void test_pages(struct world *w)
{
	const uint32_t counts[] = {
		0, 1, TFD_BATCH_PIECES - 1, TFD_BATCH_PIECES, TFD_BATCH_PIECES + 1, 4095, 4096, 4097, 50000
	};

	for (uint32_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		struct tfd_entry entry = pages_entry(w, counts[i]);
		struct told told = same(w, entry);

		CHECK(told.end.status == TFD_JOB_OK && told.counted == counts[i]);
		CHECK(told.end.bytes == (uint64_t)counts[i] * PAGE);
		entry = pages_entry(w, counts[i]);
		entry.flags |= TFD_FLAG_COUNT_JOB;
		CHECK(same(w, entry).counted == 1);
		entry.flags |= TFD_FLAG_EXACT;
		CHECK(same(w, entry).counted == 1);
	}
}

static void test_scatters(struct world *w)
{
	const uint32_t counts[] = { 0, 1, 3, 100, 512 };

	for (uint32_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		struct told told = same(w, scatter_entry(w, counts[i]));

		CHECK(told.end.status == TFD_JOB_OK && told.counted == counts[i]);
	}
}

/* A page that leaves its region or grant: those before it in other batches have counted, the rest is told lost. */
static void test_page_bounds(struct world *w)
{
	struct tfd_page *pages = (void *)arena_of(w);

	for (uint32_t at = 0; at < 10000; at += 1999) {
		for (uint32_t side = 0; side < 2; side++) {
			struct tfd_entry entry = pages_entry(w, 10000);
			struct told copied;

			*(side ? &pages[at].dst : &pages[at].src) = side ? PAGES : UINT32_MAX;
			copied = run(w, entry);
			CHECK(copied.end.status == TFD_JOB_INVALID);
			CHECK(copied.end.detail ==
			      (side ? TFD_DETAIL_DESTINATION_BOUNDS : TFD_DETAIL_SOURCE_BOUNDS));
			CHECK(copied.counted <= at && copied.losses == 1);
			CHECK(copied.units == 8 * copied.counted); /* so a retry reaches the same target */
			CHECK_OK(tfd_counters_fault(w->host.core, w->to[0].user.session, 1, 1, copied.lost,
			                            copied.units, 1));
			CHECK(run(w, pages_entry(w, 10000)).counted == 10000 - copied.counted);
		}
	}
}

/* The table is read when the job starts: what the client made of it meanwhile is checked. */
static void test_table_changed(struct world *w)
{
	struct running running;
	struct tfd_page *pages = (void *)arena_of(w);

	bump_to(w, 0);
	running = submit(w, pages_entry(w, 100));
	pages[50].dst = PAGES;
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	CHECK(running.record->bytes == 0);
}

static void test_bounds(struct world *w)
{
	struct tfd_entry entry = write_entry(w, REGION_BYTES);
	struct tfd_target *targets = (void *)arena_of(w);

	entry.src_offset = 1;
	refused(w, entry, TFD_DETAIL_SOURCE_BOUNDS);
	entry.src_offset = UINT64_MAX;
	refused(w, entry, TFD_DETAIL_SOURCE_BOUNDS);
	entry = write_entry(w, REGION_BYTES);
	entry.dst_offset = 1;
	refused(w, entry, TFD_DETAIL_DESTINATION_BOUNDS);
	entry = write_entry(w, 1);
	entry.imm = 16;
	refused(w, entry, TFD_DETAIL_IMM_RANGE);
	entry = scatter_entry(w, 5);
	targets[4].dst_offset = REGION_BYTES;
	targets[4].length = 1;
	refused(w, entry, TFD_DETAIL_DESTINATION_BOUNDS);
	entry = pages_entry(w, 5);
	entry.table_offset = 1u << 20;
	refused(w, entry, TFD_DETAIL_TABLE);
}

/* What the flag needs beside it, and what it does not go with. */
static void test_flags(struct world *w)
{
	static const uint8_t wrong[] = { TFD_FLAG_COPIED,
	                                 TFD_FLAG_COPIED | TFD_FLAG_ARMED,
	                                 TFD_FLAG_COPIED | TFD_FLAG_PLAN | TFD_FLAG_CHECKSUM,
	                                 COPIED_FLAGS | TFD_FLAG_CHECKSUM,
	                                 COPIED_FLAGS | TFD_FLAG_PLAN,
	                                 COPIED_FLAGS | TFD_FLAG_TABLE };
	static const uint8_t others[] = { TFD_OP_IMM,         TFD_OP_BARRIER, TFD_OP_SEND,  TFD_OP_CANCEL,
	                                  TFD_OP_ACKNOWLEDGE, TFD_OP_FORGET,  TFD_OP_DISARM };

	bump_to(w, 9);
	for (uint32_t i = 0; i < sizeof(wrong); i++) {
		struct tfd_entry entry = write_entry(w, 64);

		entry.flags = wrong[i];
		if (!(entry.flags & TFD_FLAG_ARMED))
			entry.fire_at = 0;
		refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	}
	for (uint32_t i = 0; i < sizeof(others); i++)
		refused(w, (struct tfd_entry){ .op = others[i], .flags = COPIED_FLAGS },
		        TFD_DETAIL_BAD_FLAGS);
}

static void test_not_theirs(struct world *w)
{
	uint64_t read_only = device_region(&w->from.user, 0);
	uint64_t no_map = grant_on(w, &w->to[0].user, w->to[0].device, 1, TFD_RIGHT_WRITE, 0);
	uint64_t only_map = grant_on(w, &w->to[0].user, w->to[0].device, 1, TFD_RIGHT_MAP, 0);
	struct tfd_target *targets = (void *)arena_of(w);
	struct tfd_entry entry = write_entry(w, 64);

	entry.src_region = w->from.user.region;
	refused(w, entry, TFD_DETAIL_NOT_COPIED);
	entry = write_entry(w, 64);
	entry.dst_grant = w->on_host;
	refused(w, entry, TFD_DETAIL_NOT_COPIED);
	entry.dst_grant = no_map;
	refused(w, entry, TFD_DETAIL_RIGHTS);
	entry.dst_grant = only_map;
	refused(w, entry, TFD_DETAIL_RIGHTS);
	entry.dst_grant = 77777;
	refused(w, entry, TFD_DETAIL_BAD_GRANT);
	entry = write_entry(w, 64);
	entry.src_region = w->to[0].device; /* another session's */
	entry.src_region += 1000;
	refused(w, entry, TFD_DETAIL_BAD_REGION);
	entry = scatter_entry(w, 5);
	targets[3].dst_grant = no_map;
	refused(w, entry, TFD_DETAIL_RIGHTS);
	targets[3].dst_grant = w->on_host;
	refused(w, entry, TFD_DETAIL_NOT_COPIED);
	entry = write_entry(w, 64);
	entry.src_region = read_only; /* to be read it is good enough */
	CHECK(run(w, entry).counted == 1);
}

/* Jobs without the flag: only what has no bytes can be done here. */
static void test_no_path(struct world *w)
{
	struct tfd_open_options nowhere = {
		.rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ, .length = 4096, .imm_count = 16, .device = 1
	};
	const uint8_t ops[] = { TFD_OP_WRITE, TFD_OP_READ };
	struct tfd_entry entry = write_entry(w, 64);
	uint64_t before = value_of(w, 0, 1);
	struct running running;

	for (uint32_t i = 0; i < 6; i++) {
		entry = write_entry(w, 64);
		entry.op = ops[i % 2];
		entry.imm = ops[i % 2] == TFD_OP_WRITE;
		entry.fire_at = 0;
		entry.flags = 0;
		if (i / 2 == 1)
			entry.src_region = w->from.user.region;
		if (i / 2 == 2)
			entry.dst_grant = w->on_host;
		refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	}
	entry = pages_entry(w, 3);
	entry.fire_at = 0;
	entry.flags = 0;
	refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	entry = scatter_entry(w, 5);
	entry.fire_at = 0;
	entry.flags = 0;
	refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	entry = write_entry(w, 64);
	entry.flags = TFD_FLAG_PLAN;
	entry.fire_at = 0;
	refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	entry.flags = TFD_FLAG_PLAN | TFD_FLAG_TABLE; /* of sizes that nobody knows yet */
	refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	entry.flags = TFD_FLAG_CHECKSUM;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	entry.flags = 0;
	entry.length = 0;
	running = submit(w, entry);
	ends(w, &running, TFD_JOB_OK, 0);
	running = submit(w, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = w->on_device[0], .imm = 1 });
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 1) == before + 2);
	CHECK_OK(tfd_session_name_space(w->host.core, w->to[0].user.session, &nowhere.name_space));
	CHECK_OK(tfd_open_add(w->host.core, w->from.user.session, &nowhere, &entry.dst_grant));
	refused(w, entry, TFD_DETAIL_DEVICE_MEMORY);
	refused(w, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = entry.dst_grant, .imm = 1 },
	        TFD_DETAIL_DEVICE_MEMORY);
	nowhere.device = 0;
	CHECK(tfd_open_add(w->host.core, w->from.user.session, &nowhere, &entry.dst_grant) == -EINVAL);
}

static void test_mailbox(struct world *w)
{
	struct tfd_mailbox_options options = { .region = w->from.device, .slots = 4, .slot_bytes = 64 };
	struct tfd_mailbox_info info;

	CHECK(tfd_mailbox_add(w->host.core, w->from.user.session, &options, &info, &error) == -EINVAL);
}

static void test_regions(struct world *w)
{
	struct tfd_region_options options = { .fd = -1, .device = 1, .address = DEVICE_ADDRESS };
	struct running running;
	uint64_t region;

	CHECK(tfd_region_add(w->host.core, w->from.user.session, &options, &region, &error) == -EINVAL);
	options.length = UINT64_MAX;
	CHECK(tfd_region_add(w->host.core, w->from.user.session, &options, &region, &error) == -EINVAL);
	bump_to(w, 0);
	running = submit(w, write_entry(w, 64));
	CHECK(tfd_region_remove(w->host.core, w->from.user.session, w->from.device) == -EBUSY);
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_OK, 0);
	CHECK_OK(tfd_region_remove(w->host.core, w->from.user.session, w->from.device));
	refused(w, write_entry(w, 64), TFD_DETAIL_BAD_REGION);
	w->from.device = device_region(&w->from.user, 1);
}

int main(void)
{
	struct world w;

	world_open(&w);
	test_writes(&w);
	test_pages(&w);
	test_scatters(&w);
	test_page_bounds(&w);
	test_table_changed(&w);
	test_bounds(&w);
	test_flags(&w);
	test_not_theirs(&w);
	test_no_path(&w);
	test_mailbox(&w);
	test_regions(&w);
	rests(&w);
	world_close(&w);
	return 0;
}

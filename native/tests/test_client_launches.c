/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a lane's stream is given for launches of plans, and for reads, with a driver that only notes it. The test is the stream and the daemon.
 */
#include <stdbool.h>

#include "fake_daemon.h"
#include "transferd/lane.h"

#define STREAM ((void *)0x22)
#define SEGMENT 0x700000000000ull
#define SRC 0x100000ull /* of the region */
#define SRC_BYTES 0x10000ull
#define DST 0x200000ull /* of the grant */
#define DST_BYTES 0x8000ull

static char pages, targets, plan_pages, plan_slices; /* by their addresses */

/* What was enqueued last. */
static struct {
	void *function;
	unsigned int grid_x, grid_y, block_x;
	uint64_t p[16]; /* parameters */
	uint32_t launches, copies, writes, waits;
	uint64_t dst, src, bytes, word;
	uint64_t id; /* of the stream */
	int capturing, fails;
} driver;

static uint32_t parameter_count(const void *function)
{
	if (function == &plan_pages)
		return 14;
	return function == &plan_slices ? 10 : function == &pages ? 12 : 9;
}

/* Those of 32 bits come as such. */
static bool narrow(const void *function, uint32_t i)
{
	if (i + 1 == parameter_count(function))
		return true;
	return i == (function == &plan_slices ? 4u : function == &targets ? 3u : 6u);
}

static int launch(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                  unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                  void *stream, void **parameters, void **extra)
{
	CHECK(grid_z == 1 && block_z == 1 && !shared && stream == STREAM && !extra && block_y);
	driver.launches++;
	driver.function = function;
	driver.grid_x = grid_x;
	driver.grid_y = grid_y;
	driver.block_x = block_x;
	for (uint32_t i = 0; i < parameter_count(function); i++)
		driver.p[i] = narrow(function, i) ? *(uint32_t *)parameters[i] : *(uint64_t *)parameters[i];
	return 0;
}

static int memcpy_dtod(uint64_t dst, uint64_t src, size_t bytes, void *stream)
{
	(void)stream;
	driver.copies++;
	driver.dst = dst;
	driver.src = src;
	driver.bytes = bytes;
	return 0;
}

static int wait_value(void *stream, uint64_t address, uint64_t value, unsigned int flags)
{
	(void)stream;
	(void)address;
	(void)value;
	(void)flags;
	driver.waits++;
	return 0;
}

static int write_value(void *stream, uint64_t address, uint64_t value, unsigned int flags)
{
	(void)stream;
	(void)address;
	(void)flags;
	driver.writes++;
	driver.word = value;
	return 0;
}

static int get_id(void *stream, uint64_t *id)
{
	CHECK(stream == STREAM && !driver.capturing);
	*id = driver.id;
	return driver.fails;
}

static int capturing(void *stream, int *is)
{
	CHECK(stream == STREAM);
	*is = driver.capturing;
	return 0;
}

static int any_context(void **context)
{
	*context = NULL;
	return 0;
}

static struct fake_daemon fake;
static struct tfd_client *client;
static struct tfd_lane *lane;
static uint32_t marks;

static void world_init(void)
{
	struct tfd_lane_options options = {
		.driver = { launch, memcpy_dtod, wait_value, write_value, any_context, NULL, NULL },
		.stream = STREAM,
		.pages = &pages,
		.targets = &targets,
		.plan_pages = &plan_pages,
		.plan_slices = &plan_slices,
		.segment = SEGMENT,
		.copies_max = 16,
	};

	memset(&driver, 0, sizeof(driver));
	fake_layout(&fake, 16, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_watcher_open(client, &options.watcher) == 0);
	CHECK(tfd_client_watcher_open(client, &marks) == 0);
	options.marks = marks;
	CHECK(tfd_lane_open(client, &options, &lane) == 0);
}

static void world_fini(void)
{
	tfd_client_close(client);
	fake_fini(&fake);
}

static uint32_t plan_of(struct tfd_entry entry, const struct tfd_client_table *table, uint32_t with_table)
{
	struct tfd_table_fault fault;

	entry.flags |= TFD_FLAG_COPIED;
	CHECK(tfd_client_plan_open(client, 0, &entry, table, with_table, 0, &fault) == 0);
	CHECK(entry.flags & TFD_FLAG_PLAN && entry.flags & TFD_FLAG_COPIED);
	fake.ring->head = fake.ring->tail; /* the daemon has taken it */
	fake_end(&fake, &entry, TFD_JOB_OK);
	tfd_client_job_release(client, entry.job_id);
	return entry.plan;
}

static const struct tfd_entry *launched(uint32_t plan)
{
	const struct tfd_entry *seen = &fake.ring_entries[fake.ring->tail % 16];
	int64_t job = tfd_lane_launch(lane, plan, 0, SRC, SRC_BYTES, DST, DST_BYTES, 0);

	CHECK(job > 0 && (uint64_t)job == seen->job_id && seen->op == TFD_OP_LAUNCH && seen->plan == plan);
	CHECK(seen->flags == (TFD_FLAG_ARMED | TFD_FLAG_POLLED | TFD_FLAG_COPIED));
	CHECK(seen->fire_at == tfd_lane_last(lane) && !seen->marks && !seen->argument);
	fake.ring->head = fake.ring->tail;
	return seen;
}

/* The segment, as the client has it. */
static const uint8_t *base(void)
{
	return (const void *)tfd_client_header(client);
}

static uint64_t for_device(const void *at)
{
	return SEGMENT + (uint64_t)((const uint8_t *)at - base());
}

static struct tfd_entry entry_of(uint8_t op, uint64_t length)
{
	return (struct tfd_entry){ .op = op,
	                           .src_region = 1,
	                           .src_offset = 0x40,
	                           .dst_grant = 2,
	                           .dst_offset = 0x80,
	                           .length = length };
}

static void test_a_write(void)
{
	uint32_t small, large;

	world_init();
	small = plan_of(entry_of(TFD_OP_WRITE, 100), NULL, 0);
	large = plan_of(entry_of(TFD_OP_WRITE, TFD_LANE_MEMCPY_MIN), NULL, 0);
	CHECK(!tfd_client_plan_table(client, small));
	for (uint32_t i = 0; i < 2; i++) {
		launched(small);
		CHECK(driver.function == &pages && driver.p[0] == SRC + 0x40 && driver.p[1] == DST + 0x80);
		CHECK(driver.p[4] == 100 && driver.p[10] == tfd_lane_last(lane));
		launched(large);
		CHECK(driver.src == SRC + 0x40 && driver.dst == DST + 0x80 && driver.bytes == 1 << 20);
		CHECK(driver.word == tfd_lane_last(lane));
	}
	world_fini();
}

static void test_pages(void)
{
	const uint32_t indices[] = { 1, 2, 3 };
	const struct tfd_client_table table = { .src = indices,
	                                        .dst = indices,
	                                        .src_form = TFD_INDEX_U32,
	                                        .dst_form = TFD_INDEX_U32,
	                                        .src_end = SRC_BYTES,
	                                        .dst_end = DST_BYTES };
	struct tfd_entry entry = entry_of(TFD_OP_WRITE_PAGES, 0x100);
	uint32_t plan;

	world_init();
	entry.table_count = 3;
	entry.src_stride = 0x100;
	entry.dst_stride = 0x1000;
	plan = plan_of(entry, &table, 0);
	launched(plan);
	CHECK(driver.function == &plan_pages && driver.p[0] == SRC + 0x40 && driver.p[1] == DST + 0x80);
	CHECK(driver.p[2] == 0x100 && driver.p[3] == 0x1000 && driver.p[4] == 0x100);
	CHECK(driver.p[5] == for_device(tfd_client_plan_table(client, plan)) && driver.p[6] == 3);
	CHECK(driver.p[7] == (SRC_BYTES - 0x40) / 0x100); /* of 0xff.c none is whole */
	CHECK(driver.p[8] == 8 && driver.p[10] == 0 && driver.p[12] == 1);
	CHECK(tfd_lane_launch(lane, plan, 0, SRC, 0x80, DST, DST_BYTES, 0) > 0);
	CHECK(driver.p[7] == 0); /* a region too small for any */
	world_fini();
}

static void test_slices(void)
{
	const uint64_t places[] = { DST, DST + 0x10000 }, ends[] = { DST_BYTES, 0x100 };
	const struct tfd_target rows[] = { { 2, 0, 0, 16 }, { 3, 64, 8, 16 } };
	const struct tfd_client_table table = {
		.places = places, .ends = ends, .targets = rows, .src_end = SRC_BYTES
	};
	struct tfd_entry scatter = { .op = TFD_OP_SCATTER, .src_region = 1, .table_count = 2 };
	const struct tfd_plan_place *at;
	const struct tfd_slice *slices;
	uint32_t plan;

	world_init();
	plan = plan_of(entry_of(TFD_OP_WRITE, 0x200), &table, 1);
	launched(plan);
	at = (void *)((uint8_t *)tfd_client_plan_table(client, plan) + 64 + sizeof(struct tfd_slice));
	CHECK(driver.function == &plan_slices && driver.p[0] == SRC + 0x40 && driver.p[1] == 0x200);
	CHECK(driver.p[3] == for_device(at) && driver.p[4] == 1 && driver.grid_x == 1);
	CHECK(at->address == DST && at->bytes == DST_BYTES);
	for (uint32_t tabled = 0; tabled < 2; tabled++) {
		scatter.length = tabled ? 0x1000 : 0;
		scatter.src_offset = tabled ? 0x40 : 0;
		plan = plan_of(scatter, &table, tabled);
		launched(plan);
		CHECK(driver.function == &plan_slices && driver.p[4] == 2 && driver.grid_x == 2);
		CHECK(driver.p[0] == SRC + scatter.src_offset &&
		      driver.p[1] == (tabled ? 0x1000 : SRC_BYTES));
		slices = (const void *)(base() + driver.p[2] - SEGMENT + 64);
		at = (const void *)(base() + driver.p[3] - SEGMENT);
		CHECK((const void *)at == (const void *)(slices + 2));
		CHECK(slices[1].src_offset == 64 - scatter.src_offset && slices[1].dst_offset == 8);
		CHECK(at[1].address == DST + 0x10000 && at[1].bytes == 0x100);
	}
	world_fini();
}

/* Rows of an array name members; a plan's window may be a terabyte, and is gone over by no more blocks than a device holds. */
static void test_rows_of_members(void)
{
	const uint64_t places[] = { DST, DST + 0x10000 }, ends[] = { DST_BYTES, 0x100 }, members[] = { 2, 3 };
	const int64_t rows[] = { 1, 0, 0, 16, 0, 0, 0, 16, 1, 0, 32, 16 };
	const struct tfd_client_table table = { .places = places,
	                                        .ends = ends,
	                                        .rows = rows,
	                                        .members = members,
	                                        .member_count = 2,
	                                        .src_form = TFD_INDEX_I64,
	                                        .src_end = 1ull << 40 };
	struct tfd_entry scatter = {
		.op = TFD_OP_SCATTER, .src_region = 1, .table_count = 3, .length = 1ull << 40
	};
	const struct tfd_plan_place *at;

	world_init();
	launched(plan_of(scatter, &table, 1));
	at = (const void *)(base() + driver.p[3] - SEGMENT);
	CHECK(at[0].address == DST + 0x10000 && at[1].address == DST && at[2].bytes == 0x100);
	CHECK(driver.grid_x == 3 && driver.grid_y >= 1 && driver.grid_x * driver.grid_y <= 2048);
	world_fini();
}

static void test_triggers_and_closed_plans(void)
{
	struct tfd_copy with = {
		.src = SRC, .dst = DST, .trigger = 0x9000, .trigger_at = 5, .trigger_slot = 3
	};
	struct tfd_entry entry = { .op = TFD_OP_LAUNCH };
	struct tfd_table_fault fault;
	int32_t result;
	uint32_t plan;

	world_init();
	plan = plan_of(entry_of(TFD_OP_WRITE, TFD_LANE_MEMCPY_MIN), NULL, 0);
	entry.plan = plan;
	CHECK(tfd_lane_copy(lane, &entry, NULL, &with, 0, &fault, &result) == 0);
	CHECK(driver.waits == 1 && driver.function == &pages && !driver.copies); /* which looks at its mark */
	CHECK(driver.p[8] == for_device(base() + fake.header->watcher_offset + marks * 64));
	CHECK(entry.argument == 5 && entry.trigger == 3 && entry.marks == marks + 1);
	tfd_client_plan_close(client, plan);
	driver.launches = 0;
	launched(plan); /* its table stays until the first has ended */
	CHECK(driver.launches == 1 || driver.copies == 1);
	driver.launches = driver.copies = driver.writes = 0;
	launched(3); /* no plan: the daemon will say so */
	CHECK(!driver.launches && !driver.copies && driver.writes == 1 && driver.word == tfd_lane_last(lane));
	CHECK(tfd_lane_launch(lane, 77, 0, SRC, SRC_BYTES, DST, DST_BYTES, 0) > 0 && driver.writes == 2);
	world_fini();
}

/* Another stream has come by its handle, or it is being captured: nothing is published. */
static void test_a_stream_of_the_application(void)
{
	struct tfd_lane_options options = {
		.driver = { launch, memcpy_dtod, wait_value, write_value, any_context, NULL, NULL, get_id,
		            capturing },
		.stream = STREAM,
		.pages = &pages,
		.segment = SEGMENT,
		.marks = TFD_LANE_NO_MARKS,
		.copies_max = 16,
		.foreign = 1,
		.stream_id = 77,
	};
	uint32_t before;

	world_init();
	CHECK(tfd_client_watcher_open(client, &options.watcher) == 0);
	CHECK(tfd_lane_open(client, &options, &lane) == 0);
	driver.id = 77;
	CHECK(tfd_lane_write(lane, 0, 1, 1, 0, 2, 0, 64, 0, SRC, DST, 0) > 0 && driver.launches == 1);
	before = fake.ring->tail;
	driver.id = 78;
	CHECK(tfd_lane_write(lane, 0, 1, 1, 0, 2, 0, 64, 0, SRC, DST, 0) == -ESTALE);
	driver.id = 77;
	driver.capturing = 1;
	CHECK(tfd_lane_write(lane, 0, 1, 1, 0, 2, 0, 64, 0, SRC, DST, 0) == -EBUSY);
	driver.capturing = 0;
	driver.fails = 400;
	CHECK(tfd_lane_write(lane, 0, 1, 1, 0, 2, 0, 64, 0, SRC, DST, 0) == -ESTALE);
	CHECK(fake.ring->tail == before && tfd_lane_last(lane) == 1 && driver.launches == 1);
	driver.fails = 0;
	CHECK(tfd_lane_write(lane, 0, 1, 1, 0, 2, 0, 64, 0, SRC, DST, 0) > 0);
	world_fini();
}

static void test_reads(void)
{
	struct tfd_copy with = { .src = SRC, .dst = DST };
	struct tfd_entry small = entry_of(TFD_OP_READ, 100),
			 large = entry_of(TFD_OP_READ, TFD_LANE_MEMCPY_MIN);
	struct tfd_table_fault fault;
	int32_t result;

	world_init();
	CHECK(tfd_lane_copy(lane, &small, NULL, &with, 0, &fault, &result) == 0);
	CHECK(driver.function == &pages && driver.p[0] == DST + 0x80 && driver.p[1] == SRC + 0x40);
	CHECK(tfd_lane_copy(lane, &large, NULL, &with, 0, &fault, &result) == 0);
	CHECK(driver.src == DST + 0x80 && driver.dst == SRC + 0x40 && driver.bytes == 1 << 20);
	launched(plan_of(entry_of(TFD_OP_READ, 64), NULL, 0));
	CHECK(driver.p[0] == DST + 0x80 && driver.p[1] == SRC + 0x40 && driver.p[4] == 64);
	world_fini();
}

int main(void)
{
	test_a_write();
	test_pages();
	test_slices();
	test_rows_of_members();
	test_triggers_and_closed_plans();
	test_reads();
	test_a_stream_of_the_application();
	return 0;
}

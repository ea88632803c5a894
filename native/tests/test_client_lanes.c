/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lanes with a driver that only notes what it is told: the test itself is the stream, and the daemon. Order, room, refusals, tables that stay
 * until the stream is through, ends that are told only when no copy writes any more.
 */
#include <stdbool.h>

#include "fake_daemon.h"
#include "transferd/lane.h"

#define FOREVER (-1)
#define CONTEXT ((void *)0x11)
#define STREAM ((void *)0x22)
#define PAGES ((void *)0x33)
#define TARGETS ((void *)0x44)
#define SEGMENT 0x700000000000ull
#define REFUSED 700

/* What was enqueued last. */
static struct {
	void *current;
	uint32_t pushes, launches, copies, waits, writes;
	int refuse; /* the next launch's result */
	void *function;
	unsigned int grid_x, grid_y, block_x, block_y;
	uint64_t src, dst, bytes, chunk, marks, table;
	uint32_t count, slot;
	uint64_t word, value, awaited, awaited_value;
} driver;

static int launch(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                  unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                  void *stream, void **parameters, void **extra)
{
	CHECK(grid_z == 1 && block_z == 1 && !shared && stream == STREAM && !extra);
	CHECK(driver.current == CONTEXT);
	if (driver.refuse)
		return driver.refuse;
	driver.launches++;
	driver.function = function;
	driver.grid_x = grid_x;
	driver.grid_y = grid_y;
	driver.block_x = block_x;
	driver.block_y = block_y;
	if (function == PAGES) {
		driver.src = *(uint64_t *)parameters[0];
		driver.dst = *(uint64_t *)parameters[1];
		driver.bytes = *(uint64_t *)parameters[4];
		driver.table = *(uint64_t *)parameters[5];
		driver.count = *(uint32_t *)parameters[6];
		driver.chunk = *(uint64_t *)parameters[7];
		driver.marks = *(uint64_t *)parameters[8];
	} else {
		CHECK(function == TARGETS);
		driver.table = *(uint64_t *)parameters[1];
		driver.dst = *(uint64_t *)parameters[2]; /* the places */
		driver.count = *(uint32_t *)parameters[3];
		parameters -= 3; /* from here on they have the same */
	}
	driver.word = *(uint64_t *)parameters[9];
	driver.value = *(uint64_t *)parameters[10];
	driver.slot = *(uint32_t *)parameters[11];
	return 0;
}

static int memcpy_dtod(uint64_t dst, uint64_t src, size_t bytes, void *stream)
{
	CHECK(stream == STREAM);
	driver.copies++;
	driver.dst = dst;
	driver.src = src;
	driver.bytes = bytes;
	return 0;
}

static int wait_value(void *stream, uint64_t address, uint64_t value, unsigned int flags)
{
	CHECK(stream == STREAM && !flags);
	driver.waits++;
	driver.awaited = address;
	driver.awaited_value = value;
	return 0;
}

static int write_value(void *stream, uint64_t address, uint64_t value, unsigned int flags)
{
	CHECK(stream == STREAM && !flags);
	driver.writes++;
	driver.word = address;
	driver.value = value;
	return 0;
}

static int get_current(void **context)
{
	*context = driver.current;
	return 0;
}

static int push_current(void *context)
{
	driver.pushes++;
	driver.current = context;
	return 0;
}

static int pop_current(void **context)
{
	*context = driver.current;
	driver.current = NULL;
	return 0;
}

struct world {
	struct fake_daemon fake;
	struct tfd_client *client;
	struct tfd_watcher *watchers;
	struct tfd_lane *lane;
	uint32_t watcher, marks, trigger;
};

static void world_init(struct world *world, uint32_t copies_max, bool armed)
{
	struct tfd_lane_options options = {
		.driver = { launch, memcpy_dtod, wait_value, write_value, get_current, push_current,
		            pop_current },
		.context = CONTEXT,
		.stream = STREAM,
		.pages = PAGES,
		.targets = TARGETS,
		.segment = SEGMENT,
		.marks = TFD_LANE_NO_MARKS,
		.copies_max = copies_max,
	};

	memset(&driver, 0, sizeof(driver));
	fake_layout(&world->fake, 16, 16, 4);
	world->client = fake_attach(&world->fake);
	world->watchers = (void *)(world->fake.base + world->fake.header->watcher_offset);
	CHECK(tfd_client_watcher_open(world->client, &world->watcher) == 0);
	CHECK(tfd_client_watcher_open(world->client, &world->marks) == 0);
	CHECK(tfd_client_watcher_open(world->client, &world->trigger) == 0);
	options.watcher = world->watcher;
	if (armed)
		options.marks = world->marks;
	CHECK(tfd_lane_open(world->client, &options, &world->lane) == 0);
}

static void world_fini(struct world *world)
{
	tfd_client_close(world->client);
	fake_fini(&world->fake);
}

static int copy(struct world *world, struct tfd_entry *entry, const struct tfd_client_table *table,
                const struct tfd_copy *with, int64_t timeout_ns)
{
	struct tfd_table_fault fault;
	int32_t result = 0;
	int rc = tfd_lane_copy(world->lane, entry, table, with, timeout_ns, &fault, &result);

	CHECK(rc != -EIO || result == REFUSED);
	CHECK(rc != -ERANGE || fault.side == TFD_FAULT_GRANT);
	return rc;
}

static struct tfd_entry a_write(uint64_t length)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = 1,
	                           .src_offset = 0x10,
	                           .dst_grant = 2,
	                           .dst_offset = 0x20,
	                           .length = length };
}

/* What the stream does when it gets there, and what the worker tells then, or before. */
static void pass(struct world *world, uint64_t value)
{
	tfd_store_release(&world->watchers[world->watcher].value, value);
}

static void end(struct world *world, const struct tfd_entry *entry, uint32_t status)
{
	fake_end(&world->fake, entry, status);
}

static int look(struct world *world, const struct tfd_entry *entry)
{
	struct tfd_result result;
	int rc = tfd_client_job_poll(world->client, entry->job_id, &result);

	return rc ? rc : (int)result.status;
}

static void test_a_write_is_published_and_enqueued(void)
{
	struct tfd_copy with = { .src = 0x1000, .dst = 0x2000 };
	struct tfd_entry small = a_write(4096), large = a_write(TFD_LANE_MEMCPY_MIN), none = a_write(0);
	const struct tfd_entry *seen;
	struct world world;

	world_init(&world, 8, false);
	seen = world.fake.ring_entries;
	CHECK(copy(&world, &small, NULL, &with, 0) == 0);
	CHECK(seen[0].flags == (TFD_FLAG_ARMED | TFD_FLAG_POLLED | TFD_FLAG_COPIED));
	CHECK(seen[0].watcher == world.watcher && seen[0].fire_at == 1 && seen[0].job_id == small.job_id);
	CHECK(driver.launches == 1 && driver.function == PAGES && driver.src == 0x1010 &&
	      driver.dst == 0x2020);
	CHECK(driver.bytes == 4096 && driver.count == 1 && !driver.table && !driver.marks);
	CHECK(driver.value == 1 && driver.word == SEGMENT + world.fake.header->watcher_offset +
	                                                  world.watcher * sizeof(struct tfd_watcher));
	CHECK(driver.slot == world.watcher && !driver.writes); /* by the kernel itself */
	CHECK(driver.pushes == 1 && !driver.current);
	driver.current = CONTEXT; /* where it is current already nothing is pushed */
	CHECK(copy(&world, &large, NULL, &with, 0) == 0);
	CHECK(driver.copies == 1 && driver.launches == 1 && driver.value == 2 && driver.pushes == 1);
	CHECK(copy(&world, &none, NULL, &with, 0) == 0);
	CHECK(driver.copies == 1 && driver.launches == 1 && driver.value == 3 && driver.writes == 2);
	CHECK(tfd_lane_last(world.lane) == 3 && tfd_lane_pending(world.lane) == 3);
	pass(&world, 3);
	CHECK(tfd_lane_pending(world.lane) == 0 && tfd_lane_through(world.lane) == 0);
	world_fini(&world);
}

static void test_a_write_in_one_call(void)
{
	const struct tfd_entry *seen;
	struct world world;
	int64_t job;

	world_init(&world, 8, false);
	job = tfd_lane_write(world.lane, TFD_PRIORITY_LATENCY, 2, 3, 0x40, 5, 0x60, 7, 1000000000, 0x8000,
	                     0x9000, 0);
	seen = world.fake.ring_entries;
	CHECK(job > 0 && seen->job_id == (uint64_t)job && seen->op == TFD_OP_WRITE && seen->imm == 2);
	CHECK(seen->priority == TFD_PRIORITY_LATENCY && seen->src_region == 3 && seen->src_offset == 0x40);
	CHECK(seen->dst_grant == 5 && seen->dst_offset == 0x60 && seen->length == 7);
	CHECK(seen->deadline_ns > tfd_client_now_ns() && seen->fire_at == 1);
	CHECK(driver.src == 0x8040 && driver.dst == 0x9060 && driver.bytes == 7);
	world_fini(&world);
}

static int64_t pages(struct world *world, uint32_t count, const void *src, uint32_t form, const void *dst)
{
	return tfd_lane_pages(world->lane, TFD_PRIORITY_LATENCY, TFD_FLAG_COUNT_JOB, 7, 1, 0x10, 128, 2, 0x20,
	                      256, 64, count, src, form, 0x10 + 10 * 128, dst, TFD_INDEX_U32, UINT64_MAX,
	                      1000000, 0x1000, 0x2000, FOREVER);
}

static void test_pages_in_one_call(void)
{
	const int64_t src[] = { 9, 0, 4 }, negative[] = { 1, -1, 2 };
	const uint32_t dst[] = { 5, 6, 7 };
	const struct tfd_entry *seen;
	const struct tfd_page *table;
	struct world world;
	int64_t job;

	world_init(&world, 8, false);
	seen = world.fake.ring_entries;
	job = pages(&world, 3, src, TFD_INDEX_I64, dst);
	CHECK(job > 0 && (uint64_t)job == seen->job_id && seen->op == TFD_OP_WRITE_PAGES);
	CHECK(seen->flags == (TFD_FLAG_ARMED | TFD_FLAG_POLLED | TFD_FLAG_COPIED | TFD_FLAG_COUNT_JOB));
	CHECK(seen->priority == TFD_PRIORITY_LATENCY && seen->imm == 7 && seen->src_region == 1);
	CHECK(seen->dst_grant == 2 && seen->length == 64 && seen->src_stride == 128 &&
	      seen->dst_stride == 256);
	CHECK(seen->src_offset == 0x10 && seen->dst_offset == 0x20 && seen->table_count == 3);
	CHECK(seen->deadline_ns > 1000000 && seen->fire_at == 1);
	table = (void *)(world.fake.base + world.fake.header->arena_offset + seen->table_offset);
	CHECK(table[0].src == 9 && table[0].dst == 5 && table[2].src == 4 && table[2].dst == 7);
	CHECK(driver.src == 0x1010 && driver.dst == 0x2020 && driver.bytes == 64 && driver.count == 3);
	/* What is wrong is published by none. */
	CHECK(pages(&world, 3, negative, TFD_INDEX_I64, dst) == -ERANGE);
	CHECK(tfd_lane_last(world.lane) == 1 && world.fake.ring->tail == 1);
	job = pages(&world, 0, NULL, TFD_INDEX_U32, NULL); /* which counts once all the same */
	CHECK(job > 0 && seen[1].table_count == 0 && driver.launches == 1 && driver.writes == 1);
	driver.refuse = REFUSED;
	CHECK(pages(&world, 1, src, TFD_INDEX_I64, dst) == -EIO);
	CHECK(pages(&world, 1, src, TFD_INDEX_I64, dst) == -ENODEV);
	world_fini(&world);
}

static void test_shapes_cover_every_byte(void)
{
	static const uint64_t lengths[] = { 1, 64, 2048, 2049, 65536, 65537, 1 << 20, (1ull << 40) - 1 };
	struct tfd_copy with = { .src = 0x1000, .dst = 0x2000, .trigger = 0x9000, .trigger_at = 1 };
	struct world world;

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_entry entry = a_write(lengths[i]);

		world_init(&world, 8, true); /* armed: a kernel whatever the length */
		with.trigger_slot = world.trigger;
		CHECK(copy(&world, &entry, NULL, &with, 0) == 0);
		CHECK(driver.launches == 1 && driver.block_x * driver.block_y == 256);
		CHECK((uint64_t)driver.grid_x * driver.block_y >= 1 && driver.grid_y <= 65535);
		CHECK(driver.chunk * driver.grid_y >= lengths[i] && driver.chunk % 16 == 0);
		CHECK(driver.chunk * (driver.grid_y - 1) < lengths[i]);
		world_fini(&world);
	}
}

static void test_room_is_the_lanes(void)
{
	struct tfd_copy with = { 0 };
	struct tfd_entry entries[3] = { a_write(1), a_write(1), a_write(1) };
	struct world world;

	world_init(&world, 2, false);
	CHECK(copy(&world, &entries[0], NULL, &with, 0) == 0);
	CHECK(copy(&world, &entries[1], NULL, &with, 0) == 0);
	CHECK(copy(&world, &entries[2], NULL, &with, 0) == -EAGAIN);
	CHECK(copy(&world, &entries[2], NULL, &with, 1000000) == -ETIMEDOUT);
	CHECK(world.fake.ring->tail == 2 && driver.launches == 2);
	pass(&world, 1);
	CHECK(copy(&world, &entries[2], NULL, &with, 0) == 0 && entries[2].fire_at == 3);
	world_fini(&world);
}

static void test_tables_stay_until_the_stream_is_through(void)
{
	static uint32_t numbers[256];
	struct tfd_client_table table = {
		.src = numbers, .dst = numbers, .src_end = 1 << 20, .dst_end = 1 << 20
	};
	struct tfd_entry pages = {
		.op = TFD_OP_WRITE_PAGES, .length = 16, .table_count = 256, .src_stride = 16, .dst_stride = 16
	};
	struct tfd_entry first, second, third;
	struct tfd_copy with = { .src = 0x1000, .dst = 0x2000 };
	struct tfd_result result;
	struct world world;

	world_init(&world, 8, false);
	first = second = third = pages; /* of 2 KiB each; the arena has 4 */
	CHECK(copy(&world, &first, &table, &with, 0) == 0);
	CHECK(driver.count == 256 &&
	      driver.table == SEGMENT + world.fake.header->arena_offset + first.table_offset);
	CHECK(copy(&world, &second, &table, &with, 0) == 0);
	end(&world, &first, TFD_JOB_CANCELLED);
	tfd_client_job_release(world.client, first.job_id);
	CHECK(copy(&world, &third, &table, &with, 0) == -EAGAIN); /* ended, but the stream will read it */
	end(&world, &second, TFD_JOB_DEADLINE);
	CHECK(look(&world, &second) == -EAGAIN);
	CHECK(tfd_client_job_wait(world.client, second.job_id, 2000000, 0, &result) == -ETIMEDOUT);
	pass(&world, 1);
	CHECK(copy(&world, &third, &table, &with, 0) == 0);
	CHECK(look(&world, &second) == -EAGAIN);
	pass(&world, 2);
	CHECK(look(&world, &second) == TFD_JOB_DEADLINE);
	world_fini(&world);
}

static void test_what_leaves_its_grant_is_not_copied(void)
{
	static const struct tfd_target good = { 1, 0, 0, 16 };
	struct tfd_target targets[2] = { good, good };
	uint64_t places[2] = { 0x5000, 0x6000 }, ends[2] = { 16, 16 };
	struct tfd_client_table table = { .targets = targets, .places = places, .ends = ends, .src_end = 64 };
	struct tfd_entry scatter = { .op = TFD_OP_SCATTER, .src_region = 1, .table_count = 2 };
	struct tfd_copy with = { .src = 0x1000 };
	struct world world;

	world_init(&world, 8, false);
	targets[1].dst_offset = 1;
	CHECK(copy(&world, &scatter, &table, &with, 0) == -ERANGE);
	targets[1] = good;
	targets[1].src_offset = 49;
	CHECK(copy(&world, &scatter, &table, &with, 0) == -ERANGE);
	targets[1] = good;
	targets[1].length = UINT64_MAX;
	CHECK(copy(&world, &scatter, &table, &with, 0) == -ERANGE);
	CHECK(!driver.launches && !driver.writes && !world.fake.ring->tail);
	targets[1] = good;
	targets[1].src_offset = 48;
	CHECK(copy(&world, &scatter, &table, &with, 0) == 0);
	CHECK(driver.function == TARGETS && driver.count == 2 &&
	      driver.dst == driver.table + 2 * sizeof(good));
	CHECK(((uint64_t *)(void *)(world.fake.base + world.fake.header->arena_offset +
	                            scatter.table_offset))[9] == 0x6000);
	world_fini(&world);
}

static void test_an_armed_copy_is_void_once_its_job_has_ended(void)
{
	struct tfd_copy with = { .src = 0x1000, .dst = 0x2000, .trigger = 0x9000, .trigger_at = 5 };
	struct tfd_entry one = a_write(64), other = a_write(64);
	const struct tfd_entry *seen;
	struct tfd_copy_marks *marks;
	uint64_t *trigger;
	struct world world;

	world_init(&world, 16, true);
	with.trigger_slot = world.trigger;
	trigger = &world.watchers[world.trigger].value;
	marks = (void *)&world.watchers[world.marks];
	seen = world.fake.ring_entries;
	CHECK(copy(&world, &one, NULL, &with, 0) == 0);
	CHECK(driver.waits == 1 && driver.awaited == 0x9000 && driver.awaited_value == 5);
	CHECK(driver.marks ==
	      SEGMENT + world.fake.header->watcher_offset + world.marks * sizeof(struct tfd_watcher));
	CHECK(seen[0].marks == world.marks + 1 && seen[0].trigger == world.trigger && seen[0].argument == 5);
	CHECK(copy(&world, &other, NULL, &with, 0) == 0 && driver.value == 2);
	CHECK(marks->marks[1] == TFD_COPY_MARK(1) && marks->marks[2] == TFD_COPY_MARK(2));
	end(&world, &one, TFD_JOB_CANCELLED);
	CHECK(tfd_lane_settle(world.lane, 2) == -EAGAIN); /* of the other nobody knows */
	CHECK(marks->marks[1] == TFD_COPY_VOID(1) && marks->marks[2] == TFD_COPY_MARK(2));
	CHECK(look(&world, &one) == TFD_JOB_CANCELLED);
	tfd_store_seq(trigger, 5ull); /* from now on it may be copying */
	end(&world, &other, TFD_JOB_CANCELLED);
	CHECK(look(&world, &other) == -EAGAIN);
	CHECK(tfd_lane_settle(world.lane, 2) == -EAGAIN);
	pass(&world, 2);
	CHECK(look(&world, &other) == TFD_JOB_CANCELLED && tfd_lane_settle(world.lane, 2) == 0);
	/* Its mark is another's by then. */
	for (uint32_t i = 0; i < 15; i++) {
		one = a_write(64);
		CHECK(copy(&world, &one, NULL, &with, 0) == 0);
		world.fake.ring->head = world.fake.ring->tail; /* the daemon has taken it */
		pass(&world, one.fire_at);
		end(&world, &one, TFD_JOB_OK);
		CHECK(look(&world, &one) == TFD_JOB_OK);
		tfd_client_job_release(world.client, one.job_id);
	}
	CHECK(one.fire_at == 17 && marks->marks[1] == TFD_COPY_MARK(17));
	/* What the worker has made void is left so; and is through in time, whatever the mark says. */
	one = a_write(64);
	tfd_store_seq(trigger, 0ull);
	CHECK(copy(&world, &one, NULL, &with, 0) == 0 && marks->marks[2] == TFD_COPY_MARK(18));
	marks->marks[2] = TFD_COPY_VOID(18);
	end(&world, &one, TFD_JOB_CANCELLED);
	CHECK(look(&world, &one) == TFD_JOB_CANCELLED && marks->marks[2] == TFD_COPY_VOID(18));
	tfd_lane_release(world.client, world.trigger);
	CHECK((int64_t)(*trigger - 5) >= 0 &&
	      (int64_t)(*trigger - TFD_LANE_TRIGGER_MAX) >= 0); /* as a stream compares */
	with.trigger_at = TFD_LANE_TRIGGER_MAX + 1;
	CHECK(copy(&world, &one, NULL, &with, 0) == -EINVAL);
	world_fini(&world);
}

static void test_a_refusal_closes_the_lane(void)
{
	struct tfd_copy with = { 0 };
	struct tfd_entry good = a_write(64), bad = a_write(64), late = a_write(64);
	uint64_t refused;
	struct world world;

	world_init(&world, 8, false);
	CHECK(copy(&world, &good, NULL, &with, 0) == 0);
	driver.refuse = REFUSED;
	CHECK(copy(&world, &bad, NULL, &with, 0) == -EIO && bad.job_id && driver.launches == 1);
	CHECK(tfd_lane_refused(world.lane, &refused) == REFUSED && refused == bad.job_id);
	CHECK(tfd_lane_write(world.lane, 1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 0) == -ENODEV);
	driver.refuse = 0;
	CHECK(copy(&world, &late, NULL, &with, 0) == -ENODEV);
	pass(&world, 1);
	end(&world, &good, TFD_JOB_OK);
	CHECK(look(&world, &good) == TFD_JOB_OK);
	end(&world, &bad, TFD_JOB_CANCELLED);
	CHECK(look(&world, &bad) == -EAGAIN && tfd_lane_pending(world.lane) == 1);
	tfd_lane_fail(world.lane, 0); /* as its stream is idle */
	CHECK(world.watchers[world.watcher].value < bad.fire_at); /* its job may start yet */
	tfd_lane_fail(world.lane, 1);
	CHECK(world.watchers[world.watcher].value == bad.fire_at);
	CHECK(look(&world, &bad) == TFD_JOB_CANCELLED && tfd_lane_pending(world.lane) == 0);
	world_fini(&world);
}

static void test_a_session_that_is_over(void)
{
	struct tfd_copy with = { .trigger = 0x9000, .trigger_at = 1 };
	struct tfd_entry one = a_write(64), late = a_write(64);
	struct world world;

	world_init(&world, 8, true);
	with.trigger_slot = world.trigger;
	world.fake.counter[1].in_use = 1;
	CHECK(copy(&world, &one, NULL, &with, 0) == 0);
	CHECK(tfd_lane_settle(world.lane, 1) == -EAGAIN);
	tfd_client_set_dead(world.client);
	CHECK(tfd_lane_settle(world.lane, 1) == 0); /* void: its trigger is not reached */
	CHECK(copy(&world, &late, NULL, &with, FOREVER) == -EPIPE);
	/* Streams that wait for counts go on. */
	CHECK(world.fake.counter[1].gate == TFD_GATE_FAULT && !world.fake.counter[0].gate);
	tfd_client_set_dead(world.client);
	CHECK(world.fake.counter[1].gate == TFD_GATE_FAULT);
	world_fini(&world);
}

int main(void)
{
	test_a_write_is_published_and_enqueued();
	test_a_write_in_one_call();
	test_pages_in_one_call();
	test_shapes_cover_every_byte();
	test_room_is_the_lanes();
	test_tables_stay_until_the_stream_is_through();
	test_what_leaves_its_grant_is_not_copied();
	test_an_armed_copy_is_void_once_its_job_has_ended();
	test_a_refusal_closes_the_lane();
	test_a_session_that_is_over();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Plans on the simulated fabric, stepped: what launches do, armed or not, and how they end. */
#include "plans_fixture.h"

/* A job as it is, again and again; several launches at once. */
static void test_templates(struct sim_pair *pair)
{
	struct tfd_target *targets = sim_table(&pair->from);
	struct tfd_entry entry = entry_of(pair, TFD_OP_WRITE, 1);
	struct launched many[10];

	entry.src_offset = 3 * SLICE;
	entry.dst_offset = 5 * SLICE;
	entry.length = 100003;
	clear(pair);
	make_ok(pair, 0, entry);
	CHECK(value_of(pair, 1) == 0 && nothing_landed(pair)); /* made, not run */
	for (uint32_t i = 0; i < 10; i++)
		many[i] = launch(pair, 0);
	for (uint32_t i = 0; i < 10; i++)
		ends(pair, many[i], TFD_JOB_OK, 0);
	CHECK(value_of(pair, 1) == 10 && landed(pair, 3 * SLICE, 5 * SLICE, 100003));
	for (uint32_t i = 0; i < TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair->grant,
		                                  .src_offset = i * SLICE,
		                                  .dst_offset = (20 + i) * SLICE,
		                                  .length = 100 + i };
	entry = entry_of(pair, TFD_OP_SCATTER, 2);
	entry.table_count = TARGETS;
	make_ok(pair, 1, entry);
	memset(targets, 0xff, TARGETS * sizeof(*targets)); /* kept in private: the arena is free again */
	runs(pair, 1, TFD_JOB_OK, 0);
	runs(pair, 1, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 2) == 2 * TARGETS && landed(pair, 4 * SLICE, 24 * SLICE, 104));
	targets[0] = targets[1] = (struct tfd_target){ .dst_grant = pair->grant };
	entry = entry_of(pair, TFD_OP_BARRIER, 3);
	entry.table_count = 2;
	make_ok(pair, 2, entry);
	runs(pair, 2, TFD_JOB_OK, 0);
	make_ok(pair, 3, entry_of(pair, TFD_OP_IMM, 3));
	runs(pair, 3, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 3) == 3);
	entry = entry_of(pair, TFD_OP_READ, 0);
	entry.src_offset = REGION_BYTES / 2;
	entry.dst_offset = 7;
	entry.length = SLICE;
	make_ok(pair, 4, entry);
	runs(pair, 4, TFD_JOB_OK, 0);
	CHECK(memcmp(pair->from.memory + REGION_BYTES / 2, pair->to.memory + 7, SLICE) == 0);
	for (uint32_t i = 0; i < 5; i++)
		forget(pair, i);
	CHECK(session_of(pair)->plan_targets == 0);
}

static void test_write_by_table(struct sim_pair *pair)
{
	static const uint64_t lengths[] = { 0, 1, 4095, 16385, 60 * SLICE, 100003, 8 };
	struct tfd_slice *slice = slices_of(pair);
	uint64_t base = value_of(pair, 4);

	make_write(pair, 4);
	head_of(pair)->count = 1;
	for (uint32_t i = 0; i < 7; i++) {
		*slice = (struct tfd_slice){ .src_offset = i == 4 ? 0 : 10 * i,
		                             .dst_offset = i,
		                             .length = lengths[i] };
		clear(pair);
		runs(pair, 0, TFD_JOB_OK, 0);
		CHECK(value_of(pair, 4) == base + 1 + i);
		CHECK(landed(pair, SLICE + slice->src_offset, i, lengths[i]) &&
		      !pair->to.memory[i + lengths[i]]);
	}
	clear(pair);
	head_of(pair)->count = 0;
	runs(pair, 0, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 4) == base + 7 && nothing_landed(pair));
	forget(pair, 0);
}

static void test_scatter_by_table(struct sim_pair *pair)
{
	struct tfd_target *targets = sim_table(&pair->from);
	struct tfd_slice *slices = slices_of(pair);
	struct tfd_entry entry = entry_of(pair, TFD_OP_SCATTER, 6);

	for (uint32_t i = 0; i < TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair->grant };
	entry.flags = TFD_FLAG_TABLE;
	entry.argument = TABLE_AT;
	entry.table_count = TARGETS;
	entry.length = REGION_BYTES;
	make_ok(pair, 0, entry);
	clear(pair);
	for (uint32_t i = 0; i < TARGETS; i++)
		slices[i] = (struct tfd_slice){ i * 1000, i * SLICE, 900 * i };
	head_of(pair)->count = TARGETS;
	runs(pair, 0, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 6) == TARGETS); /* none has no bytes and counts */
	for (uint32_t i = 0; i < TARGETS; i++)
		CHECK(landed(pair, i * 1000, i * SLICE, 900 * i) && !pair->to.memory[i * SLICE + 900 * i]);
	clear(pair);
	for (uint32_t i = 0; i < TARGETS; i++) /* all on one place: one of them is there */
		slices[i] = (struct tfd_slice){ i * SLICE, 0, SLICE };
	head_of(pair)->count = 3;
	runs(pair, 0, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 6) == TARGETS + 3);
	CHECK(landed(pair, 0, 0, SLICE) || landed(pair, SLICE, 0, SLICE) ||
	      landed(pair, 2 * SLICE, 0, SLICE));
	head_of(pair)->count = 0;
	runs(pair, 0, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 6) == TARGETS + 3);
	forget(pair, 0);
}

static void test_pages_by_table(struct sim_pair *pair)
{
	static const uint32_t counts[] = { 0, 1, 3, 300, 1000 };
	struct tfd_page *pages = pages_of(pair);
	struct tfd_entry entry = entry_of(pair, TFD_OP_WRITE_PAGES, 7);
	uint64_t sum = 0, jobs = 0;

	entry.flags = TFD_FLAG_TABLE;
	entry.argument = TABLE_AT;
	entry.table_count = 1000;
	entry.length = entry.src_stride = entry.dst_stride = 128;
	make_ok(pair, 0, entry);
	entry.flags |= TFD_FLAG_COUNT_JOB | TFD_FLAG_EXACT;
	entry.imm = 8;
	make_ok(pair, 1, entry);
	for (uint32_t i = 0; i < 1000; i++)
		pages[i] = (struct tfd_page){ i * 7 % 1000, i };
	for (uint32_t i = 0; i < 5; i++) {
		head_of(pair)->count = counts[i];
		for (uint32_t number = 0; number < 2; number++) {
			clear(pair);
			runs(pair, number, TFD_JOB_OK, 0);
			for (uint32_t k = 0; k < counts[i]; k++)
				CHECK(landed(pair, k * 7 % 1000 * 128, k * 128, 128));
			CHECK(!pair->to.memory[counts[i] * 128]);
		}
		sum += counts[i];
		jobs++;
		CHECK(value_of(pair, 7) == sum && value_of(pair, 8) == jobs);
	}
	head_of(pair)->count = 1001;
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	head_of(pair)->count = 10;
	pages[9].dst = UINT32_MAX;
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	memset(pages, 0xff, 80);
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
	for (uint32_t i = 0; i < 10; i++) /* overlapping */
		pages[i] = (struct tfd_page){ i, 0 };
	runs(pair, 0, TFD_JOB_OK, 0);
	forget(pair, 0);
	forget(pair, 1);
	drop_events(pair);
}

/* The table is read when the watcher starts the launch, not when it is armed. */
static void test_armed(struct sim_pair *pair)
{
	uint64_t base = value_of(pair, 9);
	struct launched first, second;

	make_write(pair, 9);
	memset(head_of(pair), 0xff, 256);
	first = launch_armed(pair, 0, 1);
	second = launch_armed(pair, 0, 2);
	clear(pair);
	head_of(pair)->count = 1;
	slices_of(pair)[0] = (struct tfd_slice){ 1, 2, 3000 };
	bump_to(pair, 1);
	ends(pair, first, TFD_JOB_OK, 0);
	CHECK(landed(pair, SLICE + 1, 2, 3000) && value_of(pair, 9) == base + 1);
	slices_of(pair)[0] = (struct tfd_slice){ 1, 2, UINT64_MAX };
	bump_to(pair, 2);
	ends(pair, second, TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
	bump_to(pair, 0);
	first = launch_armed(pair, 0, 1); /* closed while it waits: it goes on */
	forget(pair, 0);
	slices_of(pair)[0] = (struct tfd_slice){ 5, 5, 5 };
	bump_to(pair, 1);
	ends(pair, first, TFD_JOB_OK, 0);
	CHECK(landed(pair, SLICE + 5, 5, 5) && value_of(pair, 9) == base + 2);
	bump_to(pair, 0);
	drop_events(pair);
}

static void expect_lost(struct sim_pair *pair, uint32_t imm, uint64_t count)
{
	struct tfd_event event;

	sim_step(pair, 1); /* which hands them over */
	CHECK(sim_event(&pair->a, TFD_EVENT_LOST, &event));
	CHECK(event.imm == imm && event.count == count && event.units == 0);
}

/* How many pages an armed launch will count nobody knows: its receiver is told of a loss without a number. */
static void test_fences(struct sim_pair *pair)
{
	struct tfd_imm_range range = { .first = 10, .count = 1 };
	struct tfd_entry pages = entry_of(pair, TFD_OP_WRITE_PAGES, 10);
	struct launched waiting, written;

	pages.flags = TFD_FLAG_TABLE;
	pages.argument = TABLE_AT;
	pages.table_count = 100;
	pages.length = 64;
	make_write(pair, 10);
	make_ok(pair, 1, pages);
	drop_events(pair);
	waiting = launch_armed(pair, 1, 1);
	CHECK_OK(tfd_open_fence(pair->a.core, pair->from.session, pair->grant, &range, 1, 5));
	ends(pair, waiting, TFD_JOB_CANCELLED, TFD_DETAIL_FENCED);
	expect_lost(pair, 10, 0);
	written = launch_armed(pair, 0, 1);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = written.id }),
	       TFD_JOB_OK, 0);
	ends(pair, written, TFD_JOB_CANCELLED, 0);
	expect_lost(pair, 10, 1);
	bump_to(pair, 1);
	CHECK(value_of(pair, 10) == 0);
	bump_to(pair, 0);
	forget(pair, 0);
	forget(pair, 1);
	drop_events(pair);
}

/* What was good when the plan was made is looked at again by each launch. */
static void test_revoked(struct sim_pair *pair)
{
	static const uint32_t details[][2] = { { TFD_DETAIL_REVOKED, TFD_JOB_INVALID },
	                                       { TFD_DETAIL_STALE, TFD_JOB_PEER_LOST } };

	for (uint32_t i = 0; i < 2; i++) {
		struct tfd_target *target = sim_table(&pair->from);
		struct tfd_entry entry = entry_of(pair, TFD_OP_WRITE, 11);
		struct tfd_entry barrier = entry_of(pair, TFD_OP_BARRIER, 11);
		uint64_t open = sim_grant(pair, &pair->from, &pair->to);

		entry.dst_grant = open;
		barrier.table_count = 1;
		*target = (struct tfd_target){ .dst_grant = open };
		make_ok(pair, 0, entry);
		make_ok(pair, 1, barrier);
		CHECK_OK(tfd_open_revoke(pair->a.core, pair->from.session, open, details[i][0]));
		runs(pair, 0, details[i][1], details[i][0]);
		runs(pair, 1, details[i][1], details[i][0]);
		CHECK_OK(tfd_open_remove(pair->a.core, pair->from.session, open));
		runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_BAD_GRANT);
		runs(pair, 1, TFD_JOB_INVALID, TFD_DETAIL_BAD_GRANT);
		forget(pair, 0);
		forget(pair, 1);
	}
	CHECK(value_of(pair, 11) == 0);
	drop_events(pair);
}

/* Forgotten in the same pass in which it was launched ten times. */
static void test_forgotten_under_launches(struct sim_pair *pair)
{
	struct tfd_entry entry = entry_of(pair, TFD_OP_WRITE, 12);
	struct launched many[10];

	entry.length = 1u << 20;
	make_ok(pair, 0, entry);
	for (uint32_t i = 0; i < 10; i++)
		many[i] = launch(pair, 0);
	forget(pair, 0);
	entry.length = 8; /* the number is another's now */
	make_ok(pair, 0, entry);
	for (uint32_t i = 0; i < 10; i++)
		ends(pair, many[i], TFD_JOB_OK, 0);
	CHECK(value_of(pair, 12) == 10 && many[9].record->bytes == 1u << 20);
	forget(pair, 0);
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_BAD_PLAN);
}

static void test_paths(uint32_t paths, const char *fabric)
{
	struct sim_pair pair;

	sim_pair_open(&pair, paths, fabric, (struct tfd_group_options){ .cut_bytes = 4096 });
	test_templates(&pair);
	test_write_by_table(&pair);
	test_scatter_by_table(&pair);
	test_pages_by_table(&pair);
	test_armed(&pair);
	test_fences(&pair);
	test_revoked(&pair);
	test_forgotten_under_launches(&pair);
	CHECK(session_of(&pair)->plan_targets == 0);
	sim_pair_close(&pair);
}

/* The daemon stops while there are plans, and launches that wait. */
static void test_stop(void)
{
	struct sim_pair pair;

	sim_pair_open(&pair, 1, "", (struct tfd_group_options){ 0 });
	make_write(&pair, 1);
	(void)launch_armed(&pair, 0, 1);
	sim_pair_close(&pair);
}

int main(void)
{
	test_paths(1, "");
	test_paths(4, "");
	test_paths(2, "ordered=0,delay_us=20,seed=3");
	test_stop();
	return 0;
}

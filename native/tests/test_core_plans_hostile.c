/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of a client that keeps no rule: wrong entries, wrong tables, tables that change while they are read, more than it may have. */
#include <pthread.h>

#include "plans_fixture.h"

#define UNTOUCHED 0x5a

/* Whatever a table holds that the plan does not allow ends the launch, and nothing of it lands. */
static void test_bad_slices(struct sim_pair *pair)
{
	static const struct {
		struct tfd_slice slice;
		uint32_t detail;
	} bad[] = {
		{ { 60 * SLICE, 0, 1 }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { 0, 0, 60 * SLICE + 1 }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { UINT64_MAX, 0, 2 }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { UINT64_MAX, UINT64_MAX, UINT64_MAX }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { 0, 0, UINT64_MAX }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { 1, 0, UINT64_MAX }, TFD_DETAIL_SOURCE_BOUNDS },
		{ { 0x7ff8000000000000ull, 0x7ff8000000000000ull, 0x7ff8000000000000ull },
		  TFD_DETAIL_SOURCE_BOUNDS }, /* a NaN */
		{ { 0, REGION_BYTES, 1 }, TFD_DETAIL_DESTINATION_BOUNDS },
		{ { 0, REGION_BYTES - 7, 8 }, TFD_DETAIL_DESTINATION_BOUNDS },
		{ { 0, UINT64_MAX, 8 }, TFD_DETAIL_DESTINATION_BOUNDS },
		{ { 0, UINT64_MAX - 7, 8 }, TFD_DETAIL_DESTINATION_BOUNDS },
	};
	struct tfd_target *targets = sim_table(&pair->from);
	struct tfd_entry scatter = entry_of(pair, TFD_OP_SCATTER, 5);
	uint64_t base = value_of(pair, 5);

	for (uint32_t i = 0; i < TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair->grant, .length = UINT64_MAX };
	scatter.flags = TFD_FLAG_TABLE;
	scatter.argument = TABLE_AT;
	scatter.table_count = TARGETS;
	scatter.src_offset = SLICE;
	scatter.length = 60 * SLICE;
	make_write(pair, 5);
	make_ok(pair, 1, scatter);
	clear(pair);
	for (uint32_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		head_of(pair)->count = 1;
		slices_of(pair)[0] = bad[i].slice;
		runs(pair, 0, TFD_JOB_INVALID, bad[i].detail);
		for (uint32_t k = 0; k < TARGETS; k++) /* the others are good: all or nothing */
			slices_of(pair)[k] = (struct tfd_slice){ 0, k * SLICE, 100 };
		slices_of(pair)[i % TARGETS] = bad[i].slice;
		head_of(pair)->count = TARGETS;
		runs(pair, 1, TFD_JOB_INVALID, bad[i].detail);
	}
	head_of(pair)->count = 2;
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	head_of(pair)->count = TARGETS + 1;
	runs(pair, 1, TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	head_of(pair)->count = UINT32_MAX;
	runs(pair, 0, TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	runs(pair, 1, TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	CHECK(value_of(pair, 5) == base && nothing_landed(pair));
	slices_of(pair)[0] = (struct tfd_slice){ 7, 9, 100 }; /* and the plan is as good as before */
	head_of(pair)->count = 1;
	runs(pair, 0, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 5) == base + 1 && landed(pair, SLICE + 7, 9, 100));
	forget(pair, 0);
	forget(pair, 1);
	drop_events(pair);
}

static void refused(struct sim_pair *pair, struct tfd_entry entry, uint32_t detail)
{
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, detail);
}

static void test_refusals(struct sim_pair *pair)
{
	const uint64_t end = pair->from.header->arena_bytes;
	struct tfd_entry write = entry_of(pair, TFD_OP_WRITE, 1);
	struct tfd_entry pages = entry_of(pair, TFD_OP_WRITE_PAGES, 1);
	struct tfd_entry bad;

	write.flags = pages.flags = TFD_FLAG_PLAN | TFD_FLAG_TABLE;
	write.argument = pages.argument = TABLE_AT;
	pages.table_count = 10;
#define REFUSED(good, field, value, detail) \
	do {                                \
		bad = (good);               \
		bad.field = (value);        \
		refused(pair, bad, detail); \
	} while (0)
	REFUSED(write, plan, 24, TFD_DETAIL_BAD_PLAN);
	REFUSED(write, plan, UINT32_MAX, TFD_DETAIL_BAD_PLAN);
	REFUSED(write, argument, TABLE_AT + 4, TFD_DETAIL_TABLE);
	REFUSED(write, argument, end, TFD_DETAIL_TABLE);
	REFUSED(write, argument, end - 64, TFD_DETAIL_TABLE); /* its head alone */
	REFUSED(write, argument, UINT64_MAX - 7, TFD_DETAIL_TABLE);
	REFUSED(pages, argument, end - 64 - 72, TFD_DETAIL_TABLE);
	REFUSED(pages, table_count, UINT32_MAX, TFD_DETAIL_TABLE);
	REFUSED(write, length, REGION_BYTES + 1, TFD_DETAIL_SOURCE_BOUNDS);
	REFUSED(write, dst_grant, pair->grant + 1, TFD_DETAIL_BAD_GRANT);
	REFUSED(write, imm, 16, TFD_DETAIL_IMM_RANGE);
	REFUSED(write, flags, TFD_FLAG_TABLE, TFD_DETAIL_BAD_FLAGS); /* of no plan */
	REFUSED(write, flags, TFD_FLAG_PLAN | TFD_FLAG_ARMED, TFD_DETAIL_BAD_FLAGS);
	REFUSED(pages, flags, TFD_FLAG_PLAN, TFD_DETAIL_BAD_FLAGS); /* without a table */
	REFUSED(write, op, TFD_OP_READ, TFD_DETAIL_BAD_FLAGS); /* has no table */
	bad = entry_of(pair, TFD_OP_SEND, 0);
	bad.flags = TFD_FLAG_PLAN;
	refused(pair, bad, TFD_DETAIL_BAD_FLAGS);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_LAUNCH, .plan = 1 }, TFD_DETAIL_BAD_PLAN);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_LAUNCH, .plan = UINT32_MAX }, TFD_DETAIL_BAD_PLAN);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_LAUNCH, .flags = TFD_FLAG_PLAN },
	        TFD_DETAIL_BAD_FLAGS);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_LAUNCH, .length = 1 }, TFD_DETAIL_BAD_FLAGS);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_FORGET, .argument = 24 }, TFD_DETAIL_BAD_PLAN);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_FORGET, .argument = UINT64_MAX }, TFD_DETAIL_BAD_PLAN);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_FORGET, .flags = TFD_FLAG_ARMED },
	        TFD_DETAIL_BAD_FLAGS);
	write.flags = 0;
	write.argument = 0;
	make_ok(pair, 3, write);
	write.flags = TFD_FLAG_PLAN;
	write.plan = 3;
	refused(pair, write, TFD_DETAIL_BAD_PLAN); /* it is there */
	forget(pair, 3);
	refused(pair, (struct tfd_entry){ .op = TFD_OP_FORGET, .argument = 3 }, TFD_DETAIL_BAD_PLAN);
	CHECK(session_of(pair)->plan_targets == 0);
}

/* Control has no arena that plans could have their tables in. */
static void test_by_control(struct sim_pair *pair)
{
	struct tfd_entry entries[] = { entry_of(pair, TFD_OP_WRITE, 1),
	                               { .op = TFD_OP_LAUNCH },
	                               { .op = TFD_OP_FORGET } };
	struct tfd_job_end end;

	entries[0].flags = TFD_FLAG_PLAN;
	CHECK_OK(tfd_jobs_submit(pair->a.core, pair->from.session, entries, 3, NULL, 0));
	sim_step(pair, 1);
	for (uint32_t i = 0; i < 3; i++) {
		CHECK_OK(tfd_job_result(pair->a.core, pair->from.session, entries[i].job_id, &end));
		CHECK(end.status == TFD_JOB_INVALID && end.detail == TFD_DETAIL_BAD_FLAGS);
	}
}

static void test_quota(struct sim_pair *pair)
{
	struct tfd_target *targets = sim_table(&pair->from);
	struct tfd_entry entry = entry_of(pair, TFD_OP_BARRIER, 1);

	entry.table_count = TFD_MAX_TARGETS;
	for (uint32_t i = 0; i < TFD_MAX_TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair->grant };
	for (uint32_t i = 0; i < TFD_SESSION_PLAN_TARGETS / TFD_MAX_TARGETS; i++)
		make_ok(pair, i, entry);
	expect(make(pair, 20, entry), TFD_JOB_QUOTA, 0);
	entry.table_count = 1;
	expect(make(pair, 20, entry), TFD_JOB_QUOTA, 0);
	forget(pair, 3);
	make_ok(pair, 20, entry);
	/* The session's end gives them back. */
}

/* A client that goes on writing to its table while launches read it. The race is meant: TSan would only say that there is one. */
static uint32_t scribbling;

static void *scribble(void *argument)
{
	uint64_t *words = argument;
	uint64_t random = 1;

	while (tfd_load_relaxed(&scribbling)) {
		random = random * 6364136223846793005ull + 1442695040888963407ull;
		/* Small numbers, most of which are good, and now and then anything. */
		words[(random >> 33) % 40] =
			(random >> 40) % 8 ? (random >> 43) % (1u << (random >> 54) % 8) : random;
	}
	return NULL;
}

static void launch_under_fire(struct sim_pair *pair, uint32_t number, uint64_t *ok, uint64_t *invalid)
{
	struct launched one = launch(pair, number);

	sim_await(pair, one.record, one.id);
	CHECK(one.record->status == TFD_JOB_OK || one.record->status == TFD_JOB_INVALID);
	*(one.record->status == TFD_JOB_OK ? ok : invalid) += 1;
	drop_events(pair);
}

static void test_changed_during_launch(struct sim_pair *pair)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE,
	                                    .length = REGION_BYTES / 4,
	                                    .imm_count = 16 };
	struct tfd_entry pages = entry_of(pair, TFD_OP_WRITE_PAGES, 13);
	struct tfd_entry scatter = entry_of(pair, TFD_OP_SCATTER, 13);
	struct tfd_target *targets = sim_table(&pair->from);
	uint64_t ok = 0, invalid = 0;
	pthread_t thread;
	uint64_t open;

	sim_paths(pair, &pair->to, &options);
	CHECK_OK(tfd_open_add(pair->a.core, pair->from.session, &options, &open));
	memset(pair->to.memory, UNTOUCHED, REGION_BYTES);
	pages.dst_grant = open;
	pages.flags = scatter.flags = TFD_FLAG_TABLE;
	pages.argument = scatter.argument = TABLE_AT;
	pages.table_count = 64;
	pages.length = 512;
	pages.src_stride = pages.dst_stride = 1024;
	scatter.table_count = TARGETS;
	scatter.length = REGION_BYTES / 2;
	for (uint32_t i = 0; i < TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = open };
	make_ok(pair, 0, pages);
	make_ok(pair, 1, scatter);
	memset(head_of(pair), 0, 1024);
	scribbling = 1;
#ifndef __SANITIZE_THREAD__
	CHECK(pthread_create(&thread, NULL, scribble, head_of(pair)) == 0);
#endif
	for (uint32_t i = 0; i < 3000 || ((!ok || !invalid) && i < 3000000); i++) {
#ifdef __SANITIZE_THREAD__
		((uint64_t *)head_of(pair))[i % 40] = i % 7 ? i % 100 : UINT64_MAX / (i + 1);
#endif
		launch_under_fire(pair, i % 2, &ok, &invalid);
		if (i % 100 == 0)
			(void)sched_yield();
	}
#ifndef __SANITIZE_THREAD__
	tfd_store_relaxed(&scribbling, 0);
	CHECK(pthread_join(thread, NULL) == 0);
#else
	(void)thread;
	(void)scribble;
#endif
	CHECK(ok && invalid); /* some were good, some were not */
	for (uint32_t i = REGION_BYTES / 4; i < REGION_BYTES; i++)
		CHECK(pair->to.memory[i] == UNTOUCHED);
	forget(pair, 0);
	forget(pair, 1);
}

static void test_paths(uint32_t paths, const char *fabric)
{
	struct sim_pair pair;

	sim_pair_open(&pair, paths, fabric, (struct tfd_group_options){ .cut_bytes = 4096 });
	test_bad_slices(&pair);
	test_refusals(&pair);
	test_by_control(&pair);
	test_changed_during_launch(&pair);
	test_quota(&pair);
	CHECK_OK(tfd_session_end(pair.a.core, pair.from.session, TFD_DETAIL_SESSION_ENDED));
	CHECK_OK(tfd_session_close(pair.a.core, pair.from.session)); /* with plans */
	sim_pair_close(&pair);
}

int main(void)
{
	test_paths(1, "");
	test_paths(4, "");
	test_paths(2, "ordered=0,delay_us=20,seed=3");
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core on EFA's face: credits that rule out a full queue, a queue that overflows all the same, posts that fail, a far side that
 * begins anew. Counts are exact, or a loss is told.
 */
#include "efa_pair.h"

#define PAGES 1500u
#define PAGE_BYTES 512u
#define ROUNDS_OF_PAGES 12u

struct world {
	struct host a, b;
	struct user from, to;
	uint64_t out, in, grant;
};

static void world_open(struct world *w)
{
	memset(w, 0, sizeof(*w));
	host_open(&w->a);
	host_open(&w->b);
	user_open(&w->a, &w->from);
	user_open(&w->b, &w->to);
	connect_hosts(&w->a, &w->b, &w->out, &w->in);
	w->grant = open_grant(&w->from, &w->to, w->out);
}

static void world_close(struct world *w)
{
	(void)tfd_conn_close(w->a.core, w->out, TFD_DETAIL_CONNECTION, NULL, NULL);
	(void)tfd_conn_close(w->b.core, w->in, TFD_DETAIL_CONNECTION, NULL, NULL);
	user_close(&w->from);
	user_close(&w->to);
	tfd_core_close(w->a.core);
	tfd_core_close(w->b.core);
}

static void reconnect(struct world *w)
{
	CHECK_OK(tfd_conn_close(w->b.core, w->in, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(w->a.core, w->out, TFD_DETAIL_CONNECTION, NULL, NULL));
	connect_hosts(&w->a, &w->b, &w->out, &w->in);
	w->grant = open_grant(&w->from, &w->to, w->out);
}

static struct tfd_entry entry_of(const struct world *w, uint8_t op, uint32_t imm, uint64_t length)
{
	return (struct tfd_entry){
		.op = op, .src_region = w->from.region, .dst_grant = w->grant, .imm = imm, .length = length
	};
}

static uint64_t value_of(const struct world *w, uint32_t imm)
{
	return tfd_load_acquire(&w->to.counters[imm].value);
}

static void await_value(const struct world *w, uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && value_of(w, imm) < value; i++)
		(void)usleep(100);
	CHECK(value_of(w, imm) == value);
}

static struct tfd_entry pages_of(const struct world *w, uint32_t imm)
{
	struct tfd_page *pages = (void *)(w->from.segment + w->from.header->arena_offset);
	struct tfd_entry entry = entry_of(w, TFD_OP_WRITE_PAGES, imm, PAGE_BYTES);

	for (uint32_t i = 0; i < PAGES; i++)
		pages[i] = (struct tfd_page){ .src = i, .dst = PAGES - 1 - i };
	entry.src_stride = entry.dst_stride = PAGE_BYTES;
	entry.table_count = PAGES;
	return entry;
}

/* Each page counts by an immediate of its own: many more than a queue holds, and none is lost. */
static void test_credits(void)
{
	struct tfd_record *record = NULL;
	struct efaface_stats seen;
	struct tfd_rail_info info;
	struct world w;

	world_open(&w);
	for (uint32_t i = 0; i < ROUNDS_OF_PAGES; i++)
		record = user_submit(&w.from, pages_of(&w, 1));
	wait_done(record, w.from.next_job);
	await_value(&w, 1, ROUNDS_OF_PAGES * PAGES);
	CHECK_OK(tfd_group_rail(w.a.core, w.a.group, 0, &info));
	counts_get(&seen);
	CHECK(info.credit_stalls && !seen.overruns && seen.queued_most <= info.imm_depth);
	for (uint32_t i = 0; i < PAGES; i++)
		CHECK(memcmp(w.to.memory + (PAGES - 1 - i) * PAGE_BYTES, w.from.memory + i * PAGE_BYTES,
		             PAGE_BYTES) == 0);
	world_close(&w);
}

static uint64_t open_to_read(struct world *w)
{
	struct tfd_open_options options = { .path_count = 1,
	                                    .rights = TFD_RIGHT_READ,
	                                    .length = REGION_BYTES };
	struct tfd_region_key key;
	uint64_t open;

	CHECK_OK(tfd_region_keys(w->b.core, w->to.session, w->to.region, &key, 1));
	CHECK_OK(tfd_session_name_space(w->b.core, w->to.session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = w->out, .key = key.key, .address = key.address };
	CHECK_OK(tfd_open_add(w->a.core, w->from.session, &options, &open));
	return open;
}

/* A job says in its path that a device without RDMA write was written by; one that reads says nothing. */
static void test_emulated(uint32_t emulated)
{
	struct efaface_control set = plain_knobs;
	struct tfd_record *record;
	struct tfd_entry entry;
	struct world w;

	set.unsolicited = !emulated;
	set.emulated = emulated;
	knobs_set(&set);
	world_open(&w);
	entry = entry_of(&w, TFD_OP_WRITE, 3, 100);
	record = user_run(&w.from, entry);
	CHECK(record->status == TFD_JOB_OK);
	CHECK((record->path & TFD_PATH_PROVIDER_MASK) == TFD_PATH_LIBFABRIC);
	CHECK(!(record->path & TFD_PATH_EMULATED) == !emulated);
	entry = (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = w.grant, .imm = 3 };
	record = user_run(&w.from, entry);
	CHECK(record->status == TFD_JOB_OK);
	CHECK(!(record->path & TFD_PATH_EMULATED) == !emulated);
	w.grant = open_to_read(&w);
	record = user_run(&w.from, entry_of(&w, TFD_OP_READ, 0, 100));
	CHECK(record->status == TFD_JOB_OK && !(record->path & TFD_PATH_EMULATED));
	world_close(&w);
	knobs_set(&plain_knobs);
}

/* A queue shorter than it says: completions are lost, the rail's connections break, and nobody knows what has landed. */
static void test_overrun(void)
{
	struct efaface_control set = plain_knobs;
	struct efaface_stats seen;
	struct tfd_landed landed;
	struct tfd_event event;
	struct world w;

	set.cq_size = 8;
	knobs_set(&set);
	world_open(&w);
	for (uint32_t i = 0; i < 3; i++)
		(void)user_submit(&w.from, pages_of(&w, 2));
	event = wait_event(&w.b, TFD_EVENT_CONN_LOST, w.in);
	counts_get(&seen);
	CHECK(event.detail == TFD_DETAIL_PROVIDER && seen.overruns);
	CHECK_OK(tfd_conn_close(w.b.core, w.in, TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(!landed.channels);
	world_close(&w);
	knobs_set(&plain_knobs);
}

/* A post fails, and has landed or not: the job fails, its loss is told, and the next connection counts as ever. */
static void test_failure(uint32_t lands)
{
	struct efaface_control set = plain_knobs;
	struct tfd_record *record;
	struct tfd_event event;
	struct world w;

	world_open(&w);
	record = user_run(&w.from, entry_of(&w, TFD_OP_WRITE, 3, 4096));
	CHECK(record->status == TFD_JOB_OK);
	await_value(&w, 3, 1);
	set.fail_lands = lands;
	set.fail_count = 1;
	knobs_set(&set);
	record = user_run(&w.from, entry_of(&w, TFD_OP_WRITE, 3, 4096));
	CHECK(record->status == TFD_JOB_PEER_LOST && record->detail == TFD_DETAIL_CONNECTION);
	event = wait_event(&w.a, TFD_EVENT_LOST, 0);
	CHECK(event.imm == 3 && event.count == 0 && event.units == 0); /* unknown: not said to be lost */
	CHECK(wait_event(&w.a, TFD_EVENT_CONN_LOST, w.out).detail == TFD_DETAIL_CONNECTION);
	reconnect(&w);
	record = user_run(&w.from, entry_of(&w, TFD_OP_WRITE, 4, REGION_BYTES));
	CHECK(record->status == TFD_JOB_OK);
	await_value(&w, 4, 1);
	CHECK(value_of(&w, 3) <= 2);
	world_close(&w);
}

/* A key that the far device refuses costs the job and its connection, and the far side nothing. */
static void test_refused(void)
{
	struct tfd_open_options bad = {
		.path_count = 1, .rights = TFD_RIGHT_WRITE, .length = REGION_BYTES, .imm_count = 16
	};
	struct tfd_region_key key;
	struct tfd_record *record;
	struct tfd_entry entry;
	struct world w;

	world_open(&w);
	CHECK_OK(tfd_region_keys(w.b.core, w.to.session, w.to.region, &key, 1));
	CHECK_OK(tfd_session_name_space(w.b.core, w.to.session, &bad.name_space));
	bad.paths[0] =
		(struct tfd_open_path){ .conn = w.out, .key = key.key ^ 1u << 20, .address = key.address };
	entry = entry_of(&w, TFD_OP_WRITE, 5, 4096);
	CHECK_OK(tfd_open_add(w.a.core, w.from.session, &bad, &entry.dst_grant));
	record = user_run(&w.from, entry);
	CHECK(record->status == TFD_JOB_REMOTE_ACCESS && value_of(&w, 5) == 0);
	reconnect(&w);
	record = user_run(&w.from, entry_of(&w, TFD_OP_WRITE, 5, 4096));
	CHECK(record->status == TFD_JOB_OK);
	await_value(&w, 5, 1);
	world_close(&w);
}

/* The far side ends in the midst of writes, and begins anew: what was under way fails, the new one is written to. */
static void test_restart(void)
{
	struct tfd_record *record = NULL;
	struct world w;

	world_open(&w);
	for (uint32_t i = 0; i < 8; i++)
		record = user_submit(&w.from, entry_of(&w, TFD_OP_WRITE, 6, REGION_BYTES));
	CHECK_OK(tfd_conn_close(w.b.core, w.in, TFD_DETAIL_CONNECTION, NULL, NULL));
	user_close(&w.to);
	tfd_core_close(w.b.core);
	CHECK_OK(tfd_conn_close(w.a.core, w.out, TFD_DETAIL_CONNECTION, NULL, NULL));
	wait_done(record, w.from.next_job);
	CHECK(record->status == TFD_JOB_PEER_LOST);
	host_open(&w.b);
	user_open(&w.b, &w.to);
	connect_hosts(&w.a, &w.b, &w.out, &w.in);
	w.grant = open_grant(&w.from, &w.to, w.out);
	for (uint32_t i = 1; i <= 3; i++) {
		record = user_run(&w.from, entry_of(&w, TFD_OP_WRITE, 6, REGION_BYTES - i));
		CHECK(record->status == TFD_JOB_OK);
		await_value(&w, 6, i);
		CHECK(memcmp(w.to.memory, w.from.memory, REGION_BYTES - i) == 0);
	}
	world_close(&w);
}

int main(void)
{
	face_load();
	(void)setenv("TFD_TEST_PROVIDER", "libfabric", 1);
	(void)setenv("TFD_TEST_LIBRARY", face_path, 1);
	(void)setenv("TFD_TEST_RAIL", NEAR, 1);
	test_credits();
	test_emulated(0);
	test_emulated(1);
	test_overrun();
	test_failure(0);
	test_failure(1);
	test_refused();
	test_restart();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checksums: the CRC itself; jobs with them over loopback, over several paths and within one daemon; and on the simulated fabric, where a byte
 * is changed between its landing and its comparing.
 */
#include <stdbool.h>

#include "core/parts.h"
#include "core_fixture.h"
#include "providers/sim/sim.h"

#define PATHS 3
#define PAGES 700
#define PAGE_BYTES 1000

/* ---- the CRC ---- */

static void test_crc(void)
{
	static uint8_t bytes[5000];
	uint8_t ascending[32];

	tfd_crc32c_init();
	for (uint8_t i = 0; i < 32; i++)
		ascending[i] = i;
	/* RFC 3720, B.4, and the check value of the catalogue of parametrised CRC algorithms. */
	CHECK(tfd_crc32c(0, "123456789", 9) == 0xe3069283u);
	CHECK(tfd_crc32c(0, bytes, 32) == 0x8a9136aau);
	CHECK(tfd_crc32c(0, ascending, 32) == 0x46dd794eu);
	CHECK(tfd_crc32c(0, bytes, 0) == 0);
	for (uint32_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(i * 2654435761u >> 9);
	for (uint32_t count = 0; count < 300; count++) {
		uint32_t whole = tfd_crc32c(0, bytes + count % 7, count);
		uint32_t parts = tfd_crc32c(0, bytes + count % 7, count / 3);

		CHECK(whole == tfd_crc32c_by_tables(0, bytes + count % 7, count));
		CHECK(whole == tfd_crc32c(parts, bytes + count % 7 + count / 3, count - count / 3));
	}
}

/* ---- jobs that are as they should be ---- */

struct world {
	struct host hosts[2];
	struct host *a, *b; /* the same one, within one daemon */
	struct user from, to;
	uint32_t paths;
	uint64_t out[PATHS], in[PATHS];
	uint64_t grant;
};

static void host_start(struct host *host, const char *provider, const char *fabric, uint32_t rails)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16, .stepped = *fabric != 0 };
	struct tfd_group_options group = { .rail_count = rails, .segment_bytes = 16384, .cut_bytes = 1 };

	(void)strcpy(group.provider, provider);
	(void)strcpy(group.fabric, fabric);
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	for (uint32_t i = 0; i < rails; i++)
		(void)strcpy(group.rails[i], strcmp(provider, "libfabric") == 0 ? "127.0.0.1" : "r");
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void world_open(struct world *w, const char *provider, const char *fabric, uint32_t paths)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16 };
	struct tfd_region_key keys[PATHS];
	uint32_t slots[16];

	memset(w, 0, sizeof(*w));
	w->a = w->b = &w->hosts[0];
	host_start(w->a, provider, fabric, paths);
	if (strcmp(provider, "local") != 0) {
		w->b = &w->hosts[1];
		host_start(w->b, provider, fabric, paths);
	}
	user_open(w->a, &w->from);
	user_open(w->b, &w->to);
	w->paths = paths;
	CHECK_OK(tfd_counters_add(w->b->core, w->to.session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(w->b->core, w->to.session, w->to.region, keys, PATHS));
	CHECK_OK(tfd_session_name_space(w->b->core, w->to.session, &options.name_space));
	options.path_count = paths;
	for (uint32_t i = 0; i < paths; i++) {
		connect_rails(w->a, i, w->b, i, &w->out[i], &w->in[i]);
		options.paths[i] = (struct tfd_open_path){ .conn = w->out[i],
		                                           .key = keys[i].key,
		                                           .address = keys[i].address };
	}
	CHECK_OK(tfd_open_add(w->a->core, w->from.session, &options, &w->grant));
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		w->from.memory[i] = (uint8_t)(i * 2654435761u >> 13);
}

static void world_close(struct world *w)
{
	tfd_core_close(w->a->core);
	if (w->b != w->a)
		tfd_core_close(w->b->core);
	user_unmap(&w->from);
	user_unmap(&w->to);
	tfd_sim_set_now(0);
}

static struct tfd_entry entry_of(const struct world *w, uint8_t op, uint32_t imm, uint8_t flags)
{
	return (struct tfd_entry){ .op = op,
	                           .flags = (uint8_t)(flags | TFD_FLAG_CHECKSUM),
	                           .src_region = w->from.region,
	                           .dst_grant = w->grant,
	                           .imm = imm };
}

static void *table_of(const struct world *w)
{
	return w->from.segment + w->from.header->arena_offset;
}

static struct tfd_entry pages_entry(const struct world *w, uint32_t imm, uint8_t flags)
{
	struct tfd_entry entry = entry_of(w, TFD_OP_WRITE_PAGES, imm, flags);
	struct tfd_page *pages = table_of(w);

	entry.length = PAGE_BYTES;
	entry.src_stride = PAGE_BYTES;
	entry.dst_stride = 1024;
	entry.table_count = PAGES;
	for (uint32_t i = 0; i < PAGES; i++)
		pages[i] = (struct tfd_page){ .src = PAGES - 1 - i, .dst = i };
	return entry;
}

static struct tfd_entry scatter_entry(const struct world *w, uint32_t imm)
{
	struct tfd_entry entry = entry_of(w, TFD_OP_SCATTER, imm, 0);
	struct tfd_target *targets = table_of(w);

	entry.dst_grant = 0;
	entry.table_count = 4;
	for (uint32_t i = 0; i < 4; i++)
		targets[i] = (struct tfd_target){ .dst_grant = w->grant,
		                                  .src_offset = 100 * i,
		                                  .dst_offset = i << 20,
		                                  .length = i == 2 ? 0 : 200000 + i };
	return entry;
}

static void expect(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status != status || record->detail != detail) {
		(void)fprintf(stderr, "status %u detail %u\n", record->status, record->detail);
		exit(1);
	}
}

static void await_value(const struct world *w, uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&w->to.counters[imm].value) < value; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&w->to.counters[imm].value) == value);
}

static void test_good(const char *provider, uint32_t paths)
{
	static const uint64_t lengths[] = { 0, 1, 7, 16385, 65536, 65537, 1000003, 4u << 20 };
	struct world w;

	world_open(&w, provider, "", paths);
	for (uint32_t i = 0; i < 16; i++) {
		struct tfd_entry entry = entry_of(&w, TFD_OP_WRITE, 1, i % 2 ? TFD_FLAG_EXACT : 0);

		entry.length = lengths[i / 2];
		entry.src_offset = 3 * i;
		entry.dst_offset = 5;
		expect(user_run(&w.from, entry), TFD_JOB_OK, 0);
		await_value(&w, 1, i + 1);
		CHECK(memcmp(w.to.memory + 5, w.from.memory + 3 * i, entry.length) == 0);
	}
	for (uint8_t flags = 0; flags < 4; flags++)
		expect(user_run(&w.from, pages_entry(&w, 2, flags)), TFD_JOB_OK, 0);
	await_value(&w, 2, 2 * PAGES + 2);
	for (uint32_t i = 0; i < PAGES; i++)
		CHECK(memcmp(w.to.memory + i * 1024, w.from.memory + (PAGES - 1 - i) * PAGE_BYTES,
		             PAGE_BYTES) == 0);
	expect(user_run(&w.from, scatter_entry(&w, 3)), TFD_JOB_OK, 0);
	await_value(&w, 3, 4);
	for (uint8_t op = TFD_OP_IMM; op <= TFD_OP_READ; op++) {
		struct tfd_entry entry = entry_of(&w, op, 4, 0);

		if (op == TFD_OP_WRITE_PAGES || op == TFD_OP_SCATTER)
			continue;
		expect(user_run(&w.from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_FLAGS);
	}
	world_close(&w);
}

/* ---- a byte that changes in between ---- */

static uint64_t now;

static void step(struct world *w)
{
	now += 5000;
	tfd_sim_set_now(now);
	(void)tfd_core_step(w->a->core, now);
	(void)tfd_core_step(w->b->core, now);
}

static struct tfd_event lost(struct world *w)
{
	struct tfd_event event;
	struct tfd_event found = { 0 };

	while (tfd_core_events(w->a->core, &event, 1)) {
		if (event.type == TFD_EVENT_LOST) {
			CHECK(!found.type);
			found = event;
		}
	}
	return found;
}

/* Runs a job; once byte `wrong` of the receiver's has come, which is byte `source` of the sender's, it is changed. */
static struct tfd_record *run_spoilt(struct world *w, struct tfd_entry entry, uint64_t source, uint64_t wrong)
{
	struct tfd_record *record;

	memset(w->to.memory, 0, REGION_BYTES);
	w->from.memory[source] |= 1;
	record = user_submit(&w->from, entry);
	for (int i = 0; i < 100000 && !w->to.memory[wrong]; i++)
		step(w);
	CHECK(w->to.memory[wrong] == w->from.memory[source] && record->done_id != w->from.next_job);
	w->to.memory[wrong] ^= 0x10;
	for (int i = 0; i < 100000 && record->done_id != w->from.next_job; i++)
		step(w);
	CHECK(record->done_id == w->from.next_job);
	for (int i = 0; i < 1000; i++)
		step(w);
	return record;
}

static void spoil_write(struct world *w, uint64_t length, uint64_t wrong)
{
	struct tfd_entry entry = entry_of(w, TFD_OP_WRITE, 1, 0);
	struct tfd_event event;

	entry.length = length;
	entry.dst_offset = 64;
	expect(run_spoilt(w, entry, wrong, 64 + wrong), TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_CHECKSUM);
	event = lost(w);
	CHECK(event.type && event.imm == 1 && event.count == 1 && event.units < 8);
	CHECK(w->to.counters[1].value == 0);
	CHECK_OK(tfd_counters_fault(w->b->core, w->to.session, 1, 1, 1, event.units, 1));
}

static void spoil_pages(struct world *w, uint8_t flags)
{
	uint64_t source = (PAGES - 1 - 333) * PAGE_BYTES + 77;
	uint64_t before = w->to.counters[2].value;
	struct tfd_event event;

	expect(run_spoilt(w, pages_entry(w, 2, flags), source, 333 * 1024 + 77), TFD_JOB_REMOTE_ACCESS,
	       TFD_DETAIL_CHECKSUM);
	event = lost(w);
	CHECK(event.type && event.imm == 2);
	CHECK(w->to.counters[2].value - before < (flags & TFD_FLAG_COUNT_JOB ? 1 : PAGES));
	if (flags & TFD_FLAG_EXACT) /* not even those that are as they should be */
		CHECK(w->to.counters[2].value == before && event.units == 0);
	CHECK_OK(tfd_counters_fault(w->b->core, w->to.session, 2, 1, event.count, event.units, 1));
}

/* The other targets count; the spoilt one alone is lost. */
static void spoil_scatter(struct world *w)
{
	struct tfd_event event;

	expect(run_spoilt(w, scatter_entry(w, 3), 100 + 123456, (1u << 20) + 123456), TFD_JOB_REMOTE_ACCESS,
	       TFD_DETAIL_CHECKSUM);
	event = lost(w);
	CHECK(event.type && event.imm == 3 && event.count == 1);
	CHECK(w->to.counters[3].value == 3);
}

static void test_spoilt(uint32_t seed)
{
	struct world w;
	char fabric[TFD_NAME_MAX];

	now = 1000000;
	tfd_sim_set_now(now);
	(void)snprintf(fabric, sizeof(fabric), "seed=%u,ordered=%u,delay_us=100", seed, seed % 2);
	world_open(&w, "sim", fabric, 1 + seed % PATHS);
	spoil_write(&w, 100000, 0);
	spoil_write(&w, 100000, 99999);
	spoil_write(&w, 1000003, 500000);
	spoil_pages(&w, 0);
	spoil_pages(&w, TFD_FLAG_COUNT_JOB);
	spoil_pages(&w, TFD_FLAG_EXACT);
	spoil_scatter(&w);
	world_close(&w);
}

int main(void)
{
	test_crc();
	test_good("libfabric", 1);
	test_good("libfabric", PATHS);
	test_good("local", 1);
	for (uint32_t seed = 1; seed <= 12; seed++)
		test_spoilt(seed);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Many pages in one post, or posted at once: what is counted, what goes out again after a loss, what a bad table does. On the simulated fabric. */
#include "sim_pair.h"

#define PAGES_MAX 9000u
#define PAGE_BYTES 256u
#define DST_STRIDE 512u
#ifdef __SANITIZE_THREAD__ /* there is one thread: nothing for it to find */
#define EVERY 64
#else
#define EVERY 9
#endif

static const struct tfd_group_options small = { .segment_bytes = 8 * PAGE_BYTES,
                                                .window_bytes = 64 * PAGE_BYTES,
                                                .cut_bytes = 1 };
static const struct tfd_group_options usual = { .window_bytes = 64u << 10, .cut_bytes = 1 };

/* Pages that are nowhere adjacent. */
static struct tfd_entry pages_entry(const struct sim_pair *pair, uint32_t imm, uint32_t count)
{
	struct tfd_page *pages = sim_table(&pair->from);

	for (uint32_t i = 0; i < count; i++)
		pages[i] = (struct tfd_page){ .src = count - 1 - i, .dst = i };
	return (struct tfd_entry){ .op = TFD_OP_WRITE_PAGES,
	                           .src_region = pair->from.region,
	                           .dst_grant = pair->grant,
	                           .imm = imm,
	                           .length = PAGE_BYTES,
	                           .src_stride = PAGE_BYTES,
	                           .dst_stride = DST_STRIDE,
	                           .table_count = count };
}

static bool in_place(const struct sim_pair *pair, const struct tfd_entry *entry, uint32_t i)
{
	const struct tfd_page *page = (const struct tfd_page *)sim_table(&pair->from) + i;

	return memcmp(pair->to.memory + entry->dst_offset + page->dst * entry->dst_stride,
	              pair->from.memory + entry->src_offset + page->src * entry->src_stride,
	              entry->length) == 0;
}

static void check_pages(const struct sim_pair *pair, const struct tfd_entry *entry)
{
	for (uint32_t i = 0; i < entry->table_count; i++)
		CHECK(in_place(pair, entry, i));
}

static struct tfd_rail_info rail_of(const struct host *host, uint32_t rail)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(host->core, host->group, rail, &info));
	return info;
}

/* ---- counts ---- */

static void check_run(struct sim_pair *pair, struct tfd_entry entry, uint64_t *count, bool packs)
{
	uint64_t span = entry.dst_stride * (entry.table_count + 16);
	const struct tfd_record *record;

	CHECK(span <= REGION_BYTES);
	memset(pair->to.memory, 0, span);
	record = sim_run(pair, &pair->from, entry);
	expect(record, TFD_JOB_OK, 0);
	sim_steps(pair, 40); /* the receiver's worker takes 64 immediates in each */
	*count += entry.flags & TFD_FLAG_COUNT_JOB ? 1 : entry.table_count;
	CHECK(pair->to.counters[entry.imm].value == *count);
	CHECK(!(record->path & TFD_PATH_PACKED) == !packs);
	CHECK(record->bytes == entry.length * entry.table_count);
	check_pages(pair, &entry);
}

/* Of pages that are nowhere adjacent one count each needs an immediate each where pieces overtake each other. */
static void test_counts(uint32_t paths, uint32_t parts, bool ordered, uint32_t again)
{
	static const uint32_t counts[] = { 1, 2, 9, 255, 256, 257, 1000 };
	char fabric[TFD_NAME_MAX];
	struct sim_pair pair;
	uint64_t count = 0;

	(void)snprintf(fabric, sizeof(fabric), "delay_us=9,parts=%u,ordered=%u,again=%u", parts, ordered,
	               again);
	sim_pair_open(&pair, paths, fabric, small);
	for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		for (uint8_t flags = 0; flags < 8; flags++) {
			struct tfd_entry entry = pages_entry(&pair, 1, counts[i]);

			entry.flags = flags;
			check_run(&pair, entry, &count, parts > 1 && counts[i] > paths && (ordered || flags));
		}
	}
	sim_pair_close(&pair);
}

/* Runs of adjacent pages, longer than what the window lets go at once, and pages alone. */
static void test_runs(uint32_t parts, bool ordered)
{
	char fabric[TFD_NAME_MAX];
	struct sim_pair pair;
	struct tfd_page *pages;
	uint64_t count = 0;

	(void)snprintf(fabric, sizeof(fabric), "delay_us=9,parts=%u,ordered=%u", parts, ordered);
	sim_pair_open(&pair, 1, fabric, usual);
	pages = sim_table(&pair.from);
	for (uint8_t flags = 0; flags < 8; flags++) {
		struct tfd_entry entry = pages_entry(&pair, 2, 2000);

		entry.length = entry.src_stride = entry.dst_stride = 1000;
		entry.flags = flags;
		for (uint32_t i = 0, at = 0, run = 1; i < entry.table_count; i++, at++) {
			if (i == run) { /* 1, 3, 13, 53, …: the longest of 820 pages */
				run += 1 + 3 * run;
				at += 2;
			}
			pages[i] = (struct tfd_page){ .src = at, .dst = at };
		}
		for (uint32_t i = 1500; i < entry.table_count; i += 2) /* every other one elsewhere */
			pages[i].src = i - 1500;
		check_run(&pair, entry, &count, parts > 1 && (ordered || flags));
	}
	sim_pair_close(&pair);
}

/* 1,000 pages: eight to a post, and 13 immediates, the first of which rides on the last post. */
static void test_posts(void)
{
	struct sim_pair pair;
	struct tfd_rail_info before, after;
	uint64_t count = 0, imms;

	sim_pair_open(&pair, 1, "parts=64", small);
	before = rail_of(&pair.a, 0);
	imms = rail_of(&pair.b, 0).imms_received;
	check_run(&pair, pages_entry(&pair, 1, 1000), &count, true);
	after = rail_of(&pair.a, 0);
	CHECK(after.writes_sent - before.writes_sent == 125 + 12);
	CHECK(after.bytes_sent - before.bytes_sent == 1000 * PAGE_BYTES);
	CHECK(rail_of(&pair.b, 0).imms_received - imms == 13);
	sim_pair_close(&pair);
	count = 0;
	sim_pair_open(&pair, 1, "parts=3", small); /* 85 posts of a batch of 256 have three, one has one */
	check_run(&pair, pages_entry(&pair, 1, 256), &count, true);
	CHECK(rail_of(&pair.a, 0).writes_sent == 86 + 3);
	sim_pair_close(&pair);
}

static void test_empty_pages(void)
{
	struct sim_pair pair;
	struct tfd_entry entry;
	uint64_t count = 0;

	sim_pair_open(&pair, 1, "parts=64", small);
	entry = pages_entry(&pair, 1, PAGES_MAX);
	entry.length = 0;
	check_run(&pair, entry, &count, false);
	sim_pair_close(&pair);
}

/* ---- losses ---- */

static uint64_t landed_of(struct sim_pair *pair, uint32_t path)
{
	struct tfd_landed landed;

	CHECK_OK(tfd_conn_close(pair->b.core, pair->in[path], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(pair->a.core, pair->out[path], TFD_DETAIL_CONNECTION, &landed, NULL));
	return landed.imms[0];
}

/* Of two paths one is lost after `steps`: what was acknowledged, or told as landed, goes once; all else by the other. */
static void test_path_lost(uint32_t parts, int steps, uint32_t page_bytes, bool breaks)
{
	char fabric[TFD_NAME_MAX];
	struct sim_pair pair;
	struct tfd_entry entry;
	const struct tfd_record *record;

	(void)snprintf(fabric, sizeof(fabric), "delay_us=200,again=10,parts=%u", parts);
	sim_pair_open(&pair, 2, fabric, small);
	entry = pages_entry(&pair, 1, PAGES_MAX);
	entry.length = page_bytes;
	record = user_submit(&pair.from, entry);
	sim_steps(&pair, steps);
	if (breaks) { /* cut anywhere in a post */
		tfd_sim_break(sim_conn(&pair.a, pair.out[0])->half);
		sim_steps(&pair, 1);
	}
	(void)landed_of(&pair, 0);
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_OK, 0);
	sim_steps(&pair, 100);
	CHECK(pair.to.counters[1].value == PAGES_MAX);
	CHECK(record->bytes == (uint64_t)PAGES_MAX * page_bytes);
	CHECK(rail_of(&pair.a, 0).bytes_sent + rail_of(&pair.a, 1).bytes_sent == record->bytes);
	check_pages(&pair, &entry);
	sim_pair_close(&pair);
}

/* What is told of a job that failed makes its retry reach the same count. */
static void retry(struct sim_pair *pair, struct tfd_entry entry)
{
	uint64_t value = pair->to.counters[entry.imm].value;
	struct tfd_event event;

	CHECK(sim_event(&pair->a, TFD_EVENT_LOST, &event));
	CHECK(event.imm == entry.imm && event.count == entry.table_count && event.units == 8 * value);
	CHECK_OK(tfd_counters_fault(pair->b.core, pair->to.session, entry.imm, 1, event.count, event.units,
	                            1));
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_OK, 0);
	sim_steps(pair, 100);
	CHECK(pair->to.counters[entry.imm].value == entry.table_count);
	check_pages(pair, &entry);
}

/* The page numbered `bad` leaves the region, or the grant. */
static void test_bounds(uint32_t bad, bool source)
{
	struct sim_pair pair;
	struct tfd_entry entry;
	struct tfd_page *page, good;
	const struct tfd_record *record;

	sim_pair_open(&pair, 1, "delay_us=9,parts=16", small);
	memset(pair.to.memory, 0, REGION_BYTES);
	entry = pages_entry(&pair, 1, PAGES_MAX);
	page = (struct tfd_page *)sim_table(&pair.from) + bad;
	good = *page;
	*(source ? &page->src : &page->dst) = UINT32_MAX;
	record = sim_run(&pair, &pair.from, entry);
	expect(record, TFD_JOB_INVALID, source ? TFD_DETAIL_SOURCE_BOUNDS : TFD_DETAIL_DESTINATION_BOUNDS);
	sim_steps(&pair, 100);
	*page = good;
	for (uint32_t i = bad; i < PAGES_MAX; i++)
		CHECK(!in_place(&pair, &entry, i));
	retry(&pair, entry);
	sim_pair_close(&pair);
}

static void test_cancel(uint32_t parts, int steps)
{
	char fabric[TFD_NAME_MAX];
	struct tfd_entry cancel = { .op = TFD_OP_CANCEL };
	static uint8_t seen[REGION_BYTES];
	struct sim_pair pair;
	struct tfd_entry entry;
	const struct tfd_record *record;

	(void)snprintf(fabric, sizeof(fabric), "delay_us=50,parts=%u", parts);
	sim_pair_open(&pair, 2, fabric, small);
	entry = pages_entry(&pair, 1, PAGES_MAX);
	record = user_submit(&pair.from, entry);
	sim_steps(&pair, steps);
	cancel.argument = pair.from.next_job;
	(void)user_submit(&pair.from, cancel);
	sim_await(&pair, record, cancel.argument);
	expect(record, TFD_JOB_CANCELLED, 0);
	memcpy(seen, pair.to.memory, REGION_BYTES);
	sim_steps(&pair, 200);
	CHECK(memcmp(seen, pair.to.memory, REGION_BYTES) == 0);
	retry(&pair, entry);
	sim_pair_close(&pair);
}

/* The grant ends in the middle of the region. The client moves pages behind its end and back while they are being posted. */
static void test_table_changes(uint32_t seed)
{
	struct tfd_open_options half = { .rights = TFD_RIGHT_WRITE,
	                                 .length = REGION_BYTES / 2,
	                                 .imm_count = 16 };
	struct sim_pair pair;
	struct tfd_page *pages;
	struct tfd_entry entry;
	const struct tfd_record *record;
	uint64_t job;

	sim_pair_open(&pair, 1, "delay_us=9,parts=16", small);
	memset(pair.to.memory, 0x5a, REGION_BYTES);
	sim_paths(&pair, &pair.to, &half);
	CHECK_OK(tfd_open_add(pair.a.core, pair.from.session, &half, &pair.grant));
	entry = pages_entry(&pair, 1, 8000);
	pages = sim_table(&pair.from);
	record = user_submit(&pair.from, entry);
	job = pair.from.next_job;
	for (uint32_t i = seed; tfd_load_acquire(&record->done_id) != job; i += 7919) {
		struct tfd_page *page = &pages[i % 8000];

		page->dst = i % 64 ? page->dst / 2 : UINT32_MAX - page->dst;
		sim_step(&pair, PAIR_STEP_NS);
	}
	if (record->status != TFD_JOB_OK)
		expect(record, TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	sim_steps(&pair, 100);
	for (uint32_t i = REGION_BYTES / 2; i < REGION_BYTES; i++)
		CHECK(pair.to.memory[i] == 0x5a);
	sim_pair_close(&pair);
}

/* ---- what is compared ---- */

/* One byte of one page is changed once it has landed: that is found, and nothing is counted. */
static void test_checksum(uint32_t parts)
{
	char fabric[TFD_NAME_MAX];
	struct sim_pair pair;
	struct tfd_entry entry;
	const struct tfd_record *record;
	uint32_t last = 699;

	(void)snprintf(fabric, sizeof(fabric), "delay_us=9,parts=%u", parts);
	sim_pair_open(&pair, 1, fabric, small);
	entry = pages_entry(&pair, 1, last + 1);
	entry.flags = TFD_FLAG_CHECKSUM;
	memset(pair.to.memory, 0, REGION_BYTES);
	record = user_submit(&pair.from, entry);
	while (!in_place(&pair, &entry, last))
		sim_step(&pair, 1000);
	pair.to.memory[300 * DST_STRIDE + 17] ^= 1;
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_CHECKSUM);
	CHECK(pair.to.counters[1].value == 0);
	retry(&pair, entry);
	sim_pair_close(&pair);
}

/* The far side refuses a post: the region has gone away. */
static void test_refused(void)
{
	struct sim_pair pair;
	struct tfd_event event;
	const struct tfd_record *record;

	sim_pair_open(&pair, 1, "parts=16", small);
	CHECK_OK(tfd_region_remove(pair.b.core, pair.to.session, pair.to.region));
	memset(pair.to.memory, 0x3c, REGION_BYTES);
	record = user_submit(&pair.from, pages_entry(&pair, 1, 1000));
	while (!sim_event(&pair.a, TFD_EVENT_CONN_LOST, &event))
		sim_steps(&pair, 1);
	(void)landed_of(&pair, 0);
	sim_await(&pair, record, pair.from.next_job);
	expect(record, TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_CONNECTION);
	sim_steps(&pair, 1);
	CHECK(sim_event(&pair.a, TFD_EVENT_LOST, &event) && event.count == 1000 && event.units == 0);
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		CHECK(pair.to.memory[i] == 0x3c);
	sim_pair_close(&pair);
}

int main(void)
{
	static const uint32_t parts[] = { 1, 2, 3, 8, 300 };

	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
		for (uint32_t ordered = 0; ordered < 2; ordered++) {
			test_counts(1 + (uint32_t)i % 3, parts[i], ordered != 0, ordered ? 0 : 40);
			test_counts(1, parts[i], ordered != 0, ordered ? 40 : 0);
			test_runs(parts[i], ordered != 0);
		}
	}
	test_posts();
	test_empty_pages();
	for (int steps = 1; steps < 160; steps += EVERY) {
		test_path_lost(16, steps, PAGE_BYTES, false);
		test_path_lost(16, steps, PAGE_BYTES - 1, true);
		test_path_lost(1, steps, PAGE_BYTES - 1, true);
		test_cancel(steps % 2 ? 1 : 16, steps);
	}
	for (uint32_t bad = 0; bad < PAGES_MAX; bad += 333 * EVERY) {
		test_bounds(bad, false);
		test_bounds(bad > 130 ? bad - 130 : 5, true);
	}
	for (uint32_t seed = 0; seed < 20; seed += EVERY / 9)
		test_table_changes(seed * 61);
	test_checksum(1);
	test_checksum(16);
	test_refused();
	return 0;
}

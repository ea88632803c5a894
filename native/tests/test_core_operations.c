/* SPDX-License-Identifier: Apache-2.0 */
/* Every operation over 1 to 4 connections between two cores on loopback: cut, counted, moved to another path, fenced. */
#include <stdbool.h>

#include "core_fixture.h"

#define PATHS_MAX 4
#define MIB (1u << 20)

struct pair {
	struct host a, b;
	struct user from, to;
	uint32_t paths;
	uint64_t out[PATHS_MAX], in[PATHS_MAX];
	uint64_t grant;
};

static uint64_t grant_of(struct pair *pair, uint32_t rights)
{
	struct tfd_open_options options = {
		.path_count = pair->paths, .rights = rights, .length = REGION_BYTES, .imm_count = 16
	};
	struct tfd_region_key keys[PATHS_MAX];
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(pair->b.core, pair->to.session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(pair->b.core, pair->to.session, pair->to.region, keys, PATHS_MAX));
	CHECK_OK(tfd_session_name_space(pair->b.core, pair->to.session, &options.name_space));
	for (uint32_t i = 0; i < pair->paths; i++)
		options.paths[i] = (struct tfd_open_path){ .conn = pair->out[i],
		                                           .key = keys[i].key,
		                                           .address = keys[i].address };
	CHECK_OK(tfd_open_add(pair->a.core, pair->from.session, &options, &open));
	return open;
}

static void pair_open(struct pair *pair, uint32_t paths)
{
	memset(pair, 0, sizeof(*pair));
	pair->paths = paths;
	host_open_rails(&pair->a, paths, 16u << 10);
	host_open_rails(&pair->b, paths, 16u << 10);
	user_open(&pair->a, &pair->from);
	user_open(&pair->b, &pair->to);
	for (uint32_t i = 0; i < paths; i++)
		connect_rails(&pair->a, i, &pair->b, i, &pair->out[i], &pair->in[i]);
	pair->grant = grant_of(pair, TFD_RIGHT_WRITE | TFD_RIGHT_READ);
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		pair->from.memory[i] = (uint8_t)(i * 2654435761u >> 13);
}

static void pair_close(struct pair *pair)
{
	user_close(&pair->from);
	user_close(&pair->to);
	tfd_core_close(pair->a.core);
	tfd_core_close(pair->b.core);
}

static void await_least(const struct user *user, uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&user->counters[imm].value) < value; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&user->counters[imm].value) >= value);
}

static void await_value(const struct user *user, uint32_t imm, uint64_t value)
{
	await_least(user, imm, value);
	(void)usleep(1000); /* more than that must not come */
	CHECK(tfd_load_acquire(&user->counters[imm].value) == value);
}

static void expect(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status != status || record->detail != detail) {
		(void)fprintf(stderr, "status %u detail %u\n", record->status, record->detail);
		exit(1);
	}
}

static struct tfd_entry basic(const struct pair *pair, uint8_t op, uint32_t imm)
{
	return (struct tfd_entry){
		.op = op, .src_region = pair->from.region, .dst_grant = pair->grant, .imm = imm
	};
}

static void test_writes(struct pair *pair)
{
	static const uint64_t lengths[] = { 0, 1, 7, 16383, 16385, 100003, MIB + 1, 4 * MIB + 3 };
	uint64_t count = 0;

	for (uint32_t flags = 0; flags <= TFD_FLAG_EXACT; flags++) {
		for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
			struct tfd_entry entry = basic(pair, TFD_OP_WRITE, 1);

			entry.flags = (uint8_t)flags;
			entry.src_offset = 11 * i;
			entry.dst_offset = 5;
			entry.length = lengths[i];
			memset(pair->to.memory, 0xee, lengths[i] + 64);
			expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
			await_value(&pair->to, 1, ++count);
			CHECK(memcmp(pair->to.memory + 5, pair->from.memory + 11 * i, lengths[i]) == 0);
			CHECK(pair->to.memory[4] == 0xee && pair->to.memory[5 + lengths[i]] == 0xee);
		}
	}
}

static struct tfd_page *page_table(struct pair *pair)
{
	return (void *)(pair->from.segment + pair->from.header->arena_offset);
}

static void check_pages(struct pair *pair, const struct tfd_entry *entry)
{
	const struct tfd_page *pages = page_table(pair);

	for (uint32_t i = 0; i < entry->table_count; i++) {
		const uint8_t *there = pair->to.memory + entry->dst_offset + pages[i].dst * entry->dst_stride;
		const uint8_t *here =
			pair->from.memory + entry->src_offset + pages[i].src * entry->src_stride;

		if (memcmp(there, here, entry->length) == 0)
			continue;
		(void)fprintf(stderr, "page %u of %u: %u to %u, %llu bytes, flags %u, %u paths\n", i,
		              entry->table_count, pages[i].src, pages[i].dst,
		              (unsigned long long)entry->length, entry->flags, pair->paths);
		exit(1);
	}
}

static void test_pages(struct pair *pair)
{
	struct tfd_page *pages = page_table(pair);
	uint64_t count = 0;

	for (uint32_t round = 0; round < 5; round++) {
		static const uint32_t counts[] = { 0, 1, 9, 700, 1000 };
		struct tfd_entry entry = basic(pair, TFD_OP_WRITE_PAGES, 2);

		entry.table_count = counts[round];
		entry.length = 1000;
		entry.src_stride = 1000;
		entry.dst_stride = 1024;
		for (uint32_t i = 0; i < entry.table_count; i++)
			pages[i] = (struct tfd_page){ .src = entry.table_count - 1 - i, .dst = i };
		for (uint8_t flags = 0; flags < 4; flags++) {
			memset(pair->to.memory, 0, 2 * MIB);
			entry.flags = flags;
			expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
			count += flags & TFD_FLAG_COUNT_JOB ? 1 : entry.table_count;
			await_value(&pair->to, 2, count);
			check_pages(pair, &entry);
		}
	}
}

/* Adjacent pages are merged, pages above a segment are cut: the count stays. */
static void test_page_sizes(struct pair *pair)
{
	struct tfd_page *pages = page_table(pair);
	uint64_t count = pair->to.counters[2].value;

	for (uint32_t bytes = 64; bytes <= 256u << 10; bytes *= 16) {
		struct tfd_entry entry = basic(pair, TFD_OP_WRITE_PAGES, 2);

		entry.length = entry.src_stride = entry.dst_stride = bytes;
		entry.table_count = REGION_BYTES / bytes < 5000 ? REGION_BYTES / bytes : 5000;
		for (uint32_t i = 0; i < entry.table_count; i++)
			pages[i] = (struct tfd_page){ .src = i, .dst = i };
		expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
		count += entry.table_count;
		await_value(&pair->to, 2, count);
		check_pages(pair, &entry);
	}
}

static void test_bad_pages(struct pair *pair)
{
	struct tfd_page *pages = page_table(pair);
	struct tfd_entry entry = basic(pair, TFD_OP_WRITE_PAGES, 3);

	entry.length = entry.src_stride = entry.dst_stride = 4096;
	entry.table_count = 1;
	pages[0] = (struct tfd_page){ .src = REGION_BYTES / 4096, .dst = 0 };
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_SOURCE_BOUNDS);
	pages[0] = (struct tfd_page){ .src = 0, .dst = UINT32_MAX };
	entry.dst_stride = UINT64_MAX / 2;
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	entry.table_offset = 4;
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	entry.table_offset = pair->from.header->arena_bytes;
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	entry.table_offset = 0;
	entry.table_count = UINT32_MAX;
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_TABLE);
	CHECK(pair->to.counters[3].value == 0);
}

static void test_scatter(struct pair *pair)
{
	struct tfd_target *targets = (void *)page_table(pair);
	struct tfd_entry entry = basic(pair, TFD_OP_SCATTER, 4);
	uint64_t other = grant_of(pair, TFD_RIGHT_WRITE);

	entry.dst_grant = 0;
	entry.table_count = 64;
	memset(pair->to.memory, 0, REGION_BYTES);
	for (uint32_t i = 0; i < 64; i++)
		targets[i] = (struct tfd_target){
			.dst_grant = i % 2 ? other : pair->grant,
			.src_offset = 13 * i,
			.dst_offset = 40000u * i,
			.length = 600 * i,
		};
	expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
	await_value(&pair->to, 4, 64);
	for (uint32_t i = 0; i < 64; i++)
		CHECK(memcmp(pair->to.memory + 40000u * i, pair->from.memory + 13 * i, 600 * i) == 0);
	targets[63].dst_offset = REGION_BYTES; /* one is wrong: nothing is sent */
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_DESTINATION_BOUNDS);
	entry.table_count = 0;
	expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
	await_value(&pair->to, 4, 64);
	entry.op = TFD_OP_BARRIER;
	entry.src_region = 0;
	entry.table_count = 2;
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID,
	       TFD_DETAIL_SOURCE_BOUNDS); /* bytes without a region */
	for (uint32_t i = 0; i < 2; i++)
		targets[i] = (struct tfd_target){ .dst_grant = i ? other : pair->grant };
	expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
	await_value(&pair->to, 4, 66);
}

static void test_read(struct pair *pair)
{
	struct tfd_entry entry = basic(pair, TFD_OP_READ, 0);

	for (uint32_t i = 0; i < REGION_BYTES; i++)
		pair->to.memory[i] = (uint8_t)(i * 40503u >> 7);
	for (uint64_t length = 0; length <= 4 * MIB; length = length * 9 + 1) {
		memset(pair->from.memory, 0, length + 64);
		entry.src_offset = 3;
		entry.dst_offset = 77;
		entry.length = length;
		expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
		CHECK(memcmp(pair->from.memory + 3, pair->to.memory + 77, length) == 0);
		CHECK(pair->from.memory[2] == 0 && pair->from.memory[3 + length] == 0);
	}
	entry.dst_grant = grant_of(pair, TFD_RIGHT_WRITE);
	expect(user_run(&pair->from, entry), TFD_JOB_INVALID, TFD_DETAIL_RIGHTS);
}

static bool is_ordered(const struct host *host)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(host->core, host->group, 0, &info));
	return info.ordered != 0;
}

/*
 * One path after the other is lost in the middle of writes: what the far side took tells what goes out again. On unordered rails it
 * cannot: jobs that had pieces in flight there fail, and each of the others counts.
 */
static void test_paths_lost(uint32_t paths)
{
	uint64_t counted = 0, submitted = 0;
	struct pair pair;
	bool ordered;
	struct tfd_entry entry;
	struct tfd_page *pages;
	struct tfd_landed landed;

	pair_open(&pair, paths);
	ordered = is_ordered(&pair.a);
	pages = page_table(&pair);
	for (uint32_t i = 0; i < 2000; i++)
		pages[i] = (struct tfd_page){ .src = i, .dst = 1999 - i };
	for (uint32_t lost = 0; lost + 1 < paths; lost++) {
		uint64_t first = pair.from.next_job + 1;

		memset(pair.to.memory, 0, REGION_BYTES);
		for (uint32_t i = 0; i < 30; i++) {
			entry = basic(&pair, i % 3 == 2 ? TFD_OP_WRITE_PAGES : TFD_OP_WRITE, 5);
			entry.priority = i / 2 % 2;
			entry.flags = i % 4 == 3 ? TFD_FLAG_EXACT : 0;
			entry.length = 3 * MIB + i;
			entry.dst_offset = 4 * MIB; /* beside the pages */
			if (i % 3 == 2) {
				entry.length = entry.src_stride = entry.dst_stride = 2048;
				entry.dst_offset = 0;
				entry.table_count = 2000;
			}
			(void)user_submit(&pair.from, entry);
		}
		(void)usleep(3000);
		CHECK_OK(tfd_conn_close(pair.b.core, pair.in[lost], TFD_DETAIL_CONNECTION, NULL, &landed));
		CHECK(!landed.channels == !ordered);
		CHECK_OK(tfd_conn_close(pair.a.core, pair.out[lost], TFD_DETAIL_CONNECTION, &landed, NULL));
		for (uint64_t job = first; job < first + 30; job++) {
			struct tfd_record *record = &pair.from.records[job % pair.from.header->record_count];
			uint64_t counts = (job - first) % 3 == 2 ? 2000 : 1;

			wait_done(record, job);
			submitted += counts;
			counted += record->status == TFD_JOB_OK ? counts : 0;
			if (ordered || record->status == TFD_JOB_OK)
				expect(record, TFD_JOB_OK, 0);
			else
				expect(record, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
		}
		if (ordered) {
			await_value(&pair.to, 5, (lost + 1) * (20 + 10 * 2000));
			check_pages(&pair, &entry);
		} else {
			await_least(&pair.to, 5, counted);
			CHECK(pair.to.counters[5].value <= submitted);
		}
	}
	pair_close(&pair);
}

static uint64_t sent_by(const struct host *host, uint32_t rail)
{
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(host->core, host->group, rail, &info));
	return info.bytes_sent;
}

static void write_some(struct pair *pair, uint64_t *count)
{
	struct tfd_entry entry = basic(pair, TFD_OP_WRITE, 9);

	entry.length = 2 * MIB + 1;
	memset(pair->to.memory, 0, entry.length);
	expect(user_run(&pair->from, entry), TFD_JOB_OK, 0);
	await_value(&pair->to, 9, ++*count);
	CHECK(memcmp(pair->to.memory, pair->from.memory, entry.length) == 0);
}

/* A path that was lost gets a new connection once the far side has answered by it; the open stays what it is. */
static void test_path_restored(uint32_t paths)
{
	struct pair pair;
	struct tfd_open_path path;
	struct tfd_region_key keys[PATHS_MAX];
	struct tfd_landed landed;
	uint64_t before, count = 0;

	pair_open(&pair, paths);
	write_some(&pair, &count);
	CHECK_OK(tfd_region_keys(pair.b.core, pair.to.session, pair.to.region, keys, PATHS_MAX));
	path = (struct tfd_open_path){ .conn = pair.out[1], .key = keys[1].key, .address = keys[1].address };
	CHECK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, 1, &path) == -EBUSY);
	CHECK_OK(tfd_conn_close(pair.b.core, pair.in[1], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[1], TFD_DETAIL_CONNECTION, &landed, NULL));
	CHECK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, 1, &path) == -ENOTCONN);
	CHECK(tfd_conn_probe(pair.a.core, pair.out[1]) == -ENOENT);
	before = sent_by(&pair.a, 1);
	write_some(&pair, &count);
	CHECK(sent_by(&pair.a, 1) == before);

	connect_rails(&pair.a, 1, &pair.b, 1, &pair.out[1], &pair.in[1]);
	CHECK(tfd_conn_probe(pair.b.core, pair.in[1]) == -EINVAL);
	CHECK_OK(tfd_conn_probe(pair.a.core, pair.out[1]));
	(void)wait_event(&pair.a, TFD_EVENT_CONN_PROVEN, pair.out[1]);
	CHECK(tfd_conn_probe(pair.a.core, pair.out[1]) == -EBUSY);
	path.conn = pair.out[1];
	CHECK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant + 1, 1, &path) == -ENOENT);
	CHECK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, paths + 1, &path) == -EINVAL);
	CHECK_OK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, 1, &path));
	write_some(&pair, &count);
	CHECK(sent_by(&pair.a, 1) > before);
	for (uint32_t i = paths; i < TFD_MAX_PATHS; i++) /* the same connection again, as one more */
		CHECK_OK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, i, &path));
	CHECK(tfd_open_path_set(pair.a.core, pair.from.session, pair.grant, TFD_MAX_PATHS, &path) == -EINVAL);
	write_some(&pair, &count);
	pair_close(&pair);
}

/* Nobody there: the connection is never proven, and closing it gives everything back. */
static void test_probe_unanswered(void)
{
	struct tfd_event event;
	struct pair pair;
	uint64_t out, in;

	pair_open(&pair, 1);
	connect_rails(&pair.a, 0, &pair.b, 0, &out, &in);
	CHECK_OK(tfd_conn_close(pair.b.core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_probe(pair.a.core, out));
	(void)usleep(100000);
	CHECK_OK(tfd_conn_close(pair.a.core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	while (tfd_core_events(pair.a.core, &event, 1))
		CHECK(event.type != TFD_EVENT_CONN_PROVEN);
	pair_close(&pair);
}

/* The last path is lost: the job fails, and the receiver hears what to take out again. */
static void test_last_path_lost(void)
{
	struct tfd_event event;
	struct pair pair;
	struct tfd_entry entry;
	struct tfd_record *record;
	struct tfd_landed landed;
	uint64_t sum;

	pair_open(&pair, 2);
	entry = basic(&pair, TFD_OP_WRITE_PAGES, 6);
	for (uint32_t i = 0; i < 8000; i++)
		page_table(&pair)[i] = (struct tfd_page){ .src = i, .dst = 7999 - i };
	entry.length = 1000;
	entry.src_stride = entry.dst_stride = 1024;
	entry.table_count = 8000;
	record = user_submit(&pair.from, entry);
	(void)usleep(2000);
	for (uint32_t i = 0; i < 2; i++) {
		CHECK_OK(tfd_conn_close(pair.b.core, pair.in[i], TFD_DETAIL_CONNECTION, NULL, &landed));
		CHECK_OK(tfd_conn_close(pair.a.core, pair.out[i], TFD_DETAIL_CONNECTION, &landed, NULL));
	}
	wait_done(record, pair.from.next_job);
	sum = pair.to.counters[6].value;
	if (record->status == TFD_JOB_OK) {
		CHECK(sum == 8000);
	} else {
		expect(record, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
		event = wait_event(&pair.a, TFD_EVENT_LOST, 0);
		CHECK(event.imm == 6);
		if (is_ordered(&pair.a))
			CHECK(event.count == 8000 && event.units == 8 * sum);
		else /* what was in flight nobody knows: it is not said to be lost, and may have landed */
			CHECK(event.count <= 8000 && event.units <= 8 * sum);
		CHECK_OK(tfd_counters_fault(pair.b.core, pair.to.session, 6, 1, event.count, event.units, 1));
		CHECK(pair.to.counters[6].value == sum && pair.to.counters[6].lost == event.count);
	}
	pair_close(&pair);
}

static void test_fence(void)
{
	struct pair pair;
	struct tfd_event event;
	struct tfd_entry entry;
	uint64_t first;
	uint32_t cancelled = 0;
	const struct tfd_imm_range seven[] = { { 7, 1 }, { 11, 4 } };
	const struct tfd_imm_range all = { 0, 16 };
	const struct tfd_imm_range bad[][2] = { { { 1u << 20, 1 }, { 0, 0 } },
	                                        { { 0, 0 }, { 1, 1 } },
	                                        { { 7, 1 }, { 6, 1 } },
	                                        { { 7, 2 }, { 8, 1 } },
	                                        { { 1, (1u << 20) }, { 0, 0 } } };

	pair_open(&pair, 2);
	first = pair.from.next_job + 1;
	for (uint32_t i = 0; i < 40; i++) {
		entry = basic(&pair, TFD_OP_WRITE, i % 2 ? 7 : 8);
		entry.length = 4 * MIB;
		(void)user_submit(&pair.from, entry);
	}
	CHECK_OK(tfd_open_fence(pair.a.core, pair.from.session, pair.grant, seven, 2, 99));
	event = wait_event(&pair.a, TFD_EVENT_FENCE_QUIET, pair.grant);
	CHECK(event.count == 99 && event.session == pair.from.session);
	for (uint64_t job = first; job < first + 40; job++) {
		struct tfd_record *record = &pair.from.records[job % pair.from.header->record_count];

		if ((job - first) % 2) { /* imm 7: over already, if it was taken before the fence */
			wait_done(record, job);
			cancelled += record->status == TFD_JOB_CANCELLED;
			if (record->status != TFD_JOB_OK)
				expect(record, TFD_JOB_CANCELLED, TFD_DETAIL_FENCED);
		} else {
			wait_done(record, job);
			expect(record, TFD_JOB_OK, 0);
		}
	}
	CHECK(cancelled > 0);
	await_value(&pair.to, 8, 20);
	CHECK_OK(
		tfd_open_fence(pair.a.core, pair.from.session, pair.grant, &all, 1, 100)); /* idle: at once */
	CHECK(wait_event(&pair.a, TFD_EVENT_FENCE_QUIET, pair.grant).count == 100);
	for (uint32_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		CHECK(tfd_open_fence(pair.a.core, pair.from.session, pair.grant, bad[i], 2, 1) == -ERANGE);
	CHECK(tfd_open_fence(pair.a.core, pair.from.session, pair.grant, &all, 0, 1) == -ERANGE);
	CHECK(tfd_open_fence(pair.a.core, pair.from.session, 12345, &all, 1, 1) == -ENOENT);
	pair_close(&pair);
}

int main(void)
{
	for (uint32_t paths = 1; paths <= PATHS_MAX; paths++) {
		struct pair pair;

		pair_open(&pair, paths);
		test_writes(&pair);
		test_pages(&pair);
		test_page_sizes(&pair);
		test_bad_pages(&pair);
		test_scatter(&pair);
		test_read(&pair);
		pair_close(&pair);
	}
	for (uint32_t paths = 2; paths <= PATHS_MAX; paths++)
		test_paths_lost(paths);
	for (uint32_t paths = 2; paths <= PATHS_MAX; paths++)
		test_path_restored(paths);
	test_probe_unanswered();
	for (int i = 0; i < 10; i++)
		test_last_path_lost();
	test_fence();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Tables: the arena's parts never overlap and come back, indices are checked whole, a batch is all or none. */
#include "../shm/arena.h"
#include "fake_daemon.h"

#define FOREVER (-1)

static uint32_t next_random(void)
{
	static uint64_t state = 88172645463325252ull;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 16);
}

/* Against a map of who has which line. */
static void test_arena_against_a_map(void)
{
	enum { LINES = 64, MOST = 12 };
	struct tfd_extent held[MOST];
	uint8_t owner[LINES] = { 0 };
	struct tfd_arena arena;
	uint32_t count = 0, refused = 0;

	CHECK(tfd_arena_init(&arena, LINES * TFD_LINE + 63, MOST) == 0);
	CHECK(arena.bytes == LINES * TFD_LINE);
	for (int round = 0; round < 200000; round++) {
		uint64_t bytes = tfd_arena_size(1 + next_random() % (20 * TFD_LINE));
		uint64_t offset = 1;

		if (count && next_random() % 2) {
			uint32_t i = next_random() % count;

			tfd_arena_release(&arena, held[i].offset, held[i].bytes);
			memset(owner + held[i].offset / TFD_LINE, 0, held[i].bytes / TFD_LINE);
			held[i] = held[--count];
		} else if (tfd_arena_alloc(&arena, bytes, &offset) == 0) {
			CHECK(count < MOST && offset % TFD_LINE == 0 && offset + bytes <= arena.bytes);
			for (uint64_t line = offset / TFD_LINE; line < (offset + bytes) / TFD_LINE; line++)
				CHECK(owner[line]++ == 0);
			held[count++] = (struct tfd_extent){ offset, bytes };
		} else {
			CHECK(offset == 1); /* untouched */
			refused++;
		}
	}
	CHECK(refused);
	while (count--)
		tfd_arena_release(&arena, held[count].offset, held[count].bytes);
	CHECK(arena.free_count == 1 && arena.free[0].bytes == arena.bytes && arena.taken == 0);
	CHECK(tfd_arena_alloc(&arena, arena.bytes + TFD_LINE, &held[0].offset) == -EMSGSIZE);
	tfd_arena_fini(&arena);
	CHECK(tfd_arena_init(&arena, 0, 1) == 0);
	CHECK(tfd_arena_alloc(&arena, TFD_LINE, &held[0].offset) == -EMSGSIZE);
	tfd_arena_fini(&arena);
}

static struct tfd_entry pages_entry(uint64_t bytes, uint32_t count)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE_PAGES,
	                           .length = bytes,
	                           .src_stride = bytes,
	                           .dst_stride = bytes,
	                           .table_count = count };
}

struct check {
	const char *what;
	int64_t src[4], dst[4];
	uint32_t count;
	uint64_t length, src_stride, dst_stride, src_offset, dst_offset;
	uint64_t src_end, dst_end;
	int rc;
	uint32_t side, position;
	uint64_t legal;
};

static const struct check checks[] = {
	{ "all", { 0, 1, 2, 3 }, { 3, 2, 1, 0 }, 4, 10, 10, 10, 0, 0, 40, 40, 0, 0, 0, 0 },
	{ "source", { 0, 1, 4, 3 }, { 9, 2, 1, 0 }, 4, 10, 10, 10, 0, 0, 40, 40, -ERANGE, 0, 2, 4 },
	{ "destination", { 0, 1, 2, 3 }, { 3, 2, 1, 4 }, 4, 10, 10, 10, 0, 0, 40, 40, -ERANGE, 1, 3, 4 },
	{ "a byte short", { 3 }, { 3 }, 1, 10, 10, 10, 0, 1, 40, 40, -ERANGE, 1, 0, 3 },
	{ "negative", { 0, -1 }, { 0, 0 }, 2, 1, 1, 1, 0, 0, UINT64_MAX, 9, -ERANGE, 0, 1, 1ull << 32 },
	{ "lowest", { 0 }, { INT64_MIN }, 1, 1, 1, 1, 0, 0, 9, UINT64_MAX, -ERANGE, 1, 0, 1ull << 32 },
	{ "33 bits", { 1ll << 32 }, { 0 }, 1, 1, 1, 1, 0, 0, UINT64_MAX, 9, -ERANGE, 0, 0, 1ull << 32 },
	{ "same place", { 7 }, { UINT32_MAX }, 1, 10, 0, 0, 0, 0, 10, 10, 0, 0, 0, 0 },
	{ "no page fits", { 0 }, { 0 }, 1, 11, 0, 0, 0, 0, 10, 10, -ERANGE, 0, 0, 0 },
	{ "offset past the end", { 0 }, { 0 }, 1, 1, 1, 1, 0, 11, 10, 10, -ERANGE, 1, 0, 0 },
	{ "stride wraps", { 2 }, { 0 }, 1, 1, 1ull << 63, 1, 0, 0, 10, 10, -ERANGE, 0, 0, 1 },
	{ "offset wraps", { 0 }, { 0 }, 1, 2, 1, 1, 0, UINT64_MAX, 10, UINT64_MAX, -ERANGE, 1, 0, 0 },
	{ "empty", { 0 }, { 0 }, 0, 11, 0, 0, 99, 99, 10, 10, 0, 0, 0, 0 },
};

static void test_every_index_is_checked(void)
{
	for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
		const struct check *c = &checks[i];
		struct tfd_table_fault fault = { 0 };
		struct tfd_entry entry = pages_entry(c->length, c->count);
		struct tfd_client_table table = { .src = c->src,
		                                  .dst = c->dst,
		                                  .src_form = TFD_INDEX_I64,
		                                  .dst_form = i % 2 ? TFD_INDEX_I64 : TFD_INDEX_U64,
		                                  .src_end = c->src_end,
		                                  .dst_end = c->dst_end };

		entry.src_stride = c->src_stride;
		entry.dst_stride = c->dst_stride;
		entry.src_offset = c->src_offset;
		entry.dst_offset = c->dst_offset;
		if (tfd_client_tables_check(&entry, &table, 1, &fault) != c->rc || fault.side != c->side ||
		    fault.position != c->position || fault.legal != c->legal) {
			fprintf(stderr, "%s: side %u position %u legal %llu\n", c->what, fault.side,
			        fault.position, (unsigned long long)fault.legal);
			exit(1);
		}
	}
}

/* What is negative as int32 is legal as uint32, where the region is that large. */
static void test_narrow_forms(void)
{
	const uint32_t high = UINT32_MAX;
	const uint32_t zero = 0;
	struct tfd_entry entries[2] = { { .op = TFD_OP_IMM }, pages_entry(1, 1) };
	struct tfd_client_table tables[2] = { { 0 },
	                                      { .src = &high,
		                                .dst = &zero,
		                                .src_form = TFD_INDEX_U32,
		                                .dst_form = TFD_INDEX_I32,
		                                .src_end = 1ull << 33,
		                                .dst_end = 1 } };
	struct tfd_table_fault fault = { 0 };

	CHECK(tfd_client_tables_check(entries, tables, 2, &fault) == 0);
	tables[1].src_form = TFD_INDEX_I32;
	CHECK(tfd_client_tables_check(entries, tables, 2, &fault) == -ERANGE);
	CHECK(fault.entry == 1 && fault.side == 0 && fault.position == 0);
}

static const uint64_t members[3] = { 70, 71, 72 };

static struct tfd_client_table rows_table(const void *rows, uint32_t form)
{
	return (struct tfd_client_table){ .rows = rows,
	                                  .src_form = form,
	                                  .members = members,
	                                  .member_count = 3,
	                                  .src_start = 100,
	                                  .src_end = 1100 };
}

/* Each column, at its first number that is not legal; `legal` is where the next one would be. */
static void test_rows_are_checked(void)
{
	static const struct {
		int64_t row[4];
		uint32_t side;
		uint64_t legal;
	} cases[] = {
		{ { 3, 0, 0, 0 }, 0, 3 },
		{ { -1, 0, 0, 0 }, 0, 3 },
		{ { 0, 1001, 0, 0 }, 1, 1001 },
		{ { 0, -1, 0, 0 }, 1, 1001 },
		{ { 0, INT64_MAX, 0, INT64_MAX }, 1, 1001 },
		{ { 0, 0, -1, 0 }, 2, 1ull << 63 },
		{ { 0, 999, 0, 2 }, 3, 2 },
		{ { 2, 1000, INT64_MAX, -1 }, 3, 1 },
	};
	struct tfd_entry entry = { .op = TFD_OP_SCATTER, .table_count = 2 };
	int64_t wide[8] = { 2, 1000, INT64_MAX, 0, 0, 0, 0, 1000 };
	int32_t narrow[8] = { 2, 1000, INT32_MAX, 0, 0, 0, 0, -1 };
	struct tfd_client_table table = rows_table(wide, TFD_INDEX_I64);
	struct tfd_table_fault fault = { 0 };

	CHECK(tfd_client_tables_check(&entry, &table, 1, &fault) == 0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		memcpy(&wide[4], cases[i].row, sizeof(cases[i].row));
		CHECK(tfd_client_tables_check(&entry, &table, 1, &fault) == -ERANGE);
		CHECK(fault.entry == 0 && fault.position == 1);
		CHECK(fault.side == cases[i].side && fault.legal == cases[i].legal);
	}
	table = rows_table(narrow, TFD_INDEX_I32);
	CHECK(tfd_client_tables_check(&entry, &table, 1, &fault) == -ERANGE && fault.side == 3);
	table.src_form = TFD_INDEX_U32;
	CHECK(tfd_client_tables_check(&entry, &table, 1, &fault) == -ERANGE && fault.side == 3);
	/* One job has at most 2^40 bytes, however large the region is. */
	table = rows_table(wide, TFD_INDEX_I64);
	table.src_end = UINT64_MAX;
	memcpy(&wide[4], (const int64_t[4]){ 0, 0, 0, (1ll << 40) + 1 }, 4 * sizeof(int64_t));
	CHECK(tfd_client_tables_check(&entry, &table, 1, &fault) == -ERANGE);
	CHECK(fault.side == 3 && fault.legal == (1ull << 40) + 1);
}

static void test_rows_arrive_as_targets(void)
{
	const int32_t rows[8] = { 2, 0, 7, 1000, 0, 999, INT32_MAX, 1 };
	const struct tfd_target wanted[2] = { { 72, 100, 7, 1000 }, { 70, 1099, INT32_MAX, 1 } };
	struct tfd_entry entry = { .op = TFD_OP_SCATTER, .table_count = 2 };
	struct tfd_client_table table = rows_table(rows, TFD_INDEX_I32);
	struct tfd_table_fault fault;
	struct fake_daemon fake;
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_submit_tables(client, 0, &entry, &table, 1, 0, &fault) == 0);
	CHECK(memcmp(fake.base + fake.header->arena_offset + fake.ring_entries[0].table_offset, wanted,
	             sizeof(wanted)) == 0);
	tfd_client_close(client);
	fake_fini(&fake);
}

static int submit_pages(struct tfd_client *client, struct tfd_entry *entry, const void *src,
                        uint32_t src_form, const void *dst, int64_t timeout_ns)
{
	struct tfd_table_fault fault;
	struct tfd_client_table table = { .src = src,
	                                  .dst = dst,
	                                  .src_form = src_form,
	                                  .dst_form = TFD_INDEX_I32,
	                                  .src_end = UINT64_MAX,
	                                  .dst_end = UINT64_MAX };

	return tfd_client_submit_tables(client, 0, entry, &table, 1, timeout_ns, &fault);
}

static void test_tables_arrive_whole(void)
{
	const int64_t wide[5] = { 9, 8, 7, 0, UINT32_MAX };
	const int32_t narrow[5] = { 1, 2, 3, 4, INT32_MAX };
	const struct tfd_target targets[3] = { { 1, 2, 3, 4 }, { 5, 6, 7, 8 }, { 9, 10, 11, 12 } };
	struct tfd_entry entries[3] = { pages_entry(1, 5),
	                                { .op = TFD_OP_IMM, .imm = 3 },
	                                { .op = TFD_OP_SCATTER, .table_count = 3 } };
	struct tfd_client_table tables[3] = { { .src = wide,
	                                        .dst = narrow,
	                                        .src_form = TFD_INDEX_I64,
	                                        .dst_form = TFD_INDEX_I32,
	                                        .src_end = UINT64_MAX,
	                                        .dst_end = UINT64_MAX },
	                                      { 0 },
	                                      { .targets = targets } };
	struct tfd_table_fault fault;
	struct fake_daemon fake;
	struct tfd_client *client;
	const struct tfd_page *pages;
	const uint8_t *arena;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_arena_bytes(client) == 4096);
	CHECK(tfd_client_submit_tables(client, 0, entries, tables, 3, 0, &fault) == 0);
	CHECK(fake.ring->tail == 3 && entries[2].job_id);
	arena = fake.base + fake.header->arena_offset;
	pages = (const void *)(arena + fake.ring_entries[0].table_offset);
	for (int i = 0; i < 5; i++)
		CHECK(pages[i].src == (uint32_t)wide[i] && pages[i].dst == (uint32_t)narrow[i]);
	CHECK(fake.ring_entries[0].table_count == 5 && fake.ring_entries[1].table_count == 0);
	CHECK(memcmp(arena + fake.ring_entries[2].table_offset, targets, sizeof(targets)) == 0);
	tfd_client_close(client);
	fake_fini(&fake);
}

/* A full arena is back-pressure; what ended gives its part back, whether its result is kept or not. */
static void test_a_full_arena_is_waited_for(void)
{
	static int32_t index[513];
	struct tfd_entry entry = pages_entry(HELD_LENGTH, 128); /* 1,024 bytes; held */
	struct tfd_entry larger = pages_entry(1, 513);
	struct fake_daemon fake;
	struct tfd_client *client;
	struct tfd_result result;

	fake_layout(&fake, 32, 32, 4);
	client = fake_attach(&fake);
	fake_start(&fake);
	CHECK(submit_pages(client, &larger, index, TFD_INDEX_I32, index, FOREVER) == -EMSGSIZE);
	for (int i = 0; i < 4; i++) {
		CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 0) == 0);
		if (i % 2)
			tfd_client_job_release(client, entry.job_id);
	}
	CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 0) == -EAGAIN);
	CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 2000000) == -ETIMEDOUT);
	/* Others are not held up: an immediate needs no room there. */
	CHECK(tfd_client_job_submit(client, 0, TFD_OP_IMM, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0) > 0);
	fake_flush(&fake);
	for (int i = 0; i < 1000; i++) {
		entry = pages_entry((uint64_t)i, 128 + (uint32_t)i % 380);
		CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, FOREVER) == 0);
		if (i % 7 == 0)
			CHECK(tfd_client_job_wait(client, entry.job_id, FOREVER, 0, &result) == 0);
	}
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

/* The ring is full, or refuses: the room taken for the tables comes back. */
static void test_what_is_not_published_takes_no_room(void)
{
	const int32_t index[512] = { 0 };
	struct tfd_entry entry = pages_entry(1, 512); /* the whole arena */
	struct fake_daemon fake;
	struct tfd_client *client;

	fake_layout(&fake, 2, 16, 4);
	client = fake_attach(&fake);
	for (int i = 0; i < 2; i++)
		CHECK(tfd_client_job_submit(client, 0, TFD_OP_IMM, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0) > 0);
	for (int i = 0; i < 3; i++)
		CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 0) == -EAGAIN);
	CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 1000000) == -ETIMEDOUT);
	CHECK(submit_pages(NULL, &entry, index, TFD_INDEX_I32, index, 0) == -EPIPE);
	tfd_store_release(&fake.ring->head, 2u);
	CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, 0) == 0);
	tfd_client_set_dead(client);
	CHECK(submit_pages(client, &entry, index, TFD_INDEX_I32, index, FOREVER) == -EPIPE);
	tfd_client_close(client);
	fake_fini(&fake);
}

struct producer {
	pthread_t thread;
	struct tfd_client *client;
	uint32_t number;
};

static void *produce(void *argument)
{
	struct producer *p = argument;
	int32_t index[300];
	struct tfd_result result;

	for (int i = 0; i < 300; i++)
		index[i] = (int32_t)p->number;
	for (uint32_t i = 0; i < 2000; i++) {
		struct tfd_entry entry = pages_entry(i, 1 + (i * 7 + p->number * 31) % 300);

		CHECK(submit_pages(p->client, &entry, index, TFD_INDEX_I32, index, FOREVER) == 0);
		if (i % 3 == 0)
			tfd_client_job_release(p->client, entry.job_id);
		else
			CHECK(tfd_client_job_wait(p->client, entry.job_id, FOREVER, 0, &result) == 0);
		if (i % 3 == 1)
			tfd_client_job_release(p->client, entry.job_id);
	}
	return NULL;
}

static void test_several_threads(void)
{
	enum { THREADS = 4 };
	struct producer producers[THREADS];
	struct fake_daemon fake;
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	fake.check_pages = 1;
	fake_start(&fake);
	for (uint32_t i = 0; i < THREADS; i++) {
		producers[i] = (struct producer){ .client = client, .number = i };
		CHECK(pthread_create(&producers[i].thread, NULL, produce, &producers[i]) == 0);
	}
	for (uint32_t i = 0; i < THREADS; i++)
		CHECK(pthread_join(producers[i].thread, NULL) == 0);
	fake_stop(&fake);
	tfd_client_close(client);
	fake_fini(&fake);
}

int main(void)
{
	test_arena_against_a_map();
	test_every_index_is_checked();
	test_narrow_forms();
	test_tables_arrive_whole();
	test_rows_are_checked();
	test_rows_arrive_as_targets();
	test_a_full_arena_is_waited_for();
	test_what_is_not_published_takes_no_room();
	test_several_threads();
	return 0;
}

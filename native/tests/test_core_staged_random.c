/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs of all kinds at random to and from memory that is opened, forgotten, or cannot be opened, at random, while their staged
 * connections break and are made anew.
 *
 *   ended     each job, as OK or by what has happened to it
 *   counted   what was OK, once each; of what failed at most all
 *   left      nothing that keeps the next job from landing
 *
 *   test_core_staged_random [seed] [rounds]
 */
#include "slow_world.h"

#define ROUNDS 60u
#define AT_ONCE 24u
#define PAGES 1500u
#define PAGE_STRIDE 4096u
#define LONG_PAGE 200000u /* more than a slot */
#define WAYS 2u /* staged connections that its open goes by */

struct one {
	struct tfd_record *record;
	uint64_t job;
	uint32_t counts;
};

struct sums {
	uint64_t ok, failed; /* counts of jobs that ended so */
	uint32_t jobs_ok, jobs_failed;
};

static uint64_t state;
static uint64_t ways_out[WAYS], ways_in[WAYS];

static uint32_t any(uint32_t below)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33) % below;
}

/* ---- what happens meanwhile ---- */

static void memory_forget(void)
{
	(void)tfd_stage_memory_forget(slow.end->host.core, slow.end->host.group, SLOW_MEMORY);
}

/* Control's answers, some of them late; nobody may need it any more. */
static void helper_answers(void)
{
	struct host *host = &slow.end->host;
	struct tfd_event event;

	while (tfd_core_events(host->core, &event, 1)) {
		int rc;

		if (event.type != TFD_EVENT_STAGE_NEEDED || event.id != SLOW_MEMORY)
			continue;
		if (!any(3))
			(void)usleep(any(8000));
		if (any(5))
			rc = tfd_stage_memory_set(host->core, host->group, SLOW_MEMORY, slow.end->stage);
		else
			rc = tfd_stage_memory_fail(host->core, host->group, SLOW_MEMORY);
		CHECK(!rc || rc == -ENOENT);
	}
}

static void way_make(uint32_t way)
{
	const struct tfd_region_key *keys = slow.end == &far ? slow.keys : far.device_keys;
	struct tfd_open_path path = { .key = keys[STAGED].key, .address = keys[STAGED].address };

	connect_rails(&near.host, STAGED, &far.host, STAGED, &ways_out[way], &ways_in[way]);
	path.conn = ways_out[way];
	CHECK_OK(tfd_open_path_set(near.host.core, slow_writer()->session, slow.open, STAGED + way, &path));
}

static int half_close(struct tfd_core *core, uint64_t conn, const struct tfd_landed *far_landed,
                      struct tfd_landed *landed)
{
	int rc = -EAGAIN;

	for (uint32_t i = 0; i < 1000 && rc == -EAGAIN; i++)
		rc = tfd_conn_close(core, conn, TFD_DETAIL_CONNECTION, far_landed, landed);
	return rc;
}

static void way_break(uint32_t way)
{
	struct tfd_landed landed = { 0 };

	CHECK_OK(half_close(far.host.core, ways_in[way], NULL, &landed));
	CHECK_OK(half_close(near.host.core, ways_out[way], landed.channels ? &landed : NULL, NULL));
	if (any(2))
		(void)usleep(any(2000));
	way_make(way);
}

/* ---- jobs ---- */

static void tables_fill(void)
{
	const struct user *user = slow_writer();
	struct tfd_page *pages = (void *)(user->segment + user->header->arena_offset);

	for (uint32_t i = 0; i < PAGES; i++)
		pages[i] = (struct tfd_page){ i * 7 % 1000, i * 3 % 1000 };
}

static void make_pages(struct tfd_entry *entry, uint32_t count, uint64_t bytes)
{
	entry->op = TFD_OP_WRITE_PAGES;
	entry->table_count = count;
	entry->length = bytes;
	entry->src_stride = entry->dst_stride = PAGE_STRIDE;
}

static struct one submit_any(void)
{
	struct one one = { .counts = 1 };
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = slow.end == &near ? slow.region : near.region,
	                           .dst_grant = slow.open,
	                           .length = 2 + any(9000),
	                           .imm = SLOW_IMM };

	switch (any(8)) {
	case 0:
		entry.length = 2 + any(DEVICE_BYTES / 2);
		break;
	case 1:
		entry.op = TFD_OP_READ;
		entry.imm = 0;
		one.counts = 0;
		break;
	case 2:
		make_pages(&entry, 1 + any(PAGES), 2 + any(PAGE_STRIDE - 2));
		one.counts = entry.table_count;
		break;
	case 3:
		make_pages(&entry, 1 + any(PAGES), 2 + any(PAGE_STRIDE - 2));
		entry.flags = TFD_FLAG_COUNT_JOB;
		break;
	case 4:
		make_pages(&entry, 1 + any(20), LONG_PAGE);
		entry.src_stride = entry.dst_stride = PAGE_STRIDE / 2;
		one.counts = entry.table_count;
		break;
	case 5:
		entry.flags = TFD_FLAG_EXACT;
		break;
	default:
		break;
	}
	one.record = user_submit(slow_writer(), entry);
	one.job = slow_writer()->next_job;
	return one;
}

static void wait_any(const struct one *one, struct sums *sums)
{
	for (uint32_t i = 0; is_pending(one->record, one->job); i++) {
		CHECK(i < 400000);
		helper_answers();
		(void)usleep(50);
		if (!any(60))
			way_break(any(WAYS));
		if (!any(3000))
			memory_forget();
	}
	if (one->record->status == TFD_JOB_OK) {
		sums->ok += one->counts;
		sums->jobs_ok++;
	} else {
		CHECK(one->record->detail == TFD_DETAIL_STAGING ||
		      one->record->detail == TFD_DETAIL_CONNECTION);
		sums->failed += one->counts;
		sums->jobs_failed++;
	}
}

static void one_round(struct sums *sums)
{
	struct one ones[AT_ONCE];

	for (uint32_t i = 0; i < AT_ONCE; i++) {
		ones[i] = submit_any();
		if (!any(6))
			helper_answers();
	}
	if (any(2)) {
		(void)usleep(any(3000));
		memory_forget();
	}
	for (uint32_t i = 0; i < AT_ONCE; i++)
		wait_any(&ones[i], sums);
}

/* Its memory is opened whenever it is asked for, and lands all that it is sent. */
static void still_lands(void)
{
	struct host *host = &slow.end->host;
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = slow.end == &near ? slow.region : near.region,
	                           .dst_grant = slow.open,
	                           .length = DEVICE_BYTES,
	                           .imm = SLOW_IMM };
	uint8_t *source = slow.end == &near ? slow.bytes : near.device;
	const uint8_t *destination = slow.end == &near ? far.device : slow.bytes;
	uint64_t before = slow_count();
	struct tfd_record *record;
	struct tfd_event event;
	uint64_t job;

	memory_forget();
	copiers_have();
	fill(source, DEVICE_BYTES, 5);
	record = user_submit(slow_writer(), entry);
	job = slow_writer()->next_job;
	for (uint32_t i = 0; is_pending(record, job); i++) {
		CHECK(i < 400000);
		while (tfd_core_events(host->core, &event, 1)) {
			if (event.type == TFD_EVENT_STAGE_NEEDED && event.id == SLOW_MEMORY)
				(void)tfd_stage_memory_set(host->core, host->group, SLOW_MEMORY,
				                           slow.end->stage);
		}
		(void)usleep(50);
	}
	CHECK(record->status == TFD_JOB_OK);
	copiers_have();
	CHECK(!memcmp(source, destination, DEVICE_BYTES));
	CHECK(slow_count() == before + 1);
}

static void test_random(bool at_far, uint32_t rounds)
{
	struct sums sums = { 0 };

	slow_world_open(at_far);
	ways_out[0] = out[STAGED];
	ways_in[0] = in[STAGED];
	for (uint32_t i = 1; i < WAYS; i++)
		way_make(i);
	tables_fill();
	for (uint32_t i = 0; i < rounds; i++)
		one_round(&sums);
	for (uint32_t i = 0; i < 50000 && slow_count() < sums.ok; i++)
		(void)usleep(100);
	CHECK(slow_count() >= sums.ok && slow_count() <= sums.ok + sums.failed);
	CHECK(sums.jobs_ok && sums.jobs_failed);
	still_lands();
	out[STAGED] = ways_out[0];
	in[STAGED] = ways_in[0];
	slow_world_close();
}

int main(int argc, char **argv)
{
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 12345;
	uint32_t rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : ROUNDS;

	state = seed;
	for (int at_far = 0; at_far < 2; at_far++)
		test_random(at_far, rounds);
	return 0;
}

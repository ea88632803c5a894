/* SPDX-License-Identifier: Apache-2.0 */
/* The local provider: by itself (queue, keys, halves), and as the rail of a core whose sessions write to each other. */
#include <stdbool.h>

#include "core_fixture.h"
#include "providers/provider.h"

#define MEMORY_BYTES (2u << 20)

static const struct tfd_provider_ops *const ops = &tfd_local_ops;
static uint32_t copy_threads; /* all of it is run without helpers, and with */

/* ---- the provider by itself ---- */

struct bench {
	struct tfd_domain *domain;
	struct tfd_rail_info info;
	uint8_t *source, *target;
	struct tfd_mr *source_mr, *target_mr;
	struct tfd_region_key source_key, target_key;
	struct tfd_half *out, *in;
	uint8_t out_address[TFD_ADDRESS_MAX], in_address[TFD_ADDRESS_MAX];
	size_t out_bytes, in_bytes;
	int owner;
};

static void bench_join(struct bench *bench)
{
	CHECK_OK(ops->half_open(bench->domain, 1, NULL, &bench->out, bench->out_address, &bench->out_bytes,
	                        &error));
	CHECK_OK(ops->half_open(bench->domain, 0, &bench->owner, &bench->in, bench->in_address,
	                        &bench->in_bytes, &error));
	CHECK_OK(ops->half_start(bench->in, bench->out_address, bench->out_bytes, &error));
	CHECK_OK(ops->half_start(bench->out, bench->in_address, bench->in_bytes, &error));
}

static void half_end(struct tfd_half *half)
{
	struct tfd_wc wc[16];

	ops->half_close(half);
	while (ops->half_drain(half, wc, 16))
		continue;
	ops->half_free(half);
}

static void bench_open(struct bench *bench, uint32_t target_access)
{
	struct tfd_group_options options = { .provider = "local",
	                                     .library = "/nonexistent",
	                                     .copy_threads = copy_threads };

	memset(bench, 0, sizeof(*bench));
	CHECK_OK(ops->domain_open(&options, "local", &bench->info, &bench->domain, &error));
	bench->source = calloc(1, MEMORY_BYTES);
	bench->target = calloc(1, MEMORY_BYTES);
	CHECK(bench->source && bench->target);
	CHECK_OK(ops->mr_open(bench->domain, bench->source, MEMORY_BYTES, 1, &bench->source_mr,
	                      &bench->source_key, &error));
	CHECK_OK(ops->mr_open(bench->domain, bench->target, MEMORY_BYTES, target_access, &bench->target_mr,
	                      &bench->target_key, &error));
	bench_join(bench);
}

static void bench_close(struct bench *bench)
{
	half_end(bench->in);
	half_end(bench->out);
	ops->mr_close(bench->domain, bench->source_mr);
	ops->mr_close(bench->domain, bench->target_mr);
	ops->domain_close(bench->domain);
	free(bench->source);
	free(bench->target);
}

static struct tfd_post piece(const struct bench *bench, uint64_t length)
{
	return (struct tfd_post){ .local = bench->source,
	                          .mr = bench->source_mr,
	                          .length = length,
	                          .remote_address = bench->target_key.address,
	                          .remote_key = bench->target_key.key };
}

static void test_rail(void)
{
	struct bench one, two;
	struct tfd_half *half;
	uint8_t address[TFD_ADDRESS_MAX];
	size_t bytes;

	bench_open(&one, 1);
	bench_open(&two, 1);
	CHECK(strcmp(one.info.name, "local") == 0 && strcmp(one.info.provider, "local") == 0);
	CHECK(strncmp(one.info.protocol, "local/", 6) == 0 && strlen(one.info.protocol) == 6 + 32);
	CHECK(strcmp(one.info.protocol, two.info.protocol) != 0);
	CHECK(one.info.ordered && one.info.max_message_bytes == 256u << 10);
	CHECK(ops->wait_fd(one.domain) >= 0 && ops->arm(one.domain) == 0);
	CHECK_OK(ops->half_open(one.domain, 1, NULL, &half, address, &bytes, &error));
	CHECK(ops->half_start(half, two.in_address, two.in_bytes, &error) == -EPROTO);
	CHECK(ops->half_start(half, one.in_address, one.in_bytes - 1, &error) == -EPROTO);
	CHECK(ops->half_start(half, one.out_address, one.out_bytes, &error) == -EPROTO);
	half_end(one.in);
	CHECK(ops->half_start(half, one.in_address, one.in_bytes, &error) == -ENOTCONN);
	CHECK(ops->post(half, &(struct tfd_post){ .has_imm = 1 }, &(struct tfd_wr){ 0 }) == -ENOTCONN);
	CHECK(ops->post(one.out, &(struct tfd_post){ .has_imm = 1 }, &(struct tfd_wr){ 0 }) == -ENOTCONN);
	half_end(one.out);
	bench_join(&one);
	ops->half_close(half);
	ops->half_free(half);
	bench_close(&one);
	bench_close(&two);
}

/* A full queue, and a pass's share of copying, ask for a poll; nothing is lost and the order is that of the posts. */
static void test_queue(void)
{
	struct tfd_wr *wrs = calloc(2048, sizeof(*wrs));
	struct tfd_wc wc[64];
	struct bench bench;
	uint32_t posted = 0, sent = 0, imms = 0;
	int count;

	CHECK(wrs);
	bench_open(&bench, 1);
	for (int round = 0; round < 1000 && sent < 2048; round++) {
		while (posted < 2048) {
			/* One in a while tells one thing only, so that the queue is filled to an odd number. */
			struct tfd_post imm = { .has_imm = posted % 500 != 0, .imm = posted };
			int rc = ops->post(bench.out, &imm, &wrs[posted]);

			CHECK(rc == 0 || rc == -EAGAIN);
			if (rc)
				break;
			posted++;
		}
		CHECK(posted - sent >= 400 && ops->arm(bench.domain) == -EAGAIN);
		while ((count = ops->poll(bench.domain, wc, 64)) > 0) {
			for (int i = 0; i < count; i++) {
				if (wc[i].type == TFD_WC_IMM) {
					CHECK(wc[i].imm == sent && wc[i].owner == &bench.owner);
					imms++;
				} else {
					CHECK(wc[i].type == TFD_WC_SENT && wc[i].wr == &wrs[sent]);
					sent++;
				}
			}
		}
		CHECK(ops->arm(bench.domain) == 0);
	}
	CHECK(sent == 2048 && imms == 2048 - 5);
	for (posted = 0; posted < 100; posted++) {
		struct tfd_post big = piece(&bench, 256u << 10);

		big.remote_address += posted % 8 * (256u << 10); /* no two at once to the same bytes */
		if (ops->post(bench.out, &big, &wrs[posted]) != 0)
			break;
	}
	CHECK(posted > 0 && posted < 100);
	for (sent = 0; sent < posted; sent += (uint32_t)count) /* helpers may need a while */
		CHECK((count = ops->poll(bench.domain, wc, 64)) == (int)posted || copy_threads);
	CHECK_OK(ops->post(bench.out, &(struct tfd_post){ 0 }, &wrs[0]));
	bench_close(&bench);
	free(wrs);
}

/* Posts on a connection of its own; whether the far side refused it. */
static bool refused(struct bench *bench, struct tfd_post *post)
{
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc[4];

	post->has_imm = !post->read;
	CHECK_OK(ops->post(bench->out, post, &wr));
	if (ops->poll(bench->domain, wc, 4) != 1) {
		CHECK(wc[0].type == TFD_WC_IMM && wc[1].type == TFD_WC_SENT);
		return false;
	}
	CHECK(wc[0].wr == &wr);
	if (wc[0].type == TFD_WC_SENT)
		return false;
	CHECK(wc[0].type == TFD_WC_ERROR && wc[0].error == EACCES && wc[0].remote_access);
	CHECK(ops->post(bench->out, &(struct tfd_post){ .has_imm = 1 }, &wr) == -ENOTCONN);
	half_end(bench->out);
	half_end(bench->in);
	bench_join(bench);
	return true;
}

/* One post of three ranges, of which each may be the one that leaves the memory. */
static void test_parts(void)
{
	struct bench bench;
	struct tfd_post_part parts[2];
	struct tfd_post post;

	bench_open(&bench, 1);
	CHECK(bench.info.max_parts >= 3);
	for (uint32_t i = 0; i < 300; i++)
		bench.source[i] = (uint8_t)(i + 1);
	post = piece(&bench, 100);
	post.part_count = 2;
	post.parts = parts;
	for (uint64_t i = 0; i < 2; i++)
		parts[i] = (struct tfd_post_part){ .local = bench.source + 100 * (i + 1),
		                                   .remote_address = 1000 * (i + 1),
		                                   .length = 100 };
	CHECK(!refused(&bench, &post));
	for (uint32_t i = 0; i < 3; i++) {
		CHECK(memcmp(bench.target + 1000 * i, bench.source + 100 * i, 100) == 0);
		CHECK(bench.target[1000 * i + 100] == 0);
	}
	for (uint32_t i = 0; i < 2; i++) {
		parts[i].remote_address = MEMORY_BYTES - 99;
		CHECK(refused(&bench, &post));
		parts[i].remote_address = 1000 * (i + 1);
	}
	parts[1].length = (256u << 10) - 199;
	CHECK(ops->post(bench.out, &post, &(struct tfd_wr){ 0 }) == -EMSGSIZE);
	bench_close(&bench);
}

static void test_keys(int read)
{
	struct bench bench;
	struct tfd_post good, bad;
	struct tfd_mr *mr;
	struct tfd_region_key key;
	uint64_t stale;

	bench_open(&bench, 1);
	good = piece(&bench, 4096);
	good.read = (uint32_t)read;
	memset(bench.source, 0x11, MEMORY_BYTES);
	memset(bench.target, 0x22, MEMORY_BYTES);
#define REFUSED(field, value)                 \
	do {                                  \
		bad = good;                   \
		bad.field = (value);          \
		CHECK(refused(&bench, &bad)); \
	} while (0)
	REFUSED(remote_key, 0);
	REFUSED(remote_key, UINT64_MAX);
	REFUSED(remote_key, good.remote_key + 1);
	REFUSED(remote_key, good.remote_key + (1ull << 32));
	REFUSED(remote_key, good.remote_key + 1000000);
	REFUSED(remote_address, MEMORY_BYTES - 4095);
	REFUSED(remote_address, MEMORY_BYTES + 1ull);
	REFUSED(remote_address, UINT64_MAX - 4094);
	bad = good;
	bad.length = (256u << 10) + 1;
	CHECK(ops->post(bench.out, &bad, &(struct tfd_wr){ 0 }) == -EMSGSIZE);
	for (uint32_t i = 0; i < MEMORY_BYTES; i++)
		CHECK(bench.source[i] == 0x11 && bench.target[i] == 0x22);
	bad = good;
	bad.remote_address = MEMORY_BYTES - 4096;
	CHECK(!refused(&bench, &bad));
	CHECK(bench.target[MEMORY_BYTES - 1] == (read ? 0x22 : 0x11));
	CHECK(bench.source[0] == (read ? 0x22 : 0x11));
	/* Its slot in the table is used again, its key is not. */
	CHECK_OK(ops->mr_open(bench.domain, bench.target, 8192, 1, &mr, &key, &error));
	ops->mr_close(bench.domain, mr);
	REFUSED(remote_key, key.key);
	stale = key.key;
	CHECK_OK(ops->mr_open(bench.domain, bench.target, 8192, 1, &mr, &key, &error));
	CHECK(key.key != stale);
	REFUSED(remote_key, stale);
	bad = good;
	bad.remote_key = key.key;
	CHECK(!refused(&bench, &bad));
	ops->mr_close(bench.domain, mr);
	bench_close(&bench);
}

static void test_read_only(void)
{
	struct bench bench;
	struct tfd_post post;

	bench_open(&bench, 0);
	post = piece(&bench, 64);
	memset(bench.source, 1, 64);
	CHECK(refused(&bench, &post));
	CHECK(bench.target[0] == 0);
	post.read = 1;
	CHECK(!refused(&bench, &post));
	CHECK(bench.source[0] == 0);
	/* The reader's own memory may not be written to. */
	post.local = bench.target;
	post.mr = bench.target_mr;
	CHECK(ops->post(bench.out, &post, &(struct tfd_wr){ 0 }) == -EACCES);
	bench_close(&bench);
}

/* ---- below a core ---- */

static void host_open_local(struct host *host)
{
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	struct tfd_group_options group = {
		.provider = "local", .rails = { "local" }, .rail_count = 1, .copy_threads = copy_threads
	};

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

/* `from` may write to and read from `key`'s memory, imms 0 to 15. */
static uint64_t open_at(struct user *from, struct user *to, uint64_t conn, uint64_t key, uint64_t address)
{
	struct tfd_open_options options = { .path_count = 1,
	                                    .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16 };
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(to->host->core, to->session, 0, 16, slots));
	CHECK_OK(tfd_session_name_space(to->host->core, to->session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = conn, .key = key, .address = address };
	CHECK_OK(tfd_open_add(from->host->core, from->session, &options, &open));
	return open;
}

static uint64_t open_region(struct user *from, struct user *to, uint64_t conn, uint64_t region)
{
	struct tfd_region_key key;

	CHECK_OK(tfd_region_keys(to->host->core, to->session, region, &key, 1));
	return open_at(from, to, conn, key.key, key.address);
}

static struct tfd_entry entry_of(const struct user *user, uint8_t op, uint64_t open, uint64_t length,
                                 uint32_t imm)
{
	return (struct tfd_entry){
		.op = op, .src_region = user->region, .dst_grant = open, .length = length, .imm = imm
	};
}

static void expect(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status != status || record->detail != detail) {
		(void)fprintf(stderr, "status %u detail %u\n", record->status, record->detail);
		CHECK(!"the job's end");
	}
}

static void wait_value(const struct user *user, uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&user->counters[imm].value) < value; i++)
		(void)usleep(100);
	CHECK(user->counters[imm].value == value);
}

static void test_writes(struct user *a, struct user *b, uint64_t open)
{
	const uint64_t lengths[] = { 0, 1, 4096, 65537, (1u << 20) + 3, REGION_BYTES };
	struct tfd_record *record;

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		memset(a->memory, (int)(i + 1), REGION_BYTES);
		record = user_run(a, entry_of(a, TFD_OP_WRITE, open, lengths[i], 3));
		expect(record, TFD_JOB_OK, 0);
		CHECK((record->path & TFD_PATH_PROVIDER_MASK) == TFD_PATH_LOCAL);
		wait_value(b, 3, i + 1);
		CHECK(memcmp(a->memory, b->memory, lengths[i]) == 0);
	}
	expect(user_run(a, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = open, .imm = 4 }), TFD_JOB_OK,
	       0);
	wait_value(b, 4, 1);
	CHECK(a->counters[0].value == 0);
}

static void test_reads(struct user *a, struct user *b, uint64_t open)
{
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		b->memory[i] = (uint8_t)(i * 2654435761u >> 11);
	for (uint64_t length = 1; length <= REGION_BYTES; length = length * 7 + 1) {
		memset(a->memory, 0, REGION_BYTES);
		expect(user_run(a, entry_of(a, TFD_OP_READ, open, length, 0)), TFD_JOB_OK, 0);
		CHECK(memcmp(a->memory, b->memory, length) == 0);
		CHECK(length == REGION_BYTES || a->memory[length] == 0);
	}
}

/* Small pages go many in a post. */
static void test_pages(struct user *a, struct user *b, uint64_t open)
{
	struct tfd_page *pages = (void *)(a->segment + a->header->arena_offset);
	struct tfd_entry entry = entry_of(a, TFD_OP_WRITE_PAGES, open, 1000, 7);
	struct tfd_record *record;

	entry.src_stride = 1000;
	entry.dst_stride = 1024;
	entry.table_count = 1000;
	for (uint32_t i = 0; i < 1000; i++)
		pages[i] = (struct tfd_page){ .src = 999 - i, .dst = i };
	memset(b->memory, 0, REGION_BYTES);
	record = user_run(a, entry);
	expect(record, TFD_JOB_OK, 0);
	CHECK(record->path & TFD_PATH_PACKED);
	wait_value(b, 7, 1000);
	for (uint32_t i = 0; i < 1000; i++)
		CHECK(memcmp(b->memory + 1024 * i, a->memory + 1000 * (999 - i), 1000) == 0);
}

/* Many writers' worth of small writes at once: more than the queue holds. */
static void test_many(struct user *a, struct user *b, uint64_t open)
{
	const uint64_t before = b->counters[5].value;
	const uint64_t first = a->next_job + 1;

	for (uint64_t i = 0; i < 6400; i++) {
		if (i >= 64) /* as many records as there are */
			wait_done(&a->records[(first + i) % 64], first + i - 64);
		(void)user_submit(a, entry_of(a, TFD_OP_WRITE, open, i % 100, 5));
	}
	for (uint64_t job = first + 6400 - 64; job < first + 6400; job++)
		wait_done(&a->records[job % 64], job);
	wait_value(b, 5, before + 6400);
}

/* An idle worker goes to sleep, and stays there: its clients are told to ring. */
static void test_idle(const struct user *a)
{
	int asleep = 0;

	for (int i = 0; i < 50000 && asleep < 20; i++) {
		asleep = tfd_load_seq(&a->ring->need_wakeup) ? asleep + 1 : 0;
		(void)usleep(500);
	}
	CHECK(asleep == 20);
}

/* A key that nobody has, and a range that leaves the region: refused, told, and another connection does not notice. */
static void test_bad_keys(struct user *a, struct user *b, uint64_t good)
{
	const uint64_t value = b->counters[6].value;
	struct tfd_region_key key;
	uint64_t out, in;

	CHECK_OK(tfd_region_keys(b->host->core, b->session, b->region, &key, 1));
	memset(a->memory, 0x31, REGION_BYTES);
	memset(b->memory, 0x32, REGION_BYTES);
	for (int i = 0; i < 2; i++) {
		uint64_t open;

		connect_hosts(a->host, b->host, &out, &in);
		open = i ? open_at(a, b, out, key.key, key.address + 4096) :
		           open_at(a, b, out, key.key + (1ull << 32), key.address);
		expect(user_run(a, entry_of(a, TFD_OP_WRITE, open, REGION_BYTES, 6)), TFD_JOB_REMOTE_ACCESS,
		       TFD_DETAIL_CONNECTION);
		(void)wait_event(a->host, TFD_EVENT_CONN_LOST, out);
		CHECK_OK(tfd_conn_close(a->host->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
		CHECK_OK(tfd_conn_close(a->host->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
		for (uint32_t k = 0; k < 4096; k++)
			CHECK(b->memory[k] == 0x32);
	}
	CHECK(b->counters[6].value == value);
	expect(user_run(a, entry_of(a, TFD_OP_WRITE, good, 4096, 6)), TFD_JOB_OK, 0);
	wait_value(b, 6, value + 1);
	CHECK(b->memory[0] == 0x31);
}

/*
 * The receiver closes in the midst of writes: from then on nothing lands, and what has landed is what it says. Whether it was in
 * their midst: if all were over first, nothing was shown.
 */
static bool close_fences(struct user *a, struct user *b)
{
	const uint64_t value = b->counters[7].value;
	struct tfd_record *records[32];
	struct tfd_landed told;
	uint64_t jobs[32], out, in, open, landed, ok = 0;
	uint8_t *before = malloc(REGION_BYTES);

	CHECK(before);
	connect_hosts(a->host, b->host, &out, &in);
	open = open_region(a, b, out, b->region);
	for (int i = 0; i < 32; i++) {
		records[i] = user_submit(a, entry_of(a, TFD_OP_WRITE, open, REGION_BYTES, 7));
		jobs[i] = a->next_job;
	}
	CHECK_OK(tfd_conn_close(b->host->core, in, TFD_DETAIL_CONNECTION, NULL, &told));
	CHECK(told.channels == 1);
	landed = told.imms[0];
	memcpy(before, b->memory, REGION_BYTES);
	CHECK(b->counters[7].value == value + landed);
	if (landed < 32)
		(void)wait_event(a->host, TFD_EVENT_CONN_LOST, out);
	memset(a->memory, (int)value + 1, REGION_BYTES);
	CHECK_OK(tfd_conn_close(a->host->core, out, TFD_DETAIL_CONNECTION, &told, NULL));
	for (int i = 0; i < 32; i++) {
		wait_done(records[i], jobs[i]);
		CHECK(records[i]->status == TFD_JOB_PEER_LOST || records[i]->status == TFD_JOB_OK);
		ok += records[i]->status == TFD_JOB_OK;
	}
	CHECK(ok == landed);
	CHECK(memcmp(before, b->memory, REGION_BYTES) == 0);
	CHECK(b->counters[7].value == value + landed);
	free(before);
	return landed < 32;
}

static void test_close_fence(struct user *a, struct user *b)
{
	uint32_t tries = 0;

	while (!close_fences(a, b))
		CHECK(++tries < 100);
}

static uint64_t unsealed_region(struct user *user, int *fd)
{
	struct tfd_region_options options = { .writable = 1, .length = REGION_BYTES };
	uint64_t region;

	*fd = options.fd = memfd_create("unsealed", MFD_CLOEXEC);
	CHECK(*fd >= 0 && ftruncate(*fd, REGION_BYTES) == 0);
	CHECK_OK(tfd_region_add(user->host->core, user->session, &options, &region, &error));
	return region;
}

/* Pages that vanish: of the source the job fails, of the destination its owner is told; of what is read the reader gets no zeros. */
static void test_vanished(struct user *a, struct user *b, uint64_t good)
{
	struct tfd_entry entry = entry_of(a, TFD_OP_WRITE, good, REGION_BYTES, 8);
	uint64_t out, in, open, region;
	int fd;

	entry.src_region = region = unsealed_region(a, &fd);
	CHECK(ftruncate(fd, 4096) == 0);
	expect(user_run(a, entry), TFD_JOB_LOCAL_ACCESS, TFD_DETAIL_BROKEN_REGION);
	(void)wait_event(a->host, TFD_EVENT_REGION_BROKEN, region);
	CHECK(user_run(a, entry)->detail == TFD_DETAIL_BROKEN_REGION);
	(void)close(fd);

	region = unsealed_region(b, &fd);
	connect_hosts(a->host, b->host, &out, &in);
	open = open_region(a, b, out, region);
	CHECK(ftruncate(fd, 4096) == 0);
	expect(user_run(a, entry_of(a, TFD_OP_WRITE, open, REGION_BYTES, 8)), TFD_JOB_OK, 0);
	(void)wait_event(a->host, TFD_EVENT_REGION_BROKEN, region);
	(void)close(fd);

	region = unsealed_region(b, &fd);
	open = open_region(a, b, out, region);
	CHECK(ftruncate(fd, 4096) == 0);
	expect(user_run(a, entry_of(a, TFD_OP_READ, open, REGION_BYTES, 0)), TFD_JOB_REMOTE_ACCESS,
	       TFD_DETAIL_CONNECTION);
	CHECK_OK(tfd_conn_close(a->host->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(a->host->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	(void)close(fd);
	expect(user_run(a, entry_of(a, TFD_OP_WRITE, good, 4096, 8)), TFD_JOB_OK, 0);
}

static void test_core(void)
{
	struct host host;
	struct user a, b;
	uint64_t out, in, open;

	host_open_local(&host);
	user_open(&host, &a);
	user_open(&host, &b);
	connect_hosts(&host, &host, &out, &in);
	open = open_region(&a, &b, out, b.region);
	test_writes(&a, &b, open);
	test_reads(&a, &b, open);
	test_pages(&a, &b, open);
	test_many(&a, &b, open);
	test_idle(&a);
	test_bad_keys(&a, &b, open);
	test_close_fence(&a, &b);
	test_vanished(&a, &b, open);
	user_close(&a);
	user_close(&b);
	tfd_core_close(host.core);
}

int main(void)
{
	for (copy_threads = 0; copy_threads <= 2; copy_threads += 2) {
		test_rail();
		test_queue();
		test_parts();
		test_keys(0);
		test_keys(1);
		test_read_only();
		test_core();
	}
	return 0;
}

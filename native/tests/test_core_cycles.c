/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions and connections over and over: no file descriptor, mapping or name space is left behind. */
#include <dirent.h>
#include <malloc.h>
#include <stdbool.h>

#include "core/parts.h"
#include "core_fixture.h"

#define CYCLES 200

static int count_entries(const char *path)
{
	DIR *directory = opendir(path);
	int count = 0;

	CHECK(directory);
	while (readdir(directory))
		count++;
	(void)closedir(directory);
	return count;
}

#ifdef __SANITIZE_ADDRESS__
#define ASAN 1
#else
#define ASAN 0
#endif

static int count_maps(void)
{
	FILE *file = fopen("/proc/self/maps", "r");
	int lines = 0;
	int c;

	CHECK(file);
	while ((c = fgetc(file)) != EOF)
		lines += c == '\n';
	(void)fclose(file);
	return lines;
}

static int count_free_wrs(struct tfd_worker *worker, void *argument)
{
	uint32_t *count = argument;

	for (struct tfd_wr *wr = worker->wr_free; wr; wr = wr->next)
		++*count;
	return 0;
}

/* Work requests whose connection closed under them are used again. */
static void check_wrs(struct host *host)
{
	uint32_t count = 0;

	CHECK_OK(tfd_command_run(host->core->groups[0]->worker, count_free_wrs, &count));
	if (count != TFD_WRS_PER_WORKER)
		(void)fprintf(stderr, "%u of %u work requests are free\n", count, TFD_WRS_PER_WORKER);
	CHECK(count == TFD_WRS_PER_WORKER);
}

/* A connection closes with pieces in flight; with `first` the far half closes before. Whether the job failed. */
static bool cycle_in_flight(struct host *host_a, struct host *host_b, bool first)
{
	struct user a, b;
	uint64_t out, in;
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .length = REGION_BYTES, .imm = 1 };
	struct tfd_record *record;
	bool failed;

	user_open(host_a, &a);
	user_open(host_b, &b);
	connect_hosts(host_a, host_b, &out, &in);
	entry.dst_grant = open_grant(&a, &b, out);
	entry.src_region = a.region;
	record = user_submit(&a, entry);
	(void)usleep(500);
	if (first)
		CHECK_OK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(host_a->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	wait_done(record, a.next_job);
	failed = record->status == TFD_JOB_PEER_LOST;
	if (!first)
		CHECK_OK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	user_close(&a);
	user_close(&b);
	check_wrs(host_a);
	return failed;
}

static void cycle(struct host *host_a, struct host *host_b)
{
	struct user a, b;
	uint64_t out, in;
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .length = 4096, .imm = 1 };

	user_open(host_a, &a);
	user_open(host_b, &b);
	connect_hosts(host_a, host_b, &out, &in);
	entry.dst_grant = open_grant(&a, &b, out);
	entry.src_region = a.region;
	CHECK(user_run(&a, entry)->status == TFD_JOB_OK);
	(void)user_submit(&a, entry); /* dies in flight */
	user_close(&a);
	CHECK_OK(tfd_conn_close(host_a->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK_OK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, NULL, NULL) == -ENOENT);
	user_close(&b);
}

/* A core that ends while counts hold parts of writes, and while nobody has taken what control submitted with tables. */
static void core_cycle(bool ends_first)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "sim", .rail_count = 1 };
	struct tfd_entry entry = { .op = TFD_OP_WRITE_PAGES, .table_count = 1 };
	struct tfd_page page = { 0 };
	struct host host;
	struct user user;
	uint32_t slots[4];

	(void)strcpy(group.rails[0], "sim0");
	CHECK_OK(tfd_core_open(&core, &host.core, &error));
	CHECK_OK(tfd_group_open(host.core, &group, &host.group, &error));
	user_open(&host, &user);
	CHECK_OK(tfd_counters_add(host.core, user.session, 0, 4, slots));
	CHECK_OK(tfd_counters_fault(host.core, user.session, 0, 4, 1, 3, 77));
	CHECK_OK(tfd_jobs_submit(host.core, user.session, &entry, 1, &page, sizeof(page)));
	if (ends_first) {
		CHECK_OK(tfd_session_end(host.core, user.session, TFD_DETAIL_SESSION_ENDED));
		CHECK(tfd_jobs_submit(host.core, user.session, &entry, 1, &page, sizeof(page)) == -ESHUTDOWN);
		user_free(&user);
	} else {
		user_unmap(&user);
	}
	tfd_core_close(host.core);
}

/* The allocator's own count; 0 under sanitizers, which find leaks themselves. */
static size_t allocated(void)
{
	return mallinfo2().uordblks;
}

static void core_cycles(void)
{
	size_t before;

	for (int i = 0; i < 20; i++) /* until the allocator's caches are as they stay */
		core_cycle(i % 2);
	before = allocated();
	for (int i = 0; i < 10; i++)
		core_cycle(i % 2);
	CHECK(allocated() == before);
}

int main(void)
{
	struct host host_a, host_b;
	int fds, tasks, maps, failed = 0;

	host_open(&host_a);
	host_open(&host_b);
	for (int i = 0; i < 10; i++)
		cycle(&host_a, &host_b);
	fds = count_entries("/proc/self/fd");
	tasks = count_entries("/proc/self/task");
	maps = count_maps();
	for (int i = 0; i < CYCLES; i++)
		cycle(&host_a, &host_b);
	CHECK(count_entries("/proc/self/fd") == fds);
	CHECK(count_entries("/proc/self/task") == tasks);
	if (!ASAN) /* it keeps what was freed, in mappings of its own; without it there are none more */
		CHECK(count_maps() <= maps + 2);
	for (int i = 0; i < 20; i++)
		failed += cycle_in_flight(&host_a, &host_b, i % 2);
	CHECK(failed > 0);
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
	core_cycles();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions and connections over and over: no file descriptor, mapping or name space is left behind. */
#include <dirent.h>

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
	CHECK_OK(tfd_conn_close(host_a->core, out, TFD_DETAIL_CONNECTION, TFD_LANDED_UNKNOWN, NULL));
	CHECK_OK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, TFD_LANDED_UNKNOWN, NULL));
	CHECK(tfd_conn_close(host_b->core, in, TFD_DETAIL_CONNECTION, TFD_LANDED_UNKNOWN, NULL) == -ENOENT);
	user_close(&b);
}

int main(void)
{
	struct host host_a, host_b;
	int fds, tasks, maps;

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
	CHECK(count_maps() <= maps + 8); /* the allocator's own */
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Memory whose pages are taken away: no SIGBUS, the job fails, another session goes on. */
#include <fcntl.h>

#include "core/parts.h"
#include "core_fixture.h"

static uint64_t unsealed_region(struct user *user, int *fd)
{
	struct tfd_region_options options = { .writable = 1, .length = REGION_BYTES };
	uint64_t region;

	*fd = options.fd = memfd_create("unsealed", MFD_CLOEXEC);
	CHECK(*fd >= 0 && ftruncate(*fd, REGION_BYTES) == 0);
	CHECK_OK(tfd_region_add(user->host->core, user->session, &options, &region, &error));
	return region;
}

static void test_bounds(struct user *user)
{
	struct tfd_region_options options = { .writable = 1, .length = REGION_BYTES + 1 };
	uint64_t region;

	options.fd = memfd_create("short", MFD_CLOEXEC);
	CHECK(ftruncate(options.fd, REGION_BYTES) == 0);
	CHECK(tfd_region_add(user->host->core, user->session, &options, &region, &error) == -EINVAL);
	options.offset = UINT64_MAX;
	CHECK(tfd_region_add(user->host->core, user->session, &options, &region, &error) == -EINVAL);
	options = (struct tfd_region_options){ .fd = options.fd, .offset = 1, .length = 4096 };
	CHECK(tfd_region_add(user->host->core, user->session, &options, &region, &error) == -EINVAL);
	(void)close(options.fd);
	options.fd = -1;
	CHECK(tfd_region_add(user->host->core, user->session, &options, &region, &error) == -EBADF);
	CHECK(tfd_region_remove(user->host->core, user->session, 12345) == -ENOENT);
}

static int touch(struct tfd_worker *worker, void *argument)
{
	struct tfd_region *region = argument;

	(void)worker;
	((volatile uint8_t *)region->base)[region->length - 1] = 1; /* SIGBUS without the guard */
	return 0;
}

static void test_guard(struct user *user)
{
	struct tfd_session *session;
	int fd;
	uint64_t region = unsealed_region(user, &fd);
	struct tfd_region *inside;

	session = tfd_session_get(user->host->core, user->session);
	inside = tfd_table_get(&session->regions, region);
	CHECK(ftruncate(fd, 4096) == 0);
	CHECK_OK(tfd_command_run(session->group->worker, touch, inside));
	CHECK(tfd_load_relaxed(&inside->broken) == 1);
	tfd_session_put(session);
	CHECK_OK(tfd_region_remove(user->host->core, user->session, region));
	(void)close(fd);
}

/* The kernel's copy reports EFAULT: the job ends LOCAL_ACCESS, and a connection of its own bears the damage. */
static void test_truncated_source(struct user *a, struct user *b)
{
	uint64_t out, in, good_out, good_in, open, good;
	struct tfd_record *record;
	int fd;
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .length = REGION_BYTES, .imm = 1 };

	connect_hosts(a->host, b->host, &good_out, &good_in);
	good = open_grant(a, b, good_out);
	connect_hosts(a->host, b->host, &out, &in);
	open = open_grant(a, b, out);
	entry.src_region = unsealed_region(a, &fd);
	entry.dst_grant = open;
	CHECK(ftruncate(fd, 4096) == 0);
	record = user_submit(a, entry);
	(void)wait_event(a->host, TFD_EVENT_CONN_LOST, out);
	CHECK_OK(tfd_conn_close(a->host->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	wait_done(record, a->next_job);
	CHECK(record->status == TFD_JOB_LOCAL_ACCESS && record->detail == TFD_DETAIL_BROKEN_REGION);
	CHECK(user_run(a, entry)->detail == TFD_DETAIL_BROKEN_REGION);
	entry.src_region = a->region;
	entry.dst_grant = good;
	CHECK(user_run(a, entry)->status == TFD_JOB_OK);
	(void)close(fd);
}

/* A NIC goes on reading the pages that it had, whatever becomes of their file. */
static bool is_pinned(void)
{
	const char *provider = getenv("TFD_TEST_PROVIDER");

	return provider && strcmp(provider, "verbs") == 0;
}

struct registering {
	struct user *user;
	uint32_t stop;
};

/* Other regions of its session come and go. */
static void *register_thread(void *argument)
{
	struct registering *registering = argument;
	struct user *user = registering->user;
	struct tfd_region_options options = { .writable = 1, .length = 1u << 20 };
	struct tfd_region_key key;
	uint64_t region;

	options.fd = memfd_create("coming", MFD_CLOEXEC);
	CHECK(options.fd >= 0 && ftruncate(options.fd, 1 << 20) == 0);
	while (!tfd_load_seq(&registering->stop)) {
		CHECK_OK(tfd_region_add(user->host->core, user->session, &options, &region, &error));
		CHECK_OK(tfd_region_keys(user->host->core, user->session, region, &key, 1));
		CHECK_OK(tfd_region_remove(user->host->core, user->session, region));
	}
	(void)close(options.fd);
	return NULL;
}

/* At both ends, while writes go from one to the other. */
static void test_registering(struct user *a, struct user *b)
{
	struct registering registering[2] = { { .user = a }, { .user = b } };
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .length = 300000, .imm = 7 };
	uint64_t out, in, before;
	pthread_t threads[2];

	connect_hosts(a->host, b->host, &out, &in);
	entry.dst_grant = open_grant(a, b, out);
	entry.src_region = a->region;
	before = tfd_load_acquire(&b->counters[7].value);
	for (int i = 0; i < 2; i++)
		CHECK(pthread_create(&threads[i], NULL, register_thread, &registering[i]) == 0);
	for (uint32_t i = 0; i < 100; i++) {
		memset(a->memory, (int)i + 1, entry.length);
		CHECK(user_run(a, entry)->status == TFD_JOB_OK);
		CHECK(memcmp(a->memory, b->memory, entry.length) == 0);
	}
	for (int i = 0; i < 2; i++) {
		tfd_store_seq(&registering[i].stop, 1);
		CHECK(pthread_join(threads[i], NULL) == 0);
	}
	for (int i = 0; i < 5000 && tfd_load_acquire(&b->counters[7].value) != before + 100; i++)
		(void)usleep(1000);
	CHECK(tfd_load_acquire(&b->counters[7].value) == before + 100);
}

int main(void)
{
	struct host host_a, host_b;
	struct user a, b;

	host_open(&host_a);
	host_open(&host_b);
	user_open(&host_a, &a);
	user_open(&host_b, &b);
	test_bounds(&a);
	test_registering(&a, &b);
	test_guard(&a);
	if (!is_pinned())
		test_truncated_source(&a, &b);
	user_close(&a);
	user_close(&b);
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Plans by the client's own half, and a daemon: tables that are filled beforehand, and where they lie in the arena. */
#include "core/parts.h"
#include "core_fixture.h"
#include "shm/session.h"

#define SLICE 4096u

static struct host host;
static struct user user, target;
static struct tfd_client *client;
static uint64_t grant;

static struct tfd_result ended(uint64_t job)
{
	struct tfd_result result;

	CHECK_OK(tfd_client_job_wait(client, job, 20000000000, 0, &result));
	tfd_client_job_release(client, job);
	return result;
}

static uint32_t plan_open(struct tfd_entry entry, const struct tfd_client_table *table, uint32_t with_table)
{
	struct tfd_table_fault fault;

	CHECK_OK(tfd_client_plan_open(client, 0, &entry, table, with_table, -1, &fault));
	CHECK(ended(entry.job_id).status == TFD_JOB_OK);
	return entry.plan;
}

static uint32_t watcher; /* of armed launches */

static uint64_t launch(uint32_t plan, uint64_t armed_at)
{
	struct tfd_entry entry = { .op = TFD_OP_LAUNCH, .plan = plan };

	if (armed_at) {
		entry.flags = TFD_FLAG_ARMED;
		entry.fire_at = armed_at;
		entry.watcher = watcher;
	}
	CHECK_OK(tfd_client_submit_wait(client, 0, &entry, 1, -1));
	return entry.job_id;
}

static void launch_ok(uint32_t plan)
{
	CHECK(ended(launch(plan, 0)).status == TFD_JOB_OK);
}

static void plan_close(uint32_t plan)
{
	struct tfd_entry entry = { .op = TFD_OP_FORGET, .argument = plan };

	CHECK_OK(tfd_client_submit_wait(client, 0, &entry, 1, -1));
	CHECK(ended(entry.job_id).status == TFD_JOB_OK);
	tfd_client_plan_close(client, plan);
	tfd_client_plan_close(client, plan); /* once more does nothing */
}

static bool landed(uint64_t src, uint64_t dst, uint64_t length)
{
	return memcmp(target.memory + dst, user.memory + src, length) == 0;
}

static bool arena_is_free(void)
{
	return client->arena.taken == 0 && client->arena.free_count == 1 &&
	       client->arena.free[0].bytes == client->arena.bytes;
}

static struct tfd_entry write_entry(void)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = user.region,
	                           .src_offset = SLICE,
	                           .dst_grant = grant,
	                           .dst_offset = 7,
	                           .length = 5000,
	                           .imm = 1 };
}

static void test_write(void)
{
	uint32_t plain = plan_open(write_entry(), NULL, 0);
	uint32_t tabled = plan_open(write_entry(), NULL, 1);
	struct tfd_plan_table *head = tfd_client_plan_table(client, tabled);
	struct tfd_slice *slice = (void *)(head + 1);

	CHECK(plain != tabled && !tfd_client_plan_table(client, plain) && head);
	memset(target.memory, 0, 64 * SLICE);
	launch_ok(plain);
	CHECK(landed(SLICE, 7, 5000));
	memset(target.memory, 0, 64 * SLICE);
	launch_ok(tabled); /* as it was made */
	CHECK(landed(SLICE, 7, 5000) && head->count == 1 && slice->length == 5000 && slice->dst_offset == 7);
	*slice = (struct tfd_slice){ 1, 3 * SLICE, 100 };
	launch_ok(tabled);
	CHECK(landed(SLICE + 1, 3 * SLICE, 100));
	plan_close(plain);
	plan_close(tabled);
	CHECK(arena_is_free() && !tfd_client_plan_table(client, tabled));
}

static void test_scatter(void)
{
	struct tfd_target targets[2] = { { grant, SLICE + 10, 0, 100 }, { grant, SLICE + 20, SLICE, 200 } };
	struct tfd_client_table table = { .targets = targets };
	struct tfd_entry entry = { .op = TFD_OP_SCATTER,
	                           .src_region = user.region,
	                           .src_offset = SLICE,
	                           .length = SLICE,
	                           .imm = 1,
	                           .table_count = 2 };
	uint32_t plan = plan_open(entry, &table, 1);
	struct tfd_slice *slices = (void *)((struct tfd_plan_table *)tfd_client_plan_table(client, plan) + 1);

	CHECK(client->arena.taken == 1); /* what the daemon read is free again */
	CHECK(slices[0].src_offset == 10 && slices[1].src_offset == 20 && slices[1].dst_offset == SLICE &&
	      slices[1].length == 200);
	memset(target.memory, 0, 64 * SLICE);
	launch_ok(plan);
	CHECK(landed(SLICE + 10, 0, 100) && landed(SLICE + 20, SLICE, 200) && !target.memory[SLICE + 200]);
	plan_close(plan);
	CHECK(arena_is_free());
}

static void test_pages(void)
{
	uint32_t src[3] = { 1, 2, 3 };
	uint64_t dst[3] = { 5, 4, 9 };
	struct tfd_client_table table = { .src = src,
	                                  .dst = dst,
	                                  .src_form = TFD_INDEX_U32,
	                                  .dst_form = TFD_INDEX_U64,
	                                  .src_end = REGION_BYTES,
	                                  .dst_end = REGION_BYTES };
	struct tfd_entry entry = { .op = TFD_OP_WRITE_PAGES,
	                           .src_region = user.region,
	                           .dst_grant = grant,
	                           .length = SLICE,
	                           .src_stride = SLICE,
	                           .dst_stride = SLICE,
	                           .imm = 1,
	                           .table_count = 3 };
	uint32_t plan = plan_open(entry, &table, 0); /* has one in any case */
	struct tfd_plan_table *head = tfd_client_plan_table(client, plan);
	struct tfd_page *pages = (void *)(head + 1);
	struct tfd_table_fault fault;

	CHECK(head->count == 3 && pages[2].src == 3 && pages[2].dst == 9);
	memset(target.memory, 0, 64 * SLICE);
	launch_ok(plan);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(landed(src[i] * SLICE, dst[i] * SLICE, SLICE));
	head->count = 1;
	pages[0] = (struct tfd_page){ 7, 0 };
	launch_ok(plan);
	CHECK(landed(7 * SLICE, 0, SLICE));
	plan_close(plan);
	dst[1] = REGION_BYTES / SLICE; /* told by its place, and nothing is taken */
	CHECK(tfd_client_plan_open(client, 0, &entry, &table, 0, -1, &fault) == -ERANGE);
	CHECK(fault.side == 1 && fault.position == 1 && fault.legal == REGION_BYTES / SLICE);
	entry.table_count = 1u << 20;
	entry.length = entry.src_stride = entry.dst_stride = 0;
	table.src = table.dst = calloc(1u << 20, sizeof(uint64_t));
	table.src_form = TFD_INDEX_U64;
	CHECK(tfd_client_plan_open(client, 0, &entry, &table, 0, -1, &fault) == -EMSGSIZE);
	free((void *)(uintptr_t)table.src);
	CHECK(arena_is_free());
}

/* Its table stays where it is until the last launch has ended, whoever forgets the plan. */
static void test_closed_under_launches(void)
{
	uint32_t plan = plan_open(write_entry(), NULL, 1);
	uint64_t waiting[3];

	for (uint32_t i = 0; i < 3; i++)
		waiting[i] = launch(plan, i + 1);
	plan_close(plan);
	CHECK(client->arena.taken == 1 && client->plans[plan].taken);
	for (uint32_t i = 0; i < 3; i++) {
		CHECK(client->arena.taken == 1);
		CHECK_OK(tfd_client_watcher_bump(client, watcher, 1));
		CHECK(ended(waiting[i]).status == TFD_JOB_OK);
	}
	CHECK(arena_is_free() && !client->plans[plan].taken);
}

static void test_all_are_taken(void)
{
	struct tfd_entry entry = write_entry();
	struct tfd_entry wrong = write_entry();
	struct tfd_table_fault fault;
	uint32_t count = client->plan_count;

	for (uint32_t i = 0; i < count; i++)
		(void)plan_open(write_entry(), NULL, 1);
	CHECK(tfd_client_plan_open(client, 0, &entry, NULL, 1, -1, &fault) == -ENOSPC);
	for (uint32_t i = 0; i < count; i++)
		plan_close(i);
	CHECK(arena_is_free());
	wrong.imm = 99; /* refused by the daemon: to be closed */
	CHECK_OK(tfd_client_plan_open(client, 0, &wrong, NULL, 1, -1, &fault));
	CHECK(ended(wrong.job_id).detail == TFD_DETAIL_IMM_RANGE);
	tfd_client_plan_close(client, wrong.plan);
	CHECK(arena_is_free());
	CHECK(ended(launch(3, 0)).detail == TFD_DETAIL_BAD_PLAN);
	CHECK(ended(launch(UINT32_MAX, 0)).detail == TFD_DETAIL_BAD_PLAN);
	CHECK(!tfd_client_plan_table(client, UINT32_MAX));
}

int main(void)
{
	uint64_t out, in;

	host_open(&host);
	user_open(&host, &target);
	user_open(&host, &user);
	connect_hosts(&host, &host, &out, &in);
	grant = open_grant(&user, &target, out);
	CHECK_OK(tfd_client_open(user.fds.segment_fd, &user.fds.doorbell_fd, 1, &client));
	CHECK_OK(tfd_client_watcher_open(client, &watcher));
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		user.memory[i] = (uint8_t)(i * 2654435761u >> 13);
	test_write();
	test_scatter();
	test_pages();
	test_closed_under_launches();
	test_all_are_taken();
	tfd_client_close(client);
	user_close(&user);
	user_close(&target);
	tfd_core_close(host.core);
	return 0;
}

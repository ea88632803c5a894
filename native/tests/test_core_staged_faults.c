/* SPDX-License-Identifier: Apache-2.0 */
/* Helpers that fail, end or stand still, at either end; halves that are closed while they copy. What is not staged goes on. */
#include "staged_world.h"

#define BYTES 700000u

static uint64_t device_open, plain_open;

static struct tfd_record *submit(void)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = near.region,
	                           .dst_grant = device_open,
	                           .length = BYTES,
	                           .imm = 3 };

	copiers_have();
	fill(near.device, BYTES, 7);
	return user_submit(&near.user, entry);
}

/* By the other path, which is not to notice. */
static void direct_goes_on(void)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = near.user.region,
	                           .dst_grant = plain_open,
	                           .length = 5000,
	                           .imm = 4 };

	CHECK(user_run(&near.user, entry)->status == TFD_JOB_OK);
}

static void is_well(void)
{
	struct tfd_record *record = submit();
	uint64_t before = counter_value(3);

	wait_done(record, near.user.next_job);
	CHECK(record->status == TFD_JOB_OK && path_of(record) == TFD_PATH_STAGED);
	wait_counter(3, before + 1);
	copiers_have();
	CHECK(memcmp(near.device, far.device, BYTES) == 0);
}

static void no_connection_is_lost(void)
{
	struct tfd_event event;

	while (tfd_core_events(near.host.core, &event, 1))
		CHECK(event.type != TFD_EVENT_CONN_LOST);
	while (tfd_core_events(far.host.core, &event, 1))
		CHECK(event.type != TFD_EVENT_CONN_LOST);
}

/* It ends alone, and has not counted: neither its connection nor what else goes by that notices. */
static void fails_alone(struct tfd_record *record, uint64_t job, uint32_t status)
{
	wait_done(record, job);
	CHECK(record->status == status && record->detail == TFD_DETAIL_STAGING);
	direct_goes_on();
	is_well();
	CHECK(counter_value(3) == 1);
	no_connection_is_lost();
}

static uint32_t status_of(const struct end *end)
{
	return end == &far ? TFD_JOB_REMOTE_ACCESS : TFD_JOB_LOCAL_ACCESS;
}

static void open_both(void)
{
	world_open(true);
	device_open = grant_open(true);
	plain_open = grant_open(false);
}

/* One request of a helper's, which says so: of the pieces behind it, which are copied, none counts. */
static void test_request_fails(void)
{
	for (uint32_t at_far = 0; at_far < 2; at_far++) {
		struct tfd_stage_info info;
		struct end *end = at_far ? &far : &near;
		struct tfd_record *record;

		open_both();
		tfd_store_seq(&end->copier.fail_next, 1);
		record = submit();
		fails_alone(record, near.user.next_job, status_of(end));
		CHECK_OK(tfd_stage_stat(end->host.core, end->host.group, end->stage, &info));
		CHECK(info.failed == 1 && !info.waiting);
		world_close();
	}
}

/* Jobs of others are under way by the same connection when some of them cannot be copied. */
static void test_bystanders(void)
{
	for (uint32_t at_far = 0; at_far < 2; at_far++) {
		struct end *end = at_far ? &far : &near;
		struct tfd_record *records[40];
		uint64_t first, failed = 0;

		open_both();
		first = near.user.next_job + 1;
		for (uint32_t i = 0; i < 40; i++) {
			struct tfd_entry entry = { .op = TFD_OP_WRITE,
			                           .src_region = near.region,
			                           .src_offset = i * 65536,
			                           .dst_grant = device_open,
			                           .dst_offset = i * 65536,
			                           .length = 65536,
			                           .imm = 3 };

			if (i % 8 == 3)
				(void)tfd_add_seq(&end->copier.fail_next, 1);
			fill(near.device + i * 65536, 65536, i);
			records[i] = user_submit(&near.user, entry);
		}
		for (uint32_t i = 0; i < 40; i++) {
			wait_done(records[i], first + i);
			failed += records[i]->status != TFD_JOB_OK;
			CHECK(records[i]->status == TFD_JOB_OK || records[i]->status == status_of(end));
			copiers_have();
			CHECK(records[i]->status != TFD_JOB_OK ||
			      memcmp(near.device + i * 65536, far.device + i * 65536, 65536) == 0);
		}
		CHECK(failed >= 1 && failed <= 5);
		wait_counter(3, 40 - failed);
		no_connection_is_lost();
		world_close();
	}
}

/* The memory that control has announced is not open there. */
static void test_not_open(void)
{
	for (uint32_t at_far = 0; at_far < 2; at_far++) {
		struct end *end = at_far ? &far : &near;
		struct tfd_record *record;
		uint64_t job;

		open_both();
		CHECK_OK(tfd_stage_memory_forget(end->host.core, end->host.group, end->memory));
		record = submit();
		job = near.user.next_job;
		(void)wait_event(&end->host, TFD_EVENT_STAGE_NEEDED, end->memory);
		CHECK_OK(tfd_stage_memory_fail(end->host.core, end->host.group, end->memory));
		wait_done(record, job);
		CHECK_OK(tfd_stage_memory_set(end->host.core, end->host.group, end->memory, end->stage));
		fails_alone(record, job, status_of(end));
		CHECK(tfd_stage_memory_set(end->host.core, end->host.group, end->memory, 99) == -ENOENT);
		world_close();
	}
}

static void await_waiting(struct end *end)
{
	struct tfd_stage_info info = { 0 };

	for (int i = 0; i < 50000 && !info.waiting; i++) {
		CHECK_OK(tfd_stage_stat(end->host.core, end->host.group, end->stage, &info));
		(void)usleep(100);
	}
	CHECK(info.waiting);
}

/* Its process ends with copies under way; a new one takes its place. */
static void test_helper_ends(void)
{
	for (uint32_t at_far = 0; at_far < 2; at_far++) {
		struct end *end = at_far ? &far : &near;
		struct tfd_record *record;
		uint64_t job;

		open_both();
		tfd_store_seq(&end->copier.hold, 1);
		record = submit();
		job = near.user.next_job;
		await_waiting(end);
		end_helper_close(end);
		CHECK(tfd_stage_close(end->host.core, end->host.group, end->stage) == -ENOENT);
		direct_goes_on();
		wait_done(record, job);
		CHECK(record->status == status_of(end) && counter_value(3) == 0);
		record = submit();
		job = near.user.next_job;
		(void)wait_event(&end->host, TFD_EVENT_STAGE_NEEDED, end->memory);
		tfd_store_seq(&end->copier.hold, 0);
		end_helper_open(end);
		wait_done(record, job);
		CHECK(record->status == TFD_JOB_OK);
		wait_counter(3, 1);
		is_well();
		no_connection_is_lost();
		world_close();
	}
}

/* It says that it is dead, and is ended only then: so long nothing new is asked of it. */
static void test_helper_dead(void)
{
	struct tfd_record *record;
	struct tfd_event event;
	uint64_t job;

	open_both();
	tfd_store_seq(&near.copier.hold, 1);
	record = submit();
	job = near.user.next_job;
	await_waiting(&near);
	tfd_store_release(&near.copier.stage->state, TFD_STAGE_DEAD); /* pairs with check_silence */
	event = wait_event(&near.host, TFD_EVENT_STAGE_SILENT, near.stage);
	CHECK(event.count == near.host.group);
	end_helper_close(&near);
	tfd_store_seq(&near.copier.hold, 0);
	end_helper_open(&near);
	fails_alone(record, job, TFD_JOB_LOCAL_ACCESS);
	world_close();
}

/* With a copy to the far device that its helper holds. */
static struct tfd_record *held_at_far(void)
{
	struct tfd_record *record;

	open_both();
	tfd_store_seq(&far.copier.hold, 1);
	record = submit();
	await_waiting(&far);
	return record;
}

static int close_far_half(struct tfd_landed *landed)
{
	return tfd_conn_close(far.host.core, in[STAGED], TFD_DETAIL_CONNECTION, NULL, landed);
}

/* Its memory may be written to, and so whoever closes it is told, however often. The worker does not wait for that. */
static void is_not_closed(void)
{
	uint8_t address[TFD_ADDRESS_MAX] = { 0 };
	struct tfd_landed landed;

	for (int i = 0; i < 3; i++)
		CHECK(close_far_half(&landed) == -EAGAIN);
	CHECK(tfd_conn_start(far.host.core, in[STAGED], address, 64, &error) == -EINVAL);
	direct_goes_on();
}

static void close_both(struct tfd_landed *landed)
{
	int rc = -EAGAIN;

	for (int i = 0; i < 500 && rc == -EAGAIN; i++)
		rc = close_far_half(landed);
	CHECK_OK(rc);
	CHECK(close_far_half(landed) == -ENOENT);
	CHECK_OK(tfd_conn_close(near.host.core, out[STAGED], TFD_DETAIL_CONNECTION, landed, NULL));
}

/* What a helper was asked for before the half is closed has been done, or was never asked, by the time that the close says so. */
static void test_close_waits(void)
{
	struct tfd_record *record = held_at_far();
	uint64_t job = near.user.next_job;
	struct tfd_stage_info info;
	struct tfd_landed landed;

	is_not_closed();
	tfd_store_seq(&far.copier.hold, 0);
	close_both(&landed);
	CHECK_OK(tfd_stage_stat(far.host.core, far.host.group, far.stage, &info));
	CHECK(!info.waiting);
	copiers_have();
	memset(far.device, 0x5a, BYTES);
	wait_done(record, job);
	CHECK(record->status == TFD_JOB_PEER_LOST);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(far.device[i] == 0x5a);
	connect_rails(&near.host, STAGED, &far.host, STAGED, &out[STAGED], &in[STAGED]);
	direct_goes_on();
	world_close();
}

/* Of a helper that does not answer: only once its stage is closed is a half. */
static void test_close_of_a_silent_helper(void)
{
	struct tfd_record *record = held_at_far();
	uint64_t job = near.user.next_job;
	struct tfd_landed landed;

	is_not_closed();
	end_helper_close(&far);
	close_both(&landed);
	wait_done(record, job);
	CHECK(record->status == TFD_JOB_PEER_LOST);
	CHECK(counter_value(3) == 0);
	world_close();
}

/* A core that ends asks nobody again. */
static void test_core_ends(void)
{
	struct tfd_landed landed;

	(void)held_at_far();
	CHECK(close_far_half(&landed) == -EAGAIN);
	copier_stop(&far.copier);
	user_close(&far.user);
	tfd_core_close(far.host.core);
	free(far.allocation);
	CHECK_OK(tfd_conn_close(near.host.core, out[STAGED], TFD_DETAIL_CONNECTION, NULL, NULL));
	wait_done(&near.user.records[near.user.next_job % near.user.header->record_count],
	          near.user.next_job);
	end_close(&near);
}

static void test_without_staged_rails(void)
{
	struct tfd_stage_fds fds;
	struct host host;
	uint64_t stage;
	struct tfd_core_options core = { .spin_us = 50, .max_sessions = 16 };
	struct tfd_group_options group = {
		.provider = "tcp", .rails = { "127.0.0.1" }, .rail_count = 1, .staging_bytes = 1000
	};

	CHECK_OK(tfd_core_open(&core, &host.core, &error));
	CHECK(tfd_group_open(host.core, &group, &host.group, &error) == -EINVAL);
	CHECK(strstr(error.text, "1000 bytes"));
	group.staging_bytes = 0;
	CHECK_OK(tfd_group_open(host.core, &group, &host.group, &error));
	CHECK(tfd_stage_open(host.core, host.group, &stage, &fds, &error) == -ENOTSUP);
	CHECK(tfd_stage_close(host.core, host.group, 1) == -ENOTSUP);
	tfd_core_close(host.core);
}

int main(void)
{
	test_request_fails();
	test_bystanders();
	test_not_open();
	test_helper_ends();
	test_helper_dead();
	test_close_waits();
	test_close_of_a_silent_helper();
	test_core_ends();
	test_without_staged_rails();
	return 0;
}

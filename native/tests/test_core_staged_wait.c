/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that no helper has open yet: who needs it waits, and nobody else, at neither end; it goes on when it is open, fails alone when it
 * cannot be, and ends as any other when its connection, its time or its session does.
 */
#include "slow_world.h"

#define PIECE 65536u
#define SLOW_JOBS 8u
#define SLOW_BYTES (DEVICE_BYTES / SLOW_JOBS)
#define OTHERS 40u

static const uint8_t *slow_source(void)
{
	return slow.end == &near ? slow.bytes : near.device;
}

static const uint8_t *slow_destination(void)
{
	return slow.end == &near ? far.device : slow.bytes;
}

static struct tfd_record *slow_submit(uint32_t index)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = slow.end == &near ? slow.region : near.region,
	                           .src_offset = index * SLOW_BYTES,
	                           .dst_grant = slow.open,
	                           .dst_offset = index * SLOW_BYTES,
	                           .length = SLOW_BYTES,
	                           .imm = SLOW_IMM };

	return user_submit(slow_writer(), entry);
}

/* Its helper's answer, by control. */
static void slow_told(bool open)
{
	struct host *host = &slow.end->host;

	(void)wait_event(host, TFD_EVENT_STAGE_NEEDED, SLOW_MEMORY);
	if (open)
		CHECK_OK(tfd_stage_memory_set(host->core, host->group, SLOW_MEMORY, slow.end->stage));
	else
		CHECK_OK(tfd_stage_memory_fail(host->core, host->group, SLOW_MEMORY));
}

static uint32_t slow_status(void)
{
	return slow.end == &far ? TFD_JOB_REMOTE_ACCESS : TFD_JOB_LOCAL_ACCESS;
}

/* Whose memory is open: one after the other they end. */
static void others_go_on(uint32_t count)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = near.region,
	                           .dst_grant = device_open,
	                           .length = PIECE,
	                           .imm = 4 };
	uint64_t before = counter_value(4);

	for (uint32_t i = 0; i < count; i++) {
		struct tfd_record *record = user_run(&near.user, entry);

		CHECK(record->status == TFD_JOB_OK && path_of(record) == TFD_PATH_STAGED);
	}
	wait_counter(4, before + count);
}

static void no_connection_is_lost(void)
{
	struct tfd_event event;

	while (tfd_core_events(near.host.core, &event, 1))
		CHECK(event.type != TFD_EVENT_CONN_LOST);
	while (tfd_core_events(far.host.core, &event, 1))
		CHECK(event.type != TFD_EVENT_CONN_LOST);
}

/* While jobs wait, others of the same connection come and go; then they all land, and count once each. */
static void test_others_go_on(bool at_far)
{
	struct tfd_record *records[SLOW_JOBS];
	uint64_t first, jobs[SLOW_JOBS];

	slow_world_open(at_far);
	fill(at_far ? near.device : slow.bytes, DEVICE_BYTES, 3);
	first = slow_writer()->next_job + 1;
	for (uint32_t i = 0; i < SLOW_JOBS; i++) {
		records[i] = slow_submit(i);
		jobs[i] = slow_writer()->next_job;
		if (!at_far)
			others_go_on(1);
	}
	others_go_on(OTHERS);
	CHECK(jobs[0] == first);
	for (uint32_t i = 0; i < SLOW_JOBS; i++)
		CHECK(is_pending(records[i], jobs[i]));
	CHECK(slow_count() == 0);
	copiers_have();
	if (at_far)
		CHECK(!memcmp(slow.bytes, slow.bytes + 1, DEVICE_BYTES - 1) && !slow.bytes[0]);
	else
		fill(slow.bytes, DEVICE_BYTES, 9); /* nothing has been copied by now */
	slow_told(true);
	for (uint32_t i = 0; i < SLOW_JOBS; i++) {
		wait_done(records[i], jobs[i]);
		CHECK(records[i]->status == TFD_JOB_OK && records[i]->bytes == SLOW_BYTES);
	}
	for (int i = 0; i < 50000 && slow_count() != SLOW_JOBS; i++)
		(void)usleep(100);
	CHECK(slow_count() == SLOW_JOBS);
	copiers_have();
	CHECK(memcmp(slow_source(), slow_destination(), DEVICE_BYTES) == 0);
	no_connection_is_lost();
	slow_world_close();
}

/* It cannot be opened: all that wait fail by one answer, and the next one asks anew. */
static void test_it_cannot_be_opened(bool at_far)
{
	struct tfd_record *records[SLOW_JOBS];
	uint64_t jobs[SLOW_JOBS];

	slow_world_open(at_far);
	for (uint32_t round = 0; round < 2; round++) {
		for (uint32_t i = 0; i < SLOW_JOBS; i++) {
			records[i] = slow_submit(i);
			jobs[i] = slow_writer()->next_job;
		}
		others_go_on(OTHERS); /* so that all of them have been refused once */
		slow_told(false);
		for (uint32_t i = 0; i < SLOW_JOBS; i++) {
			wait_done(records[i], jobs[i]);
			CHECK(records[i]->status == slow_status() &&
			      records[i]->detail == TFD_DETAIL_STAGING);
		}
		others_go_on(1);
		CHECK(slow_count() == 0);
	}
	no_connection_is_lost();
	slow_world_close();
}

static int patience_command(struct tfd_worker *worker, void *argument)
{
	(void)argument;
	worker->group->rails[STAGED].patience_ns = 50000000;
	return 0;
}

/* Control does not answer: each fails by itself in the end. */
static void test_nobody_answers(bool at_far)
{
	struct tfd_record *record;
	uint64_t job;

	slow_world_open(at_far);
	CHECK_OK(tfd_command_run(near.host.core->groups[near.host.group]->worker, patience_command, NULL));
	record = slow_submit(0);
	job = slow_writer()->next_job;
	wait_done(record, job);
	CHECK(record->status == slow_status() && record->detail == TFD_DETAIL_STAGING);
	others_go_on(OTHERS);
	no_connection_is_lost();
	slow_world_close();
}

/* Reads, from memory that is not open, or into it. */
static void test_reads(bool at_far)
{
	struct tfd_entry entry = { .op = TFD_OP_READ, .length = DEVICE_BYTES };
	struct tfd_record *record;
	uint64_t job;

	slow_world_open(at_far);
	entry.src_region = at_far ? near.region : slow.region;
	entry.dst_grant = slow.open;
	fill(at_far ? slow.bytes : far.device, DEVICE_BYTES, 6);
	record = user_submit(slow_writer(), entry);
	job = slow_writer()->next_job;
	others_go_on(1);
	CHECK(is_pending(record, job));
	copiers_have();
	fill(at_far ? slow.bytes : far.device, DEVICE_BYTES, 7);
	slow_told(true);
	wait_done(record, job);
	CHECK(record->status == TFD_JOB_OK && record->bytes == DEVICE_BYTES);
	copiers_have();
	CHECK(memcmp(at_far ? near.device : slow.bytes, at_far ? slow.bytes : far.device, DEVICE_BYTES) == 0);
	slow_world_close();
}

/* What waits ends with its time, its fence, its connection, its session. */
static void test_ends_while_it_waits(bool at_far)
{
	const struct tfd_imm_range range = { SLOW_IMM, 1 };
	struct tfd_landed landed;
	struct tfd_record *record;
	uint64_t job;

	slow_world_open(at_far);
	record = slow_submit(0);
	job = slow_writer()->next_job;
	others_go_on(1);
	CHECK(is_pending(record, job));
	CHECK_OK(tfd_open_fence(near.host.core,
	                        slow_writer() == &slow.user ? slow.user.session : near.user.session,
	                        slow.open, &range, 1, 77));
	wait_done(record, job);
	CHECK(record->status == TFD_JOB_CANCELLED && record->detail == TFD_DETAIL_FENCED);
	(void)wait_event(&near.host, TFD_EVENT_FENCE_QUIET, slow.open);
	record = slow_submit(0);
	job = slow_writer()->next_job;
	others_go_on(1);
	CHECK(is_pending(record, job));
	CHECK_OK(tfd_conn_close(far.host.core, in[STAGED], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(near.host.core, out[STAGED], TFD_DETAIL_CONNECTION, &landed, NULL));
	wait_done(record, job);
	CHECK(record->status == TFD_JOB_PEER_LOST);
	CHECK(slow_count() == 0);
	slow_world_close();
}

static void test_session_ends_while_it_waits(bool at_far)
{
	struct tfd_record *records[SLOW_JOBS];
	uint64_t jobs[SLOW_JOBS];

	slow_world_open(at_far);
	for (uint32_t i = 0; i < SLOW_JOBS; i++) {
		records[i] = slow_submit(i);
		jobs[i] = slow_writer()->next_job;
	}
	others_go_on(1);
	CHECK_OK(tfd_session_end(near.host.core, slow_writer()->session, TFD_DETAIL_SESSION_ENDED));
	for (uint32_t i = 0; i < SLOW_JOBS; i++) {
		wait_done(records[i], jobs[i]);
		CHECK(records[i]->status == TFD_JOB_CANCELLED);
	}
	slow_world_close();
}

struct posted_call {
	struct tfd_conn *conn;
	uint64_t posted;
};

static int posted_command(struct tfd_worker *worker, void *argument)
{
	struct posted_call *call = argument;

	(void)worker;
	call->posted = call->conn->orders[0].posted;
	return 0;
}

/* How many immediates the near half has posted. */
static uint64_t posted(void)
{
	struct posted_call call = { .conn = tfd_conn_get(near.host.core, out[STAGED]) };

	CHECK_OK(tfd_command_run(call.conn->group->worker, posted_command, &call));
	tfd_conn_put(call.conn);
	return call.posted;
}

/*
 * An answer that a post has failed may be lost with the connection: then nobody knows what became of the posts around it. Once its sender
 * must have heard of it they are numbered at both ends alike.
 */
static void test_numbers_of_what_landed(bool at_far)
{
	for (uint32_t later = 0; later < 2; later++) {
		struct tfd_landed landed;
		struct tfd_record *record;
		uint64_t job;

		slow_world_open(at_far);
		record = slow_submit(0);
		job = slow_writer()->next_job;
		others_go_on(1);
		slow_told(false);
		wait_done(record, job);
		others_go_on(later ? TFD_VOID_POSTS : 1);
		CHECK_OK(tfd_conn_close(far.host.core, in[STAGED], TFD_DETAIL_CONNECTION, NULL, &landed));
		CHECK(landed.channels == later && (!later || landed.imms[0] == posted()));
		slow_world_close();
	}
}

int main(void)
{
	for (int at_far = 0; at_far < 2; at_far++) {
		test_others_go_on(at_far);
		test_it_cannot_be_opened(at_far);
		test_nobody_answers(at_far);
		test_reads(at_far);
		test_ends_while_it_waits(at_far);
		test_session_ends_while_it_waits(at_far);
		test_numbers_of_what_landed(at_far);
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Two cores in one process, joined over loopback: writes, immediates, refusals, cancel, fences, loss. */
#include "core_fixture.h"

static void wait_value(struct user *user, uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&user->counters[imm].value) < value; i++)
		(void)usleep(100);
	CHECK(user->counters[imm].value == value);
}

static void check_refused(struct user *user, struct tfd_entry entry, uint32_t detail)
{
	struct tfd_record *record = user_run(user, entry);

	CHECK(record->status == TFD_JOB_INVALID);
	CHECK(record->detail == detail);
}

static void test_writes(struct user *a, struct user *b, uint64_t open)
{
	const uint64_t lengths[] = { 0, 1, 4096, 65537, (1u << 20) + 3, REGION_BYTES };
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .src_region = a->region, .dst_grant = open, .imm = 3 };
	uint64_t counted = 0;

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		memset(a->memory, (int)(i + 1), REGION_BYTES);
		entry.length = lengths[i];
		CHECK(user_run(a, entry)->status == TFD_JOB_OK);
		wait_value(b, 3, ++counted);
		CHECK(memcmp(a->memory, b->memory, lengths[i]) == 0);
	}
	CHECK(user_run(a, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = open, .imm = 4 })->status ==
	      TFD_JOB_OK);
	wait_value(b, 4, 1);
	CHECK(a->counters[0].value == 0);
}

static void test_refusals(struct user *a, uint64_t open)
{
	const struct tfd_entry good = {
		.op = TFD_OP_WRITE, .src_region = a->region, .dst_grant = open, .length = 8, .imm = 1
	};
	struct tfd_entry bad;

#define REFUSED(field, value, detail)          \
	do {                                   \
		bad = good;                    \
		bad.field = (value);           \
		check_refused(a, bad, detail); \
	} while (0)
	REFUSED(op, 0, TFD_DETAIL_BAD_OP);
	REFUSED(op, 99, TFD_DETAIL_BAD_OP);
	REFUSED(flags, TFD_FLAG_COUNT_JOB, TFD_DETAIL_BAD_FLAGS);
	REFUSED(plan, 1, TFD_DETAIL_BAD_FLAGS); /* neither made nor launched */
	REFUSED(trigger, 1, TFD_DETAIL_BAD_FLAGS);
	REFUSED(marks, 1, TFD_DETAIL_BAD_FLAGS);
	REFUSED(watcher, 1, TFD_DETAIL_BAD_FLAGS); /* of jobs that are not armed */
	REFUSED(fire_at, 1, TFD_DETAIL_BAD_FLAGS);
	REFUSED(flags, TFD_FLAG_POLLED, TFD_DETAIL_BAD_FLAGS);
	REFUSED(table_count, 1, TFD_DETAIL_BAD_FLAGS);
	REFUSED(src_stride, 8, TFD_DETAIL_BAD_FLAGS);
	REFUSED(priority, 2, TFD_DETAIL_BAD_FLAGS);
	REFUSED(src_region, a->region + 1, TFD_DETAIL_BAD_REGION);
	REFUSED(src_region, 0, TFD_DETAIL_BAD_REGION);
	REFUSED(src_offset, REGION_BYTES - 7, TFD_DETAIL_SOURCE_BOUNDS);
	REFUSED(src_offset, UINT64_MAX - 3, TFD_DETAIL_SOURCE_BOUNDS);
	REFUSED(dst_grant, open + 1, TFD_DETAIL_BAD_GRANT);
	REFUSED(dst_offset, UINT64_MAX - 3, TFD_DETAIL_DESTINATION_BOUNDS);
	REFUSED(dst_offset, REGION_BYTES - 7, TFD_DETAIL_DESTINATION_BOUNDS);
	REFUSED(length, TFD_MAX_LENGTH + 1, TFD_DETAIL_LENGTH);
	REFUSED(length, REGION_BYTES + 1, TFD_DETAIL_DESTINATION_BOUNDS);
	REFUSED(imm, 16, TFD_DETAIL_IMM_RANGE);
	REFUSED(imm, 1u << 20, TFD_DETAIL_IMM_BITS);
	CHECK(user_run(a, (struct tfd_entry){ .op = TFD_OP_ACKNOWLEDGE, .imm = 9 })->detail ==
	      TFD_DETAIL_BAD_COUNTER);
	CHECK(user_run(a, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = 1 })->detail ==
	      TFD_DETAIL_NO_SUCH_JOB);
	bad = good;
	bad.deadline_ns = 1;
	CHECK(user_run(a, bad)->status == TFD_JOB_DEADLINE);
}

static void test_cancel(struct user *a, uint64_t open)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = a->region,
	                           .dst_grant = open,
	                           .length = REGION_BYTES,
	                           .imm = 5 };
	struct tfd_record *records[16];
	uint64_t jobs[16];
	uint32_t cancelled = 0;

	for (int i = 0; i < 16; i++) {
		records[i] = user_submit(a, entry);
		jobs[i] = a->next_job;
	}
	(void)user_run(a, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = jobs[15] });
	for (int i = 0; i < 16; i++) {
		wait_done(records[i], jobs[i]);
		cancelled += records[i]->status == TFD_JOB_CANCELLED;
		CHECK(records[i]->status == TFD_JOB_OK || i == 15);
	}
	CHECK(cancelled == 1);
	CHECK(wait_event(a->host, TFD_EVENT_LOST, open).count == 1);
}

static void test_faults(struct user *b)
{
	CHECK_OK(tfd_counters_fault(b->host->core, b->session, 7, 1, 2, 0, 0));
	CHECK(b->counters[7].faults == 1 && b->counters[7].lost == 2);
	CHECK(b->counters[7].gate == b->counters[7].value + TFD_GATE_FAULT);
	CHECK(user_run(b, (struct tfd_entry){ .op = TFD_OP_ACKNOWLEDGE, .imm = 7 })->status == TFD_JOB_OK);
	CHECK(b->counters[7].acknowledged == 1 && b->counters[7].gate == b->counters[7].value);
}

static void test_revoke(struct user *a, uint64_t open)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = a->region,
	                           .dst_grant = open,
	                           .length = REGION_BYTES,
	                           .imm = 6 };
	struct tfd_record *record = user_submit(a, entry);
	uint64_t job = a->next_job;

	CHECK_OK(tfd_open_revoke(a->host->core, a->session, open, TFD_DETAIL_REVOKED));
	(void)wait_event(a->host, TFD_EVENT_OPEN_QUIET, open);
	wait_done(record, job);
	check_refused(a, entry, TFD_DETAIL_REVOKED);
	CHECK_OK(tfd_open_remove(a->host->core, a->session, open));
	check_refused(a, entry, TFD_DETAIL_BAD_GRANT);
}

/* The receiving half goes away in the middle: the job ends PEER_LOST, a new connection works at once. */
static void test_connection_loss(struct user *a, struct user *b)
{
	struct tfd_entry entry = {
		.op = TFD_OP_WRITE, .src_region = a->region, .length = REGION_BYTES, .imm = 2
	};
	enum { JOBS = 32 };
	struct tfd_record *records[JOBS];
	uint64_t jobs[JOBS], out, in, open;

	connect_hosts(a->host, b->host, &out, &in);
	entry.dst_grant = open = open_grant(a, b, out);
	memset(a->memory, 1, REGION_BYTES);
	memset(b->memory, 0, REGION_BYTES);
	for (int i = 0; i < JOBS; i++) {
		records[i] = user_submit(a, entry);
		jobs[i] = a->next_job;
	}
	while (!*(volatile uint8_t *)b->memory) /* bytes begin to land */
		continue;
	CHECK_OK(tfd_conn_close(b->host->core, in, TFD_DETAIL_CONNECTION, NULL, NULL));
	(void)wait_event(a->host, TFD_EVENT_CONN_LOST, out);
	CHECK_OK(tfd_conn_close(a->host->core, out, TFD_DETAIL_CONNECTION, NULL, NULL));
	for (int i = 0; i < JOBS; i++) {
		wait_done(records[i], jobs[i]);
		CHECK(records[i]->status == TFD_JOB_PEER_LOST || records[i]->status == TFD_JOB_OK);
	}
	CHECK(records[JOBS - 1]->status == TFD_JOB_PEER_LOST);
	CHECK(user_run(a, entry)->status == TFD_JOB_PEER_LOST);
	connect_hosts(a->host, b->host, &out, &in);
	entry.dst_grant = open_grant(a, b, out);
	CHECK(user_run(a, entry)->status == TFD_JOB_OK);
	CHECK(memcmp(a->memory, b->memory, REGION_BYTES) == 0);
}

static void test_garbage(struct host *host)
{
	struct user user;

	user_open(host, &user);
	tfd_store_seq(&user.ring->tail, user.ring->tail + 65);
	(void)!write(user.fds.doorbell_fd, &(uint64_t){ 1 }, 8);
	(void)wait_event(host, TFD_EVENT_SESSION_BROKEN, user.session);
	user_close(&user);
	user_open(host, &user);
	(void)user_submit(&user, (struct tfd_entry){ .op = TFD_OP_IMM });
	user.entries[user.ring->tail % 64].record = 64;
	user.entries[user.ring->tail % 64].job_id = 1;
	tfd_store_seq(&user.ring->tail, user.ring->tail + 1);
	(void)!write(user.fds.doorbell_fd, &(uint64_t){ 1 }, 8);
	(void)wait_event(host, TFD_EVENT_SESSION_BROKEN, user.session);
	user_close(&user);
}

static void test_control_submit(struct user *a, uint64_t open)
{
	struct tfd_entry entries[100];
	struct tfd_job_end end;

	for (int i = 0; i < 100; i++)
		entries[i] = (struct tfd_entry){ .op = TFD_OP_WRITE,
		                                 .src_region = a->region,
		                                 .dst_grant = open,
		                                 .length = 100,
		                                 .imm = 8 };
	CHECK_OK(tfd_jobs_submit(a->host->core, a->session, entries, 100, NULL, 0));
	for (int i = 0; i < 100; i++) {
		int rc = -EAGAIN;

		for (int k = 0; k < 50000 && rc == -EAGAIN; k++) {
			rc = tfd_job_result(a->host->core, a->session, entries[i].job_id, &end);
			(void)usleep(100);
		}
		CHECK(rc == 0 && end.status == TFD_JOB_OK);
	}
	CHECK(tfd_job_result(a->host->core, a->session, 101, &end) == -ENOENT);
}

int main(void)
{
	struct host host_a, host_b;
	struct user a, b;
	uint64_t out, in, open;

	host_open(&host_a);
	host_open(&host_b);
	user_open(&host_a, &a);
	user_open(&host_b, &b);
	connect_hosts(&host_a, &host_b, &out, &in);
	open = open_grant(&a, &b, out);
	test_writes(&a, &b, open);
	test_refusals(&a, open);
	test_cancel(&a, open);
	test_faults(&b);
	test_control_submit(&a, open);
	test_revoke(&a, open);
	test_connection_loss(&a, &b);
	test_garbage(&host_a);
	user_close(&a);
	user_close(&b);
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Armed jobs on the simulated fabric, stepped: when they start, in which order, and how they end without having started. */
#include "sim_pair.h"

#define MANY 4096u
#define SLICE 4096u

struct armed {
	const struct tfd_record *record;
	uint64_t id;
};

static struct tfd_entry write_entry(const struct sim_pair *pair, uint32_t imm, uint64_t src)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .src_region = pair->from.region,
	                           .src_offset = src,
	                           .dst_grant = pair->grant,
	                           .length = SLICE,
	                           .imm = imm };
}

static struct armed arm_on(struct sim_pair *pair, struct user *user, uint32_t watcher, uint64_t value,
                           struct tfd_entry entry)
{
	struct armed armed;

	entry.flags |= TFD_FLAG_ARMED;
	entry.watcher = watcher;
	entry.fire_at = value;
	armed.record = user_submit(user, entry);
	armed.id = user->next_job;
	(void)pair;
	return armed;
}

static struct armed arm(struct sim_pair *pair, uint64_t value, struct tfd_entry entry)
{
	return arm_on(pair, &pair->from, 0, value, entry);
}

static void bump_to(struct sim_pair *pair, uint64_t value)
{
	tfd_store_release(&pair->from.watchers[0].value, value);
	sim_steps(pair, 4);
}

static bool over(const struct armed *armed)
{
	return tfd_load_acquire(&armed->record->done_id) == armed->id;
}

/* It has ended, with this, and is not in the way of another on its watcher. */
static void expect_end(struct sim_pair *pair, const struct armed *armed, uint32_t status, uint32_t detail)
{
	sim_await(pair, armed->record, armed->id);
	expect(armed->record, status, detail);
}

static uint64_t value_of(const struct sim_pair *pair, uint32_t imm)
{
	return tfd_load_acquire(&pair->to.counters[imm].value);
}

static const struct tfd_session *session_of(const struct sim_pair *pair)
{
	return tfd_table_get(&pair->a.core->sessions, pair->from.session);
}

static void reset(struct sim_pair *pair)
{
	CHECK(session_of(pair)->armed_count == 0 && session_of(pair)->job_count == 0);
	CHECK(session_of(pair)->group->worker->polled == 0);
	CHECK(tfd_list_empty(&session_of(pair)->group->worker->watched));
	bump_to(pair, 0);
}

/* All land on the same place of an ordered rail: the last to start is what is there. */
static void test_order(struct sim_pair *pair)
{
	static const uint64_t at[] = { 3, 1, 2, 7, 2, 5, 5 };
	struct armed jobs[7];

	for (uint32_t i = 0; i < 7; i++)
		jobs[i] = arm(pair, at[i], write_entry(pair, 0, (i + 1) * SLICE));
	sim_steps(pair, 10);
	CHECK(value_of(pair, 0) == 0 && session_of(pair)->armed_count == 7);
	bump_to(pair, 1);
	CHECK(over(&jobs[1]) && value_of(pair, 0) == 1);
	CHECK(memcmp(pair->to.memory, pair->from.memory + 2 * SLICE, SLICE) == 0);
	bump_to(pair, 4); /* 3 and both of 2: in order of their values */
	CHECK(value_of(pair, 0) == 4 && over(&jobs[0]) && over(&jobs[2]) && over(&jobs[4]));
	CHECK(memcmp(pair->to.memory, pair->from.memory + 1 * SLICE, SLICE) == 0);
	CHECK(!over(&jobs[5]) && !over(&jobs[6]) && !over(&jobs[3]));
	bump_to(pair, 5); /* of equal ones the first that was armed goes first */
	CHECK(value_of(pair, 0) == 6);
	CHECK(memcmp(pair->to.memory, pair->from.memory + 7 * SLICE, SLICE) == 0);
	bump_to(pair, 100);
	for (uint32_t i = 0; i < 7; i++)
		expect_end(pair, &jobs[i], TFD_JOB_OK, 0);
	jobs[0] = arm(pair, 100, write_entry(pair, 0, 0)); /* reached before: starts when it is taken */
	expect_end(pair, &jobs[0], TFD_JOB_OK, 0);
	reset(pair);
}

static void test_backwards_and_garbage(struct sim_pair *pair)
{
	uint64_t base = value_of(pair, 1);
	struct armed jobs[4];

	for (uint32_t i = 0; i < 4; i++)
		jobs[i] = arm(pair, 10 * (i + 1), write_entry(pair, 1, 0));
	bump_to(pair, 15);
	CHECK(value_of(pair, 1) == base + 1);
	bump_to(pair, 3);
	CHECK(value_of(pair, 1) == base + 1 &&
	      over(&jobs[0])); /* it stays started, and does not start again */
	bump_to(pair, 15);
	CHECK(value_of(pair, 1) == base + 1 && !over(&jobs[1]));
	bump_to(pair, UINT64_MAX);
	CHECK(value_of(pair, 1) == base + 4);
	for (uint32_t i = 0; i < 4; i++)
		expect_end(pair, &jobs[i], TFD_JOB_OK, 0);
	for (uint32_t i = 0; i < 8; i++) /* words of watchers that nothing waits for matter nowhere */
		pair->from.watchers[i].value = 0xdeadbeefdeadbeefull * (i + 1);
	memset(pair->from.watchers[1]._resv0, 0xff, sizeof(pair->from.watchers[1]._resv0));
	sim_steps(pair, 10);
	CHECK(value_of(pair, 1) == base + 4);
	for (uint32_t i = 0; i < 8; i++)
		pair->from.watchers[i].value = 0;
	reset(pair);
}

static void expect_lost(struct sim_pair *pair, uint32_t imm, uint64_t count)
{
	struct tfd_event event;

	CHECK(sim_event(&pair->a, TFD_EVENT_LOST, &event));
	CHECK(event.imm == imm && event.count == count && event.units == 0);
	CHECK(!sim_event(&pair->a, TFD_EVENT_LOST, &event));
}

static void test_cancel_and_deadline(struct sim_pair *pair)
{
	struct tfd_entry late = write_entry(pair, 3, 0);
	struct armed job = arm(pair, 1, write_entry(pair, 2, 0));

	sim_step(pair, 1);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = job.id }),
	       TFD_JOB_OK, 0);
	expect_end(pair, &job, TFD_JOB_CANCELLED, 0);
	expect_lost(pair, 2, 1); /* as with any job that does not come */
	late.deadline_ns = pair->now + 1000000;
	job = arm(pair, 1, late);
	sim_step(pair, 900000);
	CHECK(!over(&job));
	sim_step(pair, 100001);
	expect_end(pair, &job, TFD_JOB_DEADLINE, 0);
	expect_lost(pair, 3, 1);
	bump_to(pair, 1);
	CHECK(value_of(pair, 2) == 0 && value_of(pair, 3) == 0);
	reset(pair);
	late.deadline_ns = pair->now + 1000000; /* of one that has started it bounds the rest, as always */
	job = arm(pair, 1, late);
	bump_to(pair, 1);
	expect_end(pair, &job, TFD_JOB_OK, 0);
	reset(pair);
}

static void test_disarm(struct sim_pair *pair)
{
	struct armed jobs[3];
	struct armed other = arm_on(pair, &pair->from, 1, 1, write_entry(pair, 4, 0));

	for (uint32_t i = 0; i < 3; i++)
		jobs[i] = arm(pair, i + 1, write_entry(pair, 4, 0));
	bump_to(pair, 1);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_DISARM }), TFD_JOB_OK, 0);
	expect_end(pair, &jobs[0], TFD_JOB_OK, 0);
	expect_end(pair, &jobs[1], TFD_JOB_CANCELLED, 0);
	expect_end(pair, &jobs[2], TFD_JOB_CANCELLED, 0);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_DISARM }), TFD_JOB_OK, 0);
	CHECK(!over(&other));
	pair->from.watchers[1].value = 1;
	expect_end(pair, &other, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 4) == 2);
	pair->from.watchers[1].value = 0;
	while (sim_event(&pair->a, TFD_EVENT_LOST, &(struct tfd_event){ 0 }))
		continue;
	reset(pair);
}

static void test_fence(struct sim_pair *pair)
{
	struct tfd_imm_range range = { .first = 5, .count = 1 };
	struct armed fenced = arm(pair, 1, write_entry(pair, 5, 0));
	struct armed spared = arm(pair, 1, write_entry(pair, 6, 0));
	struct tfd_event event;
	struct armed later;

	CHECK_OK(tfd_open_fence(pair->a.core, pair->from.session, pair->grant, &range, 1,
	                        77)); /* takes them first */
	CHECK(tfd_core_step(pair->a.core, pair->now) >= 0);
	expect_end(pair, &fenced, TFD_JOB_CANCELLED, TFD_DETAIL_FENCED);
	while (tfd_core_events(pair->a.core, &event, 1) && event.type != TFD_EVENT_FENCE_QUIET)
		CHECK(event.type == TFD_EVENT_LOST && event.imm == 5 &&
		      event.count == 1); /* told before the fence is */
	CHECK(event.type == TFD_EVENT_FENCE_QUIET && event.count == 77);
	later = arm(pair, 1, write_entry(pair, 5, 0));
	bump_to(pair, 1);
	expect_end(pair, &spared, TFD_JOB_OK, 0);
	expect_end(pair, &later, TFD_JOB_OK, 0);
	CHECK(value_of(pair, 5) == 1 && value_of(pair, 6) == 1);
	reset(pair);
}

/* No pages, no shards: the open goes, and the job that was to use it neither holds it up nor looks at it any more. */
static void test_nothing_to_move(struct sim_pair *pair)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE_PAGES,
	                           .src_region = pair->from.region,
	                           .dst_grant = sim_grant(pair, &pair->from, &pair->to) };
	struct armed jobs[2] = { arm(pair, 1, entry), arm(pair, 2, entry) };
	struct tfd_job_info infos[2];
	struct tfd_event event;
	uint32_t count;

	sim_step(pair, 1);
	CHECK_OK(tfd_open_revoke(pair->a.core, pair->from.session, entry.dst_grant, TFD_DETAIL_REVOKED));
	sim_step(pair, 1);
	CHECK(sim_event(&pair->a, TFD_EVENT_OPEN_QUIET, &event) && event.id == entry.dst_grant);
	CHECK_OK(tfd_open_remove(pair->a.core, pair->from.session, entry.dst_grant));
	CHECK_OK(tfd_jobs_list(pair->a.core, pair->from.session, infos, 2, &count));
	CHECK(count == 2 && infos[0].open == 0);
	bump_to(pair, 1);
	expect_end(pair, &jobs[0], TFD_JOB_OK, 0);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_DISARM }), TFD_JOB_OK, 0);
	expect_end(pair, &jobs[1], TFD_JOB_CANCELLED, 0);
	reset(pair);
}

static void test_revoke(struct sim_pair *pair)
{
	static const uint32_t details[][2] = { { TFD_DETAIL_REVOKED, TFD_JOB_CANCELLED },
	                                       { TFD_DETAIL_STALE, TFD_JOB_PEER_LOST },
	                                       { TFD_DETAIL_HEARTBEAT, TFD_JOB_PEER_LOST } };

	for (uint32_t i = 0; i < 3; i++) {
		struct tfd_entry entry = write_entry(pair, 7, 0);
		struct tfd_event event;
		struct armed job;

		entry.dst_grant = sim_grant(pair, &pair->from, &pair->to);
		job = arm(pair, 1, entry);
		sim_step(pair, 1);
		CHECK_OK(tfd_open_revoke(pair->a.core, pair->from.session, entry.dst_grant, details[i][0]));
		expect_end(pair, &job, details[i][1], details[i][0]);
		sim_step(pair, 1);
		CHECK(sim_event(&pair->a, TFD_EVENT_OPEN_QUIET, &event) && event.id == entry.dst_grant);
		CHECK_OK(tfd_open_remove(pair->a.core, pair->from.session, entry.dst_grant));
		bump_to(pair, 1);
		CHECK(value_of(pair, 7) == 0);
		reset(pair);
	}
}

/* The bounds of a grant's life hold when a job starts, not only when it is taken. */
static void test_expiry(struct sim_pair *pair)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16,
	                                    .expires_ns = pair->now + 5000000 };
	struct tfd_entry entry = write_entry(pair, 8, 0);
	struct armed job;

	sim_paths(pair, &pair->to, &options);
	CHECK_OK(tfd_open_add(pair->a.core, pair->from.session, &options, &entry.dst_grant));
	job = arm(pair, 1, entry);
	bump_to(pair, 0);
	sim_step(pair, 6000000);
	CHECK(!over(&job));
	bump_to(pair, 1);
	expect_end(pair, &job, TFD_JOB_INVALID, TFD_DETAIL_EXPIRED);
	expect_lost(pair, 8, 1);
	reset(pair);
}

static void test_every_operation(struct sim_pair *pair)
{
	struct tfd_page *pages = sim_table(&pair->from);
	struct tfd_target *targets = (void *)(pages + 8);
	uint64_t base = value_of(pair, 9);
	struct armed jobs[5];

	pages[0] = (struct tfd_page){ 1, 3 };
	pages[1] = (struct tfd_page){ 2, 7 };
	for (uint32_t i = 0; i < 2; i++)
		targets[i] = (struct tfd_target){ .dst_grant = pair->grant,
		                                  .src_offset = 11 * SLICE + i,
		                                  .dst_offset = (20 + i) * SLICE,
		                                  .length = 100 };
	targets[2] = (struct tfd_target){ .dst_grant = pair->grant };
	memset(pair->to.memory, 0, 32 * SLICE);
	jobs[0] = arm(pair, 1,
	              (struct tfd_entry){ .op = TFD_OP_WRITE_PAGES,
	                                  .src_region = pair->from.region,
	                                  .dst_grant = pair->grant,
	                                  .length = SLICE,
	                                  .src_stride = SLICE,
	                                  .dst_stride = SLICE,
	                                  .imm = 9,
	                                  .table_count = 2 });
	jobs[1] = arm(pair, 1,
	              (struct tfd_entry){ .op = TFD_OP_SCATTER,
	                                  .src_region = pair->from.region,
	                                  .imm = 9,
	                                  .table_offset = 64,
	                                  .table_count = 2 });
	jobs[2] = arm(
		pair, 1,
		(struct tfd_entry){ .op = TFD_OP_BARRIER, .imm = 9, .table_offset = 128, .table_count = 1 });
	jobs[3] = arm(pair, 1, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = pair->grant, .imm = 9 });
	jobs[4] = arm(pair, 1,
	              (struct tfd_entry){ .op = TFD_OP_READ,
	                                  .src_region = pair->from.region,
	                                  .src_offset = REGION_BYTES - SLICE,
	                                  .dst_grant = pair->grant,
	                                  .dst_offset = REGION_BYTES / 2,
	                                  .length = SLICE });
	sim_steps(pair, 4);
	CHECK(session_of(pair)->armed_count == 5 && value_of(pair, 9) == base);
	memset(pair->to.memory + REGION_BYTES / 2, 0x77, SLICE);
	bump_to(pair, 1);
	for (uint32_t i = 0; i < 5; i++)
		expect_end(pair, &jobs[i], TFD_JOB_OK, 0);
	CHECK(value_of(pair, 9) == base + 2 + 2 + 1 + 1);
	CHECK(memcmp(pair->to.memory + 3 * SLICE, pair->from.memory + 1 * SLICE, SLICE) == 0);
	CHECK(memcmp(pair->to.memory + 7 * SLICE, pair->from.memory + 2 * SLICE, SLICE) == 0);
	CHECK(memcmp(pair->to.memory + 21 * SLICE, pair->from.memory + 11 * SLICE + 1, 100) == 0);
	CHECK(memcmp(pair->from.memory + REGION_BYTES - SLICE, pair->to.memory + REGION_BYTES / 2, SLICE) ==
	      0);
	for (uint32_t i = 0; i < 2; i++) /* of nobody */
		jobs[i] = arm(pair, 2 + i, (struct tfd_entry){ .op = TFD_OP_BARRIER, .imm = 9 });
	sim_steps(pair, 4);
	CHECK(!over(&jobs[0]));
	bump_to(pair, 2);
	expect_end(pair, &jobs[0], TFD_JOB_OK, 0);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = jobs[1].id }),
	       TFD_JOB_OK, 0);
	expect_end(pair, &jobs[1], TFD_JOB_CANCELLED,
	           0); /* nothing of it was left to do, but it never began */
	reset(pair);
}

/* One target is revoked while the scatter waits: the other is served. */
static void test_half_a_scatter(struct sim_pair *pair)
{
	struct tfd_target *targets = sim_table(&pair->from);
	uint64_t other = sim_grant(pair, &pair->from, &pair->to);
	struct armed job;

	targets[0] = (struct tfd_target){ .dst_grant = other, .length = 100 };
	targets[1] = (struct tfd_target){ .dst_grant = pair->grant, .dst_offset = SLICE, .length = 100 };
	job = arm(
		pair, 1,
		(struct tfd_entry){
			.op = TFD_OP_SCATTER, .src_region = pair->from.region, .imm = 10, .table_count = 2 });
	sim_step(pair, 1);
	CHECK_OK(tfd_open_revoke(pair->a.core, pair->from.session, other, TFD_DETAIL_REVOKED));
	sim_step(pair, 1);
	expect_lost(pair, 10, 1);
	CHECK(!over(&job));
	bump_to(pair, 1);
	expect_end(pair, &job, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	CHECK(value_of(pair, 10) == 1);
	CHECK(memcmp(pair->to.memory + SLICE, pair->from.memory, 100) == 0);
	CHECK_OK(tfd_open_remove(pair->a.core, pair->from.session, other));
	reset(pair);
}

static void check_refused(struct sim_pair *pair, struct tfd_entry entry, uint32_t detail)
{
	expect(sim_run(pair, &pair->from, entry), TFD_JOB_INVALID, detail);
}

static void test_refusals(struct sim_pair *pair)
{
	static const uint8_t commands[] = { TFD_OP_CANCEL, TFD_OP_ACKNOWLEDGE, TFD_OP_RELEASE,
	                                    TFD_OP_DISARM };
	struct tfd_entry entry = write_entry(pair, 1, 0);
	struct tfd_job_end end;

	entry.flags = TFD_FLAG_ARMED;
	entry.watcher = 8;
	check_refused(pair, entry, TFD_DETAIL_BAD_WATCHER);
	entry.watcher = UINT32_MAX;
	check_refused(pair, entry, TFD_DETAIL_BAD_WATCHER);
	entry.watcher = 0;
	entry.dst_offset = REGION_BYTES; /* what can be checked is checked when it is armed */
	check_refused(pair, entry, TFD_DETAIL_DESTINATION_BOUNDS);
	for (uint32_t i = 0; i < 4; i++)
		check_refused(pair, (struct tfd_entry){ .op = commands[i], .flags = TFD_FLAG_ARMED },
		              TFD_DETAIL_BAD_FLAGS);
	check_refused(pair, (struct tfd_entry){ .op = TFD_OP_DISARM, .argument = 8 }, TFD_DETAIL_BAD_WATCHER);
	entry = write_entry(pair, 1, 0); /* who has no shared memory cannot bump */
	entry.flags = TFD_FLAG_ARMED;
	CHECK_OK(tfd_jobs_submit(pair->a.core, pair->from.session, &entry, 1, NULL, 0));
	sim_step(pair, 1);
	CHECK_OK(tfd_job_result(pair->a.core, pair->from.session, entry.job_id, &end));
	CHECK(end.status == TFD_JOB_INVALID && end.detail == TFD_DETAIL_BAD_FLAGS);
	reset(pair);
}

/* Connections go while jobs wait: they take what is there when they start. */
static void test_paths(void)
{
	struct sim_pair pair;
	struct tfd_entry entry;
	struct armed jobs[2];

	sim_pair_open(&pair, 2, "", (struct tfd_group_options){ .cut_bytes = 1 });
	entry = write_entry(&pair, 1, 0);
	entry.length = 1u << 20; /* cut in two when it is armed */
	jobs[0] = arm(&pair, 1, entry);
	jobs[1] = arm(&pair, 2, entry);
	sim_step(&pair, 1);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[0], TFD_DETAIL_CONNECTION, NULL, NULL));
	bump_to(&pair, 1);
	expect_end(&pair, &jobs[0], TFD_JOB_OK, 0);
	CHECK(memcmp(pair.to.memory, pair.from.memory, entry.length) == 0 && value_of(&pair, 1) == 1);
	CHECK_OK(tfd_conn_close(pair.a.core, pair.out[1], TFD_DETAIL_CONNECTION, NULL, NULL));
	CHECK(!over(&jobs[1]));
	bump_to(&pair, 2);
	expect_end(&pair, &jobs[1], TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	reset(&pair);
	sim_pair_close(&pair);
}

static void quiet(struct sim_pair *pair, struct user *user)
{
	struct tfd_event event;

	sim_steps(pair, 10);
	CHECK(sim_event(&pair->a, TFD_EVENT_SESSION_QUIET, &event) && event.id == user->session);
	CHECK_OK(tfd_session_close(pair->a.core, user->session));
	user_unmap(user);
}

static void arm_many(struct sim_pair *pair, struct user *user, struct tfd_entry entry, struct armed *jobs)
{
	for (uint32_t i = 0; i < MANY; i++) {
		entry.flags = i % 2 ? TFD_FLAG_POLLED : 0;
		jobs[i] = arm_on(pair, user, i % 4, 1 + i * 2654435761u % MANY, entry);
	}
}

static struct tfd_entry many_entry(struct sim_pair *pair, struct user *user)
{
	struct tfd_entry entry = write_entry(pair, 1, 0);

	entry.src_region = user->region;
	entry.dst_grant = sim_grant(pair, user, &pair->to);
	entry.length = 8;
	return entry;
}

static void test_thousands(struct sim_pair *pair)
{
	static struct armed jobs[MANY];
	const struct tfd_session *session;
	uint64_t base = value_of(pair, 1);
	struct user user;
	struct tfd_entry entry;

	user_open_sized(&pair->a, &user, 2 * MANY);
	session = tfd_table_get(&pair->a.core->sessions, user.session);
	entry = many_entry(pair, &user);
	arm_many(pair, &user, entry, jobs);
	sim_steps(pair, 200);
	CHECK(session->armed_count == MANY && session->group->worker->polled == MANY / 2);
	for (uint32_t value = 0; value <= MANY; value += MANY / 8) {
		for (uint32_t i = 0; i < 4; i++)
			tfd_store_release(&user.watchers[i].value, value);
		sim_steps(pair, 400);
		for (uint32_t i = 0; i < MANY; i++) /* those that it reaches, and no other */
			CHECK(over(&jobs[i]) == (1 + i * 2654435761u % MANY <= value));
		CHECK(value_of(pair, 1) == base + value);
	}
	CHECK(session->armed_count == 0);
	CHECK_OK(tfd_session_end(pair->a.core, user.session, TFD_DETAIL_SESSION_ENDED));
	quiet(pair, &user);
}

/* Its jobs end, once each, and nothing starts afterwards, whatever the dead client's word holds. */
static void test_session_dies(struct sim_pair *pair)
{
	static struct armed jobs[MANY];
	uint64_t base = value_of(pair, 1);
	struct tfd_session_info info;
	struct user user;

	user_open_sized(&pair->a, &user, 2 * MANY);
	arm_many(pair, &user, many_entry(pair, &user), jobs);
	sim_steps(pair, 32); /* some are still in the ring */
	CHECK_OK(tfd_session_end(pair->a.core, user.session, TFD_DETAIL_SESSION_ENDED));
	for (uint32_t i = 0; i < 4; i++)
		tfd_store_release(&user.watchers[i].value, UINT64_MAX);
	for (uint32_t i = 0; i < MANY; i++) {
		CHECK(over(&jobs[i]));
		expect(jobs[i].record, TFD_JOB_CANCELLED, TFD_DETAIL_SESSION_ENDED);
	}
	CHECK_OK(tfd_session_stat(pair->a.core, user.session, &info));
	CHECK(info.jobs_ended == MANY && info.jobs_failed == MANY && info.jobs_in_flight == 0);
	quiet(pair, &user);
	CHECK(value_of(pair, 1) == base);
}

/* Seven eighths of its records: there is always one left to cancel with. */
static void test_quota(struct sim_pair *pair)
{
	struct armed jobs[64];

	for (uint32_t i = 0; i < 57; i++)
		jobs[i] = arm(pair, 1, write_entry(pair, 1, 0));
	sim_steps(pair, 4);
	expect_end(pair, &jobs[56], TFD_JOB_QUOTA, 0);
	CHECK(session_of(pair)->armed_count == 56);
	expect(sim_run(pair, &pair->from, (struct tfd_entry){ .op = TFD_OP_DISARM }), TFD_JOB_OK, 0);
	for (uint32_t i = 0; i < 56; i++)
		expect_end(pair, &jobs[i], TFD_JOB_CANCELLED, 0);
	while (sim_event(&pair->a, TFD_EVENT_LOST, &(struct tfd_event){ 0 }))
		continue;
	reset(pair);
}

/* Many watchers that are reached at once: of a session no more jobs begin in a pass than are taken from a ring; by turns. */
static void test_many_watchers(void)
{
	enum { WATCHERS = 32, EACH = 100, BUDGET = 64 };
	struct tfd_session_options options = {
		.ring_entries = MANY, .record_count = MANY, .counter_count = 4, .watcher_count = WATCHERS
	};
	const struct tfd_session *session;
	struct sim_pair pair;
	struct user user;
	uint32_t left = WATCHERS * EACH;

	sim_pair_open(&pair, 1, "move=0", (struct tfd_group_options){ 0 });
	user_open_as(&pair.a, &user, options);
	user.grant = sim_grant(&pair, &user, &pair.to);
	session = tfd_table_get(&pair.a.core->sessions, user.session);
	for (uint32_t i = 0; i < left; i++) {
		struct tfd_entry entry = write_entry(&pair, 0, 0);

		entry.src_region = user.region;
		entry.dst_grant = user.grant;
		(void)arm_on(&pair, &user, i % WATCHERS, 1, entry);
	}
	sim_steps(&pair, WATCHERS * EACH / 64 + 1);
	CHECK(session->armed_count == left);
	for (uint32_t i = 0; i < WATCHERS; i++)
		tfd_store_release(&user.watchers[i].value, 1ull);
	for (uint32_t pass = 1; left; pass++) {
		uint32_t before = left;

		sim_step(&pair, PAIR_STEP_NS);
		left = session->armed_count;
		CHECK(left == (before < BUDGET ? 0 : before - BUDGET));
		for (uint32_t i = 0; pass == WATCHERS && i < WATCHERS; i++)
			CHECK(session->watches[i].jobs.count < EACH);
	}
	user_unmap(&user);
	sim_pair_close(&pair);
}

int main(void)
{
	struct sim_pair pair;

	sim_pair_open(&pair, 1, "", (struct tfd_group_options){ 0 });
	test_order(&pair);
	test_backwards_and_garbage(&pair);
	test_cancel_and_deadline(&pair);
	test_disarm(&pair);
	test_fence(&pair);
	test_revoke(&pair);
	test_nothing_to_move(&pair);
	test_expiry(&pair);
	test_every_operation(&pair);
	test_half_a_scatter(&pair);
	test_refusals(&pair);
	test_quota(&pair);
	test_thousands(&pair);
	test_session_dies(&pair);
	sim_pair_close(&pair);
	test_paths();
	test_many_watchers();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Whose piece goes out next: turns and weights, classes, order within a session, and what holds nobody else up. Simulated fabric. */
#include "core/schedule.h"
#include "sim_pair.h"

#define KIB 1024u
#define SEGMENT (16u * KIB)
#define WINDOW (4u * SEGMENT)
#define USERS 8
#define RECORDS 4096u

/* Four pieces are in flight on a connection: so who gets the next place is the scheduler's choice. */
static const struct tfd_group_options narrow = { .segment_bytes = SEGMENT,
                                                 .window_bytes = WINDOW,
                                                 .cut_bytes = 1u << 30 };

struct scene {
	struct sim_pair pair;
	struct user users[USERS];
	uint32_t count;
	uint64_t done[USERS]; /* job ids up to which all have ended */
};

static uint64_t grant_by(struct sim_pair *pair, struct user *from, uint32_t path)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16 };
	uint64_t open;

	sim_paths(pair, &pair->to, &options);
	options.paths[0] = options.paths[path];
	options.path_count = 1;
	CHECK_OK(tfd_open_add(from->host->core, from->session, &options, &open));
	return open;
}

/* Sessions of one host with those weights, which write to one session of the other. */
static void scene_open(struct scene *scene, uint32_t paths, const char *fabric, const uint32_t *weights,
                       uint32_t count)
{
	memset(scene, 0, sizeof(*scene));
	sim_pair_open(&scene->pair, paths, fabric, narrow);
	scene->count = count;
	for (uint32_t i = 0; i < count; i++) {
		struct user *user = &scene->users[i];

		user_open_as(&scene->pair.a, user,
		             (struct tfd_session_options){ .group = scene->pair.a.group,
		                                           .ring_entries = RECORDS,
		                                           .record_count = RECORDS,
		                                           .counter_count = 4,
		                                           .weight = weights[i] });
		user->grant = sim_grant(&scene->pair, user, &scene->pair.to);
	}
}

static void scene_close(struct scene *scene)
{
	for (uint32_t i = 0; i < scene->count; i++) {
		if (scene->users[i].segment)
			user_unmap(&scene->users[i]);
	}
	sim_pair_close(&scene->pair);
}

static const struct tfd_record *put(struct user *user, uint64_t grant, uint64_t length, uint8_t priority)
{
	return user_submit(user, (struct tfd_entry){ .op = TFD_OP_WRITE,
	                                             .priority = priority,
	                                             .src_region = user->region,
	                                             .dst_grant = grant,
	                                             .length = length,
	                                             .imm = 1 });
}

static bool ended(const struct user *user, uint64_t job)
{
	return tfd_load_acquire(&user->records[job % RECORDS].done_id) == job;
}

/* So many jobs of it are under way, always. */
static void keep_busy(struct scene *scene, uint32_t i, uint32_t jobs, uint64_t length, uint8_t priority)
{
	struct user *user = &scene->users[i];

	while (scene->done[i] < user->next_job && ended(user, scene->done[i] + 1))
		scene->done[i]++;
	while (user->next_job - scene->done[i] < jobs)
		(void)put(user, user->grant, length, priority);
}

/* One job, to its end. */
static void put_and_wait(struct scene *scene, struct user *user, uint64_t grant, uint64_t length,
                         uint8_t priority)
{
	const struct tfd_record *record = put(user, grant, length, priority);

	sim_await(&scene->pair, record, user->next_job);
	expect(record, TFD_JOB_OK, 0);
}

static uint64_t sent(const struct user *user)
{
	struct tfd_session_info info;

	CHECK_OK(tfd_session_stat(user->host->core, user->session, &info));
	return info.bytes_sent;
}

static struct tfd_flow *flow_of(const struct scene *scene, uint32_t i, uint32_t priority)
{
	struct tfd_session *session = tfd_table_get(&scene->pair.a.core->sessions, scene->users[i].session);

	return &session->flows[priority];
}

/* Bytes sent, in units of a weight of one, are equal but for what is in flight and the last piece of each. */
static void check_shares(const struct scene *scene, const uint32_t *weights, const uint64_t *before)
{
	uint64_t least = UINT64_MAX;
	uint64_t most = 0;

	for (uint32_t i = 0; i < scene->count; i++) {
		uint64_t share = (sent(&scene->users[i]) - before[i]) / weights[i];

		least = share < least ? share : least;
		most = share > most ? share : most;
	}
	CHECK(least > 10 * WINDOW && most - least <= WINDOW + SEGMENT);
}

/* Whatever the sizes of jobs and however many a session has under way. */
static void test_shares(void)
{
	static const uint64_t lengths[USERS] = { 4 * KIB,  SEGMENT,  64 * KIB,  100000,
	                                         40 * KIB, 1u << 20, 250 * KIB, 4u << 20 };
	static const uint32_t jobs[USERS] = { 100, 16, 8, 3, 50, 2, 30, 2 };
	static const uint32_t weights[2][USERS] = { { 1, 1, 1, 1, 1, 1, 1, 1 }, { 1, 3, 1, 2, 5, 1, 10, 3 } };

	for (int w = 0; w < 2; w++) {
		uint64_t before[USERS] = { 0 };
		struct scene scene;

		scene_open(&scene, 1, "delay_us=50,move=0", weights[w], USERS);
		for (int step = 0; step < 60000; step++) {
			for (uint32_t i = 0; i < USERS; i++)
				keep_busy(&scene, i, jobs[i], lengths[i], TFD_PRIORITY_BULK);
			sim_step(&scene.pair, PAIR_STEP_NS);
			if (step % 20000 == 19999) {
				check_shares(&scene, weights[w], before);
				for (uint32_t i = 0; i < USERS; i++)
					before[i] = sent(&scene.users[i]);
			}
		}
		scene_close(&scene);
	}
}

/* Of many jobs of a session the first ends first; of two sessions, the first of each. */
static void test_order(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	struct scene scene;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	for (uint32_t job = 0; job < 50; job++) {
		for (uint32_t i = 0; i < 2; i++)
			(void)put(&scene.users[i], scene.users[i].grant, 10 * SEGMENT, TFD_PRIORITY_BULK);
	}
	for (uint64_t job = 1; job <= 50; job++) {
		for (uint32_t i = 0; i < 2; i++) {
			sim_await(&scene.pair, &scene.users[i].records[job], job);
			CHECK(sent(&scene.users[i]) < job * 10 * SEGMENT + WINDOW + SEGMENT);
		}
	}
	scene_close(&scene);
}

/* A large job by one path and a small one by another, after it: the small one does not wait. */
static void test_paths_of_one_session(void)
{
	static const uint32_t weights[1] = { 1 };
	struct scene scene;
	struct user *user = &scene.users[0];

	scene_open(&scene, 2, "delay_us=50,move=0", weights, 1);
	for (int i = 0; i < 20; i++)
		(void)put(user, grant_by(&scene.pair, user, 0), 1u << 20, TFD_PRIORITY_BULK);
	put_and_wait(&scene, user, grant_by(&scene.pair, user, 1), SEGMENT, TFD_PRIORITY_BULK);
	CHECK(sent(user) < 1u << 20);
	scene_close(&scene);
}

/* Latency goes out at once beside bulk that fills its window; and however much of it there is, bulk goes on. */
static void test_classes(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	uint64_t before;
	struct scene scene;
	struct tfd_conn *conn;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	conn = sim_conn(&scene.pair.a, scene.pair.out[0]);
	for (int step = 0; step < 1000; step++) {
		keep_busy(&scene, 0, 4, 1u << 20, TFD_PRIORITY_BULK);
		if (step % 10 == 9) {
			CHECK(flow_of(&scene, 0, TFD_PRIORITY_BULK)->shards);
			CHECK(conn->class_wrs[TFD_PRIORITY_LATENCY] == 0);
			(void)put(&scene.users[1], scene.users[1].grant, 4 * KIB, TFD_PRIORITY_LATENCY);
			(void)tfd_core_step(scene.pair.a.core, scene.pair.now);
			CHECK(conn->class_wrs[TFD_PRIORITY_LATENCY] == 1);
			scene.done[1] = scene.users[1].next_job;
			sim_await(&scene.pair, &scene.users[1].records[scene.done[1]], scene.done[1]);
		}
		sim_step(&scene.pair, PAIR_STEP_NS);
	}
	before = sent(&scene.users[0]);
	for (int step = 0; step < 5000; step++) {
		keep_busy(&scene, 0, 4, 1u << 20, TFD_PRIORITY_BULK);
		keep_busy(&scene, 1, 500, 64 * KIB, TFD_PRIORITY_LATENCY);
		sim_step(&scene.pair, PAIR_STEP_NS);
	}
	CHECK(sent(&scene.users[0]) - before > 5000 * PAIR_STEP_NS / 100000 * WINDOW / 4);
	scene_close(&scene);
}

/* Where both classes want the same few work requests: latency first, but bulk gets its part of eight. */
static void test_lead(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	struct tfd_wr *kept = NULL;
	struct tfd_worker *worker;
	struct scene scene;
	uint64_t bulk;
	uint64_t latency;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	worker = scene.pair.a.core->groups[0]->worker;
	for (int i = 0; i < 2; i++) {
		struct tfd_wr *next = worker->wr_free->next;

		worker->wr_free->next = kept;
		kept = worker->wr_free;
		worker->wr_free = next;
	}
	worker->wr_free = kept; /* two are left of the pool, which is freed as a whole */
	for (int step = 0; step < 60000; step++) {
		keep_busy(&scene, 0, 2, 1u << 20, TFD_PRIORITY_BULK);
		keep_busy(&scene, 1, 100, SEGMENT, TFD_PRIORITY_LATENCY);
		sim_step(&scene.pair, PAIR_STEP_NS);
	}
	bulk = sent(&scene.users[0]);
	latency = sent(&scene.users[1]);
	CHECK(latency > 8u << 20 && bulk > latency / 8 && bulk < latency / 6);
	scene_close(&scene);
}

/* Thousands of jobs of one session: another's single one waits for no more than what is in flight and a round. */
static void test_flood(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	struct scene scene;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	for (int i = 0; i < 4000; i++)
		(void)put(&scene.users[0], scene.users[0].grant, 8 * KIB, TFD_PRIORITY_BULK);
	sim_steps(&scene.pair, 100);
	for (int i = 0; i < 20; i++) {
		uint64_t before = sent(&scene.users[0]);

		put_and_wait(&scene, &scene.users[1], scene.users[1].grant, 4 * KIB, TFD_PRIORITY_BULK);
		CHECK(sent(&scene.users[0]) - before <= 2 * WINDOW + SEGMENT);
	}
	CHECK(!ended(&scene.users[0], 4000));
	scene_close(&scene);
}

/* A session with a connection that takes nothing, and one that is gone: its other jobs and the other sessions' go on. */
static void test_stuck(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	struct scene scene;
	struct user *user = &scene.users[0];
	struct tfd_event event;
	uint64_t slow;
	uint64_t good;

	scene_open(&scene, 3, "delay_us=50,move=0", weights, 2);
	slow = grant_by(&scene.pair, user, 0);
	good = grant_by(&scene.pair, user, 1);
	tfd_sim_mute(sim_conn(&scene.pair.a, scene.pair.out[0])->half);
	for (int i = 0; i < 100; i++)
		(void)put(user, slow, 1u << 20, TFD_PRIORITY_BULK);
	for (int i = 0; i < 20; i++)
		put_and_wait(&scene, user, good, 64 * KIB, TFD_PRIORITY_BULK);
	scene.users[1].grant = grant_by(&scene.pair, &scene.users[1], 1);
	for (int i = 0; i < 20; i++)
		put_and_wait(&scene, &scene.users[1], scene.users[1].grant, 64 * KIB, TFD_PRIORITY_LATENCY);
	for (int i = 0; i < 60 && !sim_event(&scene.pair.a, TFD_EVENT_CONN_LOST, &event); i++)
		sim_step(&scene.pair, 100000000);
	CHECK(event.type == TFD_EVENT_CONN_LOST && event.id == scene.pair.out[0]);
	put_and_wait(&scene, user, good, 64 * KIB, TFD_PRIORITY_BULK);
	CHECK_OK(tfd_conn_close(scene.pair.a.core, scene.pair.out[0], TFD_DETAIL_CONNECTION,
	                        &(struct tfd_landed){ .channels = 1 }, NULL));
	for (uint64_t job = 1; job <= 100; job++)
		expect(&user->records[job], TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	CHECK(flow_of(&scene, 0, TFD_PRIORITY_BULK)->shards == 0);
	scene_close(&scene);
}

/*
 * Scores of connections from which nothing comes back (their peers stand, a switch has failed), each with all that may be in flight on it:
 * work requests are left for what others carry.
 */
static void test_many_stuck(void)
{
	enum { STUCK = 70, OF_EACH = STUCK / 2, POSTS = 64 };
	static const uint32_t weights[3] = { 1, 1, 1 };
	struct scene scene;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 3);
	for (uint32_t i = 0; i < STUCK; i++) {
		struct user *user = &scene.users[i / OF_EACH];
		uint64_t grant, in;

		connect_rails(&scene.pair.a, 0, &scene.pair.b, 0, &scene.pair.out[1], &in);
		tfd_sim_mute(sim_conn(&scene.pair.a, scene.pair.out[1])->half);
		scene.pair.out[0] = scene.pair.out[1];
		grant = grant_by(&scene.pair, user, 0);
		for (int k = 0; k < POSTS; k++)
			(void)put(user, grant, 1, TFD_PRIORITY_BULK);
		sim_steps(&scene.pair, 1);
	}
	for (int i = 0; i < 20; i++)
		put_and_wait(&scene, &scene.users[2], scene.users[2].grant, SEGMENT, TFD_PRIORITY_BULK);
	CHECK(scene.pair.now < 1000000000); /* before anybody gave them up */
	scene_close(&scene);
}

/* Who was idle has saved nothing up: from its first job on it gets its share, and no more. */
static void test_idle(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	uint64_t before[2];
	struct scene scene;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	for (int step = 0; step < 5000; step++) {
		keep_busy(&scene, 0, 4, 1u << 20, TFD_PRIORITY_BULK);
		if (step == 10)
			(void)put(&scene.users[1], scene.users[1].grant, KIB, TFD_PRIORITY_BULK);
		sim_step(&scene.pair, PAIR_STEP_NS);
	}
	CHECK(flow_of(&scene, 1, TFD_PRIORITY_BULK)->deficit <= 0);
	before[0] = sent(&scene.users[0]);
	before[1] = sent(&scene.users[1]);
	for (int step = 0; step < 200; step++) {
		keep_busy(&scene, 0, 4, 1u << 20, TFD_PRIORITY_BULK);
		keep_busy(&scene, 1, 4, 1u << 20, TFD_PRIORITY_BULK);
		sim_step(&scene.pair, PAIR_STEP_NS);
		CHECK(sent(&scene.users[1]) - before[1] <= sent(&scene.users[0]) - before[0] + WINDOW);
	}
	CHECK(sent(&scene.users[1]) - before[1] > 4 * WINDOW);
	scene_close(&scene);
}

/* A session ends in the middle of its turn, with jobs queued and under way; the round goes on without it. */
static void test_end_in_turn(void)
{
	static const uint32_t weights[3] = { 1000, 1, 1000 };
	struct scene scene;
	struct tfd_event event;

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 3);
	for (int i = 0; i < 3; i++)
		keep_busy(&scene, (uint32_t)i, 50, 1u << 20, TFD_PRIORITY_BULK);
	sim_steps(&scene.pair, 3);
	CHECK(flow_of(&scene, 0, TFD_PRIORITY_BULK)->deficit > 0);
	for (uint32_t i = 0; i < 3; i += 2) {
		CHECK_OK(
			tfd_session_end(scene.pair.a.core, scene.users[i].session, TFD_DETAIL_SESSION_ENDED));
		CHECK(flow_of(&scene, i, TFD_PRIORITY_BULK)->shards == 0 &&
		      flow_of(&scene, i, TFD_PRIORITY_BULK)->deficit <= 0 &&
		      tfd_list_empty(&flow_of(&scene, i, TFD_PRIORITY_BULK)->link));
		if (i == 0)
			sim_steps(&scene.pair, 20);
		for (int step = 0; !sim_event(&scene.pair.a, TFD_EVENT_SESSION_QUIET, &event); step++) {
			CHECK(step < 1000);
			sim_step(&scene.pair, PAIR_STEP_NS);
		}
		user_free(&scene.users[i]);
		scene.users[i].segment = NULL;
	}
	for (uint64_t job = 1; job <= 50; job++)
		sim_await(&scene.pair, &scene.users[1].records[job], job);
	CHECK(tfd_list_empty(&scene.pair.a.core->groups[0]->rails[0].round[TFD_PRIORITY_BULK]));
	scene_close(&scene);
}

/* The jobs of two sessions on two paths, of which one dies: all end, and in their order, on the other. */
static void test_move(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	struct tfd_landed landed;
	struct scene scene;

	scene_open(&scene, 2, "delay_us=50", weights, 2);
	for (int i = 0; i < 2; i++)
		keep_busy(&scene, (uint32_t)i, 2000, SEGMENT, TFD_PRIORITY_BULK);
	sim_steps(&scene.pair, 30);
	CHECK_OK(tfd_conn_close(scene.pair.b.core, scene.pair.in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK(landed.channels == 1);
	CHECK_OK(tfd_conn_close(scene.pair.a.core, scene.pair.out[0], TFD_DETAIL_CONNECTION, &landed, NULL));
	for (uint64_t job = 1; job <= 2000; job++) {
		for (uint32_t i = 0; i < 2; i++) {
			sim_await(&scene.pair, &scene.users[i].records[job], job);
			expect(&scene.users[i].records[job], TFD_JOB_OK, 0);
			CHECK(sent(&scene.users[i]) <= job * SEGMENT + 3 * WINDOW);
		}
	}
	sim_steps(&scene.pair, 100);
	CHECK(scene.pair.to.counters[1].value == 4000);
	scene_close(&scene);
}

/* What is cancelled or fenced in the queue leaves it at once; what was submitted after the fence goes on. */
static void test_cancel_queued(void)
{
	static const uint32_t weights[2] = { 1, 1 };
	const struct tfd_imm_range range = { .first = 1, .count = 1 };
	struct scene scene;
	struct user *user = &scene.users[0];

	scene_open(&scene, 1, "delay_us=50,move=0", weights, 2);
	for (int i = 0; i < 2; i++)
		keep_busy(&scene, (uint32_t)i, 100, SEGMENT, TFD_PRIORITY_BULK);
	sim_steps(&scene.pair, 10);
	for (uint64_t job = 60; job <= 100; job += 2)
		(void)user_submit(user, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = job });
	sim_step(&scene.pair, 1);
	for (uint64_t job = 60; job <= 100; job++)
		CHECK(ended(user, job) == (job % 2 == 0));
	sim_await(&scene.pair, &user->records[65], 65);
	expect(&user->records[66], TFD_JOB_CANCELLED, TFD_DETAIL_NONE);
	CHECK(!ended(user, 95));
	CHECK_OK(tfd_open_fence(scene.pair.a.core, user->session, user->grant, &range, 1, 7));
	CHECK(ended(user, 95) && flow_of(&scene, 0, TFD_PRIORITY_BULK)->shards == 0);
	expect(&user->records[95], TFD_JOB_CANCELLED, TFD_DETAIL_FENCED);
	expect(sim_run(&scene.pair, user,
	               (struct tfd_entry){ .op = TFD_OP_WRITE,
	                                   .src_region = user->region,
	                                   .dst_grant = user->grant,
	                                   .length = SEGMENT,
	                                   .imm = 1 }),
	       TFD_JOB_OK, 0);
	sim_await(&scene.pair, &scene.users[1].records[100], 100);
	scene_close(&scene);
}

int main(void)
{
	struct tfd_session_options heavy = {
		.ring_entries = 64, .record_count = 64, .counter_count = 4, .weight = TFD_WEIGHT_MAX + 1
	};
	struct tfd_session_fds fds;
	struct sim_pair pair;
	uint64_t session;

	sim_pair_open(&pair, 1, "", narrow);
	CHECK(tfd_session_open(pair.a.core, &heavy, &session, &fds, &error) == -EINVAL);
	sim_pair_close(&pair);
	test_shares();
	test_order();
	test_paths_of_one_session();
	test_classes();
	test_lead();
	test_flood();
	test_stuck();
	test_many_stuck();
	test_idle();
	test_end_in_turn();
	test_move();
	test_cancel_queued();
	return 0;
}

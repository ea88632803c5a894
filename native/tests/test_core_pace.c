/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk beside urgent work, on a simulated rail of 1 Gbit/s: what is in flight, who has it, and whom that holds up. */
#include "core/schedule.h"
#include "sim_pair.h"

#define KIB 1024u
#define MS 1000000ull
#define BYTES_PER_MS 125000u
#define RAIL "rate_gbps=1,delay_us=20,move=0"
#define LONG_RAIL "rate_gbps=1,delay_us=1500,move=0"
#define CONNS 4
#define JOBS 8u
#define RECORDS 1024u
#define JOB_BYTES (1u << 20)

struct scene {
	struct sim_pair pair;
	struct user users[2];
	uint64_t conns[CONNS];
	uint64_t grants[2][CONNS]; /* by connection; 0: not used by that session */
	uint64_t jobs[2][CONNS][JOBS]; /* under way */
	uint64_t urgent; /* ns from one urgent write to the next; 0: none */
	uint64_t next_urgent;
	uint64_t slowest; /* of them, ns */
};

static void scene_open(struct scene *scene, const char *fabric)
{
	memset(scene, 0, sizeof(*scene));
	sim_pair_open(&scene->pair, 1, fabric, (struct tfd_group_options){ 0 });
	scene->conns[0] = scene->pair.out[0];
	for (int i = 1; i < CONNS; i++) {
		uint64_t in;

		connect_hosts(&scene->pair.a, &scene->pair.b, &scene->conns[i], &in);
	}
	for (int i = 0; i < 2; i++)
		user_open_sized(&scene->pair.a, &scene->users[i], RECORDS);
}

static void scene_close(struct scene *scene)
{
	for (int i = 0; i < 2; i++)
		user_unmap(&scene->users[i]);
	sim_pair_close(&scene->pair);
}

static void use(struct scene *scene, int user, int conn)
{
	struct sim_pair *pair = &scene->pair;

	pair->out[0] = scene->conns[conn];
	scene->grants[user][conn] = sim_grant(pair, &scene->users[user], &pair->to);
	pair->out[0] = scene->conns[0];
}

static uint64_t put(struct user *user, uint64_t grant, uint64_t length, uint8_t priority)
{
	(void)user_submit(user, (struct tfd_entry){ .op = TFD_OP_WRITE,
	                                            .priority = priority,
	                                            .src_region = user->region,
	                                            .dst_grant = grant,
	                                            .length = length,
	                                            .imm = priority });
	return user->next_job;
}

static bool ended(const struct user *user, uint64_t job)
{
	return tfd_load_acquire(&user->records[job % user->header->record_count].done_id) == job;
}

/* Every connection of every session always has something to post. */
static void keep_busy(struct scene *scene)
{
	for (int i = 0; i < 2; i++) {
		for (int c = 0; c < CONNS; c++) {
			for (uint32_t j = 0; scene->grants[i][c] && j < JOBS; j++) {
				uint64_t *job = &scene->jobs[i][c][j];

				if (!*job || ended(&scene->users[i], *job))
					*job = put(&scene->users[i], scene->grants[i][c], JOB_BYTES,
					           TFD_PRIORITY_BULK);
			}
		}
	}
}

/* `from` is the urgent session. */
static void be_urgent(struct scene *scene)
{
	struct user *user = &scene->pair.from;
	uint64_t called = scene->pair.now;
	uint64_t job = put(user, scene->pair.grant, 4 * KIB, TFD_PRIORITY_LATENCY);

	while (!ended(user, job)) {
		keep_busy(scene);
		sim_step(&scene->pair, PAIR_STEP_NS);
	}
	if (scene->pair.now - called > scene->slowest)
		scene->slowest = scene->pair.now - called;
	scene->next_urgent = scene->pair.now + scene->urgent;
}

static void pass(struct scene *scene, uint64_t ns)
{
	for (uint64_t end = scene->pair.now + ns; scene->pair.now < end;) {
		keep_busy(scene);
		if (scene->urgent && scene->pair.now >= scene->next_urgent)
			be_urgent(scene);
		sim_step(&scene->pair, PAIR_STEP_NS);
	}
}

static uint64_t sent(const struct user *user)
{
	struct tfd_session_info info;

	CHECK_OK(tfd_session_stat(user->host->core, user->session, &info));
	return info.bytes_sent;
}

/* Of the rail's rate. */
static double share(struct scene *scene, int user, uint64_t ns)
{
	uint64_t before = sent(&scene->users[user]);
	uint64_t begin = scene->pair.now;

	pass(scene, ns);
	return (double)(sent(&scene->users[user]) - before) * MS / BYTES_PER_MS /
	       (double)(scene->pair.now - begin);
}

static struct tfd_pace *pace_of(const struct scene *scene)
{
	return &scene->pair.a.core->groups[0]->rails[0].pace;
}

/* 4 KiB wait for less than a millisecond once their rail knows of them, and bulk has nine tenths of it all the same. */
static void test_beside(int conns)
{
	struct scene scene;

	scene_open(&scene, RAIL);
	for (int i = 0; i < conns; i++)
		use(&scene, 0, i);
	pass(&scene, 200 * MS);
	CHECK(share(&scene, 0, 200 * MS) > 0.98);
	CHECK(pace_of(&scene)->bulk_most == UINT64_MAX);
	CHECK(pace_of(&scene)->bytes_per_ms > 110000 && pace_of(&scene)->bytes_per_ms < 140000);
	scene.urgent = 2 * MS;
	pass(&scene, 50 * MS);
	CHECK(pace_of(&scene)->bulk_most < MS * BYTES_PER_MS / MS);
	scene.slowest = 0;
	CHECK(share(&scene, 0, 500 * MS) > 0.9);
	CHECK(scene.slowest < MS);
	scene.urgent = 0;
	pass(&scene, 1100 * MS); /* that was the last of it */
	CHECK(pace_of(&scene)->bulk_most == UINT64_MAX);
	CHECK(share(&scene, 0, 200 * MS) > 0.98);
	scene_close(&scene);
}

/* A path that holds more than half a millisecond's bytes gets it, within a second. */
static void test_long_path(void)
{
	struct scene scene;

	scene_open(&scene, LONG_RAIL);
	use(&scene, 0, 0);
	pass(&scene, 500 * MS);
	CHECK(share(&scene, 0, 200 * MS) > 0.95);
	scene.urgent = 5 * MS;
	pass(&scene, 1000 * MS);
	CHECK(pace_of(&scene)->bulk_most != UINT64_MAX && pace_of(&scene)->boost > 2 * TFD_BOOST_ONE);
	CHECK(share(&scene, 0, 500 * MS) > 0.88);
	scene_close(&scene);
}

/* Sessions share what a rail may have in flight, whatever the number of their connections. */
static void test_many_peers(void)
{
	struct scene scene;
	double one;
	double many;
	uint64_t before;

	scene_open(&scene, RAIL);
	use(&scene, 0, 0);
	for (int i = 1; i < CONNS; i++)
		use(&scene, 1, i);
	pass(&scene, 200 * MS);
	scene.urgent = 2 * MS;
	pass(&scene, 100 * MS);
	before = sent(&scene.users[1]);
	one = share(&scene, 0, 500 * MS) * 500 * BYTES_PER_MS;
	many = (double)(sent(&scene.users[1]) - before);
	CHECK(many / one > 0.9 && many / one < 1.1);
	scene_close(&scene);
}

/* What a connection has in flight that stands does not count for long. */
static void test_stands(void)
{
	struct scene scene;
	struct tfd_conn *conn;

	scene_open(&scene, RAIL);
	use(&scene, 0, 1);
	use(&scene, 1, 2);
	pass(&scene, 200 * MS);
	scene.urgent = 2 * MS;
	pass(&scene, 50 * MS);
	conn = sim_conn(&scene.pair.a, scene.conns[2]);
	tfd_sim_mute(conn->half);
	pass(&scene, 50 * MS);
	CHECK(conn->stands && conn->class_bytes[TFD_PRIORITY_BULK] > 0);
	CHECK(pace_of(&scene)->bulk_bytes ==
	      sim_conn(&scene.pair.a, scene.conns[1])->class_bytes[TFD_PRIORITY_BULK]);
	CHECK(share(&scene, 0, 200 * MS) > 0.9);
	CHECK_OK(tfd_conn_close(scene.pair.a.core, scene.conns[2], TFD_DETAIL_CONNECTION,
	                        &(struct tfd_landed){ .channels = 1 }, NULL));
	CHECK(pace_of(&scene)->bulk_bytes ==
	      sim_conn(&scene.pair.a, scene.conns[1])->class_bytes[TFD_PRIORITY_BULK]);
	scene_close(&scene);
}

/* A rate that is too old is measured anew, which takes a few milliseconds in ten seconds. */
static void test_rate_ages(void)
{
	struct scene scene;
	uint64_t measured;

	scene_open(&scene, RAIL);
	use(&scene, 0, 0);
	pass(&scene, 200 * MS);
	scene.urgent = 5 * MS;
	pass(&scene, 100 * MS);
	measured = pace_of(&scene)->rate_ns;
	pass(&scene, 9000 * MS);
	CHECK(pace_of(&scene)->rate_ns == measured && pace_of(&scene)->bulk_most != UINT64_MAX);
	pass(&scene, 1100 * MS);
	CHECK(pace_of(&scene)->rate_ns > measured && pace_of(&scene)->bulk_most != UINT64_MAX);
	scene_close(&scene);
}

int main(void)
{
	test_beside(1);
	test_beside(CONNS);
	test_long_path();
	test_many_peers();
	test_stands();
	test_rate_ages();
	return 0;
}

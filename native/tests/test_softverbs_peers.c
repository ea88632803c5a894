/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Credits on a rail of verbs as it is by default: 56 peers, each with a connection either way, send it immediates all at once, as fast as they
 * can, and its worker is the slow one. Each makes progress all the time; nothing is resent, and all of it is counted. On the double.
 */
#include <stdio.h>

#include "core/parts.h"
#include "core_fixture.h"
#include "softverbs/softverbs.h"

#define PEERS 56u
#define RING 64u
#define STEP_NS 10000u
#define RAREST 4u /* the receiver takes one step, of 64 immediates at most, in so many of the others' */
#define LOOK_STEPS 2000u /* in so many each has made progress */
#define LOOKS 5u

struct peer {
	struct host host;
	struct user user;
	uint64_t out, in; /* to us */
	uint64_t grant;
	uint64_t done, before;
};

static struct host us;
static struct user user;
static struct peer peers[PEERS];
static uint64_t now_ns = 1000000, step;

static void stepped_open(struct host *host, const char *rail)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "verbs",
	                                   .library = "libsoftverbs.so",
	                                   .rail_count = 1 };

	(void)strcpy(group.rails[0], rail);
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void world_open(void)
{
	CHECK(softverbs_configure("mode=inline max_qp=2048") == 0);
	stepped_open(&us, "soft1");
	user_open(&us, &user);
	for (uint32_t i = 0; i < PEERS; i++) {
		struct peer *peer = &peers[i];
		uint64_t out, in;

		stepped_open(&peer->host, "soft0");
		user_open(&peer->host, &peer->user);
		connect_hosts(&us, &peer->host, &out,
		              &in); /* a part of our queue is for what that one answers */
		connect_hosts(&peer->host, &us, &peer->out, &peer->in);
		peer->grant = open_grant(&peer->user, &user, peer->out);
	}
}

static void world_close(void)
{
	for (uint32_t i = 0; i < PEERS; i++) {
		tfd_core_close(peers[i].host.core);
		user_unmap(&peers[i].user);
	}
	tfd_core_close(us.core);
	user_unmap(&user);
}

static uint32_t share_of(const struct peer *peer)
{
	struct tfd_conn *conn = tfd_conn_get(us.core, peer->in);
	uint32_t share;

	CHECK(conn);
	share = conn->credits.share;
	tfd_conn_put(conn);
	return share;
}

/* Submits while there is room for a record. */
static void feed(struct peer *peer, bool more)
{
	struct tfd_entry entry = { .op = TFD_OP_IMM, .dst_grant = peer->grant };
	struct user *from = &peer->user;

	while (peer->done < from->next_job) {
		const struct tfd_record *record = &from->records[(peer->done + 1) % RING];

		if (tfd_load_acquire(&record->done_id) != peer->done + 1)
			break;
		CHECK(record->status == TFD_JOB_OK);
		peer->done++;
	}
	while (more && from->next_job - peer->done < RING - 1)
		(void)user_submit(from, entry);
}

/* Whether any has jobs left. */
static bool step_all(bool more)
{
	bool busy = false;

	now_ns += STEP_NS;
	for (uint32_t i = 0; i < PEERS; i++) {
		feed(&peers[i], more);
		(void)tfd_core_step(peers[i].host.core, now_ns);
		busy = busy || peers[i].done < peers[i].user.next_job;
	}
	if (++step % RAREST == 0)
		(void)tfd_core_step(us.core, now_ns);
	return busy;
}

static uint64_t done_in_all(void)
{
	uint64_t done = 0;

	for (uint32_t i = 0; i < PEERS; i++)
		done += peers[i].done;
	return done;
}

static void look(uint64_t *least, uint64_t *most)
{
	*least = UINT64_MAX;
	*most = 0;
	for (uint32_t i = 0; i < PEERS; i++) {
		uint64_t more = peers[i].done - peers[i].before;

		peers[i].before = peers[i].done;
		*least = more < *least ? more : *least;
		*most = more > *most ? more : *most;
	}
}

static void expect_clean(void)
{
	struct softverbs_counts counts;
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(us.core, us.group, 0, &info));
	CHECK(!info.credit_floods && !info.errors);
	softverbs_counts("soft1", &counts);
	CHECK(!counts.rnr && counts.srq_low > 0 && counts.immediates >= done_in_all());
}

/* What the first and the last get, and that it is there. */
static void test_shares(void)
{
	uint32_t all = 0, depth;
	struct tfd_rail_info info;

	CHECK_OK(tfd_group_rail(us.core, us.group, 0, &info));
	depth = info.imm_depth;
	CHECK(depth == 7936);
	for (uint32_t i = 0; i < PEERS; i++) {
		all += share_of(&peers[i]);
		CHECK(!i || share_of(&peers[i]) <= share_of(&peers[i - 1]));
	}
	CHECK(share_of(&peers[0]) == 128 && share_of(&peers[31]) == 128 && share_of(&peers[PEERS - 1]) == 15);
	CHECK(all < depth);
}

/* Nobody waits while others go on: at worst each gets on as its grant, the share less two, is to the largest one. */
static void test_all_at_once(void)
{
	uint64_t least, most;

	for (uint32_t i = 0; i < LOOKS; i++) {
		for (uint32_t j = 0; j < LOOK_STEPS; j++)
			(void)step_all(true);
		look(&least, &most);
		(void)printf("%llu to %llu immediates of a peer\n", (unsigned long long)least,
		             (unsigned long long)most);
		CHECK(least && least * (share_of(&peers[0]) - 2) >= most * (share_of(&peers[PEERS - 1]) - 2));
	}
	for (uint32_t i = 0; step_all(false) || user.counters[0].value != done_in_all(); i++)
		CHECK(i < 1000000);
	expect_clean();
}

int main(void)
{
	world_open();
	test_shares();
	test_all_at_once();
	world_close();
	return 0;
}

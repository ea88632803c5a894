/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Provider verbs as queue pairs end that have taken receives of the shared queue: what had landed is told, and every receive comes back. On
 * the double, which completes them a while after a queue pair broke, and then tells "last WQE reached" (softverbs/last.c).
 */
#include "verbs_soft.h"

#define FAR "soft1"
#define ROUNDS 40u

static void world_open(const char *configuration)
{
	configure(configuration);
	side_open_at(&a, DEVICE);
	side_open_at(&b, FAR);
}

static void world_close(void)
{
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* Every receive is in the shared queue, or waits to be posted again. */
static void all_receives_are_there(void)
{
	struct softverbs_counts counted;

	SOFT(softverbs_counts)(FAR, &counted);
	CHECK(!counted.receives_lost);
	CHECK(counted.srq_entries + b.domain->receives_used == b.domain->receives);
}

static void immediates_post(struct joined *pair, struct tfd_wr *wrs, uint32_t count)
{
	struct tfd_post post = piece_of(&a, &b, 0);
	struct tfd_wc wc;

	post.has_imm = 1;
	for (uint32_t i = 0; i < count; i++) {
		post.imm = i;
		CHECK_OK(ops->post(pair->out, &post, &wrs[i]));
	}
	(void)ops->poll(a.domain, &wc, 0);
}

static void immediates_sent(const struct tfd_wr *wrs, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_wc wc = next_of(&a);

		CHECK(wc.type == TFD_WC_SENT && wc.wr == &wrs[i]);
	}
}

/* Closes it as the core does. How many immediates it still told; *lost: how often that some may be missing. */
static uint32_t close_settled(struct tfd_half **half, bool settles, uint32_t *lost)
{
	uint32_t landed = 0;
	struct tfd_wc wc[4];
	int count;

	*lost = 0;
	ops->half_close(*half);
	if (settles)
		ops->half_settle(*half);
	while ((count = ops->half_drain(*half, wc, 4)) > 0) {
		for (int i = 0; i < count; i++) {
			if (wc[i].type == TFD_WC_IMM)
				CHECK(wc[i].imm == landed++);
			else
				*lost += !wc[i].wr && wc[i].error == EOVERFLOW;
		}
	}
	ops->half_free(*half);
	*half = NULL;
	return landed;
}

/* Of more connections than there are receives each ends in the midst of an immediate, which has taken one. */
static void test_in_the_midst(bool settles)
{
	struct tfd_wr wrs[1] = { 0 };
	uint32_t lost;

	world_open("hurry=100 max_srq_wr=64 last_us=1000");
	for (uint32_t i = 0; i < ROUNDS; i++) {
		struct joined pair;

		pair_open(&pair);
		SOFT(softverbs_hold)(DEVICE, 1);
		immediates_post(&pair, wrs, 1);
		CHECK(close_settled(&pair.in, settles, &lost) == 0 && !lost);
		SOFT(softverbs_hold)(DEVICE, 0);
		pair_close(&pair);
		all_receives_are_there();
	}
	world_close();
}

/* The receiver's half is freed without having been drained to its end, as when others fill the queue. */
static void test_never_empty(void)
{
	struct tfd_wr wrs[1] = { 0 };
	struct joined pair;

	world_open("hurry=100 max_srq_wr=64 last_us=1000");
	pair_open(&pair);
	SOFT(softverbs_hold)(DEVICE, 1);
	immediates_post(&pair, wrs, 1);
	ops->half_close(pair.in);
	ops->half_free(pair.in);
	pair.in = NULL;
	SOFT(softverbs_hold)(DEVICE, 0);
	pair_close(&pair);
	all_receives_are_there();
	world_close();
}

/* Their senders know that they have landed; their completions come after the queue pair has broken, by itself or by our hand. */
static void test_landed(bool fatal, bool settles)
{
	struct tfd_wr wrs[3] = { 0 };
	struct joined pair;
	struct tfd_wc wc;
	uint32_t lost;

	world_open("hurry=100 max_srq_wr=64 last_us=1000");
	pair_open(&pair);
	SOFT(softverbs_late)(FAR, 1);
	immediates_post(&pair, wrs, 3);
	immediates_sent(wrs, 3);
	CHECK(ops->poll(b.domain, &wc, 1) == 0);
	if (fatal)
		CHECK(SOFT(softverbs_qp_fatal)(pair.in->queues[TFD_TRAFFIC_BULK].number) == 0);
	CHECK(close_settled(&pair.in, settles, &lost) == 3 && !lost);
	pair_close(&pair);
	all_receives_are_there();
	world_close();
}

/* A half that was never joined has taken none: nothing is told of it, and nobody waits. */
static void test_not_joined(void)
{
	struct joined pair;

	world_open("last=0");
	halves_open(&pair);
	pair_close(&pair);
	CHECK(!a.domain->lasts_missed && !b.domain->lasts_missed);
	world_close();
}

/* A device that never tells is waited for once, and then not; nor is rdma_rxe ever. */
static void test_never_told(const char *configuration, uint32_t missed)
{
	struct joined pair;
	uint32_t lost;

	world_open(configuration);
	for (uint32_t i = 0; i < 8; i++) {
		pair_open(&pair);
		CHECK(close_settled(&pair.in, true, &lost) == 0 && !lost);
		pair_close(&pair);
	}
	CHECK(b.domain->lasts_missed == missed && !tfd_load_seq(&b.domain->lasts));
	all_receives_are_there();
	world_close();
}

/* One that tells, but not this time: nobody knows what had landed. */
static void test_missed(void)
{
	struct joined pairs[2];
	uint32_t lost;

	world_open("hurry=100");
	pair_open(&pairs[0]);
	pair_open(&pairs[1]);
	pair_close(&pairs[0]);
	CHECK(tfd_load_seq(&b.domain->lasts) && !b.domain->lasts_missed);
	SOFT(softverbs_last_hold)(FAR, 1);
	CHECK(close_settled(&pairs[1].in, true, &lost) == 0 && lost == 1);
	CHECK(b.domain->lasts_missed == 1);
	SOFT(softverbs_last_hold)(FAR, 0);
	pair_close(&pairs[1]);
	world_close();
}

/* Nothing is told of a device that is gone, and nobody waits for it. */
static void test_gone(void)
{
	struct joined pair;
	struct tfd_wc wc;

	world_open("hurry=100");
	pair_open(&pair);
	ops->half_close(pair.in);
	SOFT(softverbs_remove)(FAR);
	ops->half_settle(pair.in);
	wc = next_of(&b);
	CHECK(wc.type == TFD_WC_ERROR && wc.error == ENODEV);
	while (ops->half_drain(pair.in, &wc, 1) > 0)
		continue;
	CHECK(!b.domain->lasts_missed);
	ops->half_free(pair.in);
	pair.in = NULL;
	pair_close(&pair);
	SOFT(softverbs_back)(FAR);
	world_close();
}

int main(void)
{
	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	test_in_the_midst(true);
	test_in_the_midst(false);
	test_never_empty();
	for (uint32_t i = 0; i < 4; i++)
		test_landed(i & 1, i & 2);
	test_not_joined();
	test_never_told("last=0", 1);
	test_never_told("last=0 vendor=16777215", 0);
	test_missed();
	test_gone();
	return 0;
}

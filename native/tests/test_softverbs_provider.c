/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Provider verbs when the device does not take what it is told: what it still has is not told as done before it is, and nothing lands by a
 * half that was closed. The double ends the program if memory goes while a work request names it.
 */
#include "softverbs/softverbs.h"
#include "verbs_pair.h"

#define POSTS 6u /* the first half of them in flight when the second is refused */

static struct joined pair;
static struct tfd_wr wrs[POSTS];
static uint32_t told[POSTS]; /* 0: not yet; else enum tfd_wc_type */

static void world_open(const char *configuration)
{
	CHECK(softverbs_configure(configuration) == 0);
	memset(told, 0, sizeof(told));
	side_open_at(&a, "soft0");
	side_open_at(&b, "soft1");
	pair_open(&pair);
	memset(a.memory, 1, BYTES);
}

static void world_close(void)
{
	struct softverbs_counts left;

	side_close(&a);
	side_close(&b);
	for (uint32_t i = 0; i < 2; i++) {
		softverbs_counts(i ? "soft1" : "soft0", &left);
		CHECK(!left.contexts && !left.pds && !left.mrs && !left.cqs && !left.srqs && !left.qps &&
		      !left.channels);
	}
}

/* A page each, so that where they land tells which. */
static void post(uint32_t number)
{
	struct tfd_post piece = piece_of(&a, &b, 4096);

	piece.remote_address += number * 4096;
	CHECK_OK(ops->post(pair.out, &piece, &wrs[number]));
}

static void take(const struct tfd_wc *wc, int count)
{
	for (int i = 0; i < count; i++) {
		uint32_t number = (uint32_t)(wc[i].wr - wrs);

		if (!wc[i].wr) {
			CHECK(wc[i].type == TFD_WC_ERROR && wc[i].owner == &pair.writer);
			continue;
		}
		CHECK(number < POSTS && !told[number]);
		CHECK(!number || told[number - 1]);
		told[number] = wc[i].type;
	}
}

/* What the device has is not told before it has done with it. */
static void poll_sender(void)
{
	struct tfd_wc wc[POSTS];

	take(wc, ops->poll(a.domain, wc, POSTS));
}

static void close_sender(void)
{
	struct tfd_wc wc[POSTS];
	int count;

	ops->half_close(pair.out);
	while ((count = ops->half_drain(pair.out, wc, POSTS)) > 0)
		take(wc, count);
	ops->half_free(pair.out);
	for (uint32_t i = 0; i < POSTS; i++)
		CHECK(told[i]);
}

static bool landed(uint32_t number)
{
	for (uint32_t i = 1; i < 4096; i++)
		CHECK(b.memory[number * 4096 + i] == b.memory[number * 4096]);
	return b.memory[number * 4096] != 0;
}

/* A chain is refused while another is in flight. `parts` of the second are taken, where a device can take some of a list. */
static void test_refused(const char *verb, const char *configuration, bool lands)
{
	world_open(configuration);
	softverbs_hold("soft0", 1);
	for (uint32_t i = 0; i < POSTS / 2; i++)
		post(i);
	poll_sender();
	for (uint32_t i = POSTS / 2; i < POSTS; i++)
		post(i);
	softverbs_fail(verb, 0, ENOMEM);
	poll_sender();
	CHECK(softverbs_failed());
	for (uint32_t i = 0; i < POSTS; i++)
		CHECK(!told[i]);
	CHECK(ops->post(pair.out, &(struct tfd_post){ 0 }, &wrs[0]) == -ENOTCONN);
	if (lands) {
		softverbs_hold("soft0", 0);
		for (uint32_t i = 0; i < 50000 && !told[POSTS / 2 - 1]; i++) {
			poll_sender();
			(void)usleep(100);
		}
	}
	close_sender();
	for (uint32_t i = 0; i < POSTS; i++) {
		bool here = lands && i < POSTS / 2;

		CHECK(told[i] == (here ? TFD_WC_SENT : TFD_WC_ERROR) && landed(i) == here);
	}
	softverbs_hold("soft0", 0);
	half_end(&pair.in);
	world_close();
}

/* How often it is told that immediates of the half may be lost. */
static uint32_t close_receiver(void)
{
	struct tfd_wc wc[POSTS];
	uint32_t lost = 0;
	int count;

	ops->half_close(pair.in);
	while ((count = ops->half_drain(pair.in, wc, POSTS)) > 0) {
		for (int i = 0; i < count; i++) {
			CHECK(wc[i].type == TFD_WC_ERROR && !wc[i].wr && wc[i].owner == &pair.owner);
			CHECK(wc[i].error == EOVERFLOW);
			lost++;
		}
	}
	ops->half_free(pair.in);
	return lost;
}

/*
 * The queue pairs cannot be put into the error state: they end all the same, at either side. Of those that could land something meanwhile
 * nobody says how much it was.
 */
static void test_unstoppable(bool incoming, uint32_t skip, int error_number)
{
	world_open("mode=threaded hurry=100");
	softverbs_hold("soft0", 1);
	for (uint32_t i = 0; i < POSTS; i++)
		post(i);
	poll_sender();
	softverbs_fail("ibv_modify_qp", skip, error_number);
	if (incoming)
		CHECK(close_receiver() == (error_number != EIO));
	else
		close_sender();
	CHECK(softverbs_failed());
	softverbs_hold("soft0", 0);
	if (incoming)
		close_sender();
	else
		half_end(&pair.in);
	for (uint32_t i = 0; i < POSTS; i++)
		CHECK(told[i] == TFD_WC_ERROR && !landed(i));
	world_close();
}

int main(void)
{
	(void)unsetenv("TFD_TEST_RAIL");
	(void)unsetenv("TFD_TEST_LIBRARY");
	test_refused("ibv_wr_complete", "mode=threaded hurry=100", false);
	test_refused("ibv_wr_complete", "mode=threaded hurry=100", true);
	test_refused("ibv_wr_complete", "mode=inline", true);
	test_refused("ibv_post_send", "mode=threaded hurry=100 extended=0", false);
	test_refused("ibv_post_send", "mode=threaded hurry=100 extended=0", true);
	for (uint32_t skip = 0; skip < TFD_VERBS_CHANNELS; skip++) {
		test_unstoppable(false, skip, EINVAL);
		test_unstoppable(true, skip, EINVAL);
		test_unstoppable(true, skip, EIO); /* as of a device that is gone */
	}
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The queue for what was posted, which all connections of a verbs rail share: on the double of libibverbs (softverbs/). */
#include "verbs_soft.h"

/* One that posts as much as it may leaves entries of the queue that they share to others, and these to others still. */
static void test_room(void)
{
	static struct tfd_wr wrs[4][128];
	struct tfd_post post;
	struct joined pairs[4];
	uint32_t posted[4] = { 0 };

	configure("max_srq_wr=64; max_cqe=128");
	side_open_at(&a, DEVICE);
	side_open_at(&b, DEVICE);
	SOFT(softverbs_hold)(DEVICE, 1);
	post = piece_of(&a, &b, 8);
	for (uint32_t i = 0; i < 4; i++) {
		pair_open(&pairs[i]);
		while (ops->post(pairs[i].out, &post, &wrs[i][posted[i]]) == 0)
			posted[i]++;
		CHECK(posted[i] >= 8 && posted[i] <= 16 && (!i || posted[i] <= posted[i - 1]));
	}
	SOFT(softverbs_hold)(DEVICE, 0);
	for (uint32_t i = posted[0] + posted[1] + posted[2] + posted[3]; i; i--)
		CHECK(next_of(&a).type == TFD_WC_SENT);
	for (uint32_t i = 0; i < 4; i++)
		pair_close(&pairs[i]);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

int main(void)
{
	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	test_room();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A client that has thousands of targets read for nothing, again and again: what a pass, or a command, reads of them has a bound. */
#include "core/parts.h"
#include "sim_pair.h"

#define RECORDS 4096u
#define READ_MOST (TFD_SESSION_PLAN_TARGETS / TFD_MAX_TARGETS) /* tables in a pass, or a command */

/* Each is as long as can be, and wrong at its end. */
static void put_spoiled(struct user *user, uint64_t grant, uint8_t op, uint8_t flags, uint64_t last_length)
{
	struct tfd_target *targets = sim_table(user);

	for (uint32_t i = 0; i < TFD_MAX_TARGETS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = grant };
	targets[TFD_MAX_TARGETS - 1].length = last_length;
	for (uint32_t i = 0; i < RECORDS - 1; i++)
		(void)user_submit(user, (struct tfd_entry){ .op = op,
		                                            .flags = flags,
		                                            .src_region = user->region,
		                                            .table_count = TFD_MAX_TARGETS });
}

static void count_ends(const struct user *user, uint32_t *invalid, uint32_t *quota)
{
	*invalid = *quota = 0;
	for (uint64_t job = 1; job < RECORDS; job++) {
		if (user->records[job].done_id != job)
			continue;
		*invalid += user->records[job].status == TFD_JOB_INVALID;
		*quota += user->records[job].status == TFD_JOB_QUOTA;
	}
}

int main(void)
{
	struct tfd_group_options group = { .window_bytes = 1u << 20 };
	uint32_t invalid, quota, before;
	struct sim_pair pair;
	struct user bad;
	uint64_t grant;

	sim_pair_open(&pair, 1, "move=0", group);
	user_open_sized(&pair.a, &bad, RECORDS);
	grant = sim_grant(&pair, &bad, &pair.to);
	put_spoiled(&bad, grant, TFD_OP_SCATTER, 0, REGION_BYTES + 1);
	for (int pass = 0; pass < 5; pass++) {
		count_ends(&bad, &before, &quota);
		(void)tfd_core_step(pair.a.core, pair.now);
		count_ends(&bad, &invalid, &quota);
		CHECK(invalid > before && invalid - before <= READ_MOST);
	}
	/* Its end takes all that it has published. */
	before = invalid;
	CHECK_OK(tfd_session_end(pair.a.core, bad.session, TFD_DETAIL_SESSION_ENDED));
	count_ends(&bad, &invalid, &quota);
	CHECK(invalid + quota == RECORDS - 1 && invalid - before <= READ_MOST);
	/* Nobody else is told that it is too much. */
	expect(sim_run(&pair, &pair.from,
	               (struct tfd_entry){ .op = TFD_OP_WRITE,
	                                   .src_region = pair.from.region,
	                                   .dst_grant = pair.grant,
	                                   .length = 10 }),
	       TFD_JOB_OK, 0);
	user_unmap(&bad);
	sim_pair_close(&pair);
	return 0;
}

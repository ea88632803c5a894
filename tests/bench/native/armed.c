/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bumps a watcher that an armed write waits for, again and again, without a scripting language in between; the client half of
 * the data plane is linked in.
 */
#include <stdint.h>

#include "transferd/client.h"

struct armed {
	struct tfd_client *client;
	uint64_t region;
	uint64_t grant;
	uint64_t length;
	uint64_t count;
	uint64_t value; /* of the watcher, before */
	uint64_t pause_ns; /* from the arming to the bump: the worker has taken the job by then */
	uint32_t imm;
	uint32_t watcher;
};

#define WAIT_NS 10000000000
#define SPIN_NS 10000000

__attribute__((visibility("default"))) int armed_run(const struct armed *armed, uint64_t *bumped,
                                                     uint64_t *posted, uint64_t *ended);

static int one(const struct armed *armed, uint64_t i, uint64_t *bumped, struct tfd_result *result)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .flags = TFD_FLAG_ARMED,
	                           .priority = TFD_PRIORITY_LATENCY,
	                           .src_region = armed->region,
	                           .dst_grant = armed->grant,
	                           .length = armed->length,
	                           .imm = armed->imm,
	                           .watcher = armed->watcher,
	                           .fire_at = armed->value + i + 1 };
	int rc = tfd_client_submit_wait(armed->client, 0, &entry, 1, WAIT_NS);
	/* Not always at the same place of the worker's pass. */
	uint64_t until = tfd_client_now_ns() + armed->pause_ns + i * 7919 % 1000;

	if (rc)
		return rc;
	while (tfd_client_now_ns() < until)
		continue;
	*bumped = tfd_client_now_ns();
	rc = tfd_client_watcher_bump(armed->client, armed->watcher, 1);
	if (!rc)
		rc = tfd_client_job_wait(armed->client, entry.job_id, WAIT_NS, SPIN_NS, result);
	tfd_client_job_release(armed->client, entry.job_id);
	return rc;
}

/* Fills bumped[count], posted[count] and ended[count], CLOCK_MONOTONIC. Returns 0, -errno, or how a job ended if not OK. */
int armed_run(const struct armed *armed, uint64_t *bumped, uint64_t *posted, uint64_t *ended)
{
	for (uint64_t i = 0; i < armed->count; i++) {
		struct tfd_result result;
		int rc = one(armed, i, &bumped[i], &result);

		if (rc)
			return rc;
		if (result.status != TFD_JOB_OK)
			return (int)result.status;
		posted[i] = result.posted_ns;
		ended[i] = result.ended_ns;
	}
	return 0;
}

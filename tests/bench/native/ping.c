/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes back and forth between two sessions without a scripting language in between; the client half of the data
 * plane is linked in. Each process calls ping_run with its own session.
 */
#include <errno.h>
#include <stdint.h>

#include "transferd/client.h"

struct ping {
	struct tfd_client *client;
	uint64_t region;
	uint64_t grant; /* handle of the far side's memory */
	uint64_t length;
	uint64_t spin_ns;
	uint64_t count;
	uint64_t counted; /* what the counter shows already */
	uint32_t imm;
	uint32_t slot;   /* of the counter here */
	uint32_t first;  /* not 0: this side begins */
	uint32_t _pad;
};

#define WAIT_NS 10000000000

__attribute__((visibility("default"))) int ping_run(const struct ping *ping, uint64_t *called,
                                                    uint64_t *seen);

static int64_t write_one(const struct ping *ping, uint64_t *called)
{
	int64_t job;

	*called = tfd_client_now_ns();
	job = tfd_client_job_submit(ping->client, 0, TFD_OP_WRITE, TFD_PRIORITY_LATENCY, ping->imm,
	                            ping->region, 0, ping->grant, 0, ping->length, 0, 0, WAIT_NS);
	if (job > 0)
		tfd_client_job_release(ping->client, (uint64_t)job);
	return job;
}

/* Fills called[count] and seen[count], CLOCK_MONOTONIC. Returns 0 or -errno. */
int ping_run(const struct ping *ping, uint64_t *called, uint64_t *seen)
{
	for (uint64_t i = 0; i < ping->count; i++) {
		int64_t rc = 1;

		if (ping->first)
			rc = write_one(ping, &called[i]);
		if (rc < 0)
			return (int)rc;
		rc = tfd_client_counter_wait(ping->client, ping->slot, ping->counted + i + 1, WAIT_NS,
		                             ping->spin_ns);
		if (rc)
			return (int)rc;
		seen[i] = tfd_client_now_ns();
		if (!ping->first)
			rc = write_one(ping, &called[i]);
		if (rc < 0)
			return (int)rc;
	}
	return 0;
}

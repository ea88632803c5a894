/* SPDX-License-Identifier: Apache-2.0 */
/* ImmCounters as their owner sees them. */
#include <errno.h>

#include "../core/barrier.h"
#include "session.h"

int tfd_client_counter_read(struct tfd_client *client, uint32_t slot, struct tfd_counter_view *out)
{
	return tfd_client_counters_read(client, &slot, 1, out);
}

int tfd_client_counters_read(struct tfd_client *client, const uint32_t *slots, uint32_t count,
                             struct tfd_counter_view *out)
{
	const struct tfd_counter *counter;

	if (!client)
		return -EPIPE;
	for (uint32_t i = 0; i < count; i++) {
		if (slots[i] >= client->counter_count)
			return -ERANGE;
		counter = &client->counters[slots[i]];
		/* pairs with the worker's store of value: the data of the writes that it counts */
		out[i].value = tfd_load_acquire(&counter->value);
		out[i].faults = tfd_load_acquire(&counter->faults);
		out[i].lost = tfd_load_acquire(&counter->lost);
		out[i].acknowledged = tfd_load_acquire(&counter->acknowledged);
	}
	return 0;
}

struct counter_wait {
	const struct tfd_counter *counter;
	uint64_t target;
};

static int counter_check(struct tfd_client *client, void *argument)
{
	const struct counter_wait *wait = argument;
	const struct tfd_counter *counter = wait->counter;
	int over = tfd_client_over(client); /* before value: what landed before the death still counts */
	uint64_t acknowledged;

	/* pairs with the worker's store of value: the data of the writes that it counts */
	if (tfd_load_acquire(&counter->value) >= wait->target)
		return 0;
	acknowledged = tfd_load_acquire(&counter->acknowledged);
	if (tfd_load_acquire(&counter->faults) > acknowledged)
		/* A target that was reached before the fault wins: value was stored first. */
		return tfd_load_acquire(&counter->value) >= wait->target ? 0 : -EIO;
	return over ? over : -EAGAIN;
}

int tfd_client_counter_wait(struct tfd_client *client, uint32_t slot, uint64_t target, int64_t timeout_ns,
                            uint64_t spin_ns)
{
	struct tfd_client_bed bed;
	struct counter_wait wait;
	struct tfd_counter *counter;

	if (!client)
		return -EPIPE;
	if (slot >= client->counter_count)
		return -ERANGE;
	counter = &client->counters[slot];
	wait = (struct counter_wait){ counter, target };
	bed = (struct tfd_client_bed){ &counter->event, &counter->waiters, &counter->wake_at, target, NULL };
	return tfd_client_wait(client, counter_check, &wait, &bed, timeout_ns, spin_ns);
}

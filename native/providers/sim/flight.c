/* SPDX-License-Identifier: Apache-2.0 */
/* Pieces under way: when they land, and when that is told. */
#include <errno.h>

#include "fabric.h"

uint64_t tfd_sim_delay_locked(struct tfd_domain *domain)
{
	return domain->options.delay_us ?
	               tfd_sim_random_locked(domain) % (1000ull * domain->options.delay_us + 1) :
	               0;
}

void tfd_sim_flight_end_locked(struct tfd_half *half, struct tfd_flight *flight, bool error)
{
	struct tfd_wc wc = { .type = error ? TFD_WC_ERROR : TFD_WC_SENT,
	                     .wr = flight->wr,
	                     .error = error ? EIO : 0,
	                     .remote_access = flight->refused };

	if (flight->wr)
		*tfd_sim_done_locked(half->domain) = wc;
	tfd_list_remove(&flight->link);
	half->domain->flights--;
	tfd_list_push(&half->domain->flights_free, &flight->link);
}

/* All that it had in flight has landed, by this key at last, and nothing is wrong. */
static void half_trust_locked(struct tfd_half *half, uint64_t key)
{
	const struct tfd_mr *mr;

	for (uint32_t i = 0; i < half->domain->options.channels; i++) {
		if (!tfd_list_empty(&half->channels[i].flights))
			return;
	}
	if (!half->domain->null || half->faults || !half->far_half || !tfd_sim_usable(half->far_half))
		return;
	mr = tfd_sim_mr_locked(half->far_half->domain, key);
	if (mr && mr->writable)
		half->at_once = mr;
}

/* Ordered: nothing passes what was posted before it. */
static void channel_step_locked(struct tfd_half *half, struct tfd_sim_channel *channel)
{
	bool ordered = half->domain->options.ordered != 0;
	uint64_t now = tfd_sim_now_locked();
	uint64_t key = 0;
	bool rated = half->domain->options.rate_gbps != 0; /* goes on sending meanwhile */
	bool waits = false; /* an earlier acknowledgement is still under way */
	struct tfd_list *next;

	if ((channel->mute || tfd_sim_is_cut_locked(half)) && !(half->faults & TFD_SIM_BROKEN))
		return;

	for (struct tfd_list *link = channel->flights.next; link != &channel->flights; link = next) {
		struct tfd_flight *flight = tfd_container(link, struct tfd_flight, link);

		next = link->next;
		key = flight->post.remote_key;
		if ((flight->due_ns > now || (flight->landed && waits)) && !(half->faults & TFD_SIM_BROKEN)) {
			if (ordered && !(rated && flight->landed))
				return;
			waits = ordered;
			continue;
		}
		if (half->faults & TFD_SIM_BROKEN) {
			if (!flight->landed)
				tfd_sim_land_some_locked(half, flight);
			tfd_sim_flight_end_locked(half, flight, true);
			continue;
		}
		if (flight->landed) {
			tfd_sim_flight_end_locked(half, flight, false);
			continue;
		}
		if ((half->faults & TFD_SIM_FAILS_NEXT) && !half->domain->dead) {
			half->faults &= ~(uint32_t)TFD_SIM_FAILS_NEXT;
			if (tfd_sim_random_locked(half->domain) % 2)
				tfd_sim_land_locked(half, flight);
			tfd_sim_flight_end_locked(half, flight, true);
			continue;
		}
		tfd_sim_land_locked(half, flight);
		if (flight->refused || (half->faults & TFD_SIM_BROKEN)) {
			tfd_sim_fault_locked(half, TFD_SIM_BROKEN);
			tfd_sim_flight_end_locked(half, flight, true);
			continue;
		}
		if (!flight->wr) {
			tfd_sim_flight_end_locked(half, flight, false);
			continue;
		}
		flight->due_ns = now + tfd_sim_delay_locked(half->domain);
		if (flight->due_ns > now && ordered && !rated)
			return;
		waits = waits || (ordered && flight->due_ns > now);
		next = link; /* acknowledged at once */
	}
	if (tfd_list_empty(&channel->flights))
		half_trust_locked(half, key);
}

void tfd_sim_step_locked(struct tfd_half *half)
{
	for (uint32_t i = 0; i < half->domain->options.channels; i++) {
		if (!tfd_list_empty(&half->channels[i].flights))
			channel_step_locked(half, &half->channels[i]);
	}
}

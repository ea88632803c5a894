/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What becomes of a rail while the daemon runs: its port loses its link and gets it again, its device is removed. The provider knows
 * (tfd_provider_ops.rail_state, completions with ENODEV); control is told, and connections that cannot carry anything end.
 *
 *   DOWN  for a second its connections go on: a link that flaps costs retries of the NIC's. Then they break, so that jobs go by the
 *         other rails, and control makes new ones once the port is up
 *   GONE  they break at once, and the rail takes nothing any more for as long as the daemon runs
 */
#include <errno.h>

#include "barrier.h"
#include "parts.h"

#define DOWN_BOUND_NS 1000000000u

uint32_t tfd_rail_state(const struct tfd_rail *rail)
{
	/* Once the core has been told so it stays so, whatever is asked later. */
	if (!rail->ops->rail_state || tfd_load_relaxed(&rail->info.state) == TFD_RAIL_GONE)
		return tfd_load_relaxed(&rail->info.state);
	return rail->ops->rail_state(rail->domain);
}

int tfd_rail_usable(const struct tfd_rail *rail, struct tfd_error *error)
{
	switch (tfd_rail_state(rail)) {
	case TFD_RAIL_GONE:
		return tfd_fail(error, -ENODEV,
		                "rail %s: its device was removed: restart the daemon once it is back",
		                rail->info.name);
	case TFD_RAIL_DOWN:
		return tfd_fail(error, -ENETDOWN, "rail %s: its port is down", rail->info.name);
	default:
		return 0;
	}
}

/* What comes in by one that is down its writer gives up, or not; by one that is gone nothing comes. */
static void conns_break(struct tfd_worker *worker, const struct tfd_rail *rail, bool incoming)
{
	for (struct tfd_list *link = worker->conns.next; link != &worker->conns; link = link->next) {
		struct tfd_conn *conn = tfd_container(link, struct tfd_conn, link);

		if (conn->rail == rail && (conn->outgoing || incoming))
			tfd_conn_break(conn, TFD_DETAIL_CONNECTION);
	}
}

static void state_set(struct tfd_worker *worker, struct tfd_rail *rail, uint32_t state)
{
	struct tfd_event event = { .type = TFD_EVENT_RAIL_STATE, .id = rail->index, .count = state };

	if (rail->info.state == state)
		return;
	tfd_store_relaxed(&rail->info.state, state);
	rail->since_ns = worker->now_ns;
	tfd_event_post(worker, &event);
}

void tfd_rail_gone(struct tfd_worker *worker, struct tfd_rail *rail)
{
	state_set(worker, rail, TFD_RAIL_GONE);
	conns_break(worker, rail, true);
}

static void rail_check(struct tfd_worker *worker, struct tfd_rail *rail)
{
	uint32_t state = tfd_rail_state(rail);

	if (state == TFD_RAIL_GONE) {
		tfd_rail_gone(worker, rail);
		return;
	}
	state_set(worker, rail, state);
	if (state == TFD_RAIL_DOWN && worker->now_ns - rail->since_ns >= DOWN_BOUND_NS)
		conns_break(worker, rail, false);
}

void tfd_rails_check(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < worker->group->rail_count; i++)
		rail_check(worker, &worker->group->rails[i]);
}

/* An error of the provider's that is of no piece. */
void tfd_rail_error(struct tfd_worker *worker, struct tfd_rail *rail, const struct tfd_wc *wc)
{
	if (wc->error == EOVERFLOW)
		tfd_conns_uncounted(worker, rail, wc->owner);
	else if (wc->owner)
		tfd_conn_break(wc->owner, TFD_DETAIL_CONNECTION);
	else if (wc->error == ENODEV)
		tfd_rail_gone(worker, rail);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* How jobs that their client copies end before their word has come: fences, cancels, deadlines, revokes, and either session's end. */
#include "copied_world.h"

static struct tfd_entry entry_of(const struct world *w, uint32_t imm)
{
	return (struct tfd_entry){ .op = TFD_OP_WRITE,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .dst_grant = w->on_device[0],
	                           .length = 4096,
	                           .imm = imm,
	                           .fire_at = 1 };
}

static struct running armed(struct world *w, uint32_t imm)
{
	bump_to(w, 0);
	return submit(w, entry_of(w, imm));
}

/* It ended so, was told lost as one write, and its word comes too late. */
static void ends_lost(struct world *w, const struct running *running, uint32_t status, uint32_t detail)
{
	uint64_t before = value_of(w, 0, 1);
	struct tfd_event event;

	ends(w, running, status, detail);
	CHECK(running->record->bytes == 0);
	step(w, 1); /* hands the events over */
	CHECK(next_event(w, TFD_EVENT_LOST, &event) && event.count == 1 && event.units == 0);
	CHECK(!next_event(w, TFD_EVENT_LOST, &event));
	bump_to(w, 1);
	step(w, 10);
	CHECK(value_of(w, 0, 1) == before);
	rests(w);
}

static void test_cancel(struct world *w)
{
	struct running running = armed(w, 1);
	struct running cancel = submit(w, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = running.id });

	ends(w, &cancel, TFD_JOB_OK, 0);
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
	running = armed(w, 1);
	cancel = submit(w, (struct tfd_entry){ .op = TFD_OP_DISARM });
	ends(w, &cancel, TFD_JOB_OK, 0);
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
}

static void test_deadline(struct world *w)
{
	struct tfd_entry entry = entry_of(w, 1);
	struct running running;

	bump_to(w, 0);
	entry.deadline_ns = w->now + 1000000;
	running = submit(w, entry);
	CHECK(!over(&running));
	step(w, 200);
	ends_lost(w, &running, TFD_JOB_DEADLINE, 0);
}

static void test_expiry(struct world *w)
{
	struct tfd_entry entry = entry_of(w, 1);
	struct running running;

	entry.dst_grant = grant_on(w, &w->to[0].user, w->to[0].device, 1, TFD_RIGHT_WRITE | TFD_RIGHT_MAP,
	                           w->now + 500000);
	bump_to(w, 0);
	running = submit(w, entry);
	step(w, 100);
	CHECK(!over(&running));
	bump_to(w, 1); /* late: its owner has taken the memory back */
	ends_lost(w, &running, TFD_JOB_INVALID, TFD_DETAIL_EXPIRED);
}

static void test_fence(struct world *w)
{
	struct tfd_imm_range range = { .first = 1, .count = 1 };
	struct running running = armed(w, 1);
	struct running other = submit(w, entry_of(w, 2));
	struct tfd_event event;

	CHECK_OK(tfd_open_fence(w->host.core, w->from.user.session, w->on_device[0], &range, 1, 77));
	CHECK(tfd_load_acquire(&running.record->done_id) == running.id); /* before it is answered */
	step(w, 1);
	CHECK(tfd_core_events(w->host.core, &event, 1) == 1 && event.type == TFD_EVENT_LOST);
	CHECK(next_event(w, TFD_EVENT_FENCE_QUIET, &event) && event.count == 77);
	CHECK(running.record->status == TFD_JOB_CANCELLED && running.record->detail == TFD_DETAIL_FENCED);
	bump_to(w, 1);
	ends(w, &other, TFD_JOB_OK, 0);
	CHECK(value_of(w, 0, 2) == 1);
	rests(w);
}

/* One target's owner takes its grant back: the others count all the same. */
static void test_scatter_revoked(struct world *w)
{
	struct tfd_target *targets = (void *)arena_of(w);
	struct tfd_entry entry = { .op = TFD_OP_SCATTER,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .imm = 3,
	                           .fire_at = 1,
	                           .table_count = RECEIVERS };
	struct running running;
	struct tfd_event event;

	for (uint32_t i = 0; i < RECEIVERS; i++)
		targets[i] = (struct tfd_target){ .dst_grant = w->on_device[i], .length = 64 };
	bump_to(w, 0);
	running = submit(w, entry);
	drop_events(w);
	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[1], TFD_DETAIL_REVOKED));
	step(w, 1);
	CHECK(next_event(w, TFD_EVENT_OPEN_QUIET, &event) && event.id == w->on_device[1]);
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	CHECK(value_of(w, 0, 3) == 1 && value_of(w, 1, 3) == 0 && value_of(w, 2, 3) == 1);
	CHECK(running.record->bytes == 128);
	rests(w);
}

static void test_revoked(struct world *w)
{
	struct running running = armed(w, 1);

	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[0], TFD_DETAIL_REVOKED));
	ends_lost(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	refused(w, entry_of(w, 1), TFD_DETAIL_REVOKED);
	w->on_device[0] = grant_on(w, &w->to[0].user, w->to[0].device, 1, 0, 0);
}

/* The connection by which it would count is lost. */
static void test_connection(struct world *w)
{
	struct running running = armed(w, 1);
	uint64_t before = value_of(w, 0, 1);

	CHECK_OK(tfd_conn_close(w->host.core, w->out, TFD_DETAIL_CONNECTION, NULL, NULL));
	step(w, 2);
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	CHECK(value_of(w, 0, 1) == before);
	rests(w);
	connect_hosts(&w->host, &w->host, &w->out, &w->in);
	w->on_device[0] = grant_on(w, &w->to[0].user, w->to[0].device, 1, 0, 0);
}

/* Its client dies: nothing of it counts any more, whatever its stream still does. */
static void test_session_ends(struct world *w)
{
	struct running running = armed(w, 1);
	uint64_t before = value_of(w, 0, 1);
	struct tfd_event event;

	drop_events(w);
	CHECK_OK(tfd_session_end(w->host.core, w->from.user.session, TFD_DETAIL_SESSION_ENDED));
	step(w, 2);
	CHECK(next_event(w, TFD_EVENT_LOST, &event) && event.imm == 1 && event.count == 1);
	CHECK(next_event(w, TFD_EVENT_SESSION_QUIET, &event));
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_SESSION_ENDED);
	bump_to(w, 1);
	step(w, 10);
	CHECK(value_of(w, 0, 1) == before);
	rests(w);
	CHECK_OK(tfd_session_close(w->host.core, w->from.user.session));
}

int main(void)
{
	struct world w;

	world_open(&w);
	test_cancel(&w);
	test_deadline(&w);
	test_expiry(&w);
	test_fence(&w);
	test_scatter_revoked(&w);
	test_revoked(&w);
	test_connection(&w);
	test_session_ends(&w);
	world_close(&w);
	return 0;
}

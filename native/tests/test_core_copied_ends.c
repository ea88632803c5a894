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

/* What its stream waits for: watcher 1 to reach 5; the marks are in the place of watcher 2. */
static struct running triggered(struct world *w, struct tfd_entry entry)
{
	struct tfd_copy_marks *marks = (void *)&w->from.user.watchers[2];

	entry.trigger = 1;
	entry.marks = 3;
	entry.argument = 5;
	tfd_store_seq(&marks->marks[entry.fire_at % TFD_COPY_MARKS], TFD_COPY_MARK(entry.fire_at));
	return submit(w, entry);
}

static uint32_t mark_of(const struct world *w, uint64_t value)
{
	const struct tfd_copy_marks *marks = (const void *)&w->from.user.watchers[2];

	return marks->marks[value % TFD_COPY_MARKS];
}

static void trigger_to(struct world *w, uint64_t value)
{
	tfd_store_seq(&w->from.user.watchers[1].value, value);
}

/* It ended so, was told lost as one write, and its word comes too late. */
static void ended_lost(struct world *w, const struct running *running, uint32_t status, uint32_t detail)
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

/* It has failed, and its stream may be writing: nobody is told before that is through. */
static void ends_lost(struct world *w, const struct running *running, uint32_t status, uint32_t detail)
{
	struct tfd_event event;

	step(w, 10);
	CHECK(!over(running) && session_of(w)->group->worker->polled == 1);
	CHECK(!next_event(w, TFD_EVENT_LOST, &event));
	bump_to(w, 1);
	ended_lost(w, running, status, detail);
}

static void cancel(struct world *w, const struct running *running)
{
	struct running command =
		submit(w, (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = running->id });

	ends(w, &command, TFD_JOB_OK, 0);
}

static void test_cancel(struct world *w)
{
	struct running running = armed(w, 1);
	struct running command;

	drop_events(w);
	cancel(w, &running);
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
	running = armed(w, 1);
	command = submit(w, (struct tfd_entry){ .op = TFD_OP_DISARM });
	ends(w, &command, TFD_JOB_OK, 0);
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
}

/* Copies and others on one watcher: all are cancelled by one command, those that no stream has to do with at once. */
static void test_disarm_of_many(struct world *w)
{
	struct running copies[5], others[5], command;
	struct tfd_entry other = { .op = TFD_OP_IMM, .flags = TFD_FLAG_ARMED, .dst_grant = w->on_device[0] };
	struct tfd_entry entry = entry_of(w, 1);

	bump_to(w, 0);
	for (uint32_t i = 0; i < 5; i++) {
		entry.fire_at = 10 - i;
		copies[i] = submit(w, entry);
		other.fire_at = i % 2 ? 3 + i : 20 - i;
		others[i] = submit(w, other);
	}
	command = submit(w, (struct tfd_entry){ .op = TFD_OP_DISARM });
	ends(w, &command, TFD_JOB_OK, 0);
	for (uint32_t i = 0; i < 5; i++)
		CHECK(over(&others[i]) && others[i].record->status == TFD_JOB_CANCELLED && !over(&copies[i]));
	bump_to(w, 8);
	for (uint32_t i = 0; i < 5; i++)
		CHECK(over(&copies[i]) == (10 - i <= 8));
	bump_to(w, 10);
	ends(w, &copies[0], TFD_JOB_CANCELLED, 0);
	rests(w);
	drop_events(w);
}

/* Its client never stores the word: it is stuck, or dead, and its context with it. */
static void test_word_never_comes(struct world *w)
{
	struct running running = armed(w, 1);

	drop_events(w);
	cancel(w, &running);
	w->now += COPY_NS - 1000000;
	step(w, 2);
	CHECK(!over(&running));
	w->now += 1000000;
	step(w, 2);
	CHECK(over(&running));
	ended_lost(w, &running, TFD_JOB_CANCELLED, 0);
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
	bump_to(w, 0);
	entry.deadline_ns = w->now; /* when it is taken its stream may have begun all the same */
	running = submit(w, entry);
	ends_lost(w, &running, TFD_JOB_DEADLINE, 0);
	bump_to(w, 0);
	entry.deadline_ns = w->now + 1000000;
	running = submit(w, entry);
	cancel(w, &running);
	step(w, 200); /* its deadline matters no more */
	CHECK(!over(&running));
	bound_pass(w);
	ended_lost(w, &running, TFD_JOB_CANCELLED, 0);
}

/* A stream that waits for its trigger finds the copy void: nobody waits for that. */
static void test_void(struct world *w)
{
	struct running running;

	bump_to(w, 0);
	trigger_to(w, 4);
	running = triggered(w, entry_of(w, 1));
	drop_events(w);
	cancel(w, &running);
	CHECK(over(&running) && mark_of(w, 1) == TFD_COPY_VOID(1));
	ended_lost(w, &running, TFD_JOB_CANCELLED, 0);
	bump_to(w, 0);
	trigger_to(w, 5); /* it may be copying */
	running = triggered(w, entry_of(w, 1));
	cancel(w, &running);
	CHECK(mark_of(w, 1) == TFD_COPY_VOID(1));
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
	/* A mark that is another copy's is left alone, and nothing is taken for void. */
	bump_to(w, 0);
	trigger_to(w, 4);
	running = triggered(w, entry_of(w, 1));
	((struct tfd_copy_marks *)(void *)&w->from.user.watchers[2])->marks[1] = TFD_COPY_MARK(17);
	cancel(w, &running);
	CHECK(mark_of(w, 1) == TFD_COPY_MARK(17));
	ends_lost(w, &running, TFD_JOB_CANCELLED, 0);
}

static void test_bad_triggers(struct world *w)
{
	struct tfd_entry entry = entry_of(w, 1);

	entry.trigger = 1;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
	entry.marks = 9;
	refused(w, entry, TFD_DETAIL_BAD_WATCHER);
	entry.marks = UINT32_MAX;
	refused(w, entry, TFD_DETAIL_BAD_WATCHER);
	entry.marks = 8;
	entry.trigger = 8;
	refused(w, entry, TFD_DETAIL_BAD_WATCHER);
	entry.trigger = 1;
	entry.flags = TFD_FLAG_ARMED;
	refused(w, entry, TFD_DETAIL_BAD_FLAGS);
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
	ended_lost(w, &running, TFD_JOB_INVALID, TFD_DETAIL_EXPIRED);
}

static void fence(struct world *w, uint32_t imm, uint64_t number)
{
	struct tfd_imm_range range = { .first = imm, .count = 1 };

	drop_events(w);
	CHECK_OK(tfd_open_fence(w->host.core, w->from.user.session, w->on_device[0], &range, 1, number));
	step(w, 10);
}

static void test_fence(struct world *w)
{
	struct running running = armed(w, 1);
	struct running other = submit(w, entry_of(w, 2));
	struct tfd_event event;

	fence(w, 1, 77);
	CHECK(!over(&running) && !tfd_core_events(w->host.core, &event, 1));
	bump_to(w, 1);
	CHECK(over(&running)); /* before it is answered */
	ends(w, &other, TFD_JOB_OK, 0);
	step(w, 1);
	CHECK(tfd_core_events(w->host.core, &event, 1) == 1 && event.type == TFD_EVENT_LOST);
	CHECK(next_event(w, TFD_EVENT_FENCE_QUIET, &event) && event.count == 77 && !event.detail);
	CHECK(running.record->status == TFD_JOB_CANCELLED && running.record->detail == TFD_DETAIL_FENCED);
	CHECK(value_of(w, 0, 2) == 1);
	rests(w);
}

static void test_fence_of_what_waits_for_a_trigger(struct world *w)
{
	struct running running;
	struct tfd_event event;

	bump_to(w, 0);
	trigger_to(w, 4);
	running = triggered(w, entry_of(w, 1));
	fence(w, 1, 78);
	CHECK(over(&running) && mark_of(w, 1) == TFD_COPY_VOID(1));
	CHECK(next_event(w, TFD_EVENT_FENCE_QUIET, &event) && event.count == 78 && !event.detail);
	rests(w);
}

/* It is answered, and says that a stream may write on. */
static void test_fence_that_is_not_quiet(struct world *w)
{
	struct running running = armed(w, 1);
	struct tfd_event event;

	fence(w, 1, 79);
	CHECK(!next_event(w, TFD_EVENT_FENCE_QUIET, &event));
	bound_pass(w);
	CHECK(over(&running) && next_event(w, TFD_EVENT_FENCE_QUIET, &event));
	CHECK(event.count == 79 && event.detail == TFD_DETAIL_STILL_COPIED);
	rests(w);
	running = armed(w, 1);
	fence(w, 1, 80);
	bump_to(w, 1);
	CHECK(next_event(w, TFD_EVENT_FENCE_QUIET, &event) && event.count == 80 && !event.detail);
	rests(w);
}

static struct tfd_entry scatter_of(struct world *w)
{
	struct tfd_target *targets = (void *)arena_of(w);
	uint64_t *places = (void *)(targets + RECEIVERS);

	for (uint32_t i = 0; i < RECEIVERS; i++) {
		targets[i] = (struct tfd_target){ .dst_grant = w->on_device[i], .length = 64 };
		places[i] = DEVICE_ADDRESS + i;
	}
	return (struct tfd_entry){ .op = TFD_OP_SCATTER,
	                           .flags = COPIED_FLAGS,
	                           .src_region = w->from.device,
	                           .imm = 3,
	                           .fire_at = 1,
	                           .table_count = RECEIVERS };
}

static void grant_anew(struct world *w, uint32_t receiver)
{
	w->on_device[receiver] = grant_on(w, &w->to[receiver].user, w->to[receiver].device, 1, 0, 0);
}

static void scatter_revoke(struct world *w)
{
	drop_events(w);
	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[1], TFD_DETAIL_REVOKED));
	step(w, 10);
}

static bool told_quiet(struct world *w)
{
	struct tfd_event event;

	return next_event(w, TFD_EVENT_OPEN_QUIET, &event) && event.id == w->on_device[1];
}

/* One target's owner takes its grant back: the others count all the same. */
static void test_scatter_revoked(struct world *w)
{
	const uint64_t *places;
	struct running running;

	bump_to(w, 0);
	running = submit(w, scatter_of(w));
	scatter_revoke(w);
	CHECK(!told_quiet(w) && !over(&running));
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	CHECK(told_quiet(w));
	CHECK(value_of(w, 0, 3) == 1 && value_of(w, 1, 3) == 0 && value_of(w, 2, 3) == 1);
	CHECK(running.record->bytes == 128);
	rests(w);
	/* Its stream waits for a trigger: it will leave that target out. */
	grant_anew(w, 1);
	bump_to(w, 0);
	trigger_to(w, 4);
	running = triggered(w, scatter_of(w));
	places = (const void *)(arena_of(w) + RECEIVERS * sizeof(struct tfd_target));
	scatter_revoke(w);
	CHECK(told_quiet(w) && !over(&running) && mark_of(w, 1) == TFD_COPY_MARK(1));
	CHECK(places[0] && !places[1] && places[2]);
	bump_to(w, 1);
	ends(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	CHECK(value_of(w, 0, 3) == 2 && value_of(w, 1, 3) == 0 && value_of(w, 2, 3) == 2);
	rests(w);
	grant_anew(w, 1);
}

/* The bound of one target that failed is not that of the others, nor the job's deadline. */
static void test_scatter_given_up(struct world *w)
{
	struct tfd_entry entry = scatter_of(w);
	struct running running;

	bump_to(w, 0);
	entry.deadline_ns = w->now + 3 * COPY_NS;
	running = submit(w, entry);
	scatter_revoke(w);
	bound_pass(w);
	CHECK(told_quiet(w) && !over(&running));
	w->now += 3 * COPY_NS;
	step(w, 2);
	CHECK(over(&running)); /* it was given up before */
	ends(w, &running, TFD_JOB_DEADLINE, TFD_DETAIL_NONE);
	rests(w);
	grant_anew(w, 1);
	drop_events(w);
}

/* Two targets fail, one after the other; and then all. */
static void test_scatter_cancelled(struct world *w)
{
	struct running running;

	bump_to(w, 0);
	running = submit(w, scatter_of(w));
	scatter_revoke(w);
	cancel(w, &running);
	step(w, 5);
	CHECK(!over(&running) && !told_quiet(w));
	bump_to(w, 1);
	CHECK(over(&running) && told_quiet(w));
	rests(w);
	grant_anew(w, 1);
	drop_events(w);
}

static void test_revoked(struct world *w)
{
	struct running running = armed(w, 1);
	struct tfd_event event;

	drop_events(w);
	CHECK_OK(tfd_open_revoke(w->host.core, w->from.user.session, w->on_device[0], TFD_DETAIL_REVOKED));
	step(w, 5);
	CHECK(!next_event(w, TFD_EVENT_OPEN_QUIET, &event));
	ends_lost(w, &running, TFD_JOB_CANCELLED, TFD_DETAIL_REVOKED);
	refused(w, entry_of(w, 1), TFD_DETAIL_REVOKED);
	grant_anew(w, 0);
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

/* Its client dies: nothing of it counts any more, and it is quiet when its stream is, or is gone: its context dies with it. */
static void test_session_ends(struct world *w)
{
	struct running copying = armed(w, 1), later, waiting;
	uint64_t before = value_of(w, 0, 1);
	struct tfd_entry entry = entry_of(w, 1);
	struct tfd_event event;

	entry.fire_at = 2;
	later = submit(w, entry);
	entry.fire_at = 3;
	trigger_to(w, 4);
	waiting = triggered(w, entry);
	drop_events(w);
	CHECK_OK(tfd_session_end(w->host.core, w->from.user.session, TFD_DETAIL_SESSION_ENDED));
	step(w, 2);
	CHECK(over(&waiting) && mark_of(w, 3) == TFD_COPY_VOID(3) && !over(&copying) && !over(&later));
	CHECK(next_event(w, TFD_EVENT_LOST, &event) && event.imm == 1 && event.count == 1);
	bump_to(w, 1);
	CHECK(over(&copying) && !over(&later) && !next_event(w, TFD_EVENT_SESSION_QUIET, &event));
	bound_pass(w);
	ends(w, &later, TFD_JOB_CANCELLED, TFD_DETAIL_SESSION_ENDED);
	CHECK(next_event(w, TFD_EVENT_SESSION_QUIET, &event));
	bump_to(w, 3);
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
	test_disarm_of_many(&w);
	test_word_never_comes(&w);
	test_deadline(&w);
	test_void(&w);
	test_bad_triggers(&w);
	test_expiry(&w);
	test_fence(&w);
	test_fence_of_what_waits_for_a_trigger(&w);
	test_fence_that_is_not_quiet(&w);
	test_scatter_revoked(&w);
	test_scatter_given_up(&w);
	test_scatter_cancelled(&w);
	test_revoked(&w);
	test_connection(&w);
	test_session_ends(&w);
	world_close(&w);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The thread that makes the wake-up calls, so that workers make none. A worker marks what to wake in bitmaps of
 * the session and pushes the session on a stack, once: bounded, whatever a client writes into `waiters`.
 */
#include <errno.h>
#include <unistd.h>

#include "barrier.h"
#include "futex.h"
#include "parts.h"

static void waker_push(struct tfd_session *session)
{
	struct tfd_waker *waker = &session->core->waker;
	struct tfd_session *top;

	if (tfd_swap_seq(&session->wake_pending, 1)) /* on the stack already; pairs with session_wake */
		return;
	top = tfd_load_relaxed(&waker->stack);
	do
		session->wake_next = top;
	while (!tfd_replace_seq(&waker->stack, &top, session));
	if (tfd_load_seq(&waker->sleeping)) { /* pairs with waker_run: stores, then looks at the stack */
		tfd_store_seq(&waker->sleeping, 0);
		tfd_futex_wake_all(&waker->sleeping);
	}
}

static bool wake_event_due(struct tfd_session *session)
{
	/* pairs with tfd_client_set_event_waiters: it stores, then looks at the record or counter */
	if (!tfd_load_seq(&session->header->event_waiters))
		return false;
	tfd_store_seq(&session->wake_event, 1);
	return true;
}

void tfd_wake_counter(struct tfd_session *session, uint32_t slot)
{
	const struct tfd_count *count = &session->counts[slot];
	struct tfd_counter *shared = &session->counters[slot];
	bool due = wake_event_due(session);

	/* pairs with tfd_client_wait: waiters and wake_at, then value; we stored value, then look at them */
	if (tfd_load_seq(&shared->waiters) &&
	    (count->faults != count->acknowledged || count->value >= tfd_load_seq(&shared->wake_at))) {
		/* Every sleeper will look and ask anew; until then, or if one asks just now, every count wakes. */
		tfd_store_seq(&shared->wake_at, 0);
		(void)tfd_or_seq(&session->wake_counters[slot / 64], 1ull << (slot % 64));
		due = true;
	}
	if (session->control_watch) {
		tfd_store_seq(&session->wake_control, 1);
		due = true;
	}
	if (due)
		waker_push(session);
}

void tfd_wake_record(struct tfd_session *session, struct tfd_source *source, uint32_t record)
{
	bool due;

	if (source->control) {
		tfd_store_seq(&session->wake_control, 1);
		waker_push(session);
		return;
	}
	due = wake_event_due(session);
	if (tfd_load_seq(&source->records[record].waiters)) { /* pairs with tfd_client_job_wait */
		(void)tfd_or_seq(&session->wake_records[record / 64], 1ull << (record % 64));
		due = true;
	}
	if (due)
		waker_push(session);
}

static void wake_word(uint32_t *event)
{
	(void)tfd_add_seq(event, 1);
	tfd_futex_wake_all(event);
}

static void wake_bits(uint64_t *bitmap, uint32_t count, uint8_t *first_event, size_t stride)
{
	for (uint32_t word = 0; word < (count + 63) / 64; word++) {
		uint64_t bits = tfd_load_seq(&bitmap[word]) ? tfd_swap_seq(&bitmap[word], 0) : 0;

		for (; bits; bits &= bits - 1) {
			size_t index = word * 64u + (uint32_t)__builtin_ctzll(bits);

			wake_word((uint32_t *)(void *)(first_event + index * stride));
		}
	}
}

static void session_wake(struct tfd_session *session)
{
	uint64_t one = 1;

	tfd_store_seq(&session->wake_pending, 0); /* before the bits: a bit set after this pushes anew */
	wake_bits(session->wake_counters, session->counter_count, (uint8_t *)&session->counters[0].event,
	          sizeof(struct tfd_counter));
	wake_bits(session->wake_records, session->sources[0].record_count,
	          (uint8_t *)&session->sources[0].records[0].event, sizeof(struct tfd_record));
	if (tfd_swap_seq(&session->wake_event, 0))
		(void)!write(session->event[1], &one, sizeof(one)); /* full: it is readable anyway */
	if (tfd_swap_seq(&session->wake_control, 0))
		(void)!write(session->control_fd, &one, sizeof(one));
}

void tfd_waker_drain(struct tfd_core *core)
{
	struct tfd_waker *waker = &core->waker;
	struct tfd_session *session;

	(void)pthread_mutex_lock(&waker->lock);
	session = tfd_swap_seq(&waker->stack, NULL);
	while (session) {
		struct tfd_session *next =
			session->wake_next; /* before session_wake lets it be pushed again */

		session_wake(session);
		session = next;
	}
	(void)pthread_mutex_unlock(&waker->lock);
}

static void *waker_run(void *argument)
{
	struct tfd_core *core = argument;
	struct tfd_waker *waker = &core->waker;

	while (!tfd_load_seq(&waker->stop)) {
		tfd_waker_drain(core);
		tfd_store_seq(&waker->sleeping, 1); /* pairs with waker_push */
		if (tfd_load_seq(&waker->stack) || tfd_load_seq(&waker->stop))
			tfd_store_seq(&waker->sleeping, 0);
		else
			tfd_futex_wait(&waker->sleeping, 1, -1);
	}
	return NULL;
}

int tfd_waker_open(struct tfd_core *core)
{
	int rc;

	(void)pthread_mutex_init(&core->waker.lock, NULL);
	if (core->options.stepped)
		return 0;
	rc = pthread_create(&core->waker.thread, NULL, waker_run, core);
	if (rc)
		return -rc;
	core->waker.running = true;
	return 0;
}

void tfd_waker_close(struct tfd_core *core)
{
	struct tfd_waker *waker = &core->waker;

	if (waker->running) {
		tfd_store_seq(&waker->stop, 1);
		tfd_store_seq(&waker->sleeping, 0);
		tfd_futex_wake_all(&waker->sleeping);
		(void)pthread_join(waker->thread, NULL);
		waker->running = false;
	}
	(void)pthread_mutex_destroy(&waker->lock);
}

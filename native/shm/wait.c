/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sleeping on words of the segment.
 *
 * The waiter counts itself in `waiters`, reads `event`, looks at its condition again and sleeps only if `event` is
 * still the same; the daemon stores its news, reads `waiters` and, if anybody is there, changes `event` and wakes.
 * All four are sequential, so at least one side sees the other. The futex words are shared between processes.
 */
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../core/barrier.h"
#include "session.h"

#define NS_PER_S 1000000000ull
/* A sleeper looks up this often even if nobody wakes it, so that no lost wake-up of a dying daemon lasts. */
#define TFD_RECHECK_NS (NS_PER_S / 2)
#define TFD_RESTLESS_NS 200000ull
#define TFD_SPIN_MAX_NS 10000000ull

uint64_t tfd_client_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint64_t tfd_client_deadline(int64_t timeout_ns)
{
	uint64_t now = tfd_client_now_ns();

	if (timeout_ns < 0 || (uint64_t)timeout_ns > UINT64_MAX - now)
		return UINT64_MAX;
	return now + (uint64_t)timeout_ns;
}

int64_t tfd_client_left(uint64_t deadline)
{
	uint64_t now = tfd_client_now_ns();

	if (deadline == UINT64_MAX)
		return -1;
	return now < deadline ? (int64_t)(deadline - now) : 0;
}

/* -EINTR if a signal came, else 0 whatever ended the sleep. */
static int futex_sleep(uint32_t *word, uint32_t expected, uint64_t ns)
{
	struct timespec limit = { .tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S) };

	if (syscall(SYS_futex, word, FUTEX_WAIT, expected, &limit, NULL, 0) && errno == EINTR)
		return -EINTR;
	return 0;
}

static void futex_wake(uint32_t *word)
{
	(void)syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* -EAGAIN once `spin_end` has passed. Yields: whoever has the news may need this very core. */
static int spin(struct tfd_client *client, tfd_client_check check, void *argument, uint64_t spin_end)
{
	for (;;) {
		int rc = check(client, argument);

		if (rc != -EAGAIN || tfd_client_now_ns() >= spin_end)
			return rc;
		sched_yield();
	}
}

/*
 * Lowers wake_at to our target. Whenever the daemon wakes for this word it clears it, and everybody who was asleep looks and
 * says anew what he waits for. One that gave up leaves his target behind: that wakes the others once too often.
 */
static void ask_for(uint64_t *wake_at, uint64_t target)
{
	uint64_t lowest = tfd_load_relaxed(wake_at);

	while (!lowest || target < lowest) {
		if (tfd_replace_seq(wake_at, &lowest, target))
			return;
	}
}

int tfd_client_wait(struct tfd_client *client, tfd_client_check check, void *argument,
                    const struct tfd_client_bed *bed, int64_t timeout_ns, uint64_t spin_ns)
{
	uint64_t deadline = tfd_client_deadline(timeout_ns);
	uint64_t now = tfd_client_now_ns();
	uint64_t spin_end = now + (spin_ns < TFD_SPIN_MAX_NS ? spin_ns : TFD_SPIN_MAX_NS);
	int rc = spin(client, check, argument, spin_end < deadline ? spin_end : deadline);
	int slept = 0;

	while (rc == -EAGAIN) {
		uint64_t left;
		uint32_t seen;

		now = tfd_client_now_ns();
		if (now >= deadline)
			return -ETIMEDOUT;
		if (slept)
			return slept;
		left = bed->restless && *bed->restless ? TFD_RESTLESS_NS : TFD_RECHECK_NS;
		left = deadline - now < left ? deadline - now : left;
		tfd_add_seq(bed->waiters, 1u);
		seen = tfd_load_seq(bed->event); /* before wake_at: who clears that changes this afterwards */
		if (bed->wake_at)
			ask_for(bed->wake_at, bed->target);
		rc = check(client, argument);
		if (rc == -EAGAIN) {
			slept = futex_sleep(bed->event, seen, left);
			rc = check(client, argument);
		}
		tfd_sub_seq(bed->waiters, 1u);
	}
	return rc;
}

static void word_wake(uint32_t *event, const uint32_t *waiters)
{
	if (!tfd_load_seq(waiters))
		return;
	/* The daemon's word; but this session is over, and whoever read it before must not fall asleep on it. */
	tfd_add_seq(event, 1u);
	futex_wake(event);
}

void tfd_client_wake_all(struct tfd_client *client)
{
	for (uint32_t i = 0; i < client->record_count; i++)
		word_wake(&client->records[i].event, &client->records[i].waiters);
	for (uint32_t i = 0; i < client->counter_count; i++)
		word_wake(&client->counters[i].event, &client->counters[i].waiters);
}

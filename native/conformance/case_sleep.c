/* SPDX-License-Identifier: Apache-2.0 */
/* The wait fd, and threads. */
#include "cases.h"
#include "conformance.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "core/barrier.h"

#define EXCHANGES 1500
#define SLEEP_MS 20000 /* who is not woken fails after that */
#define IDLE_MS 60
#define IDLE_WAKES 10 /* of an idle rail, all in all: something may have been under way */
#define REGISTRATIONS 300

/* -1: the fd is readable; 0: it is quiet for so long. */
static int quiet_for(const struct rig *rig, int ms)
{
	struct pollfd fds[2];
	nfds_t count = rig->one_domain ? 1 : 2;
	int ready;

	for (nfds_t i = 0; i < count; i++)
		fds[i] = (struct pollfd){ .fd = rig->ops->wait_fd(rig->sides[i].domain), .events = POLLIN };
	ready = poll(fds, count, ms);
	CHECK(ready >= 0);
	return ready ? -1 : 0;
}

static bool arm_both(struct rig *rig)
{
	for (uint32_t i = 0; i < (rig->one_domain ? 1u : 2u); i++) {
		int rc = rig->ops->arm(rig->sides[i].domain);

		CHECK(rc == 0 || rc == -EAGAIN);
		if (rc)
			return false;
	}
	return true;
}

static void must_be_idle(struct rig *rig)
{
	uint32_t wakes = 0;

	rig_settle(rig);
	for (uint32_t quiet = 0; quiet < 2;) {
		while (!arm_both(rig))
			(void)rig_poll(rig, 3);
		if (quiet_for(rig, IDLE_MS) == 0) {
			quiet++;
			continue;
		}
		if (++wakes > IDLE_WAKES)
			FAIL("the wait fd of an idle rail is readable again and again");
		for (int i = 0; i < 10; i++)
			(void)rig_poll(rig, 3);
	}
}

void case_sleep_idle(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair pairs[4];

	if (rig->ops->wait_fd(rig->sides[0].domain) < 0)
		outcome_skip("the rail has no wait fd: it is polled by time");
	must_be_idle(rig);
	for (uint32_t i = 0; i < 4; i++)
		pair_open(rig, &pairs[i], i % 2);
	must_be_idle(rig);
	for (uint32_t i = 0; i < 4; i++)
		rig_write(rig, &pairs[i], 70000, &imm);
	must_be_idle(rig);
	half_end(rig, &pairs[0].in);
	half_end(rig, &pairs[1].out);
	rig->faults = true;
	must_be_idle(rig);
	for (uint32_t i = 0; i < 4; i++)
		pair_close(rig, &pairs[i]);
	must_be_idle(rig);
	rig_close(rig);
}

/* ---- two workers ---- */

/* One of two that take turns: the number of an exchange goes there and back. Owner: its thread. */
struct sleeper {
	const struct tfd_provider_ops *ops;
	struct side *side, *to;
	struct tfd_half *out;
	uint32_t exchanges;
	bool begins;
	uint32_t sleeps;
	uint32_t sent, arrived, acked;
	struct tfd_wr wr[2];
};

static uint64_t length_of(const struct sleeper *self, uint32_t exchange)
{
	static const uint64_t some[] = { 0, 64, 4096, 30000, 0, 70000, 8, 300000, 0, 1u << 20 };
	uint64_t length = some[mix(exchange) % (sizeof(some) / sizeof(some[0]))];

	return length < self->side->info.max_message_bytes ? length : 64;
}

/* As a worker does: polls while there is something, sleeps if it may. */
static struct tfd_wc await_next(struct sleeper *self)
{
	struct pollfd fd = { .fd = self->ops->wait_fd(self->side->domain), .events = POLLIN };
	struct tfd_wc wc;

	for (;;) {
		if (self->ops->poll(self->side->domain, &wc, 1))
			return wc;
		if (self->ops->arm(self->side->domain) != 0) {
			(void)sched_yield(); /* the other may need this very core */
			continue;
		}
		self->sleeps++;
		if (poll(&fd, 1, SLEEP_MS) != 1)
			FAIL("slept through exchange %u: %u sent, %u acknowledged", self->arrived, self->sent,
			     self->acked);
	}
}

static void put(struct sleeper *self)
{
	uint32_t exchange = self->sent++;
	uint64_t length = length_of(self, exchange);
	struct tfd_post write = { .local = self->side->memory,
	                          .mr = length ? self->side->mr : NULL,
	                          .length = length,
	                          .remote_address = self->to->key.address,
	                          .remote_key = self->to->key.key,
	                          .has_imm = 1,
	                          .imm = exchange };
	struct tfd_wc wc;

	/* Room there is: what was posted before the last one is acknowledged. */
	for (;;) {
		int rc = self->ops->post(self->out, &write, &self->wr[exchange % 2]);

		if (rc == 0)
			return;
		CHECK(rc == -EAGAIN);
		if (self->ops->poll(self->side->domain, &wc, 1)) {
			CHECK(wc.type == TFD_WC_SENT);
			self->acked++;
		}
	}
}

static void *take_turns(void *argument)
{
	struct sleeper *self = argument;

	if (self->begins)
		put(self);
	while (self->arrived < self->exchanges || self->acked < self->exchanges) {
		struct tfd_wc wc = await_next(self);

		if (wc.type == TFD_WC_SENT) {
			self->acked++;
			continue;
		}
		CHECK(wc.type == TFD_WC_IMM && wc.imm == self->arrived);
		self->arrived++;
		if (self->sent < self->exchanges)
			put(self);
	}
	return NULL;
}

/* The other one may still need what only this one's polling gives: its last acknowledgement. */
struct ending {
	struct sleeper *self;
	uint32_t *done; /* shared; sleepers that have all */
};

static void *take_turns_to_the_end(void *argument)
{
	struct ending *ending = argument;
	struct sleeper *self = ending->self;
	struct tfd_wc wc;

	(void)take_turns(self);
	(void)tfd_add_seq(ending->done, 1);
	while (tfd_load_seq(ending->done) < 2) { /* pairs with the other's add */
		CHECK(self->ops->poll(self->side->domain, &wc, 1) == 0);
		(void)sched_yield();
	}
	return NULL;
}

static void exchange(const struct pair *pair, struct rig *rig, struct sleeper *there, struct sleeper *back)
{
	uint32_t done = 0;
	struct ending endings[2] = { { there, &done }, { back, &done } };
	pthread_t thread;

	*there = (struct sleeper){ .ops = rig->ops,
	                           .side = pair->from,
	                           .to = pair->to,
	                           .out = pair->out.half,
	                           .exchanges = load(EXCHANGES),
	                           .begins = true };
	*back = (struct sleeper){ .ops = rig->ops,
	                          .side = pair->to,
	                          .to = pair->from,
	                          .out = pair->in.half,
	                          .exchanges = load(EXCHANGES) };
	CHECK(pthread_create(&thread, NULL, take_turns_to_the_end, &endings[1]) == 0);
	(void)take_turns_to_the_end(&endings[0]);
	CHECK(pthread_join(thread, NULL) == 0);
}

/* Where a processor is shared, what one waits for may always be there by the time that it runs: then once more. */
void case_sleep_exchange(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct sleeper there, back;
	struct pair pair;
	int tries = 50;

	if (rig->ops->wait_fd(rig->sides[0].domain) < 0)
		outcome_skip("the rail has no wait fd: it is polled by time");
	if (rig->one_domain)
		outcome_skip("both sides are one rail, of one worker");
	pair_open(rig, &pair, 0);
	rig_write(rig, &pair, 100, &imm);
	rig_settle(rig);
	do
		exchange(&pair, rig, &there, &back);
	while (!(there.sleeps && back.sleeps) && --tries);
	CHECK(tries);
	outcome_remark("%u exchanges, %u and %u sleeps", there.exchanges, there.sleeps, back.sleeps);
	pair_close(rig, &pair);
	rig_close(rig);
}

/* ---- control threads beside a worker ---- */

struct registrar {
	struct rig *rig;
	uint32_t done; /* shared */
};

static void *register_again_and_again(void *argument)
{
	struct registrar *registrar = argument;
	struct rig *rig = registrar->rig;

	for (uint32_t i = 0; i < load(REGISTRATIONS); i++) {
		struct side *side = &rig->sides[i % 2];
		struct tfd_error sentence;
		struct tfd_region_key key;
		struct tfd_mr *mr;

		CHECK(rig->ops->mr_open(side->domain, side->memory + MEMORY_BYTES / 2, 4096 + i * 64, 1, &mr,
		                        &key, &sentence) == 0);
		rig->ops->mr_close(side->domain, mr);
	}
	tfd_store_seq(&registrar->done, 1); /* pairs with case_threads_beside */
	return NULL;
}

void case_threads_beside(void)
{
	struct rig *rig = rig_open();
	struct registrar registrar = { .rig = rig };
	pthread_t thread;
	struct pair pair;
	uint32_t round = 0;

	pair_open(rig, &pair, 0);
	CHECK(pthread_create(&thread, NULL, register_again_and_again, &registrar) == 0);
	while (!tfd_load_seq(&registrar.done) || round < 50) /* pairs with register_again_and_again */
		rig_write(rig, &pair, 1 + mix(round) % 30000, round % 2 ? &round : NULL), round++;
	CHECK(pthread_join(thread, NULL) == 0);
	outcome_remark("%u writes meanwhile", round);
	pair_close(rig, &pair);
	rig_close(rig);
}

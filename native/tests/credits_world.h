/* SPDX-License-Identifier: Apache-2.0 */
/* Many senders to one receiver whose queue is short and whose worker polls rarely, on the simulated fabric. For C tests. */
#ifndef TFD_CREDITS_WORLD_H
#define TFD_CREDITS_WORLD_H

#include "providers/sim/fabric.h"
#include "sim_pair.h"

#define SENDERS 64u
#define RING 64u
#define CROWD_STEPS 300000u /* in so many all is done */

struct sender {
	struct host host;
	struct user user;
	uint64_t out, in, grant;
	uint64_t done; /* jobs before it have ended */
};

struct crowd {
	struct host to;
	struct user user;
	struct sender from[SENDERS];
	uint32_t count;
	uint32_t rarely; /* the receiver is stepped in one of so many steps; 0: not at all */
	uint64_t now, step, overruns;
};

static inline void sender_open(struct crowd *crowd, struct sender *sender, const char *fabric)
{
	const struct tfd_group_options plain = { .segment_bytes = 4096 };

	sim_host_open(&sender->host, 1, fabric, plain);
	user_open(&sender->host, &sender->user);
	connect_hosts(&sender->host, &crowd->to, &sender->out, &sender->in);
	sender->grant = open_grant(&sender->user, &crowd->user, sender->out);
}

static inline void crowd_open(struct crowd *crowd, uint32_t count, uint32_t rarely, const char *fabric)
{
	const struct tfd_group_options plain = { 0 };

	memset(crowd, 0, sizeof(*crowd));
	crowd->now = 1000000;
	crowd->count = count;
	crowd->rarely = rarely;
	crowd->overruns = tfd_sim_overruns();
	tfd_sim_set_now(crowd->now);
	sim_host_open(&crowd->to, 1, fabric, plain);
	user_open(&crowd->to, &crowd->user);
	for (uint32_t i = 0; i < count; i++)
		sender_open(crowd, &crowd->from[i], fabric);
}

static inline void crowd_close(struct crowd *crowd)
{
	CHECK(tfd_sim_overruns() == crowd->overruns);
	for (uint32_t i = 0; i < crowd->count; i++) {
		tfd_core_close(crowd->from[i].host.core);
		user_unmap(&crowd->from[i].user);
	}
	tfd_core_close(crowd->to.core);
	user_unmap(&crowd->user);
	tfd_sim_set_now(0);
}

static inline struct tfd_rail *rail_of(const struct host *host)
{
	return &host->core->groups[host->group]->rails[0];
}

/*
 * No more waits to be polled than was shared out, whatever there would be room for; and what ASK is about was acknowledged before.
 */
static inline void crowd_check(const struct crowd *crowd)
{
	const struct tfd_rail *rail = rail_of(&crowd->to);

	CHECK(rail->domain->imms <= rail->info.imm_depth - rail->credits_free);
	for (uint32_t i = 0; i < crowd->count; i++) {
		const struct tfd_conn *out = sim_conn(&crowd->from[i].host, crowd->from[i].out);

		CHECK(!out || out->credits.asked <= out->credits.acked);
	}
}

static inline void crowd_step(struct crowd *crowd, uint64_t ns)
{
	crowd->step++;
	crowd->now += ns;
	tfd_sim_set_now(crowd->now);
	for (uint32_t i = 0; i < crowd->count; i++)
		(void)tfd_core_step(crowd->from[i].host.core, crowd->now);
	crowd_check(crowd);
	if (crowd->rarely && crowd->step % crowd->rarely == 0)
		(void)tfd_core_step(crowd->to.core, crowd->now);
}

/* Whether a record would be free for its next job. */
static inline bool sender_has_room(struct sender *sender)
{
	const struct user *user = &sender->user;

	while (sender->done < user->next_job) {
		const struct tfd_record *record = &user->records[(sender->done + 1) % RING];

		if (tfd_load_acquire(&record->done_id) != sender->done + 1)
			break;
		CHECK(record->status == TFD_JOB_OK);
		sender->done++;
	}
	return user->next_job - sender->done < RING - 1;
}

/* Counts of all its immediates. */
static inline uint64_t crowd_counts(const struct crowd *crowd)
{
	uint64_t counts = 0;

	for (uint32_t i = 0; i < 16; i++)
		counts += tfd_load_acquire(&crowd->user.counters[i].value);
	return counts;
}

/*
 * Every sender submits jobs like this one, as fast as its ring takes them, until it had `each` in all; until they have ended and the
 * receiver has counted `counts`. Steps taken.
 */
static inline uint64_t crowd_run(struct crowd *crowd, struct tfd_entry entry, uint64_t each, uint64_t counts)
{
	uint64_t begun = crowd->step;
	bool busy = true;

	while (busy || crowd_counts(crowd) < counts) {
		busy = false;
		for (uint32_t i = 0; i < crowd->count; i++) {
			struct sender *sender = &crowd->from[i];

			entry.dst_grant = sender->grant;
			entry.src_region = entry.op == TFD_OP_IMM ? 0 : sender->user.region;
			entry.imm = i % 16;
			while (sender_has_room(sender) && sender->user.next_job < each)
				(void)user_submit(&sender->user, entry);
			busy = busy || sender->done < each;
		}
		CHECK(crowd->step - begun < CROWD_STEPS);
		crowd_step(crowd, PAIR_STEP_NS);
	}
	CHECK(crowd_counts(crowd) == counts);
	return crowd->step - begun;
}

#endif

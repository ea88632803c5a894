/* SPDX-License-Identifier: Apache-2.0 */
/* Counting against a model: random immediates of every weight, in any order, with faults and acknowledgements between. */
#include "core/parts.h"
#include "core_fixture.h"

#define STEPS 200000
#define IMMS 16

static const uint32_t eighths[8] = { 1, 2, 4, 8, 64, 512, 4096, 32768 };

struct model {
	uint64_t units, faults, lost, acknowledged;
};

struct run {
	struct user *user;
	struct model model[IMMS];
	uint64_t random;
	uint64_t dropped;
};

static uint32_t next_random(struct run *run)
{
	run->random = run->random * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(run->random >> 33);
}

static void check_counter(const struct run *run, uint32_t imm)
{
	const struct tfd_counter *shared = &run->user->counters[imm];
	const struct model *model = &run->model[imm];

	CHECK(shared->value == model->units / 8);
	CHECK(shared->faults == model->faults && shared->lost == model->lost);
	CHECK(shared->acknowledged == model->acknowledged);
	CHECK(shared->gate == model->units / 8 + (model->faults != model->acknowledged ? TFD_GATE_FAULT : 0));
}

/* Runs on the worker, which owns the counters. */
static int count_at_random(struct tfd_worker *worker, void *argument)
{
	struct run *run = argument;
	uint32_t name_space = 0;

	while (!worker->name_spaces[name_space])
		name_space++;
	for (int i = 0; i < STEPS; i++) {
		uint32_t imm = next_random(run) % (IMMS + 2); /* the last two are outside every grant */
		uint32_t weight = next_random(run) % 8;
		uint64_t dropped = worker->dropped_imms;

		tfd_imm_arrived(worker, 1, weight << 29 | name_space << 20 | imm);
		if (imm >= IMMS) {
			CHECK(worker->dropped_imms == dropped + 1);
			continue;
		}
		run->model[imm].units += eighths[weight];
		if (next_random(run) % 100 == 0) {
			uint64_t lost = next_random(run) % 5;

			tfd_counter_fault(worker->name_spaces[name_space], imm, lost, 0, 0);
			run->model[imm].faults++;
			run->model[imm].lost += lost;
		}
		if (next_random(run) % 100 == 0) {
			tfd_counter_acknowledge(worker->name_spaces[name_space], imm);
			run->model[imm].acknowledged = run->model[imm].faults;
		}
		/* The client scribbles over its own counter: what is published next does not care. */
		if (next_random(run) % 1000 == 0)
			memset(&run->user->counters[imm], 0xff, sizeof(struct tfd_counter));
		else if (run->model[imm].units % 8 == 0 && eighths[weight] >= 8)
			check_counter(run, imm);
	}
	tfd_imm_arrived(worker, 1, 3u << 29 | 510u << 20); /* a name space that nobody has */
	return 0;
}

/* A write cut in n shards counts once, however the shards of many writes interleave. */
static int count_shards(struct tfd_worker *worker, void *argument)
{
	struct run *run = argument;
	uint32_t name_space = 0;
	uint64_t before = run->model[3].units;

	while (!worker->name_spaces[name_space])
		name_space++;
	for (uint32_t cut = 0; cut <= 3; cut++) {
		for (uint32_t shard = 0; shard < (1u << cut) * 100; shard++)
			tfd_imm_arrived(worker, 1, (3u - cut) << 29 | name_space << 20 | 3);
	}
	run->model[3].units = before + 4ull * 100 * 8;
	check_counter(run, 3);
	return 0;
}

static int count_imm_5(struct tfd_worker *worker, void *argument)
{
	const struct tfd_session *session = argument;

	tfd_imm_arrived(worker, 1, 3u << 29 | session->name_space << 20 | 5);
	return 0;
}

static int acknowledge_imm_5(struct tfd_worker *worker, void *argument)
{
	(void)worker;
	tfd_counter_acknowledge(argument, 5);
	return 0;
}

static void wait_event_word(struct tfd_core *core, const struct tfd_counter *counter, uint32_t expected)
{
	tfd_waker_drain(core);
	for (int i = 0; i < 5000 && tfd_load_seq(&counter->event) != expected; i++)
		(void)usleep(1000);
	CHECK(tfd_load_seq(&counter->event) == expected);
}

/* A sleeper is woken by the count that it waits for, or by a fault: not by the counts before. */
static void count_for_a_sleeper(struct host *host, struct user *user)
{
	struct tfd_worker *worker = host->core->groups[0]->worker;
	struct tfd_session *session = tfd_session_get(host->core, user->session);
	struct tfd_counter *counter = &user->counters[5];
	uint32_t event;

	tfd_waker_drain(host->core); /* what the counts before have asked for is done */
	event = tfd_load_seq(&counter->event);
	counter->waiters = 0;
	CHECK_OK(tfd_command_run(worker, acknowledge_imm_5, session));
	counter->waiters = 1;
	counter->wake_at = counter->value + 3;
	for (int i = 0; i < 2; i++)
		CHECK_OK(tfd_command_run(worker, count_imm_5, session));
	wait_event_word(host->core, counter, event);
	CHECK_OK(tfd_command_run(worker, count_imm_5, session));
	wait_event_word(host->core, counter, event + 1);
	CHECK(counter->wake_at == 0);
	CHECK_OK(
		tfd_command_run(worker, count_imm_5, session)); /* nobody has asked anew: every count wakes */
	wait_event_word(host->core, counter, event + 2);
	counter->wake_at = UINT64_MAX;
	CHECK_OK(tfd_counters_fault(host->core, user->session, 5, 1, 1, 0, 0));
	wait_event_word(host->core, counter, event + 3);
	tfd_session_put(session);
}

int main(void)
{
	struct host host;
	struct user user;
	struct run run = { .random = 20251027 };
	uint32_t slots[IMMS];

	host_open(&host);
	user_open(&host, &user);
	run.user = &user;
	CHECK_OK(tfd_counters_add(host.core, user.session, 0, IMMS, slots));
	for (uint32_t i = 0; i < IMMS; i++)
		CHECK(slots[i] == i && user.counters[i].in_use == 1 && user.counters[i].imm == i);
	CHECK(tfd_counters_add(host.core, user.session, 0, 65, slots) == -ENOSPC);
	CHECK(tfd_counters_add(host.core, user.session, 0xfffff, 2, slots) == -ERANGE);
	CHECK_OK(tfd_command_run(host.core->groups[0]->worker, count_at_random, &run));
	for (uint32_t i = 0; i < IMMS; i++) /* publishes once more over what was scribbled */
		CHECK_OK(tfd_counters_fault(host.core, user.session, i, 1, 0, 0, 0));
	for (uint32_t i = 0; i < IMMS; i++) {
		run.model[i].faults++;
		check_counter(&run, i);
	}
	CHECK_OK(tfd_command_run(host.core->groups[0]->worker, count_shards, &run));
	count_for_a_sleeper(&host, &user);
	user_close(&user);
	tfd_core_close(host.core);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Two hosts on the simulated fabric, stepped by the test: time goes by only when it says so. For C tests. */
#ifndef TFD_SIM_PAIR_H
#define TFD_SIM_PAIR_H

#include "core/parts.h"
#include "core_fixture.h"
#include "providers/sim/sim.h"

#define PAIR_PATHS 4
#define PAIR_STEP_NS 10000u
#define PAIR_STEPS 2000000 /* no test takes that many: what does not come by then never does */

struct sim_pair {
	struct host a, b;
	struct user from, to;
	uint64_t now;
	uint32_t paths;
	uint64_t out[PAIR_PATHS], in[PAIR_PATHS];
	uint64_t grant; /* of all of `to`, rights to write and read, imms 0 to 15 */
};

static inline void sim_host_open(struct host *host, uint32_t rails, const char *fabric,
                                 struct tfd_group_options group)
{
	struct tfd_core_options core = { .max_sessions = 300, .stepped = 1 };

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	(void)strcpy(group.provider, "sim");
	(void)snprintf(group.fabric, sizeof(group.fabric), "%s", fabric);
	group.rail_count = rails;
	for (uint32_t i = 0; i < rails; i++)
		(void)snprintf(group.rails[i], sizeof(group.rails[i]), "sim%u", i);
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static inline void sim_paths(struct sim_pair *pair, struct user *to, struct tfd_open_options *options)
{
	struct tfd_region_key keys[PAIR_PATHS];

	CHECK_OK(tfd_region_keys(to->host->core, to->session, to->region, keys, PAIR_PATHS));
	CHECK_OK(tfd_session_name_space(to->host->core, to->session, &options->name_space));
	options->path_count = pair->paths;
	for (uint32_t i = 0; i < pair->paths; i++)
		options->paths[i] = (struct tfd_open_path){ .conn = pair->out[i],
		                                            .key = keys[i].key,
		                                            .address = keys[i].address };
}

static inline uint64_t sim_grant(struct sim_pair *pair, struct user *from, struct user *to)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = 16 };
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(to->host->core, to->session, 0, 16, slots));
	sim_paths(pair, to, &options);
	CHECK_OK(tfd_open_add(from->host->core, from->session, &options, &open));
	return open;
}

static inline void sim_pair_open(struct sim_pair *pair, uint32_t paths, const char *fabric,
                                 struct tfd_group_options group)
{
	memset(pair, 0, sizeof(*pair));
	pair->now = 1000000;
	pair->paths = paths;
	tfd_sim_set_now(pair->now);
	sim_host_open(&pair->a, paths, fabric, group);
	sim_host_open(&pair->b, paths, fabric, group);
	user_open(&pair->a, &pair->from);
	user_open(&pair->b, &pair->to);
	for (uint32_t i = 0; i < paths; i++)
		connect_rails(&pair->a, i, &pair->b, i, &pair->out[i], &pair->in[i]);
	pair->grant = sim_grant(pair, &pair->from, &pair->to);
	for (uint32_t i = 0; i < REGION_BYTES; i++)
		pair->from.memory[i] = (uint8_t)(i * 2654435761u >> 13);
}

static inline void sim_pair_close(struct sim_pair *pair)
{
	tfd_core_close(pair->a.core);
	tfd_core_close(pair->b.core);
	user_unmap(&pair->from);
	user_unmap(&pair->to);
	tfd_sim_set_now(0);
}

static inline void sim_step(struct sim_pair *pair, uint64_t ns)
{
	pair->now += ns;
	tfd_sim_set_now(pair->now);
	(void)tfd_core_step(pair->a.core, pair->now);
	(void)tfd_core_step(pair->b.core, pair->now);
}

static inline void sim_steps(struct sim_pair *pair, int count)
{
	for (int i = 0; i < count; i++)
		sim_step(pair, PAIR_STEP_NS);
}

static inline void sim_await(struct sim_pair *pair, const struct tfd_record *record, uint64_t job)
{
	for (int i = 0; i < PAIR_STEPS; i++) {
		if (tfd_load_acquire(&record->done_id) == job)
			return;
		sim_step(pair, PAIR_STEP_NS);
	}
	(void)fprintf(stderr, "job %llu does not end\n", (unsigned long long)job);
	exit(1);
}

static inline const struct tfd_record *sim_run(struct sim_pair *pair, struct user *user,
                                               struct tfd_entry entry)
{
	const struct tfd_record *record = user_submit(user, entry);

	sim_await(pair, record, user->next_job);
	return record;
}

/* The next event of that type, others are dropped; false: there is none. */
static inline bool sim_event(struct host *host, uint32_t type, struct tfd_event *event)
{
	while (tfd_core_events(host->core, event, 1)) {
		if (event->type == type)
			return true;
	}
	return false;
}

static inline struct tfd_conn *sim_conn(const struct host *host, uint64_t handle)
{
	return tfd_table_get(&host->core->conns, handle);
}

static inline void expect(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status == status && record->detail == detail)
		return;
	(void)fprintf(stderr, "status %u detail %u, not %u and %u\n", record->status, record->detail, status,
	              detail);
	exit(1);
}

/* The file's table of the sender's arena. */
static inline void *sim_table(const struct user *user)
{
	return user->segment + user->header->arena_offset;
}

#endif

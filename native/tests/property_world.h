/* SPDX-License-Identifier: Apache-2.0 */
/* The worlds of the property test: two simulated hosts, their sessions and connections, and random jobs between them. */
#ifndef TFD_PROPERTY_WORLD_H
#define TFD_PROPERTY_WORLD_H

#include "core/parts.h"
#include "core_fixture.h"
#include "providers/sim/sim.h"

#define WORLD_OPERATIONS 1500
#define USERS 2 /* on each side */
#define RAILS 4
#define PATHS 4
#define IMMS 16 /* the upper half is for scatters and barriers */
#define SLOT_BYTES 32768u
#define SLOTS (REGION_BYTES / SLOT_BYTES)
#define JOBS 32 /* in flight per user; half of its records */
#define TARGETS 6
#define TABLE_BYTES 2048u
#define STEP_NS 5000u
#define JOB_STEPS 100000u
#define CANARY_STEPS 50u

struct slot {
	uint32_t job; /* index + 1; 0: none */
	uint64_t canary_until;
	uint8_t *seen;
};

struct path {
	uint64_t out, in;
	bool lost; /* CONN_LOST came, or soon will */
	uint64_t repair_at;
};

struct job {
	bool active;
	struct tfd_entry entry;
	uint64_t id;
	uint64_t started;
	uint32_t receiver[TARGETS];
	uint32_t slot[TARGETS];
	uint32_t targets;
	struct tfd_page pages[64];
	uint64_t counts;
};

struct world {
	uint64_t random, now, step;
	struct host a, b;
	struct user from[USERS], to[USERS];
	uint32_t path_count;
	bool ordered;
	bool broken; /* some connection was */
	struct path paths[PATHS];
	uint64_t grant[USERS][USERS];
	struct job jobs[USERS][JOBS];
	struct slot slots[USERS][SLOTS];
	/* The model, by receiver and immediate. */
	uint64_t landed[USERS][IMMS]; /* counts of jobs that ended OK; of scatters: of all that started */
	uint64_t told_lost[USERS][IMMS];
	bool unknown[USERS][IMMS];
	uint64_t values[USERS][IMMS];
	uint64_t fence; /* number of the one in flight; 0: none */
	uint32_t fence_from, fence_imm;
	uint64_t fence_open;
	uint64_t ended[TFD_JOB_STATUS_COUNT];
	uint64_t reconciled, fences, proven;
};

static uint64_t seed_now;

#define MUST(condition)                                                                                    \
	do {                                                                                               \
		if (!(condition)) {                                                                        \
			(void)fprintf(stderr, "seed %llu step %llu: %s:%d: %s\n",                          \
			              (unsigned long long)seed_now, (unsigned long long)w->step, __FILE__, \
			              __LINE__, #condition);                                               \
			exit(1);                                                                           \
		}                                                                                          \
	} while (0)

static uint32_t chance(struct world *w, uint32_t below)
{
	w->random = w->random * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(w->random >> 33) % below;
}

/* ---- building a world ---- */

static void world_host(struct world *w, struct host *host, uint32_t rails, const char *fabric)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "sim", .rail_count = rails };

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	for (uint32_t i = 0; i < rails; i++)
		(void)snprintf(group.rails[i], sizeof(group.rails[i]), "sim%u", i);
	(void)snprintf(group.fabric, sizeof(group.fabric), "%s", fabric);
	group.segment_bytes = 512u << chance(w, 5);
	group.window_bytes = 2048u << chance(w, 6);
	group.cut_bytes = 1 + chance(w, 3000);
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void open_grant_of(struct world *w, uint32_t from, uint32_t to)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = IMMS };
	struct tfd_region_key keys[RAILS];

	CHECK_OK(tfd_region_keys(w->b.core, w->to[to].session, w->to[to].region, keys, RAILS));
	CHECK_OK(tfd_session_name_space(w->b.core, w->to[to].session, &options.name_space));
	for (uint32_t i = 0; i < w->path_count; i++) {
		uint32_t rail = i % w->b.core->groups[0]->rail_count;

		if (!w->paths[i].lost)
			options.paths[options.path_count++] = (struct tfd_open_path){
				.conn = w->paths[i].out, .key = keys[rail].key, .address = keys[rail].address
			};
	}
	if (options.path_count)
		CHECK_OK(tfd_open_add(w->a.core, w->from[from].session, &options, &w->grant[from][to]));
}

static void path_connect(struct world *w, uint32_t i)
{
	struct path *path = &w->paths[i];

	connect_rails(&w->a, i % w->a.core->groups[0]->rail_count, &w->b,
	              i % w->b.core->groups[0]->rail_count, &path->out, &path->in);
	path->lost = false;
}

static void world_open(struct world *w, uint64_t seed)
{
	char fabric[TFD_NAME_MAX];
	uint32_t slots[IMMS];
	uint32_t here, there;

	memset(w, 0, sizeof(*w));
	w->random = seed * 0x9e3779b97f4a7c15ull;
	(void)chance(w, 1);
	w->now = 1000000;
	w->ordered = chance(w, 4) != 0;
	tfd_sim_set_now(w->now);
	(void)snprintf(fabric, sizeof(fabric), "seed=%u,ordered=%u,delay_us=%u", chance(w, 1000), w->ordered,
	               chance(w, 2) ? chance(w, 200) : 0);
	here = 1 + chance(w, RAILS);
	there = 1 + chance(w, RAILS);
	if (chance(w, 3) == 0) /* one path: more can be said (check_visible) */
		here = there = 1;
	world_host(w, &w->a, here, fabric);
	world_host(w, &w->b, there, fabric);
	w->path_count = here > there ? here : there;
	for (uint32_t i = 0; i < USERS; i++) {
		user_open(&w->a, &w->from[i]);
		user_open(&w->b, &w->to[i]);
		for (uint32_t byte = 0; byte < REGION_BYTES; byte += 4)
			*(uint32_t *)(void *)(w->from[i].memory + byte) = (byte + i) * 2654435761u;
		CHECK_OK(tfd_counters_add(w->b.core, w->to[i].session, 0, IMMS, slots));
	}
	for (uint32_t i = 0; i < w->path_count; i++)
		path_connect(w, i);
	for (uint32_t i = 0; i < USERS * USERS; i++)
		open_grant_of(w, i / USERS, i % USERS);
}

/* ---- jobs ---- */

static bool is_many(const struct job *job)
{
	return job->entry.op == TFD_OP_SCATTER || job->entry.op == TFD_OP_BARRIER;
}

static uint32_t slot_take(struct world *w, uint32_t receiver, uint32_t job)
{
	for (uint32_t tries = 0; tries < SLOTS; tries++) {
		struct slot *slot = &w->slots[receiver][chance(w, SLOTS)];

		if (slot->job || slot->canary_until)
			continue;
		slot->job = job + 1;
		return (uint32_t)(slot - w->slots[receiver]);
	}
	return SLOTS;
}

static uint64_t some_length(struct world *w)
{
	static const uint32_t usual[] = { 0, 1, 7, 511, 512, 513, 4095, 16385, SLOT_BYTES };

	return chance(w, 2) ? usual[chance(w, 9)] : chance(w, SLOT_BYTES + 1);
}

static void shape_pages(struct world *w, struct job *job, uint8_t *table)
{
	uint32_t count = chance(w, 65);
	uint32_t bytes = 1 + chance(w, SLOT_BYTES / 64);
	uint32_t shift = chance(w, 3);

	job->entry.length = bytes;
	job->entry.src_stride = bytes + chance(w, 100);
	job->entry.dst_stride = SLOT_BYTES / 64;
	if (shift == 0) /* adjacent ones: merged */
		job->entry.src_stride = job->entry.length = SLOT_BYTES / 64;
	job->entry.table_count = count;
	job->entry.flags = (uint8_t)chance(w, 4);
	for (uint32_t i = 0; i < count; i++)
		job->pages[i] = (struct tfd_page){ .src = i, .dst = shift == 1 ? count - 1 - i : i };
	memcpy(table, job->pages, sizeof(job->pages));
	job->counts = job->entry.flags & TFD_FLAG_COUNT_JOB ? 1 : count;
}

static void shape_targets(struct world *w, uint32_t from, struct job *job, uint32_t index, uint8_t *table)
{
	struct tfd_target *targets = (void *)table;

	job->entry.imm = IMMS / 2 + chance(w, IMMS / 2);
	job->targets = 0;
	for (uint32_t i = chance(w, TARGETS + 1); i > 0; i--) {
		uint32_t to = chance(w, USERS);
		uint32_t slot = slot_take(w, to, index);

		if (slot == SLOTS)
			break;
		job->receiver[job->targets] = to;
		job->slot[job->targets] = slot;
		targets[job->targets] = (struct tfd_target){
			.dst_grant = w->grant[from][to],
			.src_offset = job->entry.op == TFD_OP_SCATTER ? 64 * job->targets : 0,
			.dst_offset = (uint64_t)slot * SLOT_BYTES,
			.length = job->entry.op == TFD_OP_SCATTER ? some_length(w) : 0,
		};
		if (targets[job->targets].length)
			targets[job->targets].length = SLOT_BYTES / 2; /* the check knows it */
		job->targets++;
	}
	job->entry.dst_grant = 0;
	job->entry.table_count = job->targets;
	if (job->entry.op == TFD_OP_BARRIER)
		job->entry.src_region = 0;
}

static void submit(struct world *w)
{
	static const uint8_t ops[] = { TFD_OP_WRITE,       TFD_OP_WRITE,   TFD_OP_IMM,     TFD_OP_WRITE_PAGES,
	                               TFD_OP_WRITE_PAGES, TFD_OP_SCATTER, TFD_OP_BARRIER, TFD_OP_READ };
	uint32_t from = chance(w, USERS), to = chance(w, USERS);
	struct user *user = &w->from[from];
	uint32_t index = 0;
	struct job *job;
	uint8_t *table;

	while (index < JOBS && w->jobs[from][index].active)
		index++;
	if (index == JOBS || user->ring->tail - tfd_load_acquire(&user->ring->head) > 32 ||
	    user->records[(user->next_job + 1) % 64].done_id + 64 < user->next_job + 1)
		return;
	for (uint32_t i = 0; i < JOBS; i++) { /* the record may still be its last job's */
		if (w->jobs[from][i].active && w->jobs[from][i].id % 64 == (user->next_job + 1) % 64)
			return;
	}
	job = &w->jobs[from][index];
	memset(job, 0, sizeof(*job));
	table = user->segment + user->header->arena_offset + (uint64_t)index * TABLE_BYTES;
	job->entry = (struct tfd_entry){ .op = ops[chance(w, 8)],
	                                 .priority = (uint8_t)chance(w, 2),
	                                 .src_region = user->region,
	                                 .dst_grant = w->grant[from][to],
	                                 .imm = chance(w, IMMS / 2) };
	if (chance(w, 20) == 0)
		job->entry.deadline_ns = w->now + chance(w, 300000);
	index += from * JOBS;
	if (is_many(job)) {
		job->entry.table_offset = (uint64_t)(table - user->segment) - user->header->arena_offset;
		shape_targets(w, from, job, index, table);
	} else {
		job->receiver[0] = to;
		job->slot[0] = slot_take(w, to, index);
		if (job->slot[0] == SLOTS)
			return;
		job->targets = 1;
		job->counts = job->entry.op == TFD_OP_READ ? 0 : 1;
		job->entry.dst_offset = (uint64_t)job->slot[0] * SLOT_BYTES;
		job->entry.src_offset = (uint64_t)(index % JOBS) * 2 * SLOT_BYTES;
		if (job->entry.op == TFD_OP_IMM) {
			job->entry.src_region = job->entry.src_offset = 0;
		} else if (job->entry.op == TFD_OP_WRITE_PAGES) {
			job->entry.table_offset =
				(uint64_t)(table - user->segment) - user->header->arena_offset;
			shape_pages(w, job, table);
		} else {
			job->entry.length = some_length(w);
			job->entry.flags = job->entry.op == TFD_OP_WRITE && chance(w, 3) == 0;
		}
	}
	(void)user_submit(user, job->entry);
	job->id = user->next_job;
	job->started = w->step;
	job->active = true;
}

#endif

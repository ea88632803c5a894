/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The worlds of the property test: two simulated hosts, their sessions, connections and grants. Host A writes, host B is written to;
 * what control would carry between their daemons the test carries itself.
 */
#ifndef TFD_PROPERTY_WORLD_H
#define TFD_PROPERTY_WORLD_H

#include "core/parts.h"
#include "core_fixture.h"
#include "providers/sim/sim.h"

#define WORLD_OPERATIONS 1500
#define USERS 2 /* on each side */
#define RAILS 4
#define PATHS 4
#define IMMS 16
#define IMM_EXACT 2     /* below it: exact jobs only */
#define IMM_MANY (IMMS / 2) /* from it on: scatters and barriers only */
#define SLOT_BYTES 32768u
#define SLOTS (REGION_BYTES / SLOT_BYTES)
#define JOBS 32 /* in flight per user; half of its records */
#define TARGETS 6
#define TABLE_BYTES 2048u
#define STEP_NS 5000u
#define WATCHERS 2u /* that jobs of a user wait for */
#define JOB_STEPS 400000u /* ten thousand counts, each an immediate, a dozen at a time over a long path */
#define CANARY_STEPS 50u
#define OPENS 8192u /* of one world */

struct slot {
	uint32_t job; /* index + 1; 0: none */
	uint64_t canary_until;
	uint8_t *seen;
};

struct path {
	uint64_t out, in;
	bool lost; /* CONN_LOST came, or soon will */
	bool dead; /* its rail died */
	uint64_t repair_at;
};

struct job {
	bool active;
	bool control; /* submitted by gRPC */
	bool again;   /* of what was told lost */
	struct tfd_entry entry;
	uint64_t id;
	uint64_t started;
	uint64_t open; /* handle; of one with many targets: 0 */
	uint32_t receiver[TARGETS]; /* USERS: it has died */
	uint32_t slot[TARGETS];
	uint32_t targets;
	struct tfd_target target[TARGETS];
	struct tfd_page pages[64];
	uint64_t counts;
	uint64_t held_until; /* a read that ended: nothing arrives any more */
	uint8_t *seen;
};

/* What an event names, also when whoever opened it or its receiver has gone. */
struct opened {
	uint64_t handle;
	uint64_t session;
	uint32_t from, to;
	uint32_t life; /* of the receiver */
	bool revoked, removed;
};

/* What the model knows of a counter. */
struct tally {
	int64_t expected; /* whole writes: those that started, without those told lost */
	uint64_t landed;  /* of jobs that ended OK */
	uint64_t owed;    /* told lost and not submitted again yet */
	uint64_t lost, faults; /* as told to the counter */
	uint64_t value;   /* when last looked at */
	bool unknown;     /* of some writes nobody knows what became of them */
	bool rebased;     /* their writer died in between */
};

struct world {
	uint64_t random, now, step;
	struct host a, b;
	struct user from[USERS], to[USERS];
	uint64_t submitted[USERS]; /* by control */
	uint64_t armed;
	uint32_t life[USERS]; /* of receivers */
	bool gone[USERS];     /* receivers whose session is ending */
	uint64_t mute; /* connection that nothing comes back from: time goes by fast until that is found */
	uint64_t peer; /* host A's number at host B */
	uint32_t path_count, here, there;
	char fabric[TFD_NAME_MAX];
	bool ordered;
	uint32_t channels; /* of a connection */
	uint32_t rarely; /* host B polls in one of so many steps */
	bool calm; /* nothing goes wrong: what is visible can be said of all counts (check_visible) */
	bool broken; /* some connection was */
	struct path paths[PATHS];
	uint64_t grant[USERS][USERS]; /* 0: no path was alive */
	struct opened opens[OPENS];
	uint32_t open_count;
	struct job jobs[USERS][JOBS];
	struct slot slots[USERS][SLOTS];
	struct tally tally[USERS][IMMS];
	uint64_t fence; /* number of the one in flight; 0: none */
	uint32_t fence_from, fence_imm;
	uint64_t fence_open;
	uint64_t quiet_session; /* of host A, told last */
	uint64_t ended[TFD_JOB_STATUS_COUNT];
	uint64_t reconciled, apart, fences, proven, retried, revoked, sessions_ended, peers_died, rails_died,
		muted, exact, stalls;
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

static void world_host(struct world *w, struct host *host, uint32_t rails)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "sim", .rail_count = rails };

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	for (uint32_t i = 0; i < rails; i++)
		(void)snprintf(group.rails[i], sizeof(group.rails[i]), "sim%u", i);
	(void)strcpy(group.fabric, w->fabric);
	group.segment_bytes = 512u << chance(w, w->calm ? 2 : 5);
	group.window_bytes = 2048u << chance(w, 6);
	group.cut_bytes = 1 + chance(w, 3000);
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static struct opened *opened_find(struct world *w, uint64_t session, uint64_t handle)
{
	for (uint32_t i = w->open_count; i > 0; i--) {
		struct opened *opened = &w->opens[i - 1];

		if (opened->handle == handle && opened->session == session)
			return opened;
	}
	MUST(false);
	return NULL;
}

static void open_grant_of(struct world *w, uint32_t from, uint32_t to)
{
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = REGION_BYTES,
	                                    .imm_count = IMMS };
	struct tfd_region_key keys[RAILS];
	uint64_t handle;

	CHECK_OK(tfd_region_keys(w->b.core, w->to[to].session, w->to[to].region, keys, RAILS));
	CHECK_OK(tfd_session_name_space(w->b.core, w->to[to].session, &options.name_space));
	for (uint32_t i = 0; i < w->path_count; i++) {
		uint32_t rail = i % w->there;

		if (!w->paths[i].lost && !w->paths[i].dead)
			options.paths[options.path_count++] = (struct tfd_open_path){
				.conn = w->paths[i].out, .key = keys[rail].key, .address = keys[rail].address
			};
	}
	if (!options.path_count || w->gone[to])
		return;
	CHECK_OK(tfd_open_add(w->a.core, w->from[from].session, &options, &handle));
	MUST(w->open_count < OPENS);
	w->opens[w->open_count++] = (struct opened){ .handle = handle,
	                                             .session = w->from[from].session,
	                                             .from = from,
	                                             .to = to,
	                                             .life = w->life[to] };
	w->grant[from][to] = handle;
}

static void open_grants(struct world *w)
{
	for (uint32_t i = 0; i < USERS * USERS; i++)
		open_grant_of(w, i / USERS, i % USERS);
}

static void path_connect(struct world *w, uint32_t i)
{
	struct path *path = &w->paths[i];
	uint8_t a[TFD_ADDRESS_MAX], b[TFD_ADDRESS_MAX];
	size_t na = sizeof(a), nb = sizeof(b);

	CHECK_OK(tfd_conn_open(w->a.core, 0, i % w->here, 1, 1, &path->out, a, &na, &error));
	CHECK_OK(tfd_conn_open(w->b.core, 0, i % w->there, 0, w->peer, &path->in, b, &nb, &error));
	CHECK_OK(tfd_conn_start(w->b.core, path->in, a, na, &error));
	CHECK_OK(tfd_conn_start(w->a.core, path->out, b, nb, &error));
	path->lost = false;
}

static void sender_open(struct world *w, uint32_t from)
{
	user_open(&w->a, &w->from[from]);
	w->submitted[from] = 0;
	memset(w->grant[from], 0, sizeof(w->grant[from]));
	for (uint32_t byte = 0; byte < REGION_BYTES; byte += 4)
		*(uint32_t *)(void *)(w->from[from].memory + byte) = (byte + from) * 2654435761u;
}

static void receiver_open(struct world *w, uint32_t to)
{
	uint32_t slots[IMMS];

	user_open(&w->b, &w->to[to]);
	CHECK_OK(tfd_counters_add(w->b.core, w->to[to].session, 0, IMMS, slots));
	w->life[to]++;
	memset(w->tally[to], 0, sizeof(w->tally[to]));
}

/* Host A with its sessions and connections. */
static void writer_open(struct world *w)
{
	w->peer++;
	world_host(w, &w->a, w->here);
	for (uint32_t i = 0; i < USERS; i++)
		sender_open(w, i);
	for (uint32_t i = 0; i < w->path_count; i++) {
		w->paths[i] = (struct path){ .dead = w->paths[i].dead };
		if (!w->paths[i].dead)
			path_connect(w, i);
	}
	open_grants(w);
}

/* Room for arrived immediates: without bound, or for little more than the connections that there are at one time. */
static uint32_t some_depth(struct world *w)
{
	static const uint32_t ordered[] = { 0, 16, 32, 128 };
	/* What was a closed half's is free again only a second later. */
	static const uint32_t unordered[] = { 0, 256, 320, 512 };

	return (w->ordered ? ordered : unordered)[chance(w, 4)];
}

static void world_open(struct world *w, uint64_t seed)
{
	uint32_t depth;

	memset(w, 0, sizeof(*w));
	w->random = seed * 0x9e3779b97f4a7c15ull;
	(void)chance(w, 1);
	w->now = 1000000;
	w->calm = chance(w, 3) == 0;
	w->ordered = chance(w, w->calm ? 2 : 4) != 0;
	tfd_sim_set_now(w->now);
	depth = some_depth(w);
	w->rarely = depth ? 1 + chance(w, 8) : 1;
	w->channels = w->ordered && chance(w, 3) == 0 ? TFD_CHANNELS_MAX : 1;
	(void)snprintf(w->fabric, sizeof(w->fabric), "seed=%u,%s,delay_us=%u,again=%u,parts=%u,imm_depth=%u",
	               chance(w, 100),
	               w->channels == 1 ? w->ordered ? "ordered=1" : "ordered=0" : "channels=3",
	               w->calm || chance(w, 2) ? chance(w, 200) : 0, chance(w, 3) ? 0 : chance(w, 60),
	               chance(w, 2) ? 1 : 2 + chance(w, 30), depth);
	w->here = 1 + chance(w, RAILS);
	w->there = 1 + chance(w, RAILS);
	if (w->calm || chance(w, 3) == 0) /* one path: more can be said */
		w->here = w->there = 1;
	w->path_count = w->here > w->there ? w->here : w->there;
	world_host(w, &w->b, w->there);
	for (uint32_t i = 0; i < USERS; i++)
		receiver_open(w, i);
	writer_open(w);
}

#endif

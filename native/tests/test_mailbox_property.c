/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random messages to small mailboxes on the simulated fabric, with delays, reordering, cancels, deadlines and broken connections:
 *
 *   TFD_OPERATIONS=1000000 TFD_SEED=7 build/native/gcc/tests/test_mailbox_property
 *
 * Every job ends exactly once and within a bound; a message whose job ended OK is delivered exactly once, one whose job was cancelled or
 * too late never, one that was lost with its connection at most once; and nobody waits for a slot that is free.
 */
#include "core/parts.h"
#include "mailbox_fixture.h"
#include "providers/sim/sim.h"

#define USERS 3
#define BOXES 2
#define PATHS 3
#define JOBS 24 /* in flight per user; less than half of its records */
#define HELD 8
#define WORLD_MESSAGES 1500
#define STEP_NS 5000u
#define JOB_STEPS 100000u
#define MESSAGE_BYTES 512u

struct job {
	bool active;
	uint64_t id, number, started;
	uint32_t box;
};

struct path {
	uint64_t out, in, repair_at;
	bool lost;
};

struct world {
	uint64_t random, now, step;
	bool ordered;
	struct host a, b;
	struct user from[USERS], to;
	struct box boxes[BOXES];
	struct tfd_letter held[BOXES][HELD];
	uint32_t held_count[BOXES];
	uint32_t path_count;
	struct path paths[PATHS];
	uint64_t opens[USERS][BOXES];
	struct job jobs[USERS][JOBS];
	uint64_t numbers; /* messages so far */
	uint8_t delivered[WORLD_MESSAGES + 8];
	uint8_t status[WORLD_MESSAGES + 8];
	uint64_t ended[TFD_JOB_STATUS_COUNT];
	uint64_t parked; /* steps at which somebody waited */
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

static void host_open_sim(struct host *host, uint32_t rails, const char *fabric)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "sim", .rail_count = rails };

	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	for (uint32_t i = 0; i < rails; i++)
		(void)snprintf(group.rails[i], sizeof(group.rails[i]), "sim%u", i);
	(void)snprintf(group.fabric, sizeof(group.fabric), "%s", fabric);
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
}

static void open_all(struct world *w)
{
	uint64_t conns[PATHS];
	uint32_t count = 0;

	for (uint32_t i = 0; i < w->path_count; i++) {
		if (!w->paths[i].lost)
			conns[count++] = w->paths[i].out;
	}
	for (uint32_t i = 0; count && i < USERS * BOXES; i++)
		w->opens[i / BOXES][i % BOXES] =
			open_box(&w->from[i / BOXES], &w->boxes[i % BOXES], conns, count);
}

static void world_open(struct world *w, uint64_t seed)
{
	char fabric[TFD_NAME_MAX];

	memset(w, 0, sizeof(*w));
	w->random = seed * 0x9e3779b97f4a7c15ull;
	(void)chance(w, 1);
	w->now = 1000000;
	w->ordered = chance(w, 2) != 0;
	tfd_sim_set_now(w->now);
	(void)snprintf(fabric, sizeof(fabric), "seed=%u,%s,delay_us=%u", chance(w, 1000),
	               w->ordered ? chance(w, 2) ? "channels=3" : "ordered=1" : "ordered=0",
	               chance(w, 3) ? chance(w, 200) : 0);
	w->path_count = 1 + chance(w, PATHS);
	host_open_sim(&w->a, w->path_count, fabric);
	host_open_sim(&w->b, w->path_count, fabric);
	user_open(&w->b, &w->to);
	for (uint32_t i = 0; i < USERS; i++)
		user_open(&w->a, &w->from[i]);
	for (uint32_t i = 0; i < BOXES; i++)
		box_open(&w->boxes[i], &w->to, 65536 * i, 1 + chance(w, HELD), MESSAGE_BYTES);
	for (uint32_t i = 0; i < w->path_count; i++)
		connect_rails(&w->a, i, &w->b, i, &w->paths[i].out, &w->paths[i].in);
	open_all(w);
}

static void world_close(struct world *w)
{
	tfd_core_close(w->a.core);
	tfd_core_close(w->b.core);
	for (uint32_t i = 0; i < USERS; i++)
		user_unmap(&w->from[i]);
	user_unmap(&w->to);
	tfd_sim_set_now(0);
}

/* ---- sending ---- */

/* The next record of a user, if nobody uses it. */
static bool record_free(const struct world *w, uint32_t from)
{
	const struct user *user = &w->from[from];

	for (uint32_t i = 0; i < JOBS; i++) {
		if (w->jobs[from][i].active && w->jobs[from][i].id % 64 == (user->next_job + 1) % 64)
			return false;
	}
	return user->ring->tail - tfd_load_acquire(&user->ring->head) < 32;
}

static uint32_t bytes_of(uint64_t number)
{
	return 8 + (uint32_t)(number * 2654435761u >> 7) % (MESSAGE_BYTES - 7);
}

static void submit(struct world *w)
{
	uint32_t from = chance(w, USERS);
	struct user *user = &w->from[from];
	struct tfd_entry entry;
	uint32_t index = 0;
	struct job *job;
	uint8_t *bytes;

	while (index < JOBS && w->jobs[from][index].active)
		index++;
	if (index == JOBS || !record_free(w, from) || w->numbers == WORLD_MESSAGES)
		return;
	job = &w->jobs[from][index];
	*job = (struct job){
		.active = true, .box = chance(w, BOXES), .number = w->numbers++, .started = w->step
	};
	entry = send_entry(w->opens[from][job->box], index * MESSAGE_BYTES, bytes_of(job->number));
	bytes = arena_of(user) + entry.table_offset;
	memset(bytes, (int)job->number, entry.table_count);
	memcpy(bytes, &job->number, sizeof(job->number));
	if (chance(w, 12) == 0)
		entry.deadline_ns = w->now + chance(w, 400000);
	(void)user_submit(user, entry);
	job->id = user->next_job;
}

static void cancel(struct world *w)
{
	uint32_t from = chance(w, USERS);
	const struct job *job = &w->jobs[from][chance(w, JOBS)];

	if (job->active && record_free(w, from))
		(void)user_submit(&w->from[from],
		                  (struct tfd_entry){ .op = TFD_OP_CANCEL, .argument = job->id });
}

/* ---- receiving ---- */

static void receive(struct world *w, uint32_t which)
{
	struct box *box = &w->boxes[which];
	struct tfd_letter letter;
	const uint8_t *message;
	uint64_t number;

	while ((message = box_next(box, &letter)) != NULL) {
		memcpy(&number, message, sizeof(number));
		MUST(number < w->numbers && letter.bytes == bytes_of(number));
		for (uint32_t i = sizeof(number); i < letter.bytes; i++)
			MUST(message[i] == (uint8_t)number);
		MUST(w->delivered[number]++ == 0);
		MUST(w->held_count[which] < box->slots);
		w->held[which][w->held_count[which]++] = letter;
	}
}

static void release_some(struct world *w, uint32_t which)
{
	uint32_t *count = &w->held_count[which];

	while (*count && chance(w, 3) && w->to.ring->tail - tfd_load_acquire(&w->to.ring->head) < 32) {
		uint32_t at = chance(w, *count);
		struct tfd_letter letter = w->held[which][at];

		w->held[which][at] = w->held[which][--*count];
		(void)user_submit(&w->to, release_entry(&w->boxes[which], letter.slot, letter.number));
	}
}

/* ---- time ---- */

static void look_at_jobs(struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			struct job *job = &w->jobs[from][i];
			const struct tfd_record *record = &w->from[from].records[job->id % 64];

			if (!job->active)
				continue;
			if (tfd_load_acquire(&record->done_id) != job->id) {
				MUST(w->step - job->started < JOB_STEPS);
				continue;
			}
			MUST(record->status == TFD_JOB_OK || record->status == TFD_JOB_CANCELLED ||
			     record->status == TFD_JOB_DEADLINE || record->status == TFD_JOB_PEER_LOST);
			MUST(!w->status[job->number]);
			w->status[job->number] = (uint8_t)record->status;
			w->ended[record->status]++;
			job->active = false;
		}
	}
}

static void take_events(struct world *w)
{
	struct tfd_event event;

	while (tfd_core_events(w->a.core, &event, 1) || tfd_core_events(w->b.core, &event, 1)) {
		for (uint32_t i = 0; i < w->path_count; i++) {
			struct path *path = &w->paths[i];

			if (event.type != TFD_EVENT_CONN_LOST || path->repair_at ||
			    (path->out != event.id && path->in != event.id))
				continue;
			path->lost = true;
			path->repair_at = w->step + 1 + chance(w, 200);
		}
	}
}

static void path_repair(struct world *w, uint32_t i)
{
	struct path *path = &w->paths[i];
	struct tfd_landed landed;

	CHECK_OK(tfd_conn_close(w->b.core, path->in, TFD_DETAIL_CONNECTION, NULL, &landed));
	if (chance(w, 10) == 0)
		landed.channels = 0; /* its daemon did not answer */
	CHECK_OK(tfd_conn_close(w->a.core, path->out, TFD_DETAIL_CONNECTION, &landed, NULL));
	*path = (struct path){ 0 };
	connect_rails(&w->a, i, &w->b, i, &path->out, &path->in);
	open_all(w);
}

static void break_some(struct world *w)
{
	uint32_t i = chance(w, w->path_count);
	struct host *host = chance(w, 2) ? &w->a : &w->b;
	struct tfd_conn *conn =
		tfd_table_get(&host->core->conns, host == &w->a ? w->paths[i].out : w->paths[i].in);

	if (conn && conn->half && !w->paths[i].lost)
		tfd_sim_break(conn->half);
}

static void world_step(struct world *w)
{
	w->step++;
	w->now += STEP_NS;
	tfd_sim_set_now(w->now);
	(void)tfd_core_step(w->a.core, w->now);
	(void)tfd_core_step(w->b.core, w->now);
	take_events(w);
	look_at_jobs(w);
	for (uint32_t i = 0; i < BOXES; i++) {
		receive(w, i);
		if (chance(w, 4) == 0)
			release_some(w, i);
		w->parked += w->held_count[i] == w->boxes[i].slots;
	}
	for (uint32_t i = 0; i < w->path_count; i++) {
		if (w->paths[i].repair_at && w->step >= w->paths[i].repair_at)
			path_repair(w, i);
	}
}

static bool world_busy(const struct world *w)
{
	for (uint32_t from = 0; from < USERS; from++) {
		for (uint32_t i = 0; i < JOBS; i++) {
			if (w->jobs[from][i].active)
				return true;
		}
	}
	return false;
}

static void check_fates(struct world *w)
{
	for (uint64_t number = 0; number < w->numbers; number++) {
		if (w->status[number] == TFD_JOB_OK)
			MUST(w->delivered[number] == 1);
		else if (w->status[number] != TFD_JOB_PEER_LOST)
			MUST(w->delivered[number] == 0);
	}
	for (uint32_t i = 0; i < BOXES; i++)
		MUST(box_value(&w->boxes[i]) == w->boxes[i].seen);
}

int main(void)
{
	const char *operations = getenv("TFD_OPERATIONS");
	const char *seed = getenv("TFD_SEED");
	uint64_t left = operations ? strtoull(operations, NULL, 0) : 60000;
	uint64_t total = 0, ended[TFD_JOB_STATUS_COUNT] = { 0 }, parked = 0;
	struct world *w = malloc(sizeof(*w));

	CHECK(w);
	for (seed_now = seed ? strtoull(seed, NULL, 0) : 1; total < left; seed_now++) {
		world_open(w, seed_now);
		while (w->numbers < WORLD_MESSAGES) {
			for (uint32_t i = chance(w, 6); i > 0; i--)
				submit(w);
			if (chance(w, 5) == 0)
				cancel(w);
			if (chance(w, 300) == 0)
				break_some(w);
			world_step(w);
		}
		while (world_busy(w))
			world_step(w);
		for (int i = 0; i < 200; i++)
			world_step(w);
		check_fates(w);
		for (int i = 0; i < TFD_JOB_STATUS_COUNT; i++)
			ended[i] += w->ended[i];
		total += w->numbers;
		parked += w->parked;
		world_close(w);
	}
	free(w);
	(void)printf("messages=%llu ok=%llu cancelled=%llu deadline=%llu peer_lost=%llu wrong=0\n",
	             (unsigned long long)total, (unsigned long long)ended[TFD_JOB_OK],
	             (unsigned long long)ended[TFD_JOB_CANCELLED],
	             (unsigned long long)ended[TFD_JOB_DEADLINE],
	             (unsigned long long)ended[TFD_JOB_PEER_LOST]);
	CHECK(ended[TFD_JOB_OK] && ended[TFD_JOB_CANCELLED] && ended[TFD_JOB_DEADLINE] &&
	      ended[TFD_JOB_PEER_LOST] && parked);
	return 0;
}

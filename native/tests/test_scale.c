/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many sessions of one daemon, many peers, many jobs in flight at once: all of them end, none twice, every count is right, and what a
 * session, a peer, a grant and a job in flight take of the daemon's memory is said.
 *
 *   TFD_SESSIONS=256 TFD_PEERS=64 TFD_JOBS=10000 build/native/gcc/tests/test_scale
 *
 * On the null fabric: work entries are real, bytes do not move.
 */
#include <malloc.h>

#include "sim_pair.h"

#define SESSIONS_MAX 256u
#define PEERS_MAX 64u
#define RING 64u /* entries, and records */
#define SCATTER 4u
#define PAGES 8u

struct scale {
	uint32_t sessions, peers, jobs;
	uint64_t now;
	struct host a;
	struct user *from; /* [sessions] */
	struct host *hosts; /* [peers] */
	struct user *to;
	uint64_t *out; /* connections */
	uint64_t (*grants)[PEERS_MAX]; /* [sessions] */
	uint64_t *expected; /* counts at each peer */
	uint64_t submitted, bytes_session, bytes_peer, bytes_grant, bytes_job;
};

static uint32_t number(const char *name, uint32_t usual, uint32_t most)
{
	const char *text = getenv(name);
	unsigned long value = text ? strtoul(text, NULL, 0) : usual;

	CHECK(value && value <= most);
	return (uint32_t)value;
}

/* Bytes that the process has from the allocator; 0 under sanitizers. */
static uint64_t heap(void)
{
	struct mallinfo2 info = mallinfo2();

	return info.uordblks + info.hblkhd;
}

/* Bytes of address space: maps, too. */
static uint64_t mapped(void)
{
	unsigned long pages = 0;
	FILE *file = fopen("/proc/self/statm", "r");

	CHECK(file && fscanf(file, "%lu", &pages) == 1);
	(void)fclose(file);
	return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void *many(size_t count, size_t bytes)
{
	void *all = calloc(count, bytes);

	CHECK(all);
	return all;
}

static void sessions_open(struct scale *s)
{
	uint64_t before = heap();

	for (uint32_t i = 0; i < s->sessions; i++)
		user_open(&s->a, &s->from[i]);
	s->bytes_session = (heap() - before) / s->sessions;
}

/* Of what a connection takes this side's half is said. */
static void peer_open(struct scale *s, uint32_t i, const struct tfd_group_options *group)
{
	uint8_t a[TFD_ADDRESS_MAX], b[TFD_ADDRESS_MAX];
	size_t na = sizeof(a), nb = sizeof(b);
	uint64_t before, in;

	sim_host_open(&s->hosts[i], 1, "move=0,delay_us=100", *group);
	user_open(&s->hosts[i], &s->to[i]);
	before = mapped();
	CHECK_OK(tfd_conn_open(s->a.core, s->a.group, 0, 1, i + 1, &s->out[i], a, &na, &error));
	s->bytes_peer += mapped() - before;
	CHECK_OK(tfd_conn_open(s->hosts[i].core, 0, 0, 0, 1, &in, b, &nb, &error));
	CHECK_OK(tfd_conn_start(s->hosts[i].core, in, a, na, &error));
	CHECK_OK(tfd_conn_start(s->a.core, s->out[i], b, nb, &error));
}

static void grants_open(struct scale *s)
{
	uint64_t before = heap();

	for (uint32_t i = 0; i < s->sessions; i++) {
		for (uint32_t peer = 0; peer < s->peers; peer++)
			s->grants[i][peer] = open_grant(&s->from[i], &s->to[peer], s->out[peer]);
	}
	s->bytes_grant = (heap() - before) / ((uint64_t)s->sessions * s->peers);
}

static void scale_open(struct scale *s)
{
	const struct tfd_group_options group = { .segment_bytes = 4096, .window_bytes = 65536 };

	s->sessions = number("TFD_SESSIONS", 24, SESSIONS_MAX);
	s->peers = number("TFD_PEERS", 8, PEERS_MAX);
	s->jobs = number("TFD_JOBS", 1000, s->sessions * RING);
	s->from = many(s->sessions, sizeof(*s->from));
	s->hosts = many(s->peers, sizeof(*s->hosts));
	s->to = many(s->peers, sizeof(*s->to));
	s->out = many(s->peers, sizeof(*s->out));
	s->grants = many(s->sessions, sizeof(*s->grants));
	s->expected = many(s->peers, sizeof(*s->expected));
	s->now = 1000000;
	tfd_sim_set_now(s->now);
	sim_host_open(&s->a, 1, "move=0,delay_us=100", group);
	sessions_open(s);
	for (uint32_t i = 0; i < s->peers; i++)
		peer_open(s, i, &group);
	s->bytes_peer /= s->peers;
	grants_open(s);
}

static void shape_targets(struct scale *s, uint32_t session, uint32_t peer, struct tfd_entry *entry)
{
	struct tfd_target *targets = sim_table(&s->from[session]);

	entry->dst_grant = 0;
	entry->table_count = SCATTER;
	for (uint32_t i = 0; i < SCATTER; i++) {
		uint32_t to = (peer + i) % s->peers;

		targets[i] = (struct tfd_target){ .dst_grant = s->grants[session][to], .length = 3000 };
		s->expected[to]++;
	}
}

/* Every session's jobs go to all peers in turn, and are of every kind. */
static void job_submit(struct scale *s, uint32_t session, uint32_t index)
{
	uint32_t peer = (session + index) % s->peers;
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .priority = index % 2,
	                           .src_region = s->from[session].region,
	                           .dst_grant = s->grants[session][peer],
	                           .length = 10000,
	                           .imm = session % 16 };

	if (index == 1) { /* one of these: they share a table */
		entry.op = TFD_OP_SCATTER;
		entry.length = 0;
		shape_targets(s, session, peer, &entry);
	} else if (index % 5 == 2) {
		entry.op = TFD_OP_WRITE_PAGES;
		entry.length = entry.src_stride = entry.dst_stride = 512;
		entry.table_offset = 4096;
		entry.table_count = PAGES;
		s->expected[peer] += PAGES;
	} else if (index % 5 == 3) {
		entry.op = TFD_OP_IMM;
		entry.src_region = entry.length = 0;
		s->expected[peer]++;
	} else {
		s->expected[peer]++;
	}
	(void)user_submit(&s->from[session], entry);
	s->submitted++;
}

static void step(struct scale *s)
{
	s->now += 20000;
	tfd_sim_set_now(s->now);
	(void)tfd_core_step(s->a.core, s->now);
	for (uint32_t i = 0; i < s->peers; i++)
		(void)tfd_core_step(s->hosts[i].core, s->now);
}

static uint64_t jobs_in_flight(struct scale *s)
{
	uint64_t count = 0;

	for (uint32_t i = 0; i < s->sessions; i++) {
		struct tfd_session_info info;

		CHECK_OK(tfd_session_stat(s->a.core, s->from[i].session, &info));
		count += info.jobs_in_flight;
	}
	return count;
}

static void check_ends(struct scale *s)
{
	uint64_t ended = 0;

	for (uint32_t i = 0; i < s->sessions; i++) {
		struct tfd_session_info info;

		CHECK_OK(tfd_session_stat(s->a.core, s->from[i].session, &info));
		CHECK(info.jobs_failed == 0 && info.jobs_ended == s->from[i].next_job);
		ended += info.jobs_ended;
		for (uint64_t job = 1; job <= s->from[i].next_job; job++)
			CHECK(s->from[i].records[job % RING].done_id == job &&
			      s->from[i].records[job % RING].status == TFD_JOB_OK);
	}
	CHECK(ended == s->submitted);
	for (uint32_t i = 0; i < s->peers; i++) {
		uint64_t counted = 0;

		for (uint32_t imm = 0; imm < 16; imm++)
			counted += s->to[i].counters[imm].value;
		CHECK(counted == s->expected[i]);
	}
}

static void scale_close(struct scale *s)
{
	tfd_core_close(s->a.core);
	for (uint32_t i = 0; i < s->peers; i++)
		tfd_core_close(s->hosts[i].core);
	for (uint32_t i = 0; i < s->peers; i++)
		user_unmap(&s->to[i]);
	for (uint32_t i = 0; i < s->sessions; i++)
		user_unmap(&s->from[i]);
	tfd_sim_set_now(0);
	free(s->expected);
	free(s->grants);
	free(s->out);
	free(s->to);
	free(s->hosts);
	free(s->from);
}

int main(void)
{
	struct scale s = { 0 };
	uint64_t before, peak, steps = 0;

	scale_open(&s);
	for (uint32_t i = 0; i < s.jobs; i++)
		job_submit(&s, i % s.sessions, i / s.sessions);
	before = heap();
	/* Time stands still: what is posted is not there yet, and every ring is taken. */
	(void)tfd_core_step(s.a.core, s.now);
	peak = jobs_in_flight(&s);
	s.bytes_job = (heap() - before) / s.jobs;
	CHECK(peak >= s.jobs * 9ull / 10); /* some of no delay at all are back */
	while (jobs_in_flight(&s)) {
		CHECK(++steps < 1000000);
		step(&s);
	}
	for (int i = 0; i < 20; i++)
		step(&s);
	check_ends(&s);
	(void)printf("sessions=%u peers=%u jobs=%u in_flight=%llu ended=%llu twice=0 session_bytes=%llu "
	             "segment_bytes=%llu peer_bytes=%llu grant_bytes=%llu job_bytes=%llu\n",
	             s.sessions, s.peers, s.jobs, (unsigned long long)peak, (unsigned long long)s.submitted,
	             (unsigned long long)s.bytes_session, (unsigned long long)s.from[0].header->segment_bytes,
	             (unsigned long long)s.bytes_peer, (unsigned long long)s.bytes_grant,
	             (unsigned long long)s.bytes_job);
	scale_close(&s);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider verbs without daemons: two processes on one device, each with a domain of its own, that talk by the table of
 * provider.h. Prints one line of JSON.
 *
 *   verbs_provider DEVICE bw SIZE DEPTH COUNT   writes with immediates, DEPTH posted: from the first post to the last acknowledgement
 *   verbs_provider DEVICE lat SIZE COUNT        one write back and forth: half of the time from the post to the answer's immediate
 *   verbs_provider DEVICE sets COUNT            COUNT connections that one domain makes to COUNT halves of the other, one by one
 *
 * TFD_TEST_LIBRARY names another library than libibverbs.so.1.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "providers/verbs/verbs.h"

#define WARM_UP 200u
#define PATIENCE_NS 60000000000u
#define LOOK_EVERY 65536u /* polls between two looks at the clock */
#define BATCH 32
#define SETS_MAX 1024u

static struct tfd_error error;

static void die(const char *what, int rc)
{
	(void)fprintf(stderr, "verbs_provider: %s: %s (%s)\n", what, strerror(-rc), error.text);
	exit(1);
}

#define OK(call)                           \
	do {                               \
		int ok_rc = (call);        \
		if (ok_rc)                 \
			die(#call, ok_rc); \
	} while (0)

static uint64_t now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- one side ---- */

struct greeting { /* what the sides tell each other */
	uint8_t address[TFD_ADDRESS_MAX];
	uint64_t address_bytes;
	uint64_t remote_address;
	uint64_t remote_key;
	uint64_t worked_ns; /* its own work before it answered, which is no exchange */
};

struct side {
	int link; /* to the other process */
	struct tfd_domain *domain;
	struct tfd_mr *mr;
	uint8_t *memory;
	struct tfd_half *half;
	uint64_t remote_address;
	uint64_t remote_key;
	uint64_t imms;  /* that have arrived */
	uint64_t sent;  /* that were acknowledged */
	uint64_t polls;
	uint64_t seen, seen_ns; /* imms and sent together, and when they were more than before */
	uint64_t owners; /* sum of the numbers of the halves that immediates came by */
};

static void tell(int link, const void *data, size_t bytes)
{
	if (write(link, data, bytes) != (ssize_t)bytes)
		die("write to the other process", -errno);
}

static void hear(int link, void *data, size_t bytes)
{
	ssize_t got = recv(link, data, bytes, MSG_WAITALL);

	if (got != (ssize_t)bytes)
		die("the other process ended", got < 0 ? -errno : -EPIPE);
}

static void side_open(struct side *side, const char *device, size_t bytes, struct tfd_region_key *key)
{
	struct tfd_group_options options = { .rail_count = 1 };
	struct tfd_rail_info info = { 0 };
	const char *library = getenv("TFD_TEST_LIBRARY");
	void *memory;

	(void)snprintf(options.provider, sizeof(options.provider), "verbs");
	(void)snprintf(options.rails[0], sizeof(options.rails[0]), "%s", device);
	(void)snprintf(options.library, sizeof(options.library), "%s", library ? library : "");
	OK(tfd_verbs_ops.domain_open(&options, device, &info, &side->domain, &error));
	OK(-posix_memalign(&memory, 4096, bytes));
	memset(memory, 0x5a, bytes);
	side->memory = memory;
	side->seen_ns = now_ns();
	OK(tfd_verbs_ops.mr_open(side->domain, memory, bytes, 1, &side->mr, key, &error));
}

static void poll_once(struct side *side)
{
	struct tfd_wc wc[BATCH];
	int count = tfd_verbs_ops.poll(side->domain, wc, BATCH);

	for (int i = 0; i < count; i++) {
		if (wc[i].type == TFD_WC_ERROR)
			die("a write failed", -wc[i].error);
		if (wc[i].type == TFD_WC_SENT) {
			side->sent++;
		} else {
			side->imms++;
			side->owners += (uint64_t)(uintptr_t)wc[i].owner;
		}
	}
}

/* Until so many immediates have arrived, and so many writes are acknowledged. */
static void poll_until(struct side *side, uint64_t imms, uint64_t sent)
{
	while (side->imms < imms || side->sent < sent) {
		poll_once(side);
		if (++side->polls % LOOK_EVERY == 0) {
			uint64_t now = now_ns();

			if (side->imms + side->sent == side->seen && now > side->seen_ns + PATIENCE_NS)
				die("nothing comes", -ETIMEDOUT);
			if (side->imms + side->sent != side->seen)
				side->seen_ns = now;
			side->seen = side->imms + side->sent;
		}
	}
}

static void post(struct side *side, struct tfd_half *half, uint64_t length, uint64_t offset,
                 enum tfd_traffic traffic, struct tfd_wr *wr)
{
	struct tfd_post what = { .local = side->memory + offset,
	                         .mr = side->mr,
	                         .length = length,
	                         .remote_address = side->remote_address + offset,
	                         .remote_key = side->remote_key,
	                         .job_bytes = length,
	                         .has_imm = 1,
	                         .imm = 7,
	                         .traffic = traffic };
	int rc;

	while ((rc = tfd_verbs_ops.post(half, &what, wr)) == -EAGAIN)
		poll_once(side);
	OK(rc);
}

static void side_join(struct side *side, const struct tfd_region_key *key)
{
	struct greeting mine = { .remote_address = key->address, .remote_key = key->key }, theirs;
	size_t bytes = 0;

	OK(tfd_verbs_ops.half_open(side->domain, 1, side, &side->half, mine.address, &bytes, &error));
	mine.address_bytes = bytes;
	tell(side->link, &mine, sizeof(mine));
	hear(side->link, &theirs, sizeof(theirs));
	OK(tfd_verbs_ops.half_start(side->half, theirs.address, theirs.address_bytes, &error));
	side->remote_address = theirs.remote_address;
	side->remote_key = theirs.remote_key;
	tell(side->link, "r", 1); /* no packet before the other side is ready to receive */
	hear(side->link, &(char){ 0 }, 1);
}

static void half_end(struct tfd_half *half)
{
	struct tfd_wc wc[BATCH];

	tfd_verbs_ops.half_close(half);
	while (tfd_verbs_ops.half_drain(half, wc, BATCH) > 0)
		continue;
	tfd_verbs_ops.half_free(half);
}

/* Nobody closes while the other may still retry. */
static void side_close(struct side *side)
{
	tell(side->link, "e", 1);
	hear(side->link, &(char){ 0 }, 1);
	if (side->half)
		half_end(side->half);
	tfd_verbs_ops.mr_close(side->domain, side->mr);
	tfd_verbs_ops.domain_close(side->domain);
	free(side->memory);
}

/* ---- rate and latency ---- */

static void run_bw(struct side *side, bool first, uint64_t size, uint64_t depth, uint64_t count)
{
	struct tfd_wr *wrs = calloc(depth, sizeof(*wrs));
	uint64_t begin;

	if (!wrs)
		die("calloc", -ENOMEM);
	if (!first) {
		poll_until(side, depth + count, 0);
		free(wrs);
		return;
	}
	for (uint64_t i = 0; i < depth; i++)
		post(side, side->half, size, 0, TFD_TRAFFIC_BULK, &wrs[i]);
	poll_until(side, 0, depth);
	begin = now_ns();
	for (uint64_t i = 0; i < count; i++) {
		poll_until(side, 0,
		           i + 1); /* of the warm-up's `depth` and these, so many are not in flight */
		post(side, side->half, size, 0, TFD_TRAFFIC_BULK, &wrs[i % depth]);
	}
	poll_until(side, 0, depth + count);
	(void)printf("{\"mib_s\": %.3f}\n",
	             (double)(size * count) / 1048576.0 / ((double)(now_ns() - begin) / 1e9));
	free(wrs);
}

static int by_value(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;

	return (a > b) - (a < b);
}

static void run_lat(struct side *side, bool first, uint64_t size, uint64_t count)
{
	double *samples = calloc(count, sizeof(*samples));
	struct tfd_wr wr;

	if (!samples)
		die("calloc", -ENOMEM);
	for (uint64_t i = 0; i < WARM_UP + count; i++) {
		uint64_t begin = now_ns();

		if (first)
			post(side, side->half, size, 0, TFD_TRAFFIC_LATENCY, &wr);
		poll_until(side, i + 1, 0);
		if (!first)
			post(side, side->half, size, 0, TFD_TRAFFIC_LATENCY, &wr);
		if (i >= WARM_UP)
			samples[i - WARM_UP] = (double)(now_ns() - begin) / 2e3;
		poll_until(side, 0, i + 1);
	}
	qsort(samples, count, sizeof(*samples), by_value);
	if (first)
		(void)printf("{\"p50_us\": %.2f, \"p99_us\": %.2f}\n", samples[count / 2],
		             samples[count * 99 / 100]);
	free(samples);
}

/* ---- many connections of one device ---- */

static long field_kib(const char *path, const char *name)
{
	FILE *file = fopen(path, "r");
	char line[256];
	long found = -1;

	while (file && found < 0 && fgets(line, sizeof(line), file)) {
		if (strncmp(line, name, strlen(name)) == 0)
			found = strtol(line + strlen(name), NULL, 10);
	}
	if (file)
		(void)fclose(file);
	if (found < 0)
		die(path, -ENOENT);
	return found;
}

struct stage { /* us, of each set */
	double open[SETS_MAX], start[SETS_MAX], exchange[SETS_MAX];
};

/* The far side of each: opens, answers with its address and how long that took, starts. */
static void sets_answer(struct side *side, struct tfd_half **halves, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		struct greeting theirs, mine = { 0 };
		uint64_t begin;
		size_t bytes = 0;

		hear(side->link, &theirs, sizeof(theirs));
		begin = now_ns();
		OK(tfd_verbs_ops.half_open(side->domain, 0, (void *)(uintptr_t)(i + 1), &halves[i],
		                           mine.address, &bytes, &error));
		OK(tfd_verbs_ops.half_start(halves[i], theirs.address, theirs.address_bytes, &error));
		mine.address_bytes = bytes;
		mine.worked_ns = now_ns() - begin;
		tell(side->link, &mine, sizeof(mine));
	}
}

static void sets_make(struct side *side, struct tfd_half **halves, uint64_t count, struct stage *stage)
{
	for (uint64_t i = 0; i < count; i++) {
		struct greeting mine = { 0 }, theirs;
		uint64_t begin = now_ns(), opened, answered;
		size_t bytes = 0;

		OK(tfd_verbs_ops.half_open(side->domain, 1, side, &halves[i], mine.address, &bytes, &error));
		mine.address_bytes = bytes;
		opened = now_ns();
		tell(side->link, &mine, sizeof(mine));
		hear(side->link, &theirs, sizeof(theirs));
		answered = now_ns();
		OK(tfd_verbs_ops.half_start(halves[i], theirs.address, theirs.address_bytes, &error));
		stage->open[i] = (double)(opened - begin) / 1e3;
		stage->exchange[i] = (double)(answered - opened - theirs.worked_ns) / 1e3;
		stage->start[i] = (double)(now_ns() - answered) / 1e3;
	}
}

static double middle(double *values, uint64_t count)
{
	qsort(values, count, sizeof(*values), by_value);
	return values[count / 2];
}

static void sets_print(const struct side *side, struct stage *stage, uint64_t count, long rss, long far_rss,
                       long host)
{
	(void)printf("{\"sets\": %llu, \"open_us\": %.1f, \"start_us\": %.1f, \"exchange_us\": %.1f, ",
	             (unsigned long long)side->sent, middle(stage->open, count), middle(stage->start, count),
	             middle(stage->exchange, count));
	(void)printf("\"pairs\": %u, \"send_cq\": %d, \"recv_cq\": %d, \"receives\": %u, ",
	             TFD_VERBS_CHANNELS, side->domain->send_cq->cqe, side->domain->recv_cq->cqe,
	             side->domain->receives);
	(void)printf("\"rss_kib\": %.1f, \"far_rss_kib\": %.1f, \"host_kib\": %.1f}\n",
	             (double)rss / (double)count, (double)far_rss / (double)count,
	             (double)host / (double)count);
}

static void run_sets(struct side *side, bool first, uint64_t count, const struct tfd_region_key *key)
{
	static struct tfd_half *halves[SETS_MAX];
	static struct tfd_wr wrs[SETS_MAX];
	static struct stage stage;
	long rss = field_kib("/proc/self/status", "VmRSS:"),
	     host = field_kib("/proc/meminfo", "MemAvailable:");
	struct tfd_region_key far;
	long far_rss;

	if (first)
		sets_make(side, halves, count, &stage);
	else
		sets_answer(side, halves, count);
	rss = field_kib("/proc/self/status", "VmRSS:") - rss;
	host -= field_kib("/proc/meminfo", "MemAvailable:");
	tell(side->link, &rss, sizeof(rss));
	hear(side->link, &far_rss, sizeof(far_rss));
	tell(side->link, key, sizeof(*key));
	hear(side->link, &far, sizeof(far));
	side->remote_address = far.address;
	side->remote_key = far.key;
	for (uint64_t i = 0; first && i < count; i++) /* each of them carries a write */
		post(side, halves[i], 64, 64 * i, TFD_TRAFFIC_BULK, &wrs[i]);
	poll_until(side, first ? 0 : count, first ? count : 0);
	if (!first && side->owners != count * (count + 1) / 2)
		die("an immediate came by another half", -EPROTO);
	if (first)
		sets_print(side, &stage, count, rss, far_rss, host);
	tell(side->link, "s", 1);
	hear(side->link, &(char){ 0 }, 1);
	for (uint64_t i = 0; i < count; i++)
		half_end(halves[i]);
}

/* ---- both ---- */

static uint64_t number(char **words, int count, int at)
{
	uint64_t value = at < count ? strtoull(words[at], NULL, 10) : 0;

	if (!value) {
		(void)fprintf(
			stderr,
			"usage: verbs_provider DEVICE bw SIZE DEPTH COUNT | lat SIZE COUNT | sets COUNT\n");
		exit(2);
	}
	return value;
}

static void run(int link, bool first, int argc, char **argv)
{
	const char *what = argv[2];
	struct side side = { .link = link };
	struct tfd_region_key key;
	uint64_t one = number(argv, argc, 3);

	if (strcmp(what, "sets") == 0) {
		side_open(&side, argv[1], 64 * SETS_MAX, &key);
		run_sets(&side, first, one < SETS_MAX ? one : SETS_MAX, &key);
		side_close(&side);
		return;
	}
	side_open(&side, argv[1], one, &key);
	side_join(&side, &key);
	if (strcmp(what, "bw") == 0)
		run_bw(&side, first, one, number(argv, argc, 4), number(argv, argc, 5));
	else
		run_lat(&side, first, one, number(argv, argc, 4));
	(void)fflush(stdout);
	side_close(&side);
}

int main(int argc, char **argv)
{
	int links[2], status;
	pid_t child;

	(void)number(argv, argc, 3);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, links) != 0)
		die("socketpair", -errno);
	child = fork();
	if (child < 0)
		die("fork", -errno);
	(void)close(links[child ? 1 : 0]);
	run(links[child ? 0 : 1], child != 0, argc, argv);
	if (!child)
		return 0;
	if (waitpid(child, &status, 0) != child || status != 0)
		die("the other process failed", -ECHILD);
	return 0;
}

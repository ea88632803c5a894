/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The raw provider, which the daemons are measured against: two processes over loopback that make libfabric's calls and
 * do nothing else.
 *
 *   fi_raw [-l LIBRARY] [-f FABRIC] [-r] bw SIZE WINDOW COUNT [SEGMENT [PIECES]]
 *   fi_raw [-l LIBRARY] [-f FABRIC] lat SIZE COUNT
 *
 * bw: COUNT messages of SIZE bytes to WINDOW places in turn, each one write, or cut in writes of SEGMENT bytes whose
 * last one carries the immediate; PIECES writes are in flight (default: those of WINDOW messages). lat: a write
 * with immediate each way in turn; half a round trip. Prints one line of JSON. -r: one run, and one line, for each line on
 * stdin, over the same connection.
 */
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fabric.h"

#define LATENCY_WARM_UP 500

/* ---- bw ---- */

struct load {
	size_t size;
	uint64_t window;
	uint64_t count;
	size_t segment;
	uint64_t pieces; /* in flight */
	bool repeats;    /* a run for each line on stdin */
};

static void send_all(struct half *half, const struct load *load, uint64_t count)
{
	uint64_t writes = count * ((load->size + load->segment - 1) / load->segment);
	uint64_t end = half->sent + writes;
	uint64_t message = 0;
	uint64_t posted = half->sent;
	size_t offset = 0;

	while (half->sent < end) {
		bool did = false;

		while (posted < end && posted - half->sent < load->pieces) {
			size_t left = load->size - offset;
			size_t length = left < load->segment ? left : load->segment;

			if (!post(half, message % load->window * load->size + offset, length, length == left))
				break;
			did = true;
			posted++;
			offset = length == left ? 0 : offset + length;
			message += length == left;
		}
		if (!poll_half(half) && !did)
			(void)sched_yield();
	}
}

/* One run, from the first post until the other side has seen the last; it waits for the word to begin without polling. */
static double bw_send_run(struct half *half, const struct load *load, uint64_t count)
{
	char byte = 0;
	uint64_t begin;
	double seconds;

	tell(half->side->socket, "", 1);
	begin = now_ns();
	send_all(half, load, count);
	hear(half->side->socket, &byte, 1);
	seconds = (double)(now_ns() - begin) / 1e9;
	tell(half->side->socket, "", 1);
	return seconds;
}

static void bw_send(struct half *half, const struct load *load)
{
	char line[16];

	(void)bw_send_run(half, load, load->window); /* connects, touches all memory */
	while (!load->repeats || fgets(line, sizeof(line), stdin)) {
		double seconds = bw_send_run(half, load, load->count);

		(void)printf("{\"mode\": \"bw\", \"size\": %zu, \"window\": %lu, \"count\": %lu, "
		             "\"segment\": %zu, "
		             "\"pieces\": %lu, \"seconds\": %.6f, \"gbps\": %.3f, ",
		             load->size, load->window, load->count, load->segment, load->pieces, seconds,
		             (double)(load->count * load->size) * 8 / seconds / 1e9);
		version_print(half->side);
		(void)fflush(stdout);
		if (!load->repeats)
			break;
	}
}

static void bw_receive_run(struct half *half, uint64_t count)
{
	uint64_t target = half->arrived + count;

	while (half->arrived < target) {
		if (!poll_half(half))
			(void)sched_yield();
	}
	tell(half->side->socket, "", 1);
	while (!heard(half->side->socket)) { /* acknowledgements go out by polling */
		if (!poll_half(half))
			(void)sched_yield();
	}
}

static void bw_receive(struct half *half, const struct load *load)
{
	uint64_t count = load->window;
	char byte;

	while (recv(half->side->socket, &byte, 1, 0) == 1) { /* else the other has ended */
		bw_receive_run(half, count);
		count = load->count;
	}
}

/* ---- lat ---- */

static void await_arrival(struct half *out, struct half *in, uint64_t count)
{
	while (in->arrived < count) {
		if (!(poll_half(out) + poll_half(in)))
			(void)sched_yield();
	}
}

static int compare(const void *a, const void *b)
{
	const uint64_t *left = a, *right = b;

	return (*left > *right) - (*left < *right);
}

static void exchange(struct half *out, struct half *in, size_t size, uint64_t count, bool first)
{
	uint64_t *samples = calloc(count, sizeof(*samples));
	uint64_t rounds = LATENCY_WARM_UP + count;

	for (uint64_t i = 0; samples && i < rounds; i++) {
		uint64_t begin = now_ns();

		if (!first)
			await_arrival(out, in, i + 1);
		while (!out->unused_count || !post(out, 0, size, true))
			(void)(poll_half(out) + poll_half(in));
		if (first)
			await_arrival(out, in, i + 1);
		if (i >= LATENCY_WARM_UP)
			samples[i - LATENCY_WARM_UP] = (now_ns() - begin) / 2;
	}
	while (out->sent < rounds)
		(void)(poll_half(out) + poll_half(in));
	if (first && samples) {
		qsort(samples, count, sizeof(*samples), compare);
		(void)printf("{\"mode\": \"lat\", \"size\": %zu, \"count\": %lu, \"p50_us\": %.3f, "
		             "\"p99_us\": %.3f, ",
		             size, count, (double)samples[count / 2] / 1e3,
		             (double)samples[count * 99 / 100] / 1e3);
	}
	free(samples);
}

static void lat_run(struct side *side, size_t size, uint64_t count, bool first)
{
	struct half *one = half_open(side);
	struct half *other = half_open(side);

	exchange(first ? one : other, first ? other : one, size, count, first);
	tell(side->socket, "", 1);
	while (!heard(side->socket))
		(void)(poll_half(one) + poll_half(other));
}

/* ---- arguments ---- */

static void run_side(int socket, const char *mode, const struct load *load, bool first)
{
	struct side side = { 0 };

	side_open(&side, socket, load->size * load->window);
	if (strcmp(mode, "lat") == 0)
		lat_run(&side, load->size, load->count, first);
	else if (first)
		bw_send(half_open(&side), load);
	else
		bw_receive(half_open(&side), load);
	if (first && strcmp(mode, "lat") == 0)
		version_print(&side);
}

static uint64_t number(int argc, char **argv, int index, uint64_t fallback)
{
	return index < argc ? strtoull(argv[index], NULL, 0) : fallback;
}

static int usage(void)
{
	(void)fprintf(stderr,
	              "usage: fi_raw [-l LIBRARY] [-f FABRIC] [-r] bw SIZE WINDOW COUNT [SEGMENT [PIECES]]\n"
	              "       fi_raw [-l LIBRARY] [-f FABRIC] lat SIZE COUNT\n");
	return 2;
}

int main(int argc, char **argv)
{
	struct load load = { .window = 1 };
	const char *library = NULL;
	const char *fabric = NULL;
	const char *mode;
	int sockets[2];
	int status = 1;
	int option;
	pid_t child;

	while ((option = getopt(argc, argv, "l:f:r")) != -1) {
		if (option == 'l')
			library = optarg;
		else if (option == 'f')
			fabric = optarg;
		else if (option == 'r')
			load.repeats = true;
		else
			return usage();
	}
	argc -= optind;
	argv += optind;
	mode = argc > 0 ? argv[0] : "";
	load.size = number(argc, argv, 1, 0);
	if (strcmp(mode, "bw") == 0) {
		load.window = number(argc, argv, 2, 0);
		load.count = number(argc, argv, 3, 0);
	} else if (strcmp(mode, "lat") == 0) {
		load.count = number(argc, argv, 2, 0);
	}
	if (!load.size || !load.window || !load.count)
		return usage();
	load.segment = number(argc, argv, 4, load.size);
	load.pieces = number(argc, argv, 5, load.window * ((load.size + load.segment - 1) / load.segment));
	if (load.pieces > PIECES_MAX)
		load.pieces = PIECES_MAX;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0)
		return 1;
	child = fork();
	(void)close(sockets[child == 0]); /* so that each notices the other's death */
	library_load(library, fabric); /* after the fork: providers have threads */
	run_side(sockets[child != 0], mode, &load, child != 0);
	(void)fflush(stdout);
	if (child == 0)
		_exit(0);
	(void)close(sockets[1]); /* tells it that there is no more to come */
	(void)waitpid(child, &status, 0);
	return status != 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bare loops over one TCP connection of 127.0.0.1, which paged writes are measured against: two processes, no daemon, no check.
 *
 *   pack_loop [-r] pack PAGE PAGES SET WINDOW JOBS BUFFER    gathers pages into a buffer, sends, receives, scatters
 *   pack_loop [-r] parts PAGE PAGES SET WINDOW JOBS BUFFER   sends from the pages themselves, receives into them
 *
 * A job is PAGES pages of PAGE bytes, taken at random from SET bytes, to as many pages of the other's SET bytes; its messages hold
 * BUFFER bytes of pages, and the numbers of their places travel ahead of them. The receiver acknowledges each job, and WINDOW jobs are in
 * flight. Prints one line of JSON. -r: one run, and one line, for each line on stdin, over the same connection.
 */
#include <arpa/inet.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TABLES_MIN 16
#define PARTS_MAX 1000u /* of IOV_MAX, the table's among them */
#define FILL 0x5a

struct load {
	bool parts;
	bool repeats;
	size_t page;
	uint32_t pages; /* of a job */
	size_t set;
	uint64_t window;
	uint64_t jobs;
	uint32_t batch; /* pages of a message */
};

struct header {
	uint32_t pages;
	uint32_t last; /* of its job */
};

struct side {
	const struct load *load;
	int socket;
	uint8_t *memory;
	uint8_t *buffer; /* a message: header, places, pages where they are packed */
	struct iovec *iov;
	bool checks; /* what arrived, in the first run */
	uint64_t sent, acknowledged; /* jobs */
	uint32_t *from, *to; /* numbers of pages, of job after job */
	uint64_t tables;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *claim(size_t bytes)
{
	void *memory = calloc(1, bytes);

	if (!memory)
		die("memory");
	return memory;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	(void)clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- which pages ---- */

static uint32_t draw(uint32_t below)
{
	static uint64_t state = 0x9e3779b97f4a7c15u;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)((state >> 16) % below);
}

static void shuffle(uint32_t *numbers, uint32_t count)
{
	for (uint32_t i = count; i > 1; i--) {
		uint32_t other = draw(i);
		uint32_t number = numbers[i - 1];

		numbers[i - 1] = numbers[other];
		numbers[other] = number;
	}
}

/* All pages of the set in random order, cut into jobs; as often as jobs enough need. Both sides take the same pages. */
static void tables_fill(struct side *side)
{
	uint32_t pages = side->load->pages;
	uint32_t slots = (uint32_t)(side->load->set / side->load->page);
	uint32_t jobs = slots / pages;
	uint32_t rounds = (TABLES_MIN + jobs - 1) / jobs;
	uint32_t *order = claim(slots * sizeof(*order));

	side->tables = (uint64_t)rounds * jobs;
	side->from = claim(side->tables * pages * sizeof(*side->from));
	side->to = claim(side->tables * pages * sizeof(*side->to));
	for (uint32_t i = 0; i < slots; i++)
		order[i] = i;
	for (uint32_t round = 0; round < rounds; round++) {
		size_t at = (size_t)round * jobs * pages;
		size_t bytes = (size_t)jobs * pages * sizeof(*order);

		shuffle(order, slots);
		memcpy(side->from + at, order, bytes);
		memcpy(side->to + at, order, bytes);
		for (uint32_t job = 0; job < jobs; job++)
			shuffle(side->to + at + (size_t)job * pages, pages);
	}
	free(order);
}

/* ---- the connection ---- */

static void send_all(struct side *side, struct iovec *iov, size_t count, size_t bytes)
{
	struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };

	if (sendmsg(side->socket, &message, 0) != (ssize_t)bytes) /* it blocks until all is taken */
		die("sendmsg");
}

static bool receive(struct side *side, void *into, size_t bytes)
{
	ssize_t got = recv(side->socket, into, bytes, MSG_WAITALL);

	if (got != (ssize_t)bytes && got != 0)
		die("recv");
	return got != 0;
}

static void acknowledgement_take(struct side *side)
{
	char bytes[64];
	ssize_t got = recv(side->socket, bytes, sizeof(bytes), 0);

	if (got <= 0)
		die("the other process");
	side->acknowledged += (uint64_t)got;
}

/* ---- the sender ---- */

static void message_send(struct side *side, const uint32_t *from, const uint32_t *to, uint32_t pages,
                         bool last)
{
	size_t page = side->load->page;
	struct header header = { .pages = pages, .last = last };
	size_t table = sizeof(header) + pages * sizeof(*to);
	size_t bytes = table + pages * page;
	struct iovec *iov = side->iov;

	memcpy(side->buffer, &header, sizeof(header));
	memcpy(side->buffer + sizeof(header), to, pages * sizeof(*to));
	iov[0] = (struct iovec){ side->buffer, side->load->parts ? table : bytes };
	for (uint32_t i = 0; i < pages; i++) {
		uint8_t *source = side->memory + (size_t)from[i] * page;

		if (side->load->parts)
			iov[1 + i] = (struct iovec){ source, page };
		else
			memcpy(side->buffer + table + i * page, source, page);
	}
	send_all(side, iov, side->load->parts ? 1 + pages : 1, bytes);
}

static void jobs_send(struct side *side, uint64_t jobs)
{
	const struct load *load = side->load;

	for (uint64_t job = 0; job < jobs; job++) {
		size_t table = (size_t)(side->sent % side->tables) * load->pages;

		while (side->sent - side->acknowledged == load->window)
			acknowledgement_take(side);
		for (uint32_t at = 0; at < load->pages; at += load->batch) {
			uint32_t left = load->pages - at;
			uint32_t pages = left < load->batch ? left : load->batch;

			message_send(side, side->from + table + at, side->to + table + at, pages,
			             pages == left);
		}
		side->sent++;
	}
	while (side->acknowledged < side->sent)
		acknowledgement_take(side);
}

static void sender_run(struct side *side)
{
	const struct load *load = side->load;
	char line[16];

	jobs_send(side, side->tables); /* touches all memory */
	while (!load->repeats || fgets(line, sizeof(line), stdin)) {
		uint64_t begin = now_ns();
		double seconds, pages = (double)(load->jobs * load->pages);

		jobs_send(side, load->jobs);
		seconds = (double)(now_ns() - begin) / 1e9;
		(void)printf("{\"mode\": \"%s\", \"page\": %zu, \"batch\": %u, \"seconds\": %.6f, "
		             "\"pages_s\": %.0f, "
		             "\"gbps\": %.3f}\n",
		             load->parts ? "parts" : "pack", load->page, load->batch, seconds,
		             pages / seconds, pages * (double)load->page * 8 / seconds / 1e9);
		(void)fflush(stdout);
		if (!load->repeats)
			break;
	}
}

/* ---- the receiver ---- */

static void message_receive(struct side *side, const uint32_t *to, uint32_t pages)
{
	size_t page = side->load->page;
	uint8_t *packed = side->buffer + sizeof(struct header) + pages * sizeof(*to);
	struct msghdr message = { .msg_iov = side->iov, .msg_iovlen = pages };

	if (!side->load->parts && !receive(side, packed, pages * page))
		die("the other process");
	for (uint32_t i = 0; i < pages; i++) {
		uint8_t *place = side->memory + (size_t)to[i] * page;

		if (side->load->parts)
			side->iov[i] = (struct iovec){ place, page };
		else
			memcpy(place, packed + i * page, page);
	}
	if (side->load->parts && recvmsg(side->socket, &message, MSG_WAITALL) != (ssize_t)(pages * page))
		die("recvmsg");
}

static void arrived_check(struct side *side, const uint32_t *to, uint32_t pages)
{
	size_t page = side->load->page;

	for (uint32_t i = 0; i < pages; i++) {
		uint8_t *place = side->memory + (size_t)to[i] * page;

		if (place[0] != FILL || place[page - 1] != FILL) {
			(void)fprintf(stderr, "pack_loop: page %u did not arrive\n", to[i]);
			exit(1);
		}
	}
}

static void receiver_run(struct side *side)
{
	struct header header;
	uint32_t *to = (uint32_t *)(void *)(side->buffer + sizeof(header));
	uint64_t jobs = 0;

	while (receive(side, &header, sizeof(header))) {
		if (!receive(side, to, header.pages * sizeof(*to)))
			die("the other process");
		message_receive(side, to, header.pages);
		if (jobs < side->tables)
			arrived_check(side, to, header.pages);
		jobs += header.last;
		if (header.last && send(side->socket, "", 1, 0) != 1)
			die("send");
	}
}

/* ---- both ---- */

static void side_open(struct side *side, const struct load *load, int socket, bool sends)
{
	int fd =
		memfd_create("pack_loop", MFD_CLOEXEC); /* the kind of memory that clients of a daemon have */
	int one = 1;

	side->load = load;
	side->socket = socket;
	if (fd < 0 || ftruncate(fd, (off_t)load->set) != 0)
		die("memfd");
	side->memory = mmap(NULL, load->set, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (side->memory == MAP_FAILED)
		die("mmap");
	memset(side->memory, sends ? FILL : 0, load->set);
	side->buffer = claim(sizeof(struct header) + load->batch * (sizeof(uint32_t) + load->page));
	side->iov = claim((1 + (size_t)load->batch) * sizeof(*side->iov));
	if (setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) != 0)
		die("TCP_NODELAY");
	tables_fill(side);
}

static uint64_t number(const char *word)
{
	char *end;
	uint64_t value = strtoull(word, &end, 0);

	if (*end || !value) {
		(void)fprintf(stderr, "pack_loop: %s is no number above 0\n", word);
		exit(2);
	}
	return value;
}

static int load_read(struct load *load, int argc, char **argv)
{
	while (getopt(argc, argv, "r") == 'r')
		load->repeats = true;
	argc -= optind;
	argv += optind;
	if (argc != 7 || (strcmp(argv[0], "pack") != 0 && strcmp(argv[0], "parts") != 0)) {
		(void)fprintf(stderr, "usage: pack_loop [-r] pack|parts PAGE PAGES SET WINDOW JOBS BUFFER\n");
		return 2;
	}
	load->parts = strcmp(argv[0], "parts") == 0;
	load->page = number(argv[1]);
	load->pages = (uint32_t)number(argv[2]);
	load->set = number(argv[3]);
	load->window = number(argv[4]);
	load->jobs = number(argv[5]);
	load->batch = (uint32_t)(number(argv[6]) / load->page);
	if (!load->batch || load->batch > load->pages)
		load->batch = load->batch ? load->pages : 1;
	if (load->parts && load->batch > PARTS_MAX)
		load->batch = PARTS_MAX;
	if (load->set / load->page < load->pages) {
		(void)fprintf(stderr, "pack_loop: the set has fewer pages than a job\n");
		return 2;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	struct load load = { 0 };
	struct side side = { 0 };
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int status = load_read(&load, argc, argv);
	int connection;
	pid_t child;

	if (status)
		return status;
	if (bind(listener, (struct sockaddr *)&address, length) != 0 || listen(listener, 1) != 0 ||
	    getsockname(listener, (struct sockaddr *)&address, &length) != 0)
		die("listen");
	child = fork();
	if (child == 0) {
		side_open(&side, &load, accept(listener, NULL, NULL), false);
		receiver_run(&side);
		return 0;
	}
	connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(connection, (struct sockaddr *)&address, length) != 0)
		die("connect");
	side_open(&side, &load, connection, true);
	sender_run(&side);
	(void)close(connection); /* tells it that there is no more to come */
	(void)waitpid(child, &status, 0);
	return status != 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Closing: what it stops, what it tells, in which order. */
#include "cases.h"
#include "conformance.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define LOAD_WRITES 64u
#define LOAD_BYTES (64u << 10)
#define ROUNDS 12
#define MAX_STRANGERS 16u
#define ENDLESS_NS 3000000000ull /* after that a post that has no end is the core's to give up on */

/* Writes, or reads, under way on all channels; how many there was room for. */
static uint32_t put_under_way(struct rig *rig, struct pair *pair, uint32_t read)
{
	uint32_t posted = 0;

	for (uint32_t i = 0; i < LOAD_WRITES; i++) {
		uint64_t offset = i * LOAD_BYTES;
		struct tfd_post post = post_write(pair, offset, offset, LOAD_BYTES);
		int rc;

		post.read = read;
		post.has_imm = !read;
		post.imm = i;
		post.traffic = i % 3;
		if (rig_try(rig, pair->out.half, &post, &rc))
			posted++;
		else if (rc == -EAGAIN)
			(void)rig_poll(rig, 1);
		else
			FAIL("a post: %s", strerror(-rc));
	}
	return posted;
}

/* So that closes meet it at different moments: when a part has been told as sent, and the far side, by turns, has been polled or not. */
static void let_some_go(struct rig *rig, uint32_t round)
{
	uint64_t sent = rig->sent + (uint64_t)LOAD_WRITES * round / ROUNDS;

	AWAIT(rig, rig->sent >= sent || !rig->in_flight);
	for (uint32_t i = 0; i < round % 4; i++)
		(void)rig_poll(rig, round % 2 ? 1 : 2);
}

/* Whatever is left ends, or nothing is told of it any more. */
static void let_end(struct rig *rig)
{
	uint64_t until_ns = tfd_now_ns() + ENDLESS_NS;

	while (rig->in_flight && tfd_now_ns() < until_ns)
		(void)rig_pass(rig);
}

static void nothing_lands(struct rig *rig, const uint8_t *memory, uint8_t value)
{
	rig_settle(rig);
	CHECK(all_are(memory, LOAD_WRITES * LOAD_BYTES, value));
}

void case_close_incoming(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	uint32_t caught = 0;
	struct pair good;

	pair_open(rig, &good, 0);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		struct pair pair;

		pair_open(rig, &pair, 0);
		rig_write(rig, &pair, 100, &imm);
		memset(rig->sides[0].memory, (int)round + 1, LOAD_WRITES * LOAD_BYTES);
		rig->faults = true;
		(void)put_under_way(rig, &pair, 0);
		let_some_go(rig, round);
		half_end(rig, &pair.in);
		memset(rig->sides[1].memory, GUARD, LOAD_WRITES * LOAD_BYTES);
		rig->arrival_count = 0;
		caught += rig->in_flight != 0;
		let_end(rig);
		nothing_lands(rig, rig->sides[1].memory, GUARD);
		CHECK(!rig->arrival_count || !rig->sides[1].info.ordered); /* nor is it told */
		half_end(rig, &pair.out);
		rig->faults = false;
		nothing_lands(rig, rig->sides[1].memory, GUARD);
		rig_write(rig, &good, 4096, &imm);
	}
	CHECK(caught || rig->one_domain);
	outcome_remark("%u of %u closes met writes under way", caught, ROUNDS);
	pair_close(rig, &good);
	rig_close(rig);
}

/* Source and target of reads, unmapped as soon as the half is drained. */
static void close_and_unmap(struct rig *rig, struct pair *pair, uint32_t read, uint32_t round)
{
	struct side *near = &rig->sides[0];
	size_t bytes = LOAD_WRITES * LOAD_BYTES;
	struct side whole = *near;
	uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	memset(memory, 0x22, bytes);
	near->memory = memory;
	CHECK_OK(rig->ops->mr_open(near->domain, memory, bytes, 1, &near->mr, &near->key, &error));
	(void)put_under_way(rig, pair, read);
	let_some_go(rig, round);
	half_end(rig, &pair->out);
	if (read) {
		memset(memory, GUARD, bytes);
		rig_settle(rig);
		CHECK(all_are(memory, bytes, GUARD));
	}
	rig->ops->mr_close(near->domain, near->mr);
	CHECK(munmap(memory, bytes) == 0);
	near->memory = whole.memory;
	near->mr = whole.mr;
	near->key = whole.key;
}

static void close_out_under_load(uint32_t read)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair good;

	pair_open(rig, &good, 0);
	for (uint32_t round = 0; round < ROUNDS; round++) {
		struct pair pair;

		pair_open(rig, &pair, 0);
		rig_write(rig, &pair, 100, &imm);
		rig->faults = true;
		close_and_unmap(rig, &pair, read, round);
		rig_settle(rig); /* what the provider holds no more it cannot touch */
		half_end(rig, &pair.in);
		rig_settle(rig);
		CHECK(!rig->in_flight);
		rig->arrival_count = 0;
		rig->faults = false;
		rig_write(rig, &good, 4096, &imm);
	}
	pair_close(rig, &good);
	rig_close(rig);
}

void case_close_outgoing(void)
{
	close_out_under_load(0);
}

void case_close_reading(void)
{
	close_out_under_load(1);
}

/* Its sender counts on it: what it was told as sent has been told there, or is when the half is drained. */
void case_close_counts(void)
{
	struct rig *rig = rig_open();
	uint64_t least = UINT64_MAX, most = 0;

	if (!rig->sides[1].info.ordered)
		outcome_skip("the rail is not ordered");
	for (uint32_t round = 0; round < ROUNDS; round++) {
		uint64_t sent;
		struct pair pair;

		pair_open(rig, &pair, 0);
		rig_write(rig, &pair, 100, NULL);
		rig->arrival_count = 0;
		rig->faults = true;
		sent = rig->sent;
		(void)put_under_way(rig, &pair, 0);
		let_some_go(rig, round);
		half_end(rig, &pair.in);
		let_end(rig);
		half_end(rig, &pair.out);
		rig->faults = false;
		sent = rig->sent - sent;
		if (sent > rig->arrival_count)
			FAIL("%llu were told as sent, %u immediates were told before the half was drained",
			     (unsigned long long)sent, rig->arrival_count);
		for (uint32_t i = 0; i < rig->arrival_count; i++)
			CHECK(rig->arrivals[i].owner == &pair.in.owner);
		least = sent < least ? sent : least;
		most = sent > most ? sent : most;
	}
	outcome_remark("%llu to %llu of %u had been acknowledged", (unsigned long long)least,
	               (unsigned long long)most, LOAD_WRITES);
	rig_close(rig);
}

/* Posts for a while; what is taken ends or goes with its half. */
static void post_into_nothing(struct rig *rig, struct pair *pair)
{
	uint64_t until_ns = tfd_now_ns() + ENDLESS_NS / 10;
	uint32_t taken = 0;
	int rc = -EAGAIN;

	while (tfd_now_ns() < until_ns && taken < 200 && rc == -EAGAIN) {
		struct tfd_post post = post_write(pair, 0, 0, 1000);

		post.has_imm = taken % 2;
		post.traffic = taken % 3;
		if (rig_try(rig, pair->out.half, &post, &rc)) {
			taken++;
			rc = -EAGAIN;
		}
		(void)rig_pass(rig);
	}
	CHECK(rc < 0);
	let_end(rig);
}

void case_close_far_half(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();

	for (uint32_t used = 0; used < 2; used++) {
		struct pair pair, good;

		pair_open(rig, &good, 0);
		rig_write(rig, &good, 1000, &imm);
		pair_open(rig, &pair, 0);
		if (used)
			rig_write(rig, &pair, 1000, &imm);
		rig->faults = true;
		half_end(rig, &pair.in);
		memset(rig->sides[1].memory, GUARD, 4096);
		post_into_nothing(rig, &pair);
		CHECK(all_are(rig->sides[1].memory, 4096, GUARD));
		half_end(rig, &pair.out);
		rig->faults = false;
		rig_write(rig, &good, 1000, &imm);
		pair_close(rig, &good);
	}
	rig_close(rig);
}

/* Its owner ends, and with it all that it had. */
static void far_rail_close(struct rig *rig)
{
	struct side *far = &rig->sides[1];

	rig->ops->mr_close(far->domain, far->mr);
	if (far->device)
		device_close(far);
	rig->ops->domain_close(far->domain);
	far->domain = NULL;
	far->mr = NULL;
}

void case_close_far_rail(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair pairs[3];

	if (rig->one_domain)
		outcome_skip("both sides are one rail");
	for (uint32_t i = 0; i < 3; i++) {
		pair_open(rig, &pairs[i], 0);
		rig_write(rig, &pairs[i], 1000, &imm);
	}
	rig->faults = true;
	(void)put_under_way(rig, &pairs[0], 0);
	(void)put_under_way(rig, &pairs[1], 1);
	for (uint32_t i = 0; i < 3; i++)
		half_end(rig, &pairs[i].in);
	far_rail_close(rig);
	for (uint32_t i = 0; i < 3; i++)
		post_into_nothing(rig, &pairs[i]);
	for (uint32_t i = 0; i < 3; i++)
		half_end(rig, &pairs[i].out);
	rig_close(rig);
}

/* What was freed is not any more what it was, also where it is kept for the next who asks for as much. */
static void scribble(void)
{
	uint8_t *taken[16];

	for (size_t bytes = 16; bytes <= 1024; bytes += 16) {
		for (uint32_t i = 0; i < 16; i++) {
			taken[i] = malloc(bytes);
			CHECK(taken[i]);
			pattern_fill(taken[i], bytes, bytes + i);
		}
		for (uint32_t i = 0; i < 16; i++)
			free(taken[i]);
	}
}

/* A first post by a connection that both sides have done something for, by turns nothing. */
static void join_and_close(struct rig *rig, uint32_t round)
{
	struct pair pair;
	struct tfd_post post;
	int rc;

	pair_open(rig, &pair, 0);
	post = post_write(&pair, 0, 0, 1000);
	if (!rig_try(rig, pair.out.half, &post, &rc))
		CHECK(rc == -EAGAIN);
	for (uint32_t i = 0; i < round / 3; i++)
		(void)rig_poll(rig, 2);
	for (uint32_t i = 0; i < round % 3; i++)
		(void)rig_poll(rig, 1);
	half_end(rig, &pair.in);
	scribble();
	memset(rig->sides[1].memory, GUARD, 4096);
	rig_settle(rig);
	CHECK(all_are(rig->sides[1].memory, 4096, GUARD));
	half_end(rig, &pair.out);
}

void case_close_joining(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair good;

	pair_open(rig, &good, 0);
	for (uint32_t round = 0; round < 9; round++) {
		rig->faults = true;
		join_and_close(rig, round);
		rig->faults = false;
		rig_write(rig, &good, 1000, &imm);
	}
	pair_close(rig, &good);
	rig_close(rig);
}

/* To all that listens in this process, which is rails and halves. How many: `sockets`, of room for MAX_STRANGERS. */
static uint32_t strangers_connect(int *sockets)
{
	uint32_t count = 0;

	for (int fd = 0; fd < 1024 && count < MAX_STRANGERS; fd++) {
		struct sockaddr_in address = { 0 };
		socklen_t bytes = sizeof(address), number = sizeof(int);
		int listens = 0;

		if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &number) != 0 || !listens ||
		    getsockname(fd, (struct sockaddr *)&address, &bytes) != 0 ||
		    address.sin_family != AF_INET)
			continue;
		sockets[count] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		CHECK(sockets[count] >= 0);
		CHECK(connect(sockets[count++], (struct sockaddr *)&address, bytes) == 0);
	}
	return count;
}

static void strangers_end(const int *sockets, uint32_t count, bool speak)
{
	static const char nonsense[] = "GET / HTTP/1.0\r\n\r\n";

	for (uint32_t i = 0; i < count; i++) {
		if (speak)
			(void)send(sockets[i], nonsense, sizeof(nonsense) - 1, MSG_NOSIGNAL);
		(void)close(sockets[i]);
	}
}

void case_close_strangers(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	int strangers[MAX_STRANGERS];
	uint32_t count = 0;
	struct pair good;

	pair_open(rig, &good, 0);
	rig_write(rig, &good, 1000, &imm);
	for (uint32_t round = 0; round < 4; round++) {
		struct pair pair;

		pair_open(rig, &pair, 0);
		rig->faults = true;
		count = strangers_connect(strangers);
		rig_settle(rig);
		half_end(rig, round & 2 ? &pair.in : &pair.out);
		scribble();
		strangers_end(strangers, count, round & 1);
		rig_settle(rig);
		pair_close(rig, &pair);
		rig->faults = false;
		rig_write(rig, &good, 1000, &imm);
	}
	outcome_remark("%u of them", count);
	pair_close(rig, &good);
	rig_close(rig);
}

void case_close_orders(void)
{
	for (uint32_t order = 0; order < 8; order++) {
		struct rig *rig = rig_open();
		struct pair pairs[2];

		for (uint32_t i = 0; i < 2; i++) {
			pair_open(rig, &pairs[i], i);
			if (order & 1)
				rig_write(rig, &pairs[i], 5000, &i);
		}
		rig->faults = true;
		half_end(rig, order & 2 ? &pairs[0].in : &pairs[0].out);
		half_end(rig, order & 4 ? &pairs[1].in : &pairs[1].out);
		if (order & 2)
			rig_settle(rig);
		pair_close(rig, &pairs[order & 1]);
		pair_close(rig, &pairs[!(order & 1)]);
		if ((order & 4) && !rig->one_domain)
			far_rail_close(rig);
		rig_close(rig);
	}
}

void case_far_never_started(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair pair, good;

	pair_open(rig, &good, 0);
	for (uint32_t far_freed = 0; far_freed < 2; far_freed++) {
		pair_make(rig, &pair, 0);
		CHECK_OK(rig->ops->half_start(pair.out.half, pair.in.address, pair.in.address_bytes, &error));
		if (far_freed)
			half_end(rig, &pair.in);
		rig->faults = true;
		post_into_nothing(rig, &pair);
		pair_close(rig, &pair);
		rig->faults = false;
		rig->arrival_count = 0;
		rig_write(rig, &good, 1000, &imm);
	}
	pair_close(rig, &good);
	rig_close(rig);
}

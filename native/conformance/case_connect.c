/* SPDX-License-Identifier: Apache-2.0 */
/* Connections: addresses, and who starts when. */
#include "cases.h"
#include "conformance.h"

#include <stdlib.h>

#define CYCLES 200
#define MANY 64
#define MANY_ROUNDS 4
#define GARBAGE 64
#define FLIPS 48
#define TRIES 50

static void start(struct rig *rig, struct half_end *end, const struct half_end *far)
{
	CHECK_OK(rig->ops->half_start(end->half, far->address, far->address_bytes, &error));
}

/* While the far half does not know yet from whom: it lands once that does, or breaks the connection. */
static void post_early(struct rig *rig, const struct pair *pair)
{
	struct tfd_post post = post_write(pair, 0, 0, 100);
	int rc;

	if (!rig_try(rig, pair->out.half, &post, &rc))
		CHECK(rc == -EAGAIN);
	for (int i = 0; i < TRIES; i++)
		(void)rig_pass(rig);
}

void case_connect_orders(void)
{
	const uint32_t imm = 5;
	struct rig *rig = rig_open();

	for (int order = 0; order < 5; order++) {
		uint64_t failed = rig->failed;
		struct pair pair;

		pair_make(rig, &pair, 0);
		start(rig, order % 2 ? &pair.out : &pair.in, order % 2 ? &pair.in : &pair.out);
		for (int i = 0; order >= 2 && i < TRIES; i++)
			(void)rig_pass(rig);
		rig->faults = order == 3;
		if (order == 3)
			post_early(rig, &pair);
		start(rig, order % 2 ? &pair.in : &pair.out, order % 2 ? &pair.out : &pair.in);
		AWAIT(rig, !rig->in_flight);
		if (rig->failed == failed)
			rig_write(rig, &pair, 1000, &imm);
		pair_close(rig, &pair);
	}
	rig_close(rig);
}

/* The far side of an outgoing half answers by it. */
static void answer(struct rig *rig, struct pair *pair, uint64_t length, uint32_t imm)
{
	struct pair back = { .from = pair->to, .to = pair->from };
	struct tfd_post post = post_write(&back, 0, 0, length);
	uint32_t before = rig->arrival_count;

	post.has_imm = 1;
	post.imm = imm;
	post.traffic = TFD_TRAFFIC_MESSAGE;
	pattern_fill(back.from->memory, length, imm);
	CHECK(rig_run(rig, pair->in.half, &post, NULL) == 0);
	AWAIT(rig, rig->arrival_count > before);
	CHECK(rig->arrivals[before].imm == imm);
	CHECK(owned_by(rig, &rig->arrivals[before], &pair->out));
	CHECK(pattern_is(back.to->memory, length, imm));
}

void case_connect_both_ways(void)
{
	struct rig *rig = rig_open();
	struct pair there[2], back[2];

	for (int i = 0; i < 2; i++) { /* all at once */
		pair_make(rig, &there[i], 0);
		pair_make(rig, &back[i], 1);
	}
	for (int i = 0; i < 2; i++) {
		start(rig, &there[i].out, &there[i].in);
		start(rig, &back[i].out, &back[i].in);
	}
	for (int i = 0; i < 2; i++) {
		start(rig, &there[i].in, &there[i].out);
		start(rig, &back[i].in, &back[i].out);
	}
	answer(rig, &back[1], 64, 7); /* before its writer has written */
	for (uint32_t i = 0; i < 40; i++) {
		rig_write(rig, &there[i % 2], i * 100, &i);
		rig_write(rig, &back[i % 2], i * 90, &i);
		answer(rig, &there[i / 2 % 2], i * 3, i);
		answer(rig, &back[i / 2 % 2], i * 5, i);
	}
	for (int i = 0; i < 2; i++) {
		pair_close(rig, &there[i]);
		pair_close(rig, &back[i]);
	}
	rig_close(rig);
}

/* What is written to a half that took such an address goes nowhere; how it fails is its own affair. */
static void start_badly(struct rig *rig, const uint8_t *address, size_t bytes, bool refused)
{
	struct pair pair;

	for (int outgoing = 0; outgoing < 2; outgoing++) {
		struct half_end *end;
		int rc;

		pair_make(rig, &pair, 0);
		end = outgoing ? &pair.out : &pair.in;
		memset(&error, 0, sizeof(error));
		rc = rig->ops->half_start(end->half, address, bytes, &error);
		if (rc == 0 && refused)
			FAIL("an address of %zu of its %zu bytes was taken", bytes, end->address_bytes);
		if (rc != 0 && (rc > 0 || !error.text[0]))
			FAIL("half_start: %d without a sentence", rc);
		(void)rig_pass(rig);
		pair_close(rig, &pair);
	}
}

void case_connect_truncated(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair good;
	uint8_t longer[TFD_ADDRESS_MAX + 1] = { 0 };

	pair_open(rig, &good, 0);
	rig_write(rig, &good, 100, &imm);
	memcpy(longer, good.in.address, good.in.address_bytes);
	for (size_t bytes = 0; bytes < good.in.address_bytes; bytes++)
		start_badly(rig, longer, bytes, true);
	for (size_t bytes = good.in.address_bytes + 1; bytes <= TFD_ADDRESS_MAX; bytes += 17)
		start_badly(rig, longer, bytes, true);
	rig_write(rig, &good, 100, &imm);
	pair_close(rig, &good);
	rig_close(rig);
}

void case_connect_garbage(void)
{
	const uint32_t imm = 1;
	struct rig *rig = rig_open();
	struct pair good;
	uint8_t bytes[TFD_ADDRESS_MAX];

	rig->faults = true;
	pair_open(rig, &good, 0);
	rig_write(rig, &good, 100, &imm);
	for (uint32_t i = 0; i < GARBAGE; i++) {
		for (size_t at = 0; at < sizeof(bytes); at++)
			bytes[at] = (uint8_t)mix(i * 1000 + at);
		start_badly(rig, bytes, i % 2 ? good.in.address_bytes : mix(i) % (TFD_ADDRESS_MAX + 1), true);
	}
	memset(bytes, 0, sizeof(bytes));
	start_badly(rig, bytes, good.in.address_bytes, true);
	for (uint32_t i = 0; i < load(FLIPS); i++) { /* a true one with one bit wrong */
		uint64_t bit = mix(i) % (8 * good.in.address_bytes);

		memcpy(bytes, good.in.address, good.in.address_bytes);
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
		start_badly(rig, bytes, good.in.address_bytes, false);
	}
	rig_write(rig, &good, 100, &imm);
	pair_close(rig, &good);
	rig_close(rig);
}

void case_connect_cycles(void)
{
	struct rig *rig = rig_open();
	struct pair *pair = calloc(1, sizeof(*pair));
	uint32_t fds = 0, threads = 0;

	CHECK(pair);
	for (uint32_t i = 0; i < load(CYCLES); i++) {
		pair_open(rig, pair, i % 2);
		rig_write(rig, pair, 100, &i);
		pair_close(rig, pair);
		rig_settle(rig);
		if (i == load(CYCLES) / 4) { /* what is kept for reuse is there by then */
			fds = count_fds();
			threads = count_threads();
		}
	}
	CHECK(count_fds() <= fds + 2); /* a socket may still be in its last moments */
	CHECK(count_threads() <= threads);
	free(pair);
	rig_close(rig);
}

void case_connect_many(void)
{
	struct rig *rig = rig_open();
	struct pair *pairs = calloc(MANY, sizeof(*pairs));
	uint32_t seen[MANY] = { 0 };
	uint32_t bytes = 777;

	CHECK(pairs);
	for (uint32_t i = 0; i < MANY; i++)
		pair_open(rig, &pairs[i], i % 2);
	for (uint32_t i = 0; i < MANY * MANY_ROUNDS; i++) {
		struct pair *pair = &pairs[i % MANY];
		struct tfd_post post = post_write(pair, i * 1024, i * 1024, bytes);

		post.has_imm = 1;
		post.imm = i % MANY;
		pattern_fill(pair->from->memory + i * 1024, bytes, i);
		rig_send(rig, pair->out.half, &post);
	}
	AWAIT(rig, !rig->in_flight && rig->arrival_count >= MANY * MANY_ROUNDS);
	CHECK(rig->arrival_count == MANY * MANY_ROUNDS);
	for (uint32_t i = 0; i < rig->arrival_count; i++) {
		const struct arrival *arrival = &rig->arrivals[i];

		CHECK(arrival->imm < MANY && owned_by(rig, arrival, &pairs[arrival->imm].in));
		CHECK(++seen[arrival->imm] <= MANY_ROUNDS);
	}
	for (uint32_t i = 0; i < MANY * MANY_ROUNDS; i++)
		CHECK(pattern_is(pairs[i % MANY].to->memory + i * 1024, bytes, i));
	for (uint32_t i = 0; i < MANY; i++)
		pair_close(rig, &pairs[(i * 13 + 5) % MANY]);
	free(pairs);
	rig_close(rig);
}

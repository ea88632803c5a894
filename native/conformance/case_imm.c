/* SPDX-License-Identifier: Apache-2.0 */
/* Immediates. */
#include "cases.h"
#include "conformance.h"

#include <stdlib.h>

#define ROUNDS 600
#define SLOTS 64u
#define SLOT_BYTES (MEMORY_BYTES / SLOTS)
#define RUNS 200
#define RUN_WRITES 6u
#define UNPOLLED 6000u /* where nothing bounds them */
#define HALVES 8u
#define STUCK_PASSES 3000

void case_imm_alone(void)
{
	static const uint32_t imms[] = { 0, 1, 255, 256, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff };
	struct rig *rig = rig_open();
	struct pair pair;

	pair_open(rig, &pair, 0);
	for (uint32_t i = 0; i < 4 * sizeof(imms) / sizeof(imms[0]); i++)
		rig_write(rig, &pair, 0, &imms[i % (sizeof(imms) / sizeof(imms[0]))]);
	pair_close(rig, &pair);
	rig_close(rig);
}

/* ---- bytes before immediates ---- */

static uint64_t slot_length(uint32_t number)
{
	uint64_t most = number % 16 == 7 ? SLOT_BYTES : 6000;

	return mix(number) % most;
}

static void slot_is_there(struct rig *rig, const struct arrival *arrival)
{
	CHECK(pattern_is(rig->sides[1].memory + arrival->imm % SLOTS * SLOT_BYTES, slot_length(arrival->imm),
	                 arrival->imm));
}

/* As many are under way as there are slots. */
void case_imm_after_data(void)
{
	uint32_t rounds = load(ROUNDS);
	struct rig *rig = rig_open();
	struct pair pairs[3];

	for (uint32_t i = 0; i < 3; i++)
		pair_open(rig, &pairs[i], 0);
	rig->on_imm = slot_is_there;
	for (uint32_t i = 0; i < rounds; i++) {
		uint64_t offset = i % SLOTS * SLOT_BYTES, length = slot_length(i);
		struct tfd_post post = post_write(&pairs[i % 3], offset, offset, length);

		if (i % SLOTS == 0) /* a slot is used again when all are told and acknowledged */
			AWAIT(rig, !rig->in_flight && rig->arrival_count == i);
		if (length > rig->sides[0].info.max_message_bytes)
			FAIL("a message of %llu bytes is the largest",
			     (unsigned long long)rig->sides[0].info.max_message_bytes);
		pattern_fill(rig->sides[0].memory + offset, length, i);
		post.has_imm = 1;
		post.imm = i;
		post.traffic = i / 3 % 3;
		rig_send(rig, pairs[i % 3].out.half, &post);
	}
	AWAIT(rig, !rig->in_flight && rig->arrival_count == rounds);
	for (uint32_t i = 0; i < 3; i++)
		pair_close(rig, &pairs[i]);
	rig_close(rig);
}

/*
 * Runs of writes without immediates, the last with one: when that is told, all of its run are there. Runs of the three kinds of traffic
 * go at once; what has one order for all keeps it among them, too.
 */
struct earlier {
	struct pair pairs[2];
	uint32_t last[2][TFD_TRAFFIC_MESSAGE + 1]; /* number of the last run told, +1, of a pair and order */
};

static uint64_t run_offset(uint32_t run, uint32_t write)
{
	return (run % SLOTS) * SLOT_BYTES + write * (SLOT_BYTES / RUN_WRITES);
}

static uint64_t run_length(uint32_t run, uint32_t write)
{
	return write == RUN_WRITES - 1 ? mix(run) % 2 * 100 :
	                                 1 + mix(run * 100 + write) % (SLOT_BYTES / RUN_WRITES - 1);
}

static void run_is_there(struct rig *rig, const struct arrival *arrival)
{
	struct earlier *earlier = rig->context;
	uint32_t run = arrival->imm, pair = run % 2, traffic = run / 2 % 3;

	for (uint32_t i = 0; i < RUN_WRITES; i++)
		CHECK(pattern_is(rig->sides[1].memory + run_offset(run, i), run_length(run, i),
		                 run * 10 + i));
	CHECK(owned_by(rig, arrival, &earlier->pairs[pair].in));
	CHECK(earlier->last[pair][arrival->order] <= run); /* one behind the other */
	earlier->last[pair][arrival->order] = run + 1;
	CHECK(arrival->order == (rig->sides[1].info.channels > 1 ? traffic : 0));
}

static void send_run(struct rig *rig, const struct pair *pair, uint32_t run)
{
	for (uint32_t i = 0; i < RUN_WRITES; i++) {
		uint64_t offset = run_offset(run, i);
		struct tfd_post post = post_write(pair, offset, offset, run_length(run, i));

		pattern_fill(rig->sides[0].memory + offset, run_length(run, i), run * 10 + i);
		post.traffic = run / 2 % 3;
		post.has_imm = i == RUN_WRITES - 1;
		post.imm = run;
		rig_send(rig, pair->out.half, &post);
	}
}

void case_imm_after_earlier(void)
{
	uint32_t runs = load(RUNS);
	struct earlier earlier = { 0 };
	struct rig *rig = rig_open();

	if (!rig->sides[0].info.ordered)
		outcome_skip("the rail is not ordered");
	pair_open(rig, &earlier.pairs[0], 0);
	pair_open(rig, &earlier.pairs[1], 0);
	rig->on_imm = run_is_there;
	rig->context = &earlier;
	for (uint32_t run = 0; run < runs; run++) {
		if (run % SLOTS == 0)
			AWAIT(rig, !rig->in_flight && rig->arrival_count == run);
		send_run(rig, &earlier.pairs[run % 2], run);
	}
	AWAIT(rig, !rig->in_flight && rig->arrival_count == runs);
	pair_close(rig, &earlier.pairs[0]);
	pair_close(rig, &earlier.pairs[1]);
	rig_close(rig);
}

/* ---- nobody polls where they arrive ---- */

/* Whether it was posted while only its own side is polled. */
static bool post_unpolled(struct rig *rig, const struct pair *pair, uint32_t imm)
{
	struct tfd_post post = post_write(pair, 0, 0, 0);

	post.has_imm = 1;
	post.imm = imm;
	for (int stuck = 0; stuck < STUCK_PASSES; stuck++) {
		int rc;

		if (rig_try(rig, pair->out.half, &post, &rc))
			return true;
		CHECK(rc == -EAGAIN);
		if (rig_poll(rig, rig->one_domain ? 0 : 1))
			stuck = 0;
	}
	return false; /* its sender is held up */
}

void case_imm_unpolled(void)
{
	struct rig *rig = rig_open();
	uint32_t depth = rig->sides[1].info.imm_depth, posted = 0;
	uint32_t count = depth ? depth : load(UNPOLLED);
	struct pair pairs[HALVES];
	uint32_t *next;
	uint64_t acknowledged;

	for (uint32_t i = 0; i < HALVES; i++) {
		const uint32_t imm = i;

		pair_open(rig, &pairs[i], 0);
		rig_write(rig, &pairs[i], 8, &imm);
	}
	rig->arrival_count = 0;
	while (posted < count && post_unpolled(rig, &pairs[posted % HALVES], posted))
		posted++;
	for (int stuck = 0; stuck < STUCK_PASSES && !rig->one_domain; stuck++)
		stuck = rig_poll(rig, 1) ? 0 : stuck;
	acknowledged = rig->sent - HALVES;
	outcome_remark("%u of %u were acknowledged before the far side polled", (uint32_t)acknowledged,
	               count);
	CHECK(rig->one_domain || !rig->arrival_count);
	AWAIT(rig, !rig->in_flight && rig->arrival_count == posted);
	next = calloc(posted + 1, sizeof(*next));
	CHECK(next);
	for (uint32_t i = 0; i < posted; i++) {
		CHECK(rig->arrivals[i].imm < posted && !next[rig->arrivals[i].imm]++);
		CHECK(owned_by(rig, &rig->arrivals[i], &pairs[rig->arrivals[i].imm % HALVES].in));
	}
	free(next);
	for (uint32_t i = 0; i < HALVES; i++)
		pair_close(rig, &pairs[i]);
	rig_close(rig);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Writes and reads. */
#include "cases.h"
#include "conformance.h"

#include <stdlib.h>
#include <sys/mman.h>

#define LARGEST_TRIED (64ull << 20)
#define FLOOD 10000
#define FLOOD_BYTES 256u
#define FLOOD_USED 200u
#define MANY_PARTS 64u
#define BESIDE 400

static const uint64_t lengths[] = { 0,      1,       2,           3,           7,      8,     9,      63,
                                    64,     65,      255,         256,         1023,   2047,  4095,   4096,
                                    4097,   8191,    16385,       65535,       65536,  65537, 262143, 262144,
                                    262145, 1048579, 4194304 + 1, 8388608 - 1, 8388608 };

#define LENGTHS (sizeof(lengths) / sizeof(lengths[0]))

/* ---- writes ---- */

/* SENT says that the bytes are there, at the very moment when it is told. */
static void sent_is_visible(struct rig *rig, const struct piece *piece)
{
	const struct pair *pair = rig->context;
	uint64_t offset = piece->post.remote_address - pair->to->key.address;

	if (!piece->post.read)
		CHECK(pattern_is(pair->to->memory + offset, piece->post.length, piece->number));
}

static void write_one(struct rig *rig, struct pair *pair, uint64_t length, uint32_t shift)
{
	struct tfd_post post = post_write(pair, 1 + shift, 64 + 3 * shift, length);
	uint8_t *target = pair->to->memory + 64 + 3 * shift;
	struct piece *piece;

	pattern_fill(pair->from->memory + 1 + shift, length, length + shift);
	memset(target - 64, GUARD, length + 128);
	post.traffic = shift % 3;
	post.job_bytes = length;
	piece = rig_post(rig, pair->out.half, &post);
	piece->number = length + shift; /* told by a poll at the earliest */
	AWAIT(rig, piece->state == PIECE_TOLD);
	piece_give(rig, piece);
	CHECK(all_are(target - 64, 64, GUARD) && all_are(target + length, 64, GUARD));
	CHECK(pattern_is(pair->from->memory + 1 + shift, length, length + shift));
}

void case_write_lengths(void)
{
	struct rig *rig = rig_open();
	struct pair pair;

	pair_open(rig, &pair, 0);
	rig->on_sent = sent_is_visible;
	rig->context = &pair;
	for (uint32_t i = 0; i < LENGTHS; i++) {
		if (lengths[i] > pair.from->info.max_message_bytes)
			continue;
		for (uint32_t shift = 0; shift < (lengths[i] > 1000000 ? 2 : 12); shift++)
			write_one(rig, &pair, lengths[i], shift);
	}
	CHECK(!rig->arrival_count);
	pair_close(rig, &pair);
	rig_close(rig);
}

struct large {
	uint8_t *memory; /* source and target */
	size_t bytes;
	struct tfd_mr *from, *to;
	struct tfd_region_key from_key, to_key;
};

static void large_open(struct rig *rig, struct large *large, uint64_t bytes)
{
	large->bytes = bytes + PAGE_BYTES;
	large->memory =
		mmap(NULL, 2 * large->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(large->memory != MAP_FAILED);
	CHECK_OK(rig->ops->mr_open(rig->sides[0].domain, large->memory, large->bytes, 0, &large->from,
	                           &large->from_key, &error));
	CHECK_OK(rig->ops->mr_open(rig->sides[1].domain, large->memory + large->bytes, large->bytes, 1,
	                           &large->to, &large->to_key, &error));
}

static void large_close(struct rig *rig, struct large *large)
{
	rig->ops->mr_close(rig->sides[0].domain, large->from);
	rig->ops->mr_close(rig->sides[1].domain, large->to);
	CHECK(munmap(large->memory, 2 * large->bytes) == 0);
}

void case_write_largest(void)
{
	struct rig *rig = rig_open();
	uint64_t most = rig->sides[0].info.max_message_bytes;
	struct tfd_post post = { .length = most };
	struct piece *piece;
	struct large large;
	struct pair pair;
	int rc;

	if (most > LARGEST_TRIED)
		outcome_skip("max_message_bytes is %llu; up to %llu is tried", (unsigned long long)most,
		             LARGEST_TRIED);
	pair_open(rig, &pair, 0);
	large_open(rig, &large, most);
	post.local = large.memory;
	post.mr = large.from;
	post.remote_key = large.to_key.key;
	post.remote_address = large.to_key.address;
	pattern_fill(large.memory, large.bytes, most);
	memset(large.memory + large.bytes, GUARD, large.bytes);
	CHECK(rig_run(rig, pair.out.half, &post, NULL) == 0);
	CHECK(pattern_is(large.memory + large.bytes, most, most));
	CHECK(all_are(large.memory + large.bytes + most, PAGE_BYTES, GUARD));
	rig->faults = true;
	post.length++;
	AWAIT(rig, (piece = rig_try(rig, pair.out.half, &post, &rc)) != NULL || rc != -EAGAIN);
	if (piece) { /* taken; then it may not be told as sent without being there */
		AWAIT(rig, !rig->in_flight);
		CHECK(rig->failed == 1 || pattern_is(large.memory + large.bytes, most + 1, most));
	}
	pair_close(rig, &pair);
	large_close(rig, &large);
	rig_close(rig);
}

void case_write_flood(void)
{
	uint32_t count = load(FLOOD), posted = 0, refusals = 0;
	struct rig *rig = rig_open();
	struct pair pairs[4];

	for (uint32_t i = 0; i < 4; i++)
		pair_open(rig, &pairs[i], 0);
	for (uint32_t i = 0; i < count; i++)
		pattern_fill(rig->sides[0].memory + i * FLOOD_BYTES, FLOOD_USED, i);
	rig->on_sent = sent_is_visible;
	rig->context = &pairs[0];
	while (posted < count) {
		struct pair *pair = &pairs[posted % 4];
		struct tfd_post post =
			post_write(pair, posted * FLOOD_BYTES, posted * FLOOD_BYTES, FLOOD_USED);
		struct piece *piece;
		int rc;

		post.has_imm = 1;
		post.imm = posted;
		post.traffic = posted / 4 % 3;
		piece = rig_try(rig, pair->out.half, &post, &rc);
		if (piece) {
			piece->number = posted++;
			continue;
		}
		CHECK(rc == -EAGAIN);
		refusals++;
		AWAIT(rig, rig_pass(rig) || !rig->in_flight);
	}
	AWAIT(rig, !rig->in_flight && rig->arrival_count == count);
	CHECK(rig->sent == count);
	for (uint32_t i = 0; i < count; i++)
		CHECK(pattern_is(rig->sides[1].memory + i * FLOOD_BYTES, FLOOD_USED, i));
	rig_settle(rig);
	CHECK(rig->arrival_count == count);
	outcome_remark("%u posts, %u times \"not now\"", count, refusals);
	for (uint32_t i = 0; i < 4; i++)
		pair_close(rig, &pairs[i]);
	rig_close(rig);
}

/* ---- many parts ---- */

#define PART_STEP 8192u

static uint64_t part_length(uint32_t part, uint32_t round)
{
	return 1 + mix(part * 131 + round) % 4000;
}

/* Everything of a post is there when its immediate is told. */
static void parts_are_there(struct rig *rig, const struct arrival *arrival)
{
	uint32_t parts = *(const uint32_t *)rig->context;

	for (uint32_t i = 0; i < parts; i++) {
		const uint8_t *target = rig->sides[1].memory + 64 + i * PART_STEP;
		uint64_t length = part_length(i, arrival->imm);

		CHECK(pattern_is(target, length, i + arrival->imm));
		CHECK(all_are(target - 64, 64, GUARD) && all_are(target + length, 64, GUARD));
	}
}

static void write_in_parts(struct rig *rig, const struct pair *pair, uint32_t count, uint32_t round)
{
	struct tfd_post_part parts[MANY_PARTS];
	struct tfd_post post = post_write(pair, 0, 64, part_length(0, round));
	uint32_t before = rig->arrival_count;

	memset(rig->sides[1].memory, GUARD, count * PART_STEP);
	for (uint32_t i = 0; i < count; i++) {
		uint8_t *local = rig->sides[0].memory + i * PART_STEP;

		pattern_fill(local, part_length(i, round), i + round);
		parts[i] = (struct tfd_post_part){ local, pair->to->key.address + 64 + i * PART_STEP,
		                                   part_length(i, round) };
	}
	post.parts = parts + 1;
	post.part_count = count - 1;
	post.has_imm = 1;
	post.imm = round;
	rig->context = &count;
	rig_send(rig, pair->out.half, &post);
	memset(parts, 0xff, sizeof(parts)); /* borrowed during the call only */
	AWAIT(rig, !rig->in_flight && rig->arrival_count == before + 1);
}

void case_write_parts(void)
{
	struct rig *rig = rig_open();
	uint32_t most = rig->sides[0].info.max_parts;
	struct pair pair;

	if (most <= 1)
		outcome_skip("max_parts is %u", most);
	pair_open(rig, &pair, 0);
	rig->on_imm = parts_are_there;
	for (uint32_t round = 0; round < 60; round++)
		write_in_parts(rig, &pair, 2 + round % ((most < MANY_PARTS ? most : MANY_PARTS) - 1), round);
	pair_close(rig, &pair);
	rig_close(rig);
}

/* ---- reads ---- */

static struct tfd_post post_read(const struct pair *pair, uint64_t to_offset, uint64_t from_offset,
                                 uint64_t length)
{
	struct tfd_post post = post_write(pair, to_offset, from_offset, length);

	post.read = 1;
	return post;
}

void case_read_lengths(void)
{
	struct rig *rig = rig_open();
	struct pair pair;

	pair_open(rig, &pair, 0);
	for (uint32_t i = 0; i < LENGTHS; i++) {
		struct tfd_post post = post_read(&pair, 64, 7 * i, lengths[i]);
		uint8_t *here = rig->sides[0].memory;

		if (lengths[i] > pair.from->info.max_message_bytes)
			continue;
		pattern_fill(rig->sides[1].memory + 7 * i, lengths[i], i);
		memset(here, GUARD, lengths[i] + 128);
		CHECK(rig_run(rig, pair.out.half, &post, NULL) == 0);
		CHECK(pattern_is(here + 64, lengths[i], i));
		CHECK(all_are(here, 64, GUARD) && all_are(here + 64 + lengths[i], 64, GUARD));
	}
	rig_settle(rig);
	CHECK(!rig->arrival_count); /* the far side is not told */
	pair_close(rig, &pair);
	rig_close(rig);
}

/* Writes land in the lower half of the far memory, reads come from the upper half. */
void case_read_beside_writes(void)
{
	const uint64_t upper = MEMORY_BYTES / 2;
	uint32_t count = load(BESIDE);
	struct rig *rig = rig_open();
	struct pair pair;
	uint64_t step = 8192;

	pair_open(rig, &pair, 0);
	for (uint32_t i = 0; i < count; i++) {
		pattern_fill(rig->sides[0].memory + i * step, 5000, i);
		pattern_fill(rig->sides[1].memory + upper + i * step, 3000, count + i);
	}
	for (uint32_t i = 0; i < count; i++) {
		struct tfd_post write = post_write(&pair, i * step, i * step, 5000);
		struct tfd_post read = post_read(&pair, upper + i * step, upper + i * step, 3000);

		write.has_imm = 1;
		write.imm = i;
		rig_send(rig, pair.out.half, i % 2 ? &write : &read);
		rig_send(rig, pair.out.half, i % 2 ? &read : &write);
	}
	AWAIT(rig, !rig->in_flight && rig->arrival_count == count);
	for (uint32_t i = 0; i < count; i++) {
		CHECK(rig->arrivals[i].imm < count);
		CHECK(pattern_is(rig->sides[1].memory + i * step, 5000, i));
		CHECK(pattern_is(rig->sides[0].memory + upper + i * step, 3000, count + i));
	}
	pair_close(rig, &pair);
	rig_close(rig);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What the far side refuses. Other halves of the same rails go on meanwhile. */
#include "cases.h"
#include "conformance.h"

#include <stdlib.h>

#define BESIDE 8u

struct bystander {
	struct pair pair;
	uint32_t count;
};

static void bystander_post(struct rig *rig, struct bystander *bystander)
{
	for (uint32_t i = 0; i < BESIDE; i++) {
		uint64_t offset = (1u << 20) + bystander->count % 256 * PAGE_BYTES;
		struct tfd_post post = post_write(&bystander->pair, offset, offset, PAGE_BYTES - 5);

		pattern_fill(rig->sides[0].memory + offset, PAGE_BYTES - 5, bystander->count);
		post.has_imm = 1;
		post.imm = bystander->count++;
		rig_send(rig, bystander->pair.out.half, &post);
	}
}

static void bystander_look(struct rig *rig, const struct bystander *bystander)
{
	AWAIT(rig, rig->arrival_count == bystander->count);
	for (uint32_t i = 0; i < bystander->count; i++) {
		CHECK(rig->arrivals[i].imm < bystander->count);
		CHECK(owned_by(rig, &rig->arrivals[i], &bystander->pair.in));
	}
	for (uint32_t i = bystander->count < 256 ? 0 : bystander->count - 256; i < bystander->count; i++)
		CHECK(pattern_is(rig->sides[1].memory + (1u << 20) + i % 256 * PAGE_BYTES, PAGE_BYTES - 5,
		                 i));
}

/*
 * Posts something that has to be refused, with an immediate if it is a write, by a connection of its own; what goes by others is
 * whole. What it must not change the caller looks at.
 */
static void refused(struct rig *rig, struct bystander *bystander, struct tfd_post post)
{
	uint64_t failed, told;
	struct piece *piece, *behind;
	struct pair pair;
	int rc;

	pair_open(rig, &pair, 0);
	post.has_imm = !post.read;
	post.imm = 0xdeadbeef;
	rig->faults = false;
	bystander_post(rig, bystander);
	rig->faults = true;
	failed = rig->failed;
	told = rig->refused;
	piece = rig_post(rig, pair.out.half, &post);
	post = post_write(&pair, 0, 512, 64); /* what comes behind it has an end, too */
	pattern_fill(rig->sides[0].memory, 64, 3);
	behind = rig_try(rig, pair.out.half, &post, &rc);
	bystander_post(rig, bystander);
	AWAIT(rig, piece->state == PIECE_TOLD);
	CHECK(piece->error);
	bystander_look(rig, bystander);
	half_end(rig, &pair.out);
	half_end(rig, &pair.in);
	CHECK(rig->failed - failed <= (behind ? 2 : 1) && rig->refused - told <= 1);
	piece_give(rig, piece);
	AWAIT(rig, !rig->in_flight);
	rig->faults = false;
	bystander_post(rig, bystander);
	bystander_look(rig, bystander);
}

static void remark(const struct rig *rig, uint32_t posts)
{
	CHECK(rig->refused == 0 || rig->refused == posts);
	outcome_remark("told as %s", rig->refused ? "refused by the far side" : "a broken connection");
}

static struct rig *open_with(struct bystander *bystander)
{
	struct rig *rig = rig_open();

	memset(bystander, 0, sizeof(*bystander));
	pair_open(rig, &bystander->pair, 0);
	memset(rig->sides[0].memory, GUARD, 8192);
	memset(rig->sides[1].memory, GUARD, 8192);
	return rig;
}

static void close_with(struct rig *rig, struct bystander *bystander)
{
	AWAIT(rig, !rig->in_flight);
	pair_close(rig, &bystander->pair);
	rig_close(rig);
}

void case_refuse_key(void)
{
	struct bystander bystander;
	struct rig *rig = open_with(&bystander);
	const uint64_t keys[] = { rig->sides[1].key.key ^ 1ull << 17, rig->sides[1].key.key + 1, 0,
	                          UINT64_MAX, rig->sides[1].key.key ^ 0x80 };
	uint32_t posts = 0;

	for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
		for (uint32_t read = 0; read < 2; read++) {
			struct tfd_post post = post_write(&bystander.pair, 4096, 4096, 64);

			post.remote_key = keys[i];
			post.read = read;
			refused(rig, &bystander, post);
			posts++;
			CHECK(all_are(rig->sides[1].memory + 4096, 4096, GUARD));
			CHECK(all_are(rig->sides[0].memory + 4096, 4096, GUARD));
		}
	}
	remark(rig, posts);
	close_with(rig, &bystander);
}

void case_refuse_bounds(void)
{
	struct bystander bystander;
	struct rig *rig = open_with(&bystander);
	const struct {
		uint64_t offset, length;
	} ranges[] = {
		{ MEMORY_BYTES - 63, 64 }, { MEMORY_BYTES, 1 },  { (uint64_t)-1, 2 },
		{ (uint64_t)-64, 64 },     { 1ull << 40, 4096 }, { MEMORY_BYTES / 2, 5000000 },
		{ 1ull << 63, 8 },
	};
	uint32_t posts = 0;

	for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
		for (uint32_t read = 0; read < 2; read++) {
			struct tfd_post post =
				post_write(&bystander.pair, 4096, ranges[i].offset, ranges[i].length);

			if (ranges[i].length > rig->sides[0].info.max_message_bytes)
				continue;
			post.read = read;
			refused(rig, &bystander, post);
			posts++;
			rig_guards(rig);
			CHECK(!read || all_are(rig->sides[0].memory + 4096, 4096, GUARD));
		}
	}
	remark(rig, posts);
	close_with(rig, &bystander);
}

void case_refuse_right(void)
{
	struct bystander bystander;
	struct rig *rig = open_with(&bystander);
	struct side *far = &rig->sides[1];
	struct tfd_post post = post_write(&bystander.pair, 64, 0, 64);
	struct tfd_region_key key;
	struct tfd_mr *mr;

	CHECK_OK(rig->ops->mr_open(far->domain, far->memory + 4096, 4096, 0, &mr, &key, &error));
	pattern_fill(far->memory + 4096, 64, 5);
	post.remote_key = key.key;
	post.remote_address = key.address;
	post.read = 1;
	CHECK(rig_run(rig, bystander.pair.out.half, &post, NULL) == 0);
	CHECK(pattern_is(rig->sides[0].memory + 64, 64, 5));
	post.read = 0;
	memset(rig->sides[0].memory, 0, 4096);
	refused(rig, &bystander, post);
	CHECK(pattern_is(far->memory + 4096, 64, 5));
	/* What may not be read may be written to. */
	rig->ops->mr_close(far->domain, mr);
	CHECK_OK(rig->ops->mr_open(far->domain, far->memory + 4096, 4096, TFD_MR_WRITABLE | TFD_MR_UNREADABLE,
	                           &mr, &key, &error));
	post.remote_key = key.key;
	post.remote_address = key.address;
	pattern_fill(rig->sides[0].memory + 64, 64, 7);
	CHECK(rig_run(rig, bystander.pair.out.half, &post, NULL) == 0);
	CHECK(pattern_is(far->memory + 4096, 64, 7));
	post.read = 1;
	memset(rig->sides[0].memory, 0, 4096);
	refused(rig, &bystander, post);
	CHECK(all_are(rig->sides[0].memory + 64, 64, 0));
	remark(rig, 2);
	/* And memory that is neither read nor written from afar can be sent from. */
	rig->ops->mr_close(far->domain, mr);
	CHECK_OK(rig->ops->mr_open(rig->sides[0].domain, rig->sides[0].memory, 4096, TFD_MR_UNREADABLE, &mr,
	                           &key, &error));
	post = post_write(&bystander.pair, 0, 0, 4096);
	post.mr = mr;
	pattern_fill(rig->sides[0].memory, 4096, 6);
	CHECK(rig_run(rig, bystander.pair.out.half, &post, NULL) == 0);
	CHECK(pattern_is(far->memory, 4096, 6));
	rig->ops->mr_close(rig->sides[0].domain, mr);
	close_with(rig, &bystander);
}

void case_refuse_closed(void)
{
	struct bystander bystander;
	struct rig *rig = open_with(&bystander);
	struct side *far = &rig->sides[1];
	struct tfd_post post = post_write(&bystander.pair, 64, 0, 64);
	struct tfd_region_key key;
	struct tfd_mr *mr;

	for (uint32_t read = 0; read < 2; read++) {
		CHECK_OK(rig->ops->mr_open(far->domain, far->memory + 4096, 4096, 1, &mr, &key, &error));
		post.remote_key = key.key;
		post.remote_address = key.address;
		post.read = 0;
		CHECK(rig_run(rig, bystander.pair.out.half, &post, NULL) == 0);
		rig->ops->mr_close(far->domain, mr);
		memset(far->memory + 4096, GUARD, 4096);
		memset(rig->sides[0].memory + 64, 0, 64);
		post.read = read;
		refused(rig, &bystander, post);
		CHECK(all_are(far->memory + 4096, 4096, GUARD));
		CHECK(!read || all_are(rig->sides[0].memory + 64, 64, 0));
	}
	remark(rig, 2);
	close_with(rig, &bystander);
}

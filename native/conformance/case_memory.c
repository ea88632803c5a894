/* SPDX-License-Identifier: Apache-2.0 */
/* Registered memory. */
#include "cases.h"
#include "conformance.h"

#include <stdlib.h>

#define KEYS 64
#define CYCLES 200

void case_memory_keys(void)
{
	struct rig *rig = rig_open();
	struct side *side = &rig->sides[1];
	struct tfd_mr *mrs[KEYS];
	struct tfd_region_key keys[KEYS + 1];
	uint32_t fds;

	keys[KEYS] = side->key;
	for (uint32_t i = 0; i < KEYS; i++) /* of the same bytes, every other one not writable */
		CHECK_OK(rig->ops->mr_open(side->domain, side->memory + (i / 2) * PAGE_BYTES, PAGE_BYTES,
		                           i % 2, &mrs[i], &keys[i], &error));
	for (uint32_t i = 0; i < KEYS; i++) {
		for (uint32_t k = i + 1; k <= KEYS; k++)
			CHECK(keys[i].key != keys[k].key);
	}
	for (uint32_t i = 0; i < KEYS; i++)
		rig->ops->mr_close(side->domain, mrs[(i * 7 + 3) % KEYS]);
	fds = count_fds();
	for (uint32_t i = 0; i < load(CYCLES); i++) {
		CHECK_OK(rig->ops->mr_open(side->domain, side->memory, 1 + i * 1000, i % 2, &mrs[0], &keys[0],
		                           &error));
		CHECK(keys[0].key != side->key.key);
		rig->ops->mr_close(side->domain, mrs[0]);
	}
	CHECK(count_fds() == fds);
	rig_close(rig);
}

/* Registers part of the far memory, writes it whole and its last byte, and looks at what is around. */
static void register_and_fill(struct rig *rig, const struct pair *pair, uint64_t offset, uint64_t length)
{
	struct tfd_post post = post_write(pair, 0, 0, length);
	uint8_t *target = pair->to->memory + offset;
	struct tfd_region_key key;
	struct tfd_mr *mr;

	memset(&error, 0, sizeof(error));
	CHECK_OK(rig->ops->mr_open(pair->to->domain, target, length, 1, &mr, &key, &error));
	memset(target - 1, GUARD, length + 2);
	pattern_fill(pair->from->memory, length, length);
	post.remote_key = key.key;
	post.remote_address = key.address;
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	CHECK(pattern_is(target, length, length));
	pair->from->memory[0] = 0x11;
	post = post_write(pair, 0, 0, 1);
	post.remote_key = key.key;
	post.remote_address = key.address + length - 1;
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	CHECK(target[length - 1] == 0x11);
	CHECK(target[-1] == GUARD && target[length] == GUARD);
	rig->ops->mr_close(pair->to->domain, mr);
}

static void odd_length(struct rig *rig, size_t length)
{
	struct tfd_region_key key;
	struct tfd_mr *mr = NULL;

	memset(&error, 0, sizeof(error));
	if (rig->ops->mr_open(rig->sides[1].domain, rig->sides[1].memory, length, 1, &mr, &key, &error) == 0)
		rig->ops->mr_close(rig->sides[1].domain, mr);
	else
		CHECK(error.text[0] && !mr);
}

void case_memory_lengths(void)
{
	static const uint64_t lengths[] = { 1, 2, 7, 8, 4095, 4096, 4097, 65535, 1000003 };
	struct rig *rig = rig_open();
	struct pair pair;

	pair_open(rig, &pair, 0);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		if (lengths[i] > pair.from->info.max_message_bytes)
			continue;
		register_and_fill(rig, &pair, PAGE_BYTES, lengths[i]);
		register_and_fill(rig, &pair, PAGE_BYTES + 1 + i, lengths[i]);
	}
	/* Nothing can be written there: refused, or of no use. */
	odd_length(rig, 0);
	odd_length(rig, (size_t)1 << 46);
	odd_length(rig, (size_t)1 << 62);
	odd_length(rig, SIZE_MAX);
	rig_write(rig, &pair, 4096, NULL);
	pair_close(rig, &pair);
	rig_close(rig);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What halves have of the staging pool: runs of their own, as large as there is room for, and clean. */
#include <stdbool.h>

#include "core_fixture.h"
#include "providers/staged/staged.h"

#define HALVES_MAX 512u

static struct tfd_domain *rail;
static struct tfd_stages *stages;
static struct tfd_half *halves[HALVES_MAX];
static uint32_t half_count;

static int half_add(bool outgoing)
{
	uint8_t address[TFD_ADDRESS_MAX];
	size_t bytes;
	struct tfd_half *half = NULL;
	int rc = tfd_staged_ops.half_open(rail, outgoing, &half, &half, address, &bytes, &error);

	if (!rc)
		halves[half_count++] = half;
	return rc;
}

static void half_drop(uint32_t at)
{
	tfd_staged_ops.half_close(halves[at]);
	tfd_staged_ops.half_free(halves[at]);
	halves[at] = halves[--half_count];
}

static void world_open(uint64_t bytes)
{
	struct tfd_group_options options = { .rail_count = 1, .staging_bytes = bytes };
	struct tfd_rail_info info;

	(void)strcpy(options.fabric, "sim");
	CHECK_OK(tfd_staged_ops.domain_open(&options, "one", &info, &rail, &error));
	stages = tfd_staged_stages(rail);
	half_count = 0;
}

static void world_close(void)
{
	while (half_count)
		half_drop(half_count - 1);
	CHECK(!stages->held);
	for (uint32_t i = 0; i < stages->slot_count; i++)
		CHECK(!stages->slots[i].half && !stages->slots[i].left);
	tfd_staged_ops.domain_close(rail);
}

/* No slot is of two, none is of what is kept for sending, and none is unaccounted for. */
static void runs_are_whole(void)
{
	uint32_t held = 0;

	for (uint32_t i = 0; i < half_count; i++) {
		CHECK(halves[i]->run_count &&
		      halves[i]->run + halves[i]->run_count <= stages->slots + stages->run_count);
		for (uint32_t j = 0; j < halves[i]->run_count; j++)
			CHECK(halves[i]->run[j].half == halves[i]);
		held += halves[i]->run_count;
	}
	CHECK(held == stages->held && held <= stages->run_count);
}

/* Both halves of connections with so many peers, until there is no room. */
static uint32_t fill(void)
{
	uint32_t peers = 0;

	while (half_add(peers % 2 == 0) == 0 && half_add(peers % 2 == 1) == 0)
		peers++;
	CHECK(half_add(true) == -ENOSPC && strstr(error.text, "gpu.staging_bytes"));
	runs_are_whole();
	return peers;
}

static void test_as_many_as_there_is_room_for(void)
{
	uint32_t peers;

	world_open(64u << 20);
	peers = fill();
	printf("64 MiB: %u slots, the first halves have %u and %u, room for %u peers\n", stages->slot_count,
	       halves[1]->in_count, halves[0]->run_count - 1, peers);
	CHECK(halves[0]->in_count == 1 && halves[0]->run_count > 4 && halves[1]->in_count > 8);
	CHECK(peers >= 36);
	/* There is something to send from all the same, and each has some of its own. */
	CHECK(!tfd_list_empty(&stages->free) && !tfd_list_empty(&halves[half_count - 1]->own));
	/* Whoever comes back finds room. */
	for (uint32_t i = 0; i < 20; i++) {
		half_drop(0);
		half_drop(0);
	}
	CHECK(fill() >= 20);
	world_close();
	world_open(8 * TFD_STAGES_SLOT_BYTES);
	CHECK(fill() >= 2);
	world_close();
}

static uint32_t random_next(void)
{
	static uint64_t state = 4711;

	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(state >> 33);
}

static void test_they_come_and_go(void)
{
	uint32_t refused = 0;

	world_open(32u << 20);
	for (uint32_t i = 0; i < 3000; i++) {
		if (half_count && random_next() % 100 < 45)
			half_drop(random_next() % half_count);
		else
			refused += half_add(random_next() % 2 == 0) == -ENOSPC;
		runs_are_whole();
	}
	CHECK(refused);
	world_close();
}

/* Nothing of one peer's is there for the next. */
static void test_slots_are_clean(void)
{
	world_open(8 * TFD_STAGES_SLOT_BYTES);
	for (uint32_t round = 0; round < 3; round++) {
		CHECK_OK(half_add(round % 2 == 0));
		for (uint64_t i = 0; i < halves[0]->run_count * TFD_STAGES_SLOT_BYTES; i++)
			CHECK(!stages->pool[halves[0]->run->offset + i]);
		memset(stages->pool, 0x5a, stages->pool_bytes);
		half_drop(0);
	}
	world_close();
}

/* A slot of a half that is gone, which a helper copies from or to, is nobody's meanwhile. */
static void test_a_slot_in_use_is_not_given_away(void)
{
	struct tfd_stage_slot *slot;
	uint32_t peers;

	world_open(8 * TFD_STAGES_SLOT_BYTES);
	CHECK_OK(half_add(true));
	slot = tfd_stage_slot_take(stages, halves[0], true);
	CHECK(slot && !tfd_stage_slot_take(stages, halves[0], true));
	slot->copies = 1;
	half_drop(0);
	CHECK(slot->left);
	while (half_add(false) == 0)
		continue;
	peers = half_count;
	CHECK(stages->held == stages->run_count - 1);
	CHECK(!slot->half);
	slot->copies = 0;
	tfd_stage_slot_posted(stages, slot); /* as its last copy's end does */
	CHECK_OK(half_add(false));
	CHECK(halves[peers]->run == slot);
	world_close();
}

int main(void)
{
	test_as_many_as_there_is_room_for();
	test_they_come_and_go();
	test_slots_are_clean();
	test_a_slot_in_use_is_not_given_away();
	return 0;
}

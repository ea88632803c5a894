/* SPDX-License-Identifier: Apache-2.0 */
/* Which memory is open where, as the staged rails of a group keep it: who is told, and that nothing of what is forgotten stays. */
#include "core_fixture.h"
#include "providers/staged/staged.h"

#define NUMBER 7u

static uint32_t needed;

static void tell(void *context, uint32_t event, uint64_t id)
{
	(void)context;
	CHECK(event == TFD_EVENT_STAGE_NEEDED && id == NUMBER);
	needed++;
}

static uint32_t known(const struct tfd_stages *stages)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < TFD_STAGES_MEMORY_BUCKETS; i++) {
		const struct tfd_list *bucket = &stages->memories[i];

		for (const struct tfd_list *link = bucket->next; link != bucket; link = link->next)
			count++;
	}
	return count;
}

int main(void)
{
	const struct tfd_stage_copy copy = { .memory = NUMBER, .bytes = 8, .rows = 1 };
	struct tfd_half half = { 0 };
	struct tfd_stages *stages;
	struct tfd_stage_slot *slot;

	CHECK_OK(tfd_stages_open(4u << 20, &stages, &error));
	stages->tell = tell;
	tfd_list_init(&half.slots);
	tfd_list_init(&half.own);
	slot = tfd_stage_slot_take(stages, &half, false);
	for (int i = 0; i < 3; i++) { /* control is asked once */
		CHECK(tfd_stages_copy(stages, TFD_STAGE_D2H, slot, &copy, 1, i > 0) == -EBUSY && needed == 1);
		CHECK(tfd_stages_ask(stages, NUMBER, i > 0) == -EBUSY && needed == 1);
	}
	CHECK_OK(tfd_stage_memory_tell(stages, NUMBER, NULL));
	for (int i = 0; i < 3; i++) /* whoever waits is told, however many those are */
		CHECK(tfd_stages_copy(stages, TFD_STAGE_D2H, slot, &copy, 1, true) == -EIO && needed == 1);
	/* However late: who has not waited asks anew. */
	CHECK(tfd_stages_copy(stages, TFD_STAGE_D2H, slot, &copy, 1, false) == -EBUSY && needed == 2);
	CHECK(tfd_stages_ask(stages, NUMBER, true) == -EBUSY && needed == 2);
	tfd_stage_memory_drop(stages, NUMBER);
	CHECK(known(stages) == 0);
	CHECK_OK(tfd_stage_memory_tell(stages, NUMBER, NULL)); /* it was being opened */
	CHECK(known(stages) == 0);
	tfd_stage_slot_put(stages, slot);
	tfd_stages_close(stages);
	return 0;
}

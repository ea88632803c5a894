/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A far side that is authenticated and wrong: it speaks to a staged rail by the rail below, with headers, parts and immediates of its own
 * making. Nothing may land where its keys do not lead, no half but its own may suffer, and nothing may crash.
 */
#include <stdbool.h>

#include "core_fixture.h"
#include "providers/staged/staged.h"

#define BYTES 65536u
#define GUARD 0xd1

/* The honest side: a staged rail over sim. */
static struct tfd_domain *rail;
static struct tfd_rail_info info;
static uint8_t *memory; /* a guard before and behind it */
static struct tfd_mr *mr;
static struct tfd_region_key key;
static struct tfd_half *half;
static int owner;
static struct tfd_staged_address there; /* what the honest half says of itself */

/* The wrong one: the rail below alone. */
static struct tfd_domain *raw;
static struct tfd_rail_info raw_info;
static uint8_t *slot; /* its slots, all it has */
static struct tfd_mr *raw_mr;
static struct tfd_region_key raw_key;
static struct tfd_half *raw_half;
static uint64_t next_number;

static uint32_t imms, errors, answers;
static uint32_t last_answer, last_imm;

static void pass(void)
{
	struct tfd_wc wc[16];
	int count = tfd_staged_ops.poll(rail, wc, 16);

	for (int i = 0; i < count; i++) {
		imms += wc[i].type == TFD_WC_IMM;
		last_imm = wc[i].type == TFD_WC_IMM ? wc[i].imm : last_imm;
		errors += wc[i].type == TFD_WC_ERROR;
		CHECK(wc[i].owner == &owner);
	}
	count = tfd_sim_ops.poll(raw, wc, 16);
	for (int i = 0; i < count; i++) {
		if (wc[i].type != TFD_WC_IMM)
			continue;
		answers++;
		last_answer = wc[i].imm;
	}
}

static void settle(void)
{
	for (int i = 0; i < 20; i++)
		pass();
}

static void halves_open(void)
{
	uint8_t address[TFD_ADDRESS_MAX], raw_address[TFD_ADDRESS_MAX];
	size_t bytes, raw_bytes;
	struct tfd_staged_address here = { .magic = TFD_STAGED_MAGIC,
	                                   .number = 5,
	                                   .token = 77,
	                                   .key = raw_key.key,
	                                   .base = raw_key.address,
	                                   .slot_bytes = TFD_STAGES_SLOT_BYTES,
	                                   .payload_kib = TFD_STAGES_PAYLOAD_BYTES >> 10,
	                                   .count = 1 };

	CHECK_OK(tfd_staged_ops.half_open(rail, 0, &owner, &half, address, &bytes, &error));
	CHECK_OK(tfd_sim_ops.half_open(raw, 1, &raw_half, &raw_half, raw_address, &raw_bytes, &error));
	memcpy(&there, address + bytes - sizeof(there), sizeof(there));
	memcpy(raw_address + raw_bytes, &here, sizeof(here));
	CHECK_OK(tfd_staged_ops.half_start(half, raw_address, raw_bytes + sizeof(here), &error));
	CHECK_OK(tfd_sim_ops.half_start(raw_half, address, bytes - sizeof(there), &error));
	next_number = 0;
	imms = errors = answers = 0;
}

static void halves_close(void)
{
	struct tfd_wc wc[16];

	tfd_staged_ops.half_close(half);
	while (tfd_staged_ops.half_drain(half, wc, 16) > 0)
		continue;
	tfd_staged_ops.half_free(half);
	tfd_sim_ops.half_close(raw_half);
	while (tfd_sim_ops.half_drain(raw_half, wc, 16) > 0)
		continue;
	tfd_sim_ops.half_free(raw_half);
	settle();
}

static void world_open(void)
{
	struct tfd_group_options options = { .rail_count = 1, .staging_bytes = 32u << 20 };

	(void)strcpy(options.fabric, "sim");
	CHECK_OK(tfd_staged_ops.domain_open(&options, "honest", &info, &rail, &error));
	options.fabric[0] = '\0';
	CHECK_OK(tfd_sim_ops.domain_open(&options, "wrong", &raw_info, &raw, &error));
	memory = malloc(3 * BYTES);
	slot = calloc(1, TFD_STAGES_SLOT_BYTES);
	CHECK(memory && slot);
	memset(memory, GUARD, 3 * BYTES);
	CHECK_OK(tfd_staged_ops.mr_open(rail, memory + BYTES, BYTES, 1, &mr, &key, &error));
	CHECK_OK(tfd_sim_ops.mr_open(raw, slot, TFD_STAGES_SLOT_BYTES, 1, &raw_mr, &raw_key, &error));
	halves_open();
}

static void world_close(void)
{
	halves_close();
	tfd_staged_ops.mr_close(rail, mr);
	tfd_sim_ops.mr_close(raw, raw_mr);
	tfd_staged_ops.domain_close(rail);
	tfd_sim_ops.domain_close(raw);
	free(memory);
	free(slot);
}

static void untouched(void)
{
	for (uint32_t i = 0; i < 3 * BYTES; i++)
		CHECK(memory[i] == GUARD);
}

static struct tfd_staged_header good_header(uint64_t length)
{
	return (struct tfd_staged_header){ .token = there.token,
	                                   .number = next_number,
	                                   .key = key.key,
	                                   .length = length,
	                                   .imm = 99,
	                                   .flags = TFD_STAGED_HAS_IMM };
}

static void send_imm(uint32_t imm)
{
	static struct tfd_wr wr;
	struct tfd_post post = { .has_imm = 1, .imm = imm };

	CHECK_OK(tfd_sim_ops.post(raw_half, &post, &wr));
	settle();
}

/* The head of the slot as it is, into the slot of that post, and its immediate. */
static void send_slot(uint64_t number)
{
	static struct tfd_wr wr;
	uint32_t index = (uint32_t)(number % there.count);
	struct tfd_post post = { .local = slot,
	                         .mr = raw_mr,
	                         .length = 16384,
	                         .remote_address = there.base + index * (uint64_t)there.slot_bytes,
	                         .remote_key = there.key,
	                         .has_imm = 1,
	                         .imm = tfd_staged_imm(TFD_STAGED_POST, index, there.token, there.number) };

	CHECK_OK(tfd_sim_ops.post(raw_half, &post, &wr));
	settle();
}

static void send_header(struct tfd_staged_header header)
{
	memcpy(slot, &header, sizeof(header));
	send_slot(next_number);
}

static uint32_t answered_with(void)
{
	return (last_answer >> 29) - TFD_STAGED_ENDED;
}

/* So that what is refused below is refused for what it says. */
static void test_the_good_one_lands(void)
{
	world_open();
	memset(slot, 0x31, 16384);
	send_header(good_header(4096));
	CHECK(imms == 1 && last_imm == 99 && answers == 1 && answered_with() == TFD_STAGED_OK);
	for (uint32_t i = 0; i < 4096; i++)
		CHECK(memory[BYTES + i] == 0x31);
	memset(memory + BYTES, GUARD, 4096);
	untouched();
	world_close();
}

static void breaks(struct tfd_staged_header header)
{
	send_header(header);
	CHECK(errors == 1 && !imms && !answers);
	untouched();
	halves_close();
	halves_open();
}

static void refused(struct tfd_staged_header header)
{
	send_header(header);
	CHECK(!imms && answers == 1 && answered_with() == TFD_STAGED_REFUSED);
	untouched();
	next_number++; /* and nothing lands behind it */
	header = good_header(64);
	send_header(header);
	CHECK(!imms && answers == 1);
	untouched();
	halves_close();
	halves_open();
}

static void test_headers(void)
{
	struct tfd_staged_header header;

	world_open();
	header = good_header(64);
	header.token ^= 1;
	breaks(header);
	header = good_header(64);
	header.number = 1;
	breaks(header);
	header = good_header(info.max_message_bytes + 1);
	breaks(header);
	header = good_header(64);
	header.part_count = TFD_STAGES_PARTS + 1;
	breaks(header);
	header = good_header(64);
	header.flags = TFD_STAGED_READ | TFD_STAGED_HAS_IMM;
	breaks(header);
	header = good_header(64);
	header.key ^= 1ull << 30;
	refused(header);
	header = good_header(64);
	header.address = BYTES - 63;
	refused(header);
	header = good_header(64);
	header.address = UINT64_MAX - 10;
	refused(header);
	header = good_header(64);
	header.flags = TFD_STAGED_READ;
	header.address = BYTES;
	refused(header);
	world_close();
}

static void test_parts(void)
{
	struct tfd_staged_part *parts;
	static const struct tfd_staged_part wrong[] = {
		{ 0, 0 },         { 0, 64 },         { 0, UINT64_MAX },
		{ BYTES - 1, 2 }, { UINT64_MAX, 1 }, { 1ull << 63, 3 },
	};

	world_open();
	parts = (void *)(slot + sizeof(struct tfd_staged_header));
	for (uint32_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
		struct tfd_staged_header header = good_header(64);

		header.part_count = 2;
		parts[0] = (struct tfd_staged_part){ 1000, 5 };
		parts[1] = wrong[i];
		refused(header);
	}
	world_close();
}

static void test_immediates(void)
{
	struct tfd_staged_header header;

	world_open();
	/* Of no half, with a wrong check, of another half: nobody's. */
	send_imm(tfd_staged_imm(TFD_STAGED_POST, 0, there.token, there.number + 1));
	send_imm(tfd_staged_imm(TFD_STAGED_POST, 0, ~there.token, there.number));
	send_imm(tfd_staged_imm(TFD_STAGED_ENDED, 0, ~there.token, there.number));
	CHECK(!errors && !imms && !answers);
	/* It has posted nothing. */
	send_imm(tfd_staged_imm(TFD_STAGED_ENDED, 0, there.token, there.number));
	CHECK(errors == 1);
	halves_close();
	halves_open();
	/* A slot that it has not. */
	send_imm(tfd_staged_imm(TFD_STAGED_POST, 15, there.token, there.number));
	CHECK(there.count < 16 && errors == 1);
	halves_close();
	halves_open();
	/* One out of its turn waits for it; and once more, before it was answered. */
	header = good_header(64);
	header.number = 1;
	memcpy(slot, &header, sizeof(header));
	send_slot(1);
	CHECK(!errors && !imms && !answers && there.count > 1);
	send_slot(1);
	CHECK(errors == 1 && !imms);
	untouched();
	world_close();
}

/* 0: it was done; else how it was refused. */
static int reach(uint64_t address, uint64_t length, bool read)
{
	static struct tfd_wr wr;
	struct tfd_post post = { .local = slot,
	                         .mr = raw_mr,
	                         .length = length,
	                         .remote_address = address,
	                         .remote_key = there.key,
	                         .read = read };
	struct tfd_wc wc[16];
	int count = 0;

	CHECK_OK(tfd_sim_ops.post(raw_half, &post, &wr));
	for (int i = 0; !count && i < 20; i++)
		count = tfd_sim_ops.poll(raw, wc, 16);
	CHECK(count == 1 && wc[0].wr == &wr);
	halves_close();
	halves_open();
	return wc[0].type == TFD_WC_SENT ? 0 : wc[0].error;
}

/* By what it was told it writes to the slots of its half, and reads nothing; other halves have the slots beside them. */
static void test_slots_of_others(void)
{
	uint8_t address[TFD_ADDRESS_MAX];
	struct tfd_half *beside[3];
	struct tfd_stages *stages;
	uint64_t length;
	size_t bytes;

	world_open();
	stages = tfd_staged_stages(rail);
	halves_close();
	CHECK_OK(tfd_staged_ops.half_open(rail, 0, &owner, &beside[0], address, &bytes, &error));
	halves_open();
	for (uint32_t i = 1; i < 3; i++)
		CHECK_OK(tfd_staged_ops.half_open(rail, i % 2, &owner, &beside[i], address, &bytes, &error));
	CHECK(beside[0]->run < half->run && half->run < beside[1]->run && beside[1]->run < beside[2]->run);
	length = there.count * (uint64_t)there.slot_bytes;
	memset(slot, 0x66, TFD_STAGES_SLOT_BYTES);
	CHECK(reach(there.base, 64, false) == 0 && reach(there.base + length - 64, 64, false) == 0);
	CHECK(reach(there.base - 1, 64, false) && reach(there.base - there.slot_bytes, 64, false));
	CHECK(reach(there.base + length - 63, 64, false) && reach(there.base + length, 1, false));
	memset(slot, 0x66, TFD_STAGES_SLOT_BYTES);
	CHECK(reach(there.base, 64, true));
	for (uint32_t i = 0; i < 64; i++)
		CHECK(slot[i] == 0x66);
	for (uint32_t i = 0; i < 3; i++) {
		for (uint32_t j = 0; j < beside[i]->run_count; j++)
			CHECK(!stages->pool[beside[i]->run[j].offset]);
		tfd_staged_ops.half_close(beside[i]);
		tfd_staged_ops.half_free(beside[i]);
	}
	world_close();
}

static uint64_t random_state = 12345;

static uint64_t random_next(void)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return random_state >> 20;
}

/* Good ones of which some bytes are not. */
static void test_random(void)
{
	uint32_t landed = 0, broken = 0;

	world_open();
	for (uint32_t i = 0; i < 20000; i++) {
		struct tfd_staged_header header = good_header(random_next() % 3000);

		header.part_count = (uint16_t)(random_next() % 3);
		for (uint32_t j = 0; j < 16384; j += 512)
			slot[j] = (uint8_t)random_next();
		for (uint32_t j = 0; j < 2; j++)
			((struct tfd_staged_part *)(void *)(slot + sizeof(header)))[j] =
				(struct tfd_staged_part){ random_next() % BYTES, 1 + random_next() % 400 };
		memcpy(slot, &header, sizeof(header));
		for (uint64_t flips = random_next() % 3; flips; flips--)
			slot[random_next() % 96] ^= (uint8_t)(1u << random_next() % 8);
		send_slot(next_number);
		next_number++;
		landed += imms;
		if (errors || (answers && answered_with() != TFD_STAGED_OK)) {
			broken++;
			halves_close();
			halves_open();
		}
		imms = answers = 0;
	}
	CHECK(landed > 1000 && broken > 1000);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(memory[i] == GUARD && memory[2 * BYTES + i] == GUARD);
	world_close();
}

int main(void)
{
	test_the_good_one_lands();
	test_headers();
	test_parts();
	test_immediates();
	test_slots_of_others();
	test_random();
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end of halves while a helper copies for them. The test is the worker, and the helper: it says when a copy has been done. Over local,
 * where both halves have one pool, one of them may end before the other.
 */
#include "core_fixture.h"
#include "providers/staged/staged.h"

#define BYTES 65536u
#define NUMBER 7u /* of the device's memory */
#define DEVICE_ADDRESS 0x700000000000ull /* nothing is mapped there */

static const struct tfd_provider_ops *const ops = &tfd_staged_ops;

static struct tfd_domain *rail;
static struct tfd_stages *stages;
static struct tfd_stage_helper *helper;
static uint8_t *host; /* two pages of BYTES: to be written from, and to */
static struct tfd_mr *host_mr, *device_mr;
static struct tfd_region_key host_key, device_key;
static uint32_t imms;

struct pair {
	struct tfd_half *out, *in;
	struct tfd_wr wr;
};

static void pass(void)
{
	struct tfd_wc wc[16];
	int count;

	for (int round = 0; round < 20; round++) {
		count = ops->poll(rail, wc, 16);
		for (int i = 0; i < count; i++)
			imms += wc[i].type == TFD_WC_IMM;
	}
}

static void pair_open(struct pair *pair)
{
	uint8_t out[TFD_ADDRESS_MAX], in[TFD_ADDRESS_MAX];
	size_t out_bytes, in_bytes;

	memset(pair, 0, sizeof(*pair));
	CHECK_OK(ops->half_open(rail, 1, pair, &pair->out, out, &out_bytes, &error));
	CHECK_OK(ops->half_open(rail, 0, pair, &pair->in, in, &in_bytes, &error));
	CHECK_OK(ops->half_start(pair->in, out, out_bytes, &error));
	CHECK_OK(ops->half_start(pair->out, in, in_bytes, &error));
}

static void drained(struct tfd_half *half)
{
	struct tfd_wc wc[16];

	while (ops->half_drain(half, wc, 16) > 0)
		continue;
	ops->half_free(half);
}

/* Of whom nobody copies. */
static void half_end(struct tfd_half **half)
{
	if (!*half)
		return;
	ops->half_close(*half);
	CHECK(ops->half_settle(*half) == 0);
	drained(*half);
	*half = NULL;
}

static void pair_end(struct pair *pair)
{
	half_end(&pair->out);
	half_end(&pair->in);
}

static void world_open(void)
{
	struct tfd_group_options options = { .rail_count = 1, .staging_bytes = 32u << 20 };
	const struct tfd_device_memory memory = { NUMBER, 0, BYTES, DEVICE_ADDRESS };
	struct tfd_rail_info info = { 0 };
	struct tfd_stage_fds fds;

	(void)strcpy(options.fabric, "local");
	CHECK_OK(ops->domain_open(&options, "one", &info, &rail, &error));
	stages = tfd_staged_stages(rail);
	CHECK_OK(tfd_stage_helper_make(stages, 1, &helper, &fds, &error));
	(void)close(fds.ring_fd);
	(void)close(fds.pool_fd);
	(void)close(fds.wake_fd);
	tfd_stage_helper_add(stages, helper);
	host = calloc(2, BYTES);
	CHECK(host);
	CHECK_OK(ops->mr_open(rail, host, 2 * BYTES, 1, &host_mr, &host_key, &error));
	CHECK_OK(ops->mr_open_device(rail, &memory, 1, &device_mr, &device_key, &error));
	CHECK_OK(tfd_stage_memory_tell(stages, NUMBER, helper));
	imms = 0;
}

static void world_close(void)
{
	ops->mr_close(rail, host_mr);
	ops->mr_close(rail, device_mr);
	ops->domain_close(rail);
	free(host);
}

/* Of BYTES of `value`, from the host's memory; to the device's, or the host's. */
static void post(struct pair *pair, uint8_t value, bool to_device)
{
	struct tfd_post write = { .local = host,
	                          .mr = host_mr,
	                          .length = BYTES,
	                          .remote_key = to_device ? device_key.key : host_key.key,
	                          .remote_address = to_device ? device_key.address : host_key.address + BYTES,
	                          .has_imm = 1 };

	memset(host, value, BYTES);
	CHECK_OK(ops->post(pair->out, &write, &pair->wr));
	pass();
}

static void read_device(struct pair *pair)
{
	struct tfd_post read = { .local = host,
	                         .mr = host_mr,
	                         .length = BYTES,
	                         .remote_key = device_key.key,
	                         .remote_address = device_key.address,
	                         .read = 1 };

	CHECK_OK(ops->post(pair->out, &read, &pair->wr));
	pass();
}

static uint64_t asked(uint32_t ring)
{
	return helper->shared->rings[ring].tail;
}

/* Where in the pool the helper is at work. */
static uint8_t *at_work(uint32_t ring)
{
	const struct tfd_stage_ring *shared = &helper->shared->rings[ring];

	CHECK(shared->tail == shared->done + 1);
	return stages->pool + shared->entries[shared->done % TFD_STAGE_ENTRIES].pool_offset;
}

static void helper_is_done(uint32_t ring)
{
	tfd_store_release(&helper->shared->rings[ring].done, asked(ring)); /* pairs with queue_poll */
	pass();
}

static bool all_are(const uint8_t *bytes, uint8_t value)
{
	for (uint32_t i = 0; i < BYTES; i++) {
		if (bytes[i] != value)
			return false;
	}
	return true;
}

static uint32_t slots_free(void)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < stages->slot_count; i++)
		count += !stages->slots[i].half && !stages->slots[i].left;
	return count;
}

/* A close is a fence only once it has settled: by what the helper does, or by its end. */
static void test_settles(void)
{
	for (uint32_t dies = 0; dies < 2; dies++) {
		struct pair pair;

		world_open();
		pair_open(&pair);
		post(&pair, 1, true);
		CHECK(asked(TFD_STAGE_H2D) == 1);
		ops->half_close(pair.in);
		for (int i = 0; i < 3; i++)
			CHECK(ops->half_settle(pair.in) == -EAGAIN);
		half_end(&pair.out); /* for which nobody copies */
		CHECK(ops->half_settle(pair.in) == -EAGAIN);
		if (dies) {
			tfd_stage_helper_remove(stages, helper);
			tfd_stage_helper_free(helper);
		} else {
			helper_is_done(TFD_STAGE_H2D);
		}
		CHECK(ops->half_settle(pair.in) == 0);
		drained(pair.in);
		CHECK(imms == 0 && slots_free() == stages->slot_count);
		world_close();
	}
}

/* The writer's half has ended, and its slot is copied from yet: nobody else gets that meanwhile. */
static void test_writer_ends(void)
{
	struct pair first, second;
	uint32_t before;

	world_open();
	pair_open(&first);
	pair_open(&second);
	post(&first, 1, true);
	CHECK(all_are(at_work(TFD_STAGE_H2D), 1));
	half_end(&first.out);
	post(&second, 2, false);
	CHECK(imms == 1 && all_are(host + BYTES, 2));
	CHECK(all_are(at_work(TFD_STAGE_H2D), 1));
	before = slots_free();
	helper_is_done(TFD_STAGE_H2D);
	CHECK(slots_free() == before + 1);
	pair_end(&first);
	pair_end(&second);
	CHECK(slots_free() == stages->slot_count);
	world_close();
}

/* The reader's half has ended, and its slot is copied into. */
static void test_reader_ends(void)
{
	struct pair first, second;

	world_open();
	pair_open(&first);
	pair_open(&second);
	read_device(&first);
	half_end(&first.out);
	memset(at_work(TFD_STAGE_D2H), 1, BYTES);
	post(&second, 2, false);
	CHECK(imms == 1 && all_are(host + BYTES, 2));
	CHECK(all_are(at_work(TFD_STAGE_D2H), 1));
	helper_is_done(TFD_STAGE_D2H);
	pair_end(&first);
	pair_end(&second);
	CHECK(slots_free() == stages->slot_count);
	world_close();
}

/* What has arrived waits for room in the helper's ring; by then its writer has ended, and another has the slot with its bytes. */
static void test_writer_ends_before(void)
{
	struct tfd_stage_queue *queue;
	struct pair first, second;

	world_open();
	pair_open(&first);
	pair_open(&second);
	queue = &helper->queues[TFD_STAGE_H2D];
	queue->told -= TFD_STAGE_ENTRIES;
	post(&first, 1, true);
	half_end(&first.out);
	post(&second, 2, false);
	queue->told += TFD_STAGE_ENTRIES;
	pass();
	CHECK(imms == 1 && asked(TFD_STAGE_H2D) == 0);
	pair_end(&first);
	pair_end(&second);
	CHECK(slots_free() == stages->slot_count);
	world_close();
}

int main(void)
{
	test_settles();
	test_writer_ends();
	test_reader_ends();
	test_writer_ends_before();
	return 0;
}

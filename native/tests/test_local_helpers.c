/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of the local provider that helpers make: their order, their bounds, their end; and copies past the caches. */
#include <poll.h>
#include <stdbool.h>

#include "core_fixture.h"
#include "providers/local/copy.h"
#include "providers/provider.h"

#define KIB 1024u
#define HELPERS 3u
#define SLOTS 64u
#define SLOT_BYTES (256u * KIB)
#define MEMORY_BYTES ((uint64_t)SLOTS * SLOT_BYTES)
#define PIECES 2000u

static const struct tfd_provider_ops *const ops = &tfd_local_ops;

struct bench {
	struct tfd_domain *domain;
	uint8_t *source, *target;
	struct tfd_mr *source_mr, *target_mr;
	struct tfd_region_key source_key, target_key;
	struct tfd_half *out, *in;
	int owner;
};

static void bench_open(struct bench *bench, uint32_t copy_threads)
{
	struct tfd_group_options options = { .provider = "local", .copy_threads = copy_threads };
	uint8_t out[TFD_ADDRESS_MAX], in[TFD_ADDRESS_MAX];
	struct tfd_rail_info info;
	size_t out_bytes, in_bytes;

	CHECK_OK(ops->domain_open(&options, "local", &info, &bench->domain, &error));
	bench->source = calloc(1, MEMORY_BYTES);
	bench->target = calloc(1, MEMORY_BYTES);
	CHECK(bench->source && bench->target);
	CHECK_OK(ops->mr_open(bench->domain, bench->source, MEMORY_BYTES, 1, &bench->source_mr,
	                      &bench->source_key, &error));
	CHECK_OK(ops->mr_open(bench->domain, bench->target, MEMORY_BYTES, 1, &bench->target_mr,
	                      &bench->target_key, &error));
	CHECK_OK(ops->half_open(bench->domain, 1, NULL, &bench->out, out, &out_bytes, &error));
	CHECK_OK(ops->half_open(bench->domain, 0, &bench->owner, &bench->in, in, &in_bytes, &error));
	CHECK_OK(ops->half_start(bench->in, out, out_bytes, &error));
	CHECK_OK(ops->half_start(bench->out, in, in_bytes, &error));
}

static void bench_close(struct bench *bench)
{
	struct tfd_half *const halves[] = { bench->in, bench->out };
	struct tfd_wc wc[16];

	for (int i = 0; i < 2; i++) {
		ops->half_close(halves[i]);
		while (ops->half_drain(halves[i], wc, 16))
			continue;
		ops->half_free(halves[i]);
	}
	ops->mr_close(bench->domain, bench->source_mr);
	ops->mr_close(bench->domain, bench->target_mr);
	ops->domain_close(bench->domain);
	free(bench->source);
	free(bench->target);
}

static struct tfd_post piece(const struct bench *bench, uint32_t slot, uint64_t length)
{
	return (struct tfd_post){ .local = bench->source + (uint64_t)slot * SLOT_BYTES,
	                          .mr = bench->source_mr,
	                          .length = length,
	                          .remote_address = bench->target_key.address + (uint64_t)slot * SLOT_BYTES,
	                          .remote_key = bench->target_key.key };
}

/* Also what is streamed, and what helpers have nothing to do with. */
static uint64_t length_of(uint32_t number)
{
	const uint64_t lengths[] = {
		SLOT_BYTES, 1, 128 * KIB, 0, 200 * KIB + 13, 128 * KIB - 1, 150 * KIB + 7
	};

	return lengths[number % (sizeof(lengths) / sizeof(lengths[0]))];
}

static uint8_t filling(uint32_t number)
{
	return (uint8_t)(number % 251 + 1);
}

static void check_slot(const struct bench *bench, uint32_t number)
{
	const uint8_t *slot = bench->target + (uint64_t)(number % SLOTS) * SLOT_BYTES;
	uint64_t length = length_of(number);

	for (uint64_t i = 0; i < length; i += i + 1 < length && length > 64 ? 61 : 1)
		CHECK(slot[i] == filling(number));
	CHECK(!length || slot[length - 1] == filling(number));
}

/* Whoever is told of an immediate finds the bytes; all come in the order of their posts, whoever copies them. */
static void test_order(uint32_t copy_threads)
{
	struct tfd_wr *wrs = calloc(PIECES, sizeof(*wrs));
	uint32_t posted = 0, told = 0, counted = 0, refusals = 0;
	struct bench bench;
	struct tfd_wc wc[7];

	CHECK(wrs);
	bench_open(&bench, copy_threads);
	while (told < PIECES) {
		int count;

		while (posted < PIECES && posted - told < SLOTS) {
			struct tfd_post post = piece(&bench, posted % SLOTS, length_of(posted));
			int rc;

			memset(bench.source + (uint64_t)(posted % SLOTS) * SLOT_BYTES, filling(posted),
			       post.length);
			post.has_imm = 1;
			post.imm = posted;
			post.job_bytes = posted % 2 ? 1ull << 40 : post.length;
			rc = ops->post(bench.out, &post, &wrs[posted]);
			CHECK(rc == 0 || rc == -EAGAIN);
			refusals += rc != 0;
			if (rc)
				break;
			posted++;
		}
		count = ops->poll(bench.domain, wc, 7);
		for (int i = 0; i < count; i++) {
			if (wc[i].type == TFD_WC_IMM) {
				CHECK(wc[i].imm == counted++ && wc[i].owner == &bench.owner);
				check_slot(&bench, wc[i].imm);
			} else {
				CHECK(wc[i].type == TFD_WC_SENT && wc[i].wr == &wrs[told++]);
				CHECK(told == counted);
			}
		}
	}
	CHECK(refusals && ops->arm(bench.domain) == 0);
	bench_close(&bench);
	free(wrs);
}

/* While all helpers have enough to do, what is short goes on; it is told of behind them. */
static void test_busy_helpers(void)
{
	struct tfd_wr wrs[256] = { 0 };
	struct bench bench;
	struct tfd_wc wc[8];
	uint32_t posted = 0, told = 0;
	bool full = false;

	bench_open(&bench, 1);
	for (uint32_t tries = 0; !full; tries++) {
		struct tfd_post post = piece(&bench, tries % SLOTS, SLOT_BYTES);

		CHECK(posted < 255);
		full = ops->post(bench.out, &post, &wrs[posted]) == -EAGAIN;
		posted += !full;
	}
	memset(bench.source, 0x77, 16);
	CHECK_OK(ops->post(bench.out,
	                   &(struct tfd_post){ .local = bench.source,
	                                       .mr = bench.source_mr,
	                                       .length = 16,
	                                       .remote_address = MEMORY_BYTES - 16,
	                                       .remote_key = bench.target_key.key },
	                   &wrs[posted++]));
	CHECK(bench.target[MEMORY_BYTES - 16] == 0x77);
	while (told < posted) {
		int count = ops->poll(bench.domain, wc, 8);

		for (int i = 0; i < count; i++)
			CHECK(wc[i].type == TFD_WC_SENT && wc[i].wr == &wrs[told++]);
	}
	bench_close(&bench);
}

/* Closing waits for what is being copied: from then on nothing changes, and all is told of. */
static void test_close_is_a_fence(void)
{
	for (uint32_t round = 0; round < 100; round++) {
		struct tfd_wr wrs[2 * HELPERS] = { 0 };
		struct tfd_wc wc[16];
		struct bench bench;
		uint32_t posted = 0, told = 0, counted = 0;
		int count;

		bench_open(&bench, HELPERS);
		memset(bench.source, 0x55, 2 * HELPERS * SLOT_BYTES);
		for (; posted < 2 * HELPERS; posted++) {
			struct tfd_post post = piece(&bench, posted, SLOT_BYTES);

			post.has_imm = 1;
			if (ops->post(bench.out, &post, &wrs[posted]))
				break;
		}
		ops->half_close(round % 2 ? bench.in : bench.out);
		CHECK(memcmp(bench.target, bench.source, (uint64_t)posted * SLOT_BYTES) == 0);
		memset(bench.source, 0x66, 2 * HELPERS * SLOT_BYTES);
		while ((count = ops->half_drain(round % 2 ? bench.in : bench.out, wc, 16)) > 0) {
			for (int i = 0; i < count; i++) {
				told += wc[i].type == TFD_WC_SENT;
				counted += wc[i].type == TFD_WC_IMM;
			}
		}
		CHECK(posted && told == posted && counted == posted);
		CHECK(bench.target[0] == 0x55 && bench.target[(uint64_t)posted * SLOT_BYTES - 1] == 0x55);
		bench_close(&bench);
	}
}

/* A worker that sleeps is woken by what its helpers have done. */
static void test_sleeping_worker(void)
{
	struct bench bench;
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;
	uint32_t slept = 0;

	bench_open(&bench, HELPERS);
	for (uint32_t round = 0; slept < 20; round++) {
		struct tfd_post post = piece(&bench, round % SLOTS, SLOT_BYTES);
		struct pollfd fd = { .fd = ops->wait_fd(bench.domain), .events = POLLIN };

		CHECK(round < 100000);
		CHECK_OK(ops->post(bench.out, &post, &wr));
		if (ops->arm(bench.domain) == 0) {
			CHECK(poll(&fd, 1, 60000) == 1);
			slept++;
		}
		while (!ops->poll(bench.domain, &wc, 1))
			continue;
		CHECK(wc.type == TFD_WC_SENT && wc.wr == &wr);
		/* A helper may be late; its word does not keep the worker awake. */
		CHECK(ops->arm(bench.domain) == 0);
		for (uint32_t late = 0; poll(&fd, 1, 0) == 1; late++) {
			CHECK(late < 2 && ops->poll(bench.domain, &wc, 1) == 0);
			CHECK(ops->arm(bench.domain) == 0);
		}
	}
	bench_close(&bench);
}

/* Both ranges may be one client's, and overlap. */
static void test_overlap(uint64_t length, uint64_t job_bytes)
{
	struct tfd_wr wr = { 0 };
	struct bench bench;
	struct tfd_post post;
	struct tfd_wc wc;

	bench_open(&bench, 1);
	for (uint64_t i = 0; i < length; i++)
		bench.source[i] = (uint8_t)(i * 131 >> 3);
	memcpy(bench.target, bench.source, length);
	post = piece(&bench, 0, length);
	post.remote_key = bench.source_key.key;
	post.remote_address = bench.source_key.address + 100;
	post.job_bytes = job_bytes;
	CHECK_OK(ops->post(bench.out, &post, &wr));
	while (!ops->poll(bench.domain, &wc, 1))
		continue;
	CHECK(wc.type == TFD_WC_SENT && memcmp(bench.source + 100, bench.target, length) == 0);
	bench_close(&bench);
}

/* Every alignment, lengths around those of a round, ranges that overlap either way; nothing beside them changes. */
static void test_streaming(void)
{
	enum { ROOM = 20000, MARGIN = 200 };
	static uint8_t source[ROOM], target[ROOM], wanted[ROOM];
	const uint64_t lengths[] = { 0, 1, 4095, 4096, 4097, 4223, 4224, 4255, 8191, 12345 };

	tfd_local_copy_init();
	for (uint32_t i = 0; i < ROOM; i++)
		source[i] = (uint8_t)(i * 2654435761u >> 13);
	for (uint32_t k = 0; k < sizeof(lengths) / sizeof(lengths[0]); k++) {
		for (uint32_t at = 0; at < 64; at++) {
			uint32_t from = (at * 7 + k) % 64;

			memset(target, 0xa5, ROOM);
			memset(wanted, 0xa5, ROOM);
			memcpy(wanted + MARGIN + at, source + from, lengths[k]);
			tfd_local_stream(target + MARGIN + at, source + from, lengths[k]);
			CHECK(memcmp(target, wanted, ROOM) == 0);
			/* In place, a little up and a little down. */
			memcpy(target, source, ROOM);
			memcpy(wanted, source, ROOM);
			memmove(wanted + MARGIN + at, wanted + MARGIN + 32, lengths[k]);
			tfd_local_stream(target + MARGIN + at, target + MARGIN + 32, lengths[k]);
			CHECK(memcmp(target, wanted, ROOM) == 0);
		}
	}
}

int main(void)
{
	test_streaming();
	test_overlap(8000, 0);
	test_overlap(200 * KIB, 0);
	test_overlap(200 * KIB, 1ull << 30);
	test_order(0);
	test_order(1);
	test_order(HELPERS);
	test_busy_helpers();
	test_close_is_a_fence();
	test_sleeping_worker();
	return 0;
}

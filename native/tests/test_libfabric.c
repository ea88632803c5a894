/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The libfabric provider by itself, two rails on loopback: writes, immediates and whose they are, reads, refusals, closing. With any
 * libfabric that dlopen finds:
 *
 *   FI_PROVIDER_PATH=/nonexistent LD_LIBRARY_PATH=<where a libfabric.so.1 is> build/native/gcc/tests/test_libfabric
 */
#include "providers/libfabric/domain.h"

#define BYTES (1u << 20)
#define PAIRS 3
#define ROUNDS 200000 /* of polling, with a pause in each; then a test gives up */

static const struct tfd_provider_ops *const ops = &tfd_libfabric_ops;
typedef struct tfd_fi_address pair_address;

#include "provider_pair.h"

static void side_open(struct side *side)
{
	struct tfd_group_options options = { .provider = "libfabric" };

	side_open_as(side, &options, "127.0.0.1");
}

struct seen {
	bool sent, imm_came;
	struct tfd_wc done, imm;
};

/* Polls both sides until the piece is back, and its immediate there if one is awaited. */
static struct seen await(const struct tfd_wr *wr, bool imm)
{
	struct seen seen = { 0 };

	for (int round = 0; round < ROUNDS && !(seen.sent && (!imm || seen.imm_came)); round++) {
		struct tfd_wc wc[16];
		int count = ops->poll(a.domain, wc, 16);

		for (int i = 0; i < count; i++) {
			CHECK(wc[i].type != TFD_WC_IMM && wc[i].wr == wr && !seen.sent);
			seen.sent = true;
			seen.done = wc[i];
		}
		count = ops->poll(b.domain, wc, 16);
		for (int i = 0; i < count; i++) {
			if (wc[i].type == TFD_WC_ERROR && !wc[i].wr)
				continue;
			CHECK(wc[i].type == TFD_WC_IMM && !seen.imm_came);
			seen.imm_came = true;
			seen.imm = wc[i];
		}
		if (!count)
			(void)usleep(20);
	}
	CHECK(seen.sent && seen.imm_came == imm);
	return seen;
}

static void post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_wc wc;
	int rc = -EAGAIN;

	for (int round = 0; round < ROUNDS && rc == -EAGAIN; round++) {
		rc = ops->post(half, post, wr);
		if (rc == -EAGAIN) {
			CHECK(ops->poll(a.domain, &wc, 1) == 0 && ops->poll(b.domain, &wc, 1) == 0);
			(void)usleep(20);
		}
	}
	CHECK_OK(rc);
}

static void write_imm(struct joined *pair, uint64_t length, uint32_t imm, void *owner)
{
	struct tfd_post write = piece(length);
	struct tfd_wr wr = { 0 };
	struct seen seen;

	for (uint64_t i = 0; i < length; i++)
		a.memory[i] = (uint8_t)(i * 31 + imm);
	write.has_imm = 1;
	write.imm = imm;
	post(pair->out, &write, &wr);
	seen = await(&wr, true);
	CHECK(seen.done.type == TFD_WC_SENT);
	CHECK(seen.imm.imm == imm && seen.imm.owner == owner);
	CHECK(memcmp(a.memory, b.memory, length) == 0);
}

/* Before 1.19 `tcp` cannot do it alone. */
static void test_choice(void)
{
	char fabric[TFD_NAME_MAX];
	unsigned major, minor;

	(void)printf("%s, %s\n", a.info.provider, a.info.protocol);
	CHECK(sscanf(a.info.provider, "libfabric %63s %u.%u", fabric, &major, &minor) == 3);
	CHECK(strcmp(fabric, major == 1 && minor < 19 ? "tcp;ofi_rxm" : "tcp") == 0);
	CHECK(strcmp(a.info.protocol, b.info.protocol) == 0 && a.info.ordered);
	CHECK(ops->wait_fd(a.domain) >= 0);
}

static void test_owners(struct joined *pairs)
{
	const uint64_t lengths[] = { 0, 1, 4096, BYTES };

	for (uint32_t i = 0; i < 40; i++)
		write_imm(&pairs[i % PAIRS], lengths[i / PAIRS % 4], 0xf0000000u + i,
		          &pairs[i % PAIRS].owner);
}

/* The far side of an outgoing half answers by it, before and after it was used, and among its writes. */
static void test_answers(struct joined *pairs)
{
	for (uint32_t i = 0; i < 40; i++) {
		struct joined *pair = &pairs[i % PAIRS];
		struct tfd_post answer = { .local = b.memory,
		                           .mr = b.mr,
		                           .length = 64 + i,
		                           .remote_address = a.key.address + 4096,
		                           .remote_key = a.key.key,
		                           .has_imm = 1,
		                           .imm = i };
		struct tfd_wr wr = { 0 };
		bool sent = false, came = false;

		memset(b.memory, (int)i + 1, 128);
		post(pair->in, &answer, &wr);
		for (int round = 0; round < ROUNDS && !(sent && came); round++) {
			struct tfd_wc wc;

			if (ops->poll(b.domain, &wc, 1)) {
				CHECK(wc.type == TFD_WC_SENT && wc.wr == &wr && !sent);
				sent = true;
			}
			if (ops->poll(a.domain, &wc, 1)) {
				CHECK(wc.type == TFD_WC_IMM && wc.imm == i && wc.owner == &pair->writer &&
				      !came);
				came = true;
			}
			if (!sent && !came)
				(void)usleep(20);
		}
		CHECK(sent && came && memcmp(a.memory + 4096, b.memory, 64 + i) == 0);
		if (i % 4 == 3)
			write_imm(pair, 4096, i, &pair->owner);
	}
}

static void test_write_without_imm(struct joined *pair)
{
	struct tfd_post write = piece(1000);
	struct tfd_wr wr = { 0 };

	memset(a.memory, 0x5a, 1000);
	post(pair->out, &write, &wr);
	CHECK(await(&wr, false).done.type == TFD_WC_SENT);
	CHECK(memcmp(a.memory, b.memory, 1000) == 0);
}

static void test_reads(struct joined *pair)
{
	const uint64_t lengths[] = { 1, 4096, 65537, BYTES - 7 };

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_post read = piece(lengths[i]);
		struct tfd_wr wr = { 0 };

		for (uint64_t k = 0; k < BYTES; k++)
			b.memory[k] = (uint8_t)(k * 7 + i);
		memset(a.memory, 0, BYTES);
		read.read = 1;
		read.remote_address += 7;
		post(pair->out, &read, &wr);
		CHECK(await(&wr, false).done.type == TFD_WC_SENT);
		CHECK(memcmp(a.memory, b.memory + 7, lengths[i]) == 0);
		CHECK(a.memory[lengths[i]] == 0);
	}
}

/* Memory that may not be written to can be read and sent from. */
static void test_read_only(struct joined *pair)
{
	struct tfd_wr wr = { 0 };
	struct tfd_post read = piece(64);
	uint8_t *memory = calloc(1, 4096);
	struct tfd_region_key key;
	struct tfd_mr *mr;

	CHECK(memory);
	memset(memory, 0x77, 4096);
	CHECK_OK(ops->mr_open(b.domain, memory, 4096, 0, &mr, &key, &error));
	read.read = 1;
	read.remote_key = key.key;
	read.remote_address = key.address;
	post(pair->out, &read, &wr);
	CHECK(await(&wr, false).done.type == TFD_WC_SENT);
	CHECK(a.memory[0] == 0x77 && a.memory[63] == 0x77);
	ops->mr_close(b.domain, mr);
	free(memory);
}

/* A wrong key is refused, and costs its own connection alone. */
static void test_bad_key(struct joined *good, int read)
{
	struct joined pair;
	struct tfd_post bad = piece(64);
	struct tfd_wr wr = { 0 };

	pair_open(&pair);
	bad.remote_key ^= 1ull << 17;
	bad.read = (uint32_t)read;
	memset(a.memory, 0xaa, 64);
	memset(b.memory, 0xbb, 64);
	post(pair.out, &bad, &wr);
	CHECK(await(&wr, false).done.type == TFD_WC_ERROR);
	CHECK(a.memory[0] == 0xaa && b.memory[0] == 0xbb);
	pair_close(&pair);
	write_imm(good, 4096, 5, &good->owner);
}

/* Immediates for a half that is gone belong to nobody, whoever's endpoint they reach. */
static void test_stale_link(void)
{
	struct joined gone, pair;
	uint32_t first;

	halves_open(&gone);
	halves_open(&pair);
	first = gone.in_address.link;
	pair_close(&gone);
	if (!first) { /* a queue for each half tells them apart */
		CHECK(!pair.in_address.link);
		pair_close(&pair);
		return;
	}
	CHECK(pair.in_address.link && pair.in_address.link != first);
	CHECK(pair.out_address.link && pair.out_address.link != pair.in_address.link);
	for (int i = 0; i < 3; i++) { /* of nobody now; of another in the same place of the table; none */
		const uint32_t links[] = { first, pair.in_address.link + TFD_FI_LINKS, 0 };

		pair.in_address.link = links[i];
		join(&pair);
		write_imm(&pair, 100, 9, NULL);
		pair_close(&pair);
		halves_open(&pair);
	}
	pair_close(&pair);
	for (int i = 0; i < 100; i++) { /* not again soon */
		halves_open(&pair);
		CHECK(pair.in_address.link && pair.in_address.link != first);
		pair_close(&pair);
	}
}

static void test_bad_addresses(void)
{
	struct tfd_fi_address address;
	struct joined pair;

	halves_open(&pair);
	address = pair.in_address;
	address.protocol[0] ^= 1;
	CHECK(ops->half_start(pair.out, &address, pair.in_bytes, &error) == -EPROTO);
	CHECK(ops->half_start(pair.out, &address, sizeof(address.protocol), &error) == -EPROTO);
	CHECK(ops->half_start(pair.out, &address, sizeof(address) + 1, &error) == -EPROTO);
	join(&pair);
	write_imm(&pair, 10, 3, &pair.owner);
	pair_close(&pair);
}

/* What had landed before the close is told by its drain, and by whom; afterwards nothing lands. */
static void test_close(struct joined *good)
{
	enum { WRITES = 8 };
	struct tfd_wr wrs[WRITES] = { 0 };
	struct joined pair;
	struct tfd_wc wc[16];
	uint32_t count;
	int back = 0;

	pair_open(&pair);
	write_imm(&pair, 10, 1, &pair.owner);
	for (uint32_t i = 0; i < WRITES; i++) {
		struct tfd_post write = piece(BYTES / WRITES);

		write.local = a.memory + i * (BYTES / WRITES);
		write.remote_address += i * (BYTES / WRITES);
		write.has_imm = 1;
		write.imm = i;
		memset(a.memory + i * (BYTES / WRITES), (int)i + 1, BYTES / WRITES);
		CHECK_OK(ops->post(pair.out, &write, &wrs[i]));
	}
	memset(b.memory, 0, BYTES);
	ops->half_close(pair.in);
	while ((count = (uint32_t)ops->half_drain(pair.in, wc, 16)) > 0) {
		for (uint32_t i = 0; i < count; i++) {
			if (wc[i].type == TFD_WC_IMM)
				CHECK(wc[i].owner == &pair.owner);
		}
	}
	ops->half_free(pair.in);
	pair.in = NULL;
	memset(b.memory, 0xcc, BYTES);
	for (int round = 0; round < ROUNDS && back < WRITES; round++) {
		count = (uint32_t)ops->poll(a.domain, wc, 16);
		back += (int)count;
		for (uint32_t i = 0; i < count; i++)
			CHECK(wc[i].wr >= wrs && wc[i].wr < wrs + WRITES);
		count = (uint32_t)ops->poll(b.domain, wc, 16);
		for (uint32_t i = 0; i < count; i++)
			CHECK(wc[i].type != TFD_WC_IMM);
		(void)usleep(20);
	}
	CHECK(back == WRITES);
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(b.memory[i] == 0xcc);
	pair_close(&pair);
	write_imm(good, 4096, 6, &good->owner);
}

int main(void)
{
	struct joined pairs[PAIRS];

	side_open(&a);
	side_open(&b);
	test_choice();
	for (int i = 0; i < PAIRS; i++) {
		pair_open(&pairs[i]);
	}
	test_answers(pairs);
	test_owners(pairs);
	test_answers(pairs);
	test_write_without_imm(&pairs[0]);
	test_reads(&pairs[1]);
	test_read_only(&pairs[1]);
	test_bad_key(&pairs[2], 0);
	test_bad_key(&pairs[2], 1);
	test_stale_link();
	test_bad_addresses();
	test_close(&pairs[0]);
	for (int i = 0; i < PAIRS; i++)
		pair_close(&pairs[i]);
	side_close(&a);
	side_close(&b);
	return 0;
}

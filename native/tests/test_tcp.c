/* SPDX-License-Identifier: Apache-2.0 */
/* The tcp provider by itself, two rails on loopback: writes of one and many parts, immediates and whose they are, reads, refusals, closing. */
#include "tcp_pair.h"

#define PAIRS 3

static uint64_t random_state = 42;

static uint32_t random_below(uint32_t bound)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)((random_state >> 33) % bound);
}

static void fill(uint8_t *memory, size_t bytes, uint32_t seed)
{
	for (size_t i = 0; i < bytes; i++)
		memory[i] = (uint8_t)((i * 2654435761u + seed) >> 11);
}

static void test_rail(void)
{
	struct tfd_group_options options = { .provider = "tcp" };
	struct tfd_domain *domain = NULL;
	struct tfd_rail_info info;

	CHECK(strcmp(a.info.provider, "tcp") == 0 && strcmp(a.info.protocol, "tcp/1") == 0);
	CHECK(a.info.ordered && a.info.max_parts > 1 && a.info.max_message_bytes >= 1u << 20);
	CHECK(ops->wait_fd(a.domain) >= 0 && ops->arm(a.domain) == 0);
	CHECK(a.key.key != b.key.key && a.key.key && b.key.key);
	CHECK(ops->domain_open(&options, "no-such-rail", &info, &domain, &error) == -ENODEV);
	CHECK(strstr(error.text, "no-such-rail"));
	CHECK(ops->domain_open(&options, "192.0.2.77", &info, &domain, &error) == -ENODEV && !domain);
	/* What it told as its address would mean the far side's own host there. */
	CHECK(ops->domain_open(&options, "0.0.0.0", &info, &domain, &error) == -EINVAL && !domain);
	CHECK(ops->domain_open(&options, "::", &info, &domain, &error) == -EINVAL && !domain);
	CHECK(strstr(error.text, "every address"));
	CHECK_OK(ops->domain_open(&options, "lo", &info, &domain, &error));
	ops->domain_close(domain);
	ops->domain_close(NULL);
}

static void test_six(void)
{
	struct joined pair;
	struct side four = a, other = b;

	side_open_at(&a, "::1");
	side_open_at(&b, "::1");
	pair_open(&pair);
	write_imm(&pair, 100000, 6);
	pair_close(&pair);
	side_close(&b);
	b = other; /* kinds do not mix */
	halves_open(&pair);
	CHECK(ops->half_start(pair.out, pair.in_address, pair.in_bytes, &error) == -EPROTO);
	pair_close(&pair);
	side_close(&a);
	a = four;
}

static void test_owners(struct joined *pairs)
{
	const uint64_t lengths[] = { 0, 1, 4096, 1u << 20 };

	for (uint32_t i = 0; i < 40; i++)
		write_imm(&pairs[i % PAIRS], lengths[i / PAIRS % 4], 0xf0000000u + i);
}

/* The far side of an outgoing half answers by it. */
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

		memset(b.memory, (int)i + 1, 128);
		told_clear();
		post_when_up(pair->in, &answer, &wr);
		await_told(1, 1);
		CHECK(b_told.wc[0].type == TFD_WC_SENT && b_told.wc[0].wr == &wr);
		CHECK(a_told.wc[0].type == TFD_WC_IMM && a_told.wc[0].imm == i &&
		      a_told.wc[0].owner == &pair->writer);
		CHECK(memcmp(a.memory + 4096, b.memory, 64 + i) == 0);
	}
}

static void test_write_without_imm(struct joined *pair)
{
	struct tfd_post write = piece(1000);
	struct tfd_wr wr = { 0 };

	told_clear();
	memset(a.memory, 0x5a, 1000);
	post_when_up(pair->out, &write, &wr);
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_SENT && memcmp(a.memory, b.memory, 1000) == 0);
}

/* ---- parts ---- */

#define SPAN 3000u /* a part's place on either side; it is shorter */

/* One write of `count` ranges, from places of a to other places of b. */
static void write_parts(struct joined *pair, uint32_t count, uint32_t longest, uint32_t imm)
{
	static struct tfd_post_part parts[TFD_TCP_PARTS_MAX];
	struct tfd_post write = { .mr = a.mr, .remote_key = b.key.key, .has_imm = 1, .imm = imm };
	uint64_t lengths[TFD_TCP_PARTS_MAX];
	struct tfd_wr wr = { 0 };

	fill(a.memory, BYTES, imm);
	memset(b.memory, 0xee, BYTES);
	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *local = a.memory + (size_t)((i * 7 + imm) % TFD_TCP_PARTS_MAX) * SPAN + i % 5;
		uint64_t remote = b.key.address + (uint64_t)(count - 1 - i) * SPAN + i % 3;

		lengths[i] = 1 + random_below(longest);
		if (i)
			parts[i - 1] = (struct tfd_post_part){ local, remote, lengths[i] };
		else {
			write.local = local;
			write.remote_address = remote;
			write.length = lengths[i];
		}
	}
	write.parts = parts;
	write.part_count = count - 1;
	told_clear();
	post_when_up(pair->out, &write, &wr);
	memset(parts, 0xff, sizeof(parts)); /* borrowed during the call only */
	await_told(1, 1);
	CHECK(a_told.wc[0].type == TFD_WC_SENT && b_told.wc[0].imm == imm);
	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *from = a.memory + (size_t)((i * 7 + imm) % TFD_TCP_PARTS_MAX) * SPAN + i % 5;
		const uint8_t *to = b.memory + (size_t)(count - 1 - i) * SPAN + i % 3;

		CHECK(memcmp(from, to, lengths[i]) == 0);
		CHECK(to[lengths[i]] == 0xee && (!(i % 3) || to[-1] == 0xee));
	}
}

static void test_parts(struct joined *pair)
{
	const uint32_t counts[] = { 2, 3, 17, 64, 511, TFD_TCP_PARTS_MAX };

	for (uint32_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		write_parts(pair, counts[i], 1, i);
		write_parts(pair, counts[i], 64, i + 100);
		write_parts(pair, counts[i], SPAN - 16, i + 200);
	}
	for (uint32_t i = 0; i < 40; i++) /* around the ends of the rings */
		write_parts(pair, 1 + random_below(TFD_TCP_PARTS_MAX), SPAN - 16, i + 300);
}

static void test_parts_refused(struct joined *good)
{
	struct tfd_post_part parts[TFD_TCP_PARTS_MAX];
	struct tfd_post write = piece(8);
	struct joined pair;
	struct tfd_wr wr = { 0 };

	for (uint32_t i = 0; i < TFD_TCP_PARTS_MAX; i++)
		parts[i] = (struct tfd_post_part){ a.memory, b.key.address, 1 };
	write.parts = parts;
	write.part_count = TFD_TCP_PARTS_MAX;
	CHECK(ops->post(good->out, &write, &wr) == -EMSGSIZE);
	write.part_count = 1;
	write.read = 1;
	CHECK(ops->post(good->out, &write, &wr) == -EINVAL);
	/* The last of many is a byte too long: none of them lands. */
	pair_open(&pair);
	write.read = 0;
	write.part_count = 300;
	parts[299] = (struct tfd_post_part){ a.memory, b.key.address + BYTES - 7, 8 };
	memset(a.memory, 0x11, 64);
	memset(b.memory, 0x22, 64);
	told_clear();
	post_when_up(pair.out, &write, &wr);
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_ERROR && a_told.wc[0].remote_access && a_told.wc[0].wr == &wr);
	for (uint32_t i = 0; i < 64; i++)
		CHECK(b.memory[i] == 0x22);
	CHECK(ops->post(pair.out, &write, &wr) == -ENOTCONN);
	pair_close(&pair);
	write_imm(good, 4096, 7);
}

/* ---- many at once, both ways ---- */

#define MANY 3000u

static void post_of(struct side *from, struct side *to, uint32_t i, struct tfd_post *post)
{
	uint32_t at = i % 1024 * 4096;

	*post = (struct tfd_post){ .local = from->memory + at,
	                           .mr = from->mr,
	                           .length = 1 + i * 37 % 2048,
	                           .remote_address = to->key.address + at + 2048,
	                           .remote_key = to->key.key,
	                           .has_imm = 1,
	                           .imm = i };
}

/* Each in the order of posting, each acknowledged, and the content right: writes are waited for where they meet their successors. */
static void test_many(struct joined *pair)
{
	static struct tfd_wr wrs[2][MANY];
	uint32_t posted[2] = { 0, 0 }, sent[2] = { 0, 0 }, imms[2] = { 0, 0 };
	struct tfd_half *halves[2] = { pair->out, pair->in };
	struct side *sides[2] = { &a, &b };

	fill(a.memory, BYTES, 1);
	fill(b.memory, BYTES, 2);
	for (uint32_t round = 0; sent[0] + sent[1] + imms[0] + imms[1] < 4 * MANY; round++) {
		struct tfd_wc wc[16];

		CHECK(round < ROUNDS);
		for (int s = 0; s < 2; s++) {
			struct tfd_post post;
			int count;

			while (posted[s] < MANY && posted[s] < imms[!s] + 1000) {
				post_of(sides[s], sides[!s], posted[s], &post);
				if (ops->post(halves[s], &post, &wrs[s][posted[s]]) == -EAGAIN)
					break;
				posted[s]++;
			}
			count = ops->poll(sides[s]->domain, wc, 16);
			for (int i = 0; i < count; i++) {
				if (wc[i].type == TFD_WC_SENT) {
					CHECK(wc[i].wr == &wrs[s][sent[s]++]);
					continue;
				}
				CHECK(wc[i].type == TFD_WC_IMM && wc[i].imm == imms[s]);
				post_of(sides[!s], sides[s], imms[s]++, &post);
				CHECK(memcmp(post.local, sides[s]->memory + post.remote_address,
				             post.length) == 0);
			}
		}
	}
}

/* Every pass tells at most as much as it is asked for; nothing is lost. */
static void test_small_polls(struct joined *pair)
{
	struct tfd_wr wrs[20] = { 0 };
	uint32_t sent = 0, imms = 0;
	struct tfd_wc wc;

	for (uint32_t i = 0; i < 20; i++) {
		struct tfd_post write = piece(i * 100);

		write.has_imm = 1;
		write.imm = i;
		post_when_up(pair->out, &write, &wrs[i]);
	}
	for (uint32_t round = 0; sent + imms < 40; round++) {
		CHECK(round < ROUNDS);
		if (ops->poll(a.domain, &wc, 1))
			CHECK(wc.type == TFD_WC_SENT && wc.wr == &wrs[sent++]);
		if (ops->poll(b.domain, &wc, 1))
			CHECK(wc.type == TFD_WC_IMM && wc.imm == imms++);
	}
}

/* ---- reads ---- */

static void test_reads(struct joined *pair)
{
	const uint64_t lengths[] = { 0, 1, 4096, 65537, BYTES - 7 };

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_post read = piece(lengths[i]);
		struct tfd_wr wr = { 0 };

		fill(b.memory, BYTES, (uint32_t)i);
		memset(a.memory, 0, BYTES);
		read.read = 1;
		read.remote_address += 7;
		told_clear();
		post_when_up(pair->out, &read, &wr);
		await_told(1, 0);
		CHECK(a_told.wc[0].type == TFD_WC_SENT && a_told.wc[0].wr == &wr);
		CHECK(memcmp(a.memory, b.memory + 7, lengths[i]) == 0 && a.memory[lengths[i]] == 0);
	}
}

/* More than may be under way, from both ends at once, among writes. */
static void test_many_reads(struct joined *pair)
{
	enum { READS = 200, READ_BYTES = 16000 };
	static struct tfd_wr wrs[2][READS], written[READS];
	uint32_t posted[2] = { 0, 0 };

	fill(a.memory, BYTES, 11);
	fill(b.memory, BYTES, 12);
	told_clear();
	for (uint32_t round = 0; a_told.count < 2 * READS || b_told.count < READS; round++) {
		struct tfd_post from_b = { .local = a.memory + posted[0] % 100 * READ_BYTES,
		                           .mr = a.mr,
		                           .length = READ_BYTES,
		                           .remote_address =
		                                   b.key.address + BYTES / 2 + posted[0] % 100 * READ_BYTES,
		                           .remote_key = b.key.key,
		                           .read = 1 };
		struct tfd_post from_a = { .local = b.memory + posted[1] % 100 * READ_BYTES,
		                           .mr = b.mr,
		                           .length = READ_BYTES,
		                           .remote_address =
		                                   a.key.address + BYTES / 2 + posted[1] % 100 * READ_BYTES,
		                           .remote_key = a.key.key,
		                           .read = 1 };
		struct tfd_post write = piece(0);

		CHECK(round < ROUNDS);
		if (posted[0] < READS && ops->post(pair->out, &from_b, &wrs[0][posted[0]]) == 0)
			post_when_up(pair->out, &write, &written[posted[0]++]);
		if (posted[1] < READS && ops->post(pair->in, &from_a, &wrs[1][posted[1]]) == 0)
			posted[1]++;
		(void)both_poll();
	}
	CHECK(memcmp(a.memory, b.memory + BYTES / 2, 100 * READ_BYTES) == 0);
	CHECK(memcmp(b.memory, a.memory + BYTES / 2, 100 * READ_BYTES) == 0);
	for (uint32_t i = 0; i < a_told.count; i++)
		CHECK(a_told.wc[i].type == TFD_WC_SENT);
}

/* Memory that may not be written to can be read and sent from. */
static void test_read_only(struct joined *good)
{
	uint8_t *memory = calloc(1, 4096);
	struct tfd_post post = piece(64);
	struct tfd_wr wr = { 0 };
	struct tfd_region_key key;
	struct joined pair;
	struct tfd_mr *mr;

	CHECK(memory);
	memset(memory, 0x77, 4096);
	CHECK_OK(ops->mr_open(b.domain, memory, 4096, 0, &mr, &key, &error));
	post.remote_key = key.key;
	post.remote_address = key.address;
	post.read = 1;
	told_clear();
	post_when_up(good->out, &post, &wr);
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_SENT && a.memory[0] == 0x77 && a.memory[63] == 0x77);
	pair_open(&pair);
	post.read = 0;
	memset(a.memory, 1, 64);
	told_clear();
	post_when_up(pair.out, &post, &wr);
	await_told(1, 0);
	CHECK(a_told.wc[0].type == TFD_WC_ERROR && a_told.wc[0].remote_access && memory[0] == 0x77);
	ops->mr_close(b.domain, mr);
	pair_close(&pair);
	CHECK_OK(ops->mr_open(a.domain, memory, 4096, 0, &mr, &key, &error));
	post = (struct tfd_post){ .local = memory, .mr = mr, .length = 1, .read = 1 };
	CHECK(ops->post(good->out, &post, &wr) == -EACCES);
	ops->mr_close(a.domain, mr);
	free(memory);
}

/* ---- refusals ---- */

static void refused(struct joined *good, struct tfd_post bad)
{
	struct tfd_wr before = { 0 }, wr = { 0 }, after = { 0 };
	struct tfd_post fine = piece(64);
	struct joined pair;

	pair_open(&pair);
	fine.remote_address += 4096;
	memset(a.memory, 0xaa, 64);
	memset(b.memory, 0xbb, 64);
	told_clear();
	post_when_up(pair.out, &fine, &before);
	CHECK_OK(ops->post(pair.out, &bad, &wr));
	CHECK_OK(ops->post(pair.out, &fine, &after));
	await_told(3, 0);
	CHECK(b.memory[0] == 0xbb && b.memory[4096] == 0xaa);
	for (uint32_t i = 0; i < 3; i++) {
		const struct tfd_wc *wc = &a_told.wc[i];

		CHECK((wc->type == TFD_WC_SENT) == (wc->wr == &before));
		CHECK(wc->remote_access == (wc->wr == &wr));
	}
	pair_close(&pair);
	write_imm(good, 4096, 5);
}

/* A wrong key or range is refused, and costs its own connection alone. */
static void test_refusals(struct joined *good)
{
	uint8_t *memory = calloc(1, 4096);
	struct tfd_region_key key;
	struct tfd_mr *mr;

	CHECK(memory);
	for (uint32_t read = 0; read < 2; read++) {
		struct tfd_post bad = piece(64);

		bad.read = read;
		bad.remote_key ^= 1ull << 27;
		refused(good, bad);
		bad.remote_key = 0;
		refused(good, bad);
		bad = piece(64);
		bad.read = read;
		bad.remote_address = b.key.address + BYTES - 63;
		refused(good, bad);
		bad.remote_address = UINT64_MAX - 3;
		refused(good, bad);
		CHECK_OK(ops->mr_open(b.domain, memory, 4096, 1, &mr, &key, &error));
		ops->mr_close(b.domain, mr); /* its key is nobody's now, whoever gets its place */
		bad.remote_address = 0;
		bad.remote_key = key.key;
		refused(good, bad);
		CHECK_OK(ops->mr_open(b.domain, memory, 4096, 1, &mr, &key, &error));
		refused(good, bad);
		ops->mr_close(b.domain, mr);
	}
	free(memory);
}

int main(void)
{
	struct joined pairs[PAIRS];

	sides_open();
	test_rail();
	for (int i = 0; i < PAIRS; i++)
		pair_open(&pairs[i]);
	test_answers(pairs);
	test_owners(pairs);
	test_write_without_imm(&pairs[0]);
	test_parts(&pairs[0]);
	test_parts_refused(&pairs[1]);
	test_many(&pairs[2]);
	test_small_polls(&pairs[0]);
	test_reads(&pairs[1]);
	test_many_reads(&pairs[1]);
	test_read_only(&pairs[1]);
	test_refusals(&pairs[2]);
	test_answers(pairs);
	for (int i = 0; i < PAIRS; i++)
		pair_close(&pairs[i]);
	sides_close();
	sides_open();
	sides_close();
	sides_open();
	test_six();
	sides_close();
	return 0;
}

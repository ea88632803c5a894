/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes around and above what a provider takes as one piece: 1 GiB less and more one byte, and 9 GiB. The memory is a file without
 * pages; where bytes move, its regions are laid over few pages, but for the last ones.
 */
#include "sim_pair.h"

#define GIB (1ull << 30)
#define CHUNK (16ull << 20)
#define FILE_BYTES (9 * GIB + CHUNK)
#define UNTOUCHED 0x5a

struct far { /* one side's region */
	uint64_t region;
	uint8_t *base;
};

/* With `length`, the chunk in which it ends has pages of its own, all others share some. */
static struct far region_open(struct user *user, uint64_t length, uint32_t seed)
{
	struct tfd_region_options options = { .writable = 1, .length = FILE_BYTES };
	struct tfd_session *session = tfd_session_get(user->host->core, user->session);
	struct tfd_region *region;
	struct far far;
	int fd;

	options.fd = memfd_create("long", MFD_CLOEXEC);
	CHECK(options.fd >= 0 && ftruncate(options.fd, FILE_BYTES) == 0);
	CHECK_OK(tfd_region_add(user->host->core, user->session, &options, &far.region, &error));
	(void)close(options.fd);
	region = tfd_table_get(&session->regions, far.region);
	far.base = region->base;
	tfd_session_put(session);
	if (!length)
		return far;
	fd = memfd_create("shared", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, 2 * CHUNK) == 0);
	for (uint64_t at = 0; at < FILE_BYTES; at += CHUNK) {
		off_t from = at / CHUNK == length / CHUNK ? (off_t)CHUNK : 0;

		CHECK(mmap(far.base + at, CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, from) !=
		      MAP_FAILED);
	}
	(void)close(fd);
	for (uint64_t i = 0; i < CHUNK; i++) {
		far.base[i] = seed ? (uint8_t)(i * seed >> 13) : UNTOUCHED;
		far.base[length / CHUNK * CHUNK + i] = seed ? (uint8_t)(i * seed >> 11) : UNTOUCHED;
	}
	return far;
}

static uint64_t pieces(const struct sim_pair *pair)
{
	uint64_t count = 0;

	for (uint32_t i = 0; i < pair->paths; i++)
		count += pair->a.core->groups[0]->rails[i].info.writes_sent;
	return count;
}

static void check_tail(const struct far *from, const struct far *to, uint64_t length)
{
	uint64_t last = length / CHUNK * CHUNK;

	CHECK(memcmp(to->base, from->base, CHUNK) == 0);
	CHECK(memcmp(to->base + last, from->base + last, length - last) == 0);
	for (uint64_t i = length; i < last + CHUNK; i++)
		CHECK(to->base[i] == UNTOUCHED);
}

/* `expected`: pieces, those without bytes among them. */
static void test_length(uint32_t paths, const char *fabric, bool moves, uint64_t length, uint64_t expected)
{
	const struct tfd_group_options group = { .segment_bytes = 1u << 30, .window_bytes = UINT32_MAX };
	struct tfd_open_options options = { .rights = TFD_RIGHT_WRITE,
	                                    .length = FILE_BYTES,
	                                    .imm_count = 16 };
	struct tfd_region_key keys[PAIR_PATHS];
	const struct tfd_record *record;
	struct far from, to;
	struct sim_pair pair;
	uint64_t open;

	sim_pair_open(&pair, paths, fabric, group);
	from = region_open(&pair.from, moves ? length : 0, 2654435761u);
	to = region_open(&pair.to, moves ? length : 0, 0);
	sim_paths(&pair, &pair.to, &options);
	CHECK_OK(tfd_region_keys(pair.b.core, pair.to.session, to.region, keys, PAIR_PATHS));
	for (uint32_t i = 0; i < paths; i++) {
		options.paths[i].key = keys[i].key;
		options.paths[i].address = keys[i].address;
	}
	CHECK_OK(tfd_open_add(pair.a.core, pair.from.session, &options, &open));
	record = sim_run(&pair, &pair.from,
	                 (struct tfd_entry){ .op = TFD_OP_WRITE,
	                                     .src_region = from.region,
	                                     .dst_grant = open,
	                                     .length = length,
	                                     .imm = 1 });
	expect(record, TFD_JOB_OK, 0);
	sim_steps(&pair, 2);
	CHECK(record->bytes == length && pair.to.counters[1].value == 1);
	CHECK(pieces(&pair) == expected);
	if (moves)
		check_tail(&from, &to, length);
	sim_pair_close(&pair);
}

int main(void)
{
	test_length(1, "move=0", false, GIB - 1, 1);
#ifdef __SANITIZE_THREAD__ /* which finds nothing in one thread, and is slow with so many bytes */
	test_length(2, "move=0", false, GIB + 1, 2);
#else
	test_length(2, "", true, GIB + 1, 2);
#endif
	test_length(1, "move=0", false, GIB + 1, 2);
	test_length(1, "move=0", false, GIB, 1);
	test_length(1, "move=0,ordered=0", false, GIB + 1, 3); /* the count trails */
	test_length(1, "move=0", false, 9 * GIB, 9);
	test_length(1, "move=0", false, 9 * GIB + 1, 10);
	test_length(2, "move=0", false, 9 * GIB + 1, 10);
	test_length(4, "move=0,ordered=0", false, 9 * GIB, 16); /* three pieces and a count each */
	return 0;
}

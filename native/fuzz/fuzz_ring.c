/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzz target: a client that writes anything into its segment. Input: 8 bytes by which tail moves, then ring entries, then what
 * its arena has for tables. Its watchers move up and down meanwhile, and in the end have reached all that waits for them. The daemon must end the session or refuse the entries, and nothing is written outside of the grant; a crash, a
 * hang or a sanitizer report is a find.
 *
 *   clang -fsanitize=fuzzer,address … fuzz/fuzz_ring.c      coverage-guided
 *   make -C native fuzz                                     gcc: random inputs by a driver of its own
 */
#include <stdbool.h>

#include "tests/core_fixture.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static struct host host;
static struct user user, target;
static uint64_t out_conn, in_conn, grant;
static uint64_t device, device_grant; /* memory of a device, that nobody may touch */

#define ENTRIES 8u
#define TABLE_BYTES 4096u
#define GRANT_BYTES (REGION_BYTES / 2) /* what lies behind is not to change */
#define UNTOUCHED 0x5a

static void fresh_device(struct tfd_open_options *options)
{
	struct tfd_region_options region = {
		.fd = -1, .writable = 1, .length = REGION_BYTES, .address = 0x700000000000ull, .device = 1
	};

	CHECK_OK(tfd_region_add(host.core, user.session, &region, &device, &error));
	options->rights |= TFD_RIGHT_MAP;
	options->device = 1;
	options->paths[0].key = options->paths[0].address = 0;
	CHECK_OK(tfd_open_add(host.core, user.session, options, &device_grant));
}

static void fresh_user(void)
{
	struct tfd_open_options options = { .path_count = 1,
	                                    .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = GRANT_BYTES,
	                                    .imm_count = 16 };
	struct tfd_region_key key;

	user_open(&host, &user);
	CHECK_OK(tfd_region_keys(host.core, target.session, target.region, &key, 1));
	CHECK_OK(tfd_session_name_space(host.core, target.session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = out_conn, .key = key.key, .address = key.address };
	CHECK_OK(tfd_open_add(host.core, user.session, &options, &grant));
	fresh_device(&options);
}

static void check_untouched(void)
{
	for (uint32_t i = GRANT_BYTES; i < REGION_BYTES; i++)
		CHECK(target.memory[i] == UNTOUCHED);
}

static void start(void)
{
	uint32_t slots[16];

	host_open(&host);
	user_open(&host, &target);
	CHECK_OK(tfd_counters_add(host.core, target.session, 0, 16, slots));
	memset(target.memory, UNTOUCHED, REGION_BYTES);
	connect_hosts(&host, &host, &out_conn, &in_conn);
	fresh_user();
}

static void watchers_store(uint64_t value)
{
	uint64_t one = 1;

	for (uint32_t i = 0; i < user.header->watcher_count; i++)
		tfd_store_seq(&user.watchers[i].value, value);
	(void)!write(user.fds.doorbell_fd, &one, sizeof(one));
}

static bool found_broken(void)
{
	struct tfd_event event;

	while (tfd_core_events(host.core, &event, 1)) {
		if (event.type == TFD_EVENT_CONN_LOST)
			(void)fprintf(stderr, "connection lost, detail %u\n", event.detail);
		CHECK(event.type != TFD_EVENT_CONN_LOST);
		if (event.type == TFD_EVENT_SESSION_BROKEN && event.id == user.session)
			return true;
	}
	return false;
}

/* All that was armed starts, and ends; or the session was found broken, which is told after its ring has moved. */
static bool fire_all(void)
{
	struct tfd_session_info info;

	watchers_store(UINT64_MAX);
	for (int i = 0; i < 200000; i++) {
		CHECK_OK(tfd_session_stat(host.core, user.session, &info));
		if (!info.jobs_in_flight) {
			watchers_store(0);
			return true;
		}
		if (found_broken())
			return false;
		(void)usleep(50);
	}
	(void)fprintf(stderr, "%llu jobs do not end\n", (unsigned long long)info.jobs_in_flight);
	abort();
}

static uint8_t *arena(void)
{
	return user.segment + user.header->arena_offset;
}

/* True once the session was found broken; else everything was taken. Meanwhile the client goes on writing to its tables. */
static bool settled_broken(void)
{
	static uint32_t random = 1;

	for (int i = 0; i < 20000; i++) {
		for (int k = 0; k < 8; k++) {
			random = random * 1664525u + 1013904223u;
			((uint32_t *)(void *)arena())[random % (TABLE_BYTES / 4)] = random >> (random >> 28);
		}
		if (found_broken())
			return true;
		user.watchers[random % user.header->watcher_count].value = random >> (random >> 28);
		if (tfd_load_acquire(&user.ring->head) == user.ring->tail)
			return false;
		(void)usleep(50);
	}
	(void)fprintf(stderr, "the session neither moves nor ends\n");
	abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	uint64_t one = 1;
	uint64_t step;

	if (!host.core)
		start();
	if (bytes < sizeof(step))
		return 0;
	memcpy(&step, data, sizeof(step));
	data += sizeof(step);
	bytes -= sizeof(step);
	for (uint32_t i = 0; bytes && i < ENTRIES; i++) {
		size_t part = bytes < sizeof(struct tfd_entry) ? bytes : sizeof(struct tfd_entry);

		memcpy(&user.entries[(user.ring->tail + i) % 64], data, part);
		data += part;
		bytes -= part;
	}
	memcpy(arena(), data, bytes < TABLE_BYTES ? bytes : TABLE_BYTES);
	tfd_store_seq(&user.ring->tail, user.ring->tail + (uint32_t)(step % 4 ? step % 65 : step));
	(void)!write(user.fds.doorbell_fd, &one, sizeof(one));
	if (settled_broken() || !fire_all()) {
		user_close(&user);
		fresh_user();
	}
	return 0;
}

#ifdef TFD_FUZZ_DRIVER
static uint64_t state;

static uint32_t chance(uint32_t below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(state >> 33) % below;
}

/* A table of what the operation reads, some of it wrong. */
static void near_valid_table(uint8_t op, uint8_t *table)
{
	struct tfd_page *pages = (void *)table;
	struct tfd_target *targets = (void *)table;

	if (op == TFD_OP_WRITE_PAGES) {
		for (uint32_t i = 0; i < TABLE_BYTES / sizeof(*pages); i++)
			pages[i] = (struct tfd_page){ .src = chance(64), .dst = chance(64) };
	} else if (op == TFD_OP_SCATTER || op == TFD_OP_BARRIER) {
		for (uint32_t i = 0; i < TABLE_BYTES / sizeof(*targets); i++)
			targets[i] =
				(struct tfd_target){ .dst_grant = chance(50) ? grant : chance(1000),
				                     .src_offset =
				                             op == TFD_OP_BARRIER ? 0 : chance(REGION_BYTES),
				                     .dst_offset = chance(GRANT_BYTES),
				                     .length = op == TFD_OP_BARRIER ? 0 : chance(5000) };
	}
}

static uint64_t some_stride(void)
{
	static const uint64_t odd[] = { 0, 1, UINT64_MAX, 1ull << 63, 1ull << 32, GRANT_BYTES };

	return chance(4) ? chance(70000) : odd[chance(6)];
}

/* Its table is where near_valid_table writes: slices are of no use by chance, but pages, and heads, may be. */
static void near_valid_plan(struct tfd_entry *entry)
{
	entry->plan = chance(9);
	entry->flags = TFD_FLAG_PLAN | (entry->flags & TFD_FLAG_EXACT);
	entry->watcher = 0;
	entry->fire_at = 0;
	if (entry->op == TFD_OP_WRITE_PAGES || chance(2)) {
		entry->flags |= TFD_FLAG_TABLE;
		entry->argument = 8ull * chance(TABLE_BYTES / 8);
	}
}

/* Over `local` it is to be copied by its client; by another rail it has no path. */
static void near_valid_device(struct tfd_entry *entry, uint8_t *table)
{
	struct tfd_target *targets = (void *)table;

	if (entry->src_region)
		entry->src_region = chance(8) ? device : user.region;
	if (entry->dst_grant)
		entry->dst_grant = chance(8) ? device_grant : grant;
	for (uint32_t i = 0; entry->op == TFD_OP_SCATTER && i < TABLE_BYTES / sizeof(*targets); i++)
		targets[i].dst_grant = chance(100) ? device_grant : grant;
	entry->flags &= (uint8_t)~TFD_FLAG_CHECKSUM;
	if (entry->flags & TFD_FLAG_ARMED)
		entry->flags |= TFD_FLAG_COPIED | (chance(8) ? TFD_FLAG_POLLED : 0);
	if (entry->flags & TFD_FLAG_PLAN && chance(4)) /* its launches are to have it, too */
		entry->flags |= TFD_FLAG_COPIED;
	if (chance(2)) {
		entry->marks = (uint32_t)(chance(8) ? chance(10) : UINT32_MAX - chance(10));
		entry->trigger = (uint32_t)(chance(8) ? chance(10) : UINT32_MAX - chance(10));
	}
}

static void near_valid(struct tfd_entry *entry, uint64_t job, uint8_t *table)
{
	uint8_t op = (uint8_t)(1 + chance(TFD_OP_FORGET + 1)); /* one more than there are */
	bool pages = op == TFD_OP_WRITE_PAGES;
	bool many = op == TFD_OP_SCATTER || op == TFD_OP_BARRIER;

	*entry = (struct tfd_entry){ .op = op,
	                             .flags = chance(4) ? 0 : (uint8_t)chance(4),
	                             .priority = (uint8_t)chance(2),
	                             .record = (uint32_t)(job % 64),
	                             .job_id = job,
	                             .src_region = op == TFD_OP_IMM || op == TFD_OP_BARRIER ? 0 : user.region,
	                             .dst_grant = many ? 0 : grant,
	                             .imm = chance(17),
	                             .argument = op == TFD_OP_CANCEL ? job - chance(3) : 0 };
	if (op == TFD_OP_WRITE || op == TFD_OP_READ || pages) {
		entry->src_offset = chance(8) ? chance(REGION_BYTES / 2) : chance(UINT32_MAX);
		entry->dst_offset = chance(8) ? chance(GRANT_BYTES / 2) : chance(UINT32_MAX);
		entry->length = chance(pages ? 5000 : 100000);
	}
	if (pages || many) {
		entry->table_offset = 8ull * chance(64);
		entry->table_count = chance(4) ? chance(100) : chance(20000);
	}
	if (pages) {
		entry->src_stride = some_stride();
		entry->dst_stride = some_stride();
	}
	if (chance(4) == 0 && op != TFD_OP_FORGET) {
		entry->flags |= TFD_FLAG_ARMED | (chance(2) ? TFD_FLAG_POLLED : 0);
		entry->watcher = chance(9);
		entry->fire_at = chance(8) ? chance(1u << 16) : UINT64_MAX - chance(2);
	}
	if (op == TFD_OP_LAUNCH || op == TFD_OP_FORGET) {
		entry->src_region = entry->dst_grant = entry->imm = 0;
		entry->plan = op == TFD_OP_LAUNCH ? chance(9) : 0;
		entry->argument = op == TFD_OP_FORGET ? chance(9) : 0;
	} else if (chance(4) == 0) {
		near_valid_plan(entry);
	}
	near_valid_table(op, table);
	if (chance(4) == 0)
		near_valid_device(entry, table);
	if (chance(20) == 0) /* one byte of it is noise */
		((uint8_t *)entry)[chance(sizeof(*entry))] = (uint8_t)chance(256);
}

int main(int argc, char **argv)
{
	struct tfd_session_info info;
	long runs = argc > 1 ? strtol(argv[1], NULL, 10) : 20000;
	static _Alignas(TFD_LINE)
		uint8_t input[sizeof(uint64_t) + ENTRIES * sizeof(struct tfd_entry) + TABLE_BYTES];

	state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
	start();
	for (long run = 0; run < runs; run++) {
		struct tfd_entry entries[ENTRIES];
		uint64_t moves = chance(50) ? ENTRIES : chance(1000);

		for (uint32_t i = 0; i < ENTRIES; i++)
			near_valid(&entries[i], (uint64_t)user.ring->tail + i + 1,
			           input + sizeof(moves) + sizeof(entries));
		memcpy(input, &moves, sizeof(moves));
		memcpy(input + sizeof(moves), entries, sizeof(entries));
		for (uint32_t i = chance(100) ? 0 : chance(2000); i > 0; i--)
			input[sizeof(moves) + chance(sizeof(entries))] = (uint8_t)chance(256);
		(void)LLVMFuzzerTestOneInput(input, sizeof(input));
		if (run % 1000 == 0)
			check_untouched();
	}
	check_untouched();
	CHECK_OK(tfd_session_stat(host.core, target.session, &info));
	CHECK(runs < 1000 || info.imms_received > (uint64_t)runs); /* most get that far */
	user_close(&user);
	user_close(&target);
	tfd_core_close(host.core);
	(void)printf("%ld inputs, %llu counts\n", runs, (unsigned long long)info.imms_received);
	return 0;
}
#endif

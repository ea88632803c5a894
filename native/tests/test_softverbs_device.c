/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of a device through the core, over provider verbs on the double: a dma-buf at either end, or at both, and a rail that cannot
 * register it. A memfd is as good as a device here; what the core calls it, nothing is mapped at.
 */
#include <stdbool.h>

#include "core_fixture.h"
#include "softverbs/softverbs.h"

#define PATHS 2u
#define DEVICE_BYTES (1u << 20)
#define DEVICE_OFFSET 8192u /* into the dma-buf */
#define DEVICE_ADDRESS 0x700000000000ull
#define PAGE 4096u

struct device {
	int fd;
	uint8_t *memory; /* the test's own view */
	uint64_t region;
	struct tfd_region_key keys[PATHS];
};

static struct host host_a, host_b;
static struct user from, to;
static uint64_t out[PATHS], in[PATHS];
static struct device near, far;

static void rails_set(const char *device)
{
	CHECK(setenv("TFD_TEST_PROVIDER", "verbs", 1) == 0);
	CHECK(setenv("TFD_TEST_LIBRARY", "libsoftverbs.so", 1) == 0);
	CHECK(setenv("TFD_TEST_RAIL", device, 1) == 0);
}

static int region_add(struct user *user, int fd, uint64_t *region)
{
	struct tfd_region_options options = { .fd = fd,
	                                      .writable = 1,
	                                      .offset = DEVICE_OFFSET,
	                                      .length = DEVICE_BYTES,
	                                      .address = DEVICE_ADDRESS,
	                                      .device = 1 };

	return tfd_region_add(user->host->core, user->session, &options, region, &error);
}

static void device_open(struct user *user, struct device *device)
{
	device->fd = memfd_create("dmabuf", MFD_CLOEXEC);
	CHECK(device->fd >= 0 && ftruncate(device->fd, DEVICE_OFFSET + DEVICE_BYTES) == 0);
	device->memory =
		mmap(NULL, DEVICE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, device->fd, DEVICE_OFFSET);
	CHECK(device->memory != MAP_FAILED);
	CHECK_OK(region_add(user, device->fd, &device->region));
	CHECK_OK(tfd_region_keys(user->host->core, user->session, device->region, device->keys, PATHS));
}

static void device_close(struct user *user, struct device *device)
{
	CHECK_OK(tfd_region_remove(user->host->core, user->session, device->region));
	(void)munmap(device->memory, DEVICE_BYTES);
	(void)close(device->fd);
}

/* With the two devices; the one that registers the memory of `without` at last cannot, on its second rail. */
static void world_open(const struct device *without)
{
	CHECK(softverbs_configure("mode=threaded hurry=1000") == 0);
	rails_set("soft0");
	host_open_rails(&host_a, PATHS, 16384);
	rails_set("soft1");
	host_open_rails(&host_b, PATHS, 16384);
	user_open(&host_a, &from);
	user_open(&host_b, &to);
	for (uint32_t i = 0; i < PATHS; i++)
		connect_rails(&host_a, i, &host_b, i, &out[i], &in[i]);
	if (without == &near)
		softverbs_fail("ibv_reg_dmabuf_mr", 1, EOPNOTSUPP);
	device_open(&from, &near);
	softverbs_fail(NULL, 0, 0);
	if (without == &far)
		softverbs_fail("ibv_reg_dmabuf_mr", 1, EOPNOTSUPP);
	device_open(&to, &far);
	softverbs_fail(NULL, 0, 0);
	for (uint32_t i = 0; i < PATHS; i++) {
		CHECK((near.keys[i].key == 0) == (without == &near && i == 1));
		CHECK((far.keys[i].key == 0) == (without == &far && i == 1));
	}
}

static void world_close(void)
{
	device_close(&from, &near);
	device_close(&to, &far);
	user_close(&from);
	user_close(&to);
	tfd_core_close(host_a.core);
	tfd_core_close(host_b.core);
}

/* Of all of the far device, or of the far host's region. */
static uint64_t grant_open(bool device)
{
	struct tfd_open_options options = { .path_count = PATHS,
	                                    .rights = TFD_RIGHT_WRITE | TFD_RIGHT_READ,
	                                    .length = DEVICE_BYTES,
	                                    .imm_count = 16,
	                                    .device = device };
	struct tfd_region_key keys[PATHS];
	uint32_t slots[16];
	uint64_t open;

	CHECK_OK(tfd_counters_add(host_b.core, to.session, 0, 16, slots));
	CHECK_OK(tfd_region_keys(host_b.core, to.session, device ? far.region : to.region, keys, PATHS));
	CHECK_OK(tfd_session_name_space(host_b.core, to.session, &options.name_space));
	for (uint32_t i = 0; i < PATHS; i++)
		options.paths[i] = (struct tfd_open_path){ .conn = out[i],
		                                           .key = keys[i].key,
		                                           .address = keys[i].address };
	CHECK_OK(tfd_open_add(host_a.core, from.session, &options, &open));
	return open;
}

static void fill(uint8_t *bytes, uint32_t seed)
{
	for (uint32_t i = 0; i < DEVICE_BYTES; i++)
		bytes[i] = (uint8_t)((i + seed) * 2654435761u >> 13);
}

static void ends(const struct tfd_record *record, uint32_t status, uint32_t detail)
{
	if (record->status == status && record->detail == detail)
		return;
	(void)fprintf(stderr, "status %u detail %u, not %u and %u\n", record->status, record->detail, status,
	              detail);
	exit(1);
}

static void counted(uint32_t imm, uint64_t value)
{
	for (int i = 0; i < 50000 && tfd_load_acquire(&to.counters[imm].value) != value; i++)
		(void)usleep(100);
	CHECK(tfd_load_acquire(&to.counters[imm].value) == value);
}

/* One side, or both, is a device's: writes of all lengths, inline ones among them, pages, and a read. */
static void test_moves(bool from_device, bool to_device)
{
	struct tfd_page *pages = (void *)(from.segment + from.header->arena_offset);
	uint8_t *source = from_device ? near.memory : from.memory;
	uint8_t *target = to_device ? far.memory : to.memory;
	uint64_t before = tfd_load_acquire(&to.counters[1].value);
	const uint64_t lengths[] = { 1, 64, 200, 4096, 100003, DEVICE_BYTES };
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .src_region = from_device ? near.region : from.region,
	                           .dst_grant = grant_open(to_device),
	                           .imm = 1 };

	for (uint32_t i = 0; i < 6; i++) {
		fill(source, i);
		memset(target, 0x5a, DEVICE_BYTES);
		entry.length = lengths[i];
		entry.src_offset = entry.dst_offset = (DEVICE_BYTES - lengths[i]) / 2;
		ends(user_run(&from, entry), TFD_JOB_OK, 0);
		CHECK(memcmp(source + entry.src_offset, target + entry.dst_offset, entry.length) == 0);
		CHECK(i == 5 || target[entry.dst_offset + entry.length] == 0x5a);
	}
	counted(1, before + 6);
	memset(target, 0, DEVICE_BYTES);
	entry = (struct tfd_entry){ .op = TFD_OP_WRITE_PAGES,
	                            .src_region = entry.src_region,
	                            .dst_grant = entry.dst_grant,
	                            .imm = 1,
	                            .length = PAGE,
	                            .src_stride = PAGE,
	                            .dst_stride = PAGE,
	                            .table_count = DEVICE_BYTES / PAGE };
	for (uint32_t i = 0; i < entry.table_count; i++)
		pages[i] = (struct tfd_page){ .src = i, .dst = entry.table_count - 1 - i };
	ends(user_run(&from, entry), TFD_JOB_OK, 0);
	counted(1, before + 6 + entry.table_count);
	for (uint32_t i = 0; i < entry.table_count; i++)
		CHECK(memcmp(source + i * PAGE, target + (entry.table_count - 1 - i) * PAGE, PAGE) == 0);
	memset(source, 0, DEVICE_BYTES);
	entry = (struct tfd_entry){ .op = TFD_OP_READ,
	                            .src_region = entry.src_region,
	                            .dst_grant = entry.dst_grant,
	                            .length = DEVICE_BYTES };
	ends(user_run(&from, entry), TFD_JOB_OK, 0);
	CHECK(memcmp(source, target, DEVICE_BYTES) == 0);
}

/* A rail that cannot reach it carries immediates, and no byte; without the other one a write has no path. */
static void test_rail_without(bool near_end)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE, .length = 100000, .imm = 2 };
	struct tfd_rail_info rail;
	uint64_t before = tfd_load_acquire(&to.counters[2].value);
	struct tfd_landed landed;

	entry.src_region = near_end ? near.region : from.region;
	entry.dst_grant = grant_open(!near_end);
	fill(near_end ? near.memory : from.memory, 9);
	for (uint32_t i = 0; i < 40; i++)
		ends(user_run(&from, entry), TFD_JOB_OK, 0);
	CHECK(memcmp(near_end ? near.memory : from.memory, near_end ? to.memory : far.memory, 100000) == 0);
	CHECK_OK(tfd_group_rail(host_a.core, host_a.group, 1, &rail));
	CHECK(rail.bytes_sent == 0);
	for (uint32_t i = 0; i < 4; i++)
		ends(user_run(&from,
		              (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = entry.dst_grant, .imm = 2 }),
		     TFD_JOB_OK, 0);
	counted(2, before + 44);
	CHECK_OK(tfd_group_rail(host_a.core, host_a.group, 1, &rail));
	CHECK(rail.writes_sent >= 1);
	CHECK_OK(tfd_conn_close(host_b.core, in[0], TFD_DETAIL_CONNECTION, NULL, &landed));
	CHECK_OK(tfd_conn_close(host_a.core, out[0], TFD_DETAIL_CONNECTION, &landed, NULL));
	ends(user_run(&from, entry), TFD_JOB_PEER_LOST, TFD_DETAIL_CONNECTION);
	ends(user_run(&from, (struct tfd_entry){ .op = TFD_OP_IMM, .dst_grant = entry.dst_grant, .imm = 2 }),
	     TFD_JOB_OK, 0);
	counted(2, before + 45);
}

/* Nobody can compare it; a peer that asks for it all the same is refused. */
static void test_checksum(void)
{
	struct tfd_entry entry = { .op = TFD_OP_WRITE,
	                           .flags = TFD_FLAG_CHECKSUM,
	                           .length = 4096,
	                           .imm = 3,
	                           .src_region = from.region };
	struct tfd_open_options options = {
		.path_count = 1, .rights = TFD_RIGHT_WRITE, .length = 4096, .imm_count = 16
	};

	entry.dst_grant = grant_open(true);
	ends(user_run(&from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_FLAGS);
	entry.dst_grant = grant_open(false);
	entry.src_region = near.region;
	ends(user_run(&from, entry), TFD_JOB_INVALID, TFD_DETAIL_BAD_FLAGS);
	CHECK_OK(tfd_session_name_space(host_b.core, to.session, &options.name_space));
	options.paths[0] = (struct tfd_open_path){ .conn = out[0],
	                                           .key = far.keys[0].key,
	                                           .address = far.keys[0].address };
	CHECK_OK(tfd_open_add(host_a.core, from.session, &options, &entry.dst_grant));
	entry.src_region = from.region;
	ends(user_run(&from, entry), TFD_JOB_REMOTE_ACCESS, TFD_DETAIL_BAD_REGION);
	CHECK(tfd_load_acquire(&to.counters[3].value) == 0);
}

/* Another failure than that a rail cannot is the caller's to know, and leaves nothing. */
static void test_failing(void)
{
	struct softverbs_counts before, after;
	uint64_t region;

	softverbs_counts("soft0", &before);
	softverbs_fail("ibv_reg_dmabuf_mr", 1, ENOMEM);
	CHECK(region_add(&from, near.fd, &region) == -ENOMEM);
	softverbs_fail(NULL, 0, 0);
	softverbs_counts("soft0", &after);
	CHECK(after.dmabuf_mrs == before.dmabuf_mrs + 1); /* of the first rail; given back */
}

static void test_what_is_a_dmabuf(void)
{
	uint64_t bytes = 7;
	int pipes[2];

	CHECK(pipe(pipes) == 0);
	CHECK(tfd_dmabuf_size(near.fd, &bytes) == -EINVAL); /* a memfd of that name is none */
	CHECK(tfd_dmabuf_size(pipes[0], &bytes) == -EINVAL);
	CHECK(tfd_dmabuf_size(-1, &bytes) == -EINVAL);
	CHECK(bytes == 7);
	(void)close(pipes[0]);
	(void)close(pipes[1]);
}

int main(void)
{
	world_open(NULL);
	test_moves(false, true);
	test_moves(true, false);
	test_moves(true, true);
	test_checksum();
	test_failing();
	test_what_is_a_dmabuf();
	world_close();
	world_open(&near);
	test_rail_without(true);
	world_close();
	world_open(&far);
	test_rail_without(false);
	world_close();
	return 0;
}

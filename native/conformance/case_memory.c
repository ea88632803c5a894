/* SPDX-License-Identifier: Apache-2.0 */
/* Registered memory. */
#include "cases.h"
#include "conformance.h"

#include <fcntl.h>
#include <linux/udmabuf.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define KEYS 64
#define CYCLES 200

void case_memory_keys(void)
{
	struct rig *rig = rig_open();
	struct side *side = &rig->sides[1];
	struct tfd_mr *mrs[KEYS];
	struct tfd_region_key keys[KEYS + 1];
	uint32_t fds;

	keys[KEYS] = side->key;
	for (uint32_t i = 0; i < KEYS; i++) /* of the same bytes, every other one not writable */
		CHECK_OK(rig->ops->mr_open(side->domain, side->memory + (i / 2) * PAGE_BYTES, PAGE_BYTES,
		                           i % 2, &mrs[i], &keys[i], &error));
	for (uint32_t i = 0; i < KEYS; i++) {
		for (uint32_t k = i + 1; k <= KEYS; k++)
			CHECK(keys[i].key != keys[k].key);
	}
	for (uint32_t i = 0; i < KEYS; i++)
		rig->ops->mr_close(side->domain, mrs[(i * 7 + 3) % KEYS]);
	fds = count_fds();
	for (uint32_t i = 0; i < load(CYCLES); i++) {
		CHECK_OK(rig->ops->mr_open(side->domain, side->memory, 1 + i * 1000, i % 2, &mrs[0], &keys[0],
		                           &error));
		CHECK(keys[0].key != side->key.key);
		rig->ops->mr_close(side->domain, mrs[0]);
	}
	CHECK(count_fds() == fds);
	rig_close(rig);
}

/* Registers part of the far memory, writes it whole and its last byte, and looks at what is around. */
static void register_and_fill(struct rig *rig, const struct pair *pair, uint64_t offset, uint64_t length)
{
	struct tfd_post post = post_write(pair, 0, 0, length);
	uint8_t *target = pair->to->memory + offset;
	struct tfd_region_key key;
	struct tfd_mr *mr;

	memset(&error, 0, sizeof(error));
	CHECK_OK(rig->ops->mr_open(pair->to->domain, target, length, 1, &mr, &key, &error));
	memset(target - 1, GUARD, length + 2);
	pattern_fill(pair->from->memory, length, length);
	post.remote_key = key.key;
	post.remote_address = key.address;
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	CHECK(pattern_is(target, length, length));
	pair->from->memory[0] = 0x11;
	post = post_write(pair, 0, 0, 1);
	post.remote_key = key.key;
	post.remote_address = key.address + length - 1;
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	CHECK(target[length - 1] == 0x11);
	CHECK(target[-1] == GUARD && target[length] == GUARD);
	rig->ops->mr_close(pair->to->domain, mr);
}

static void odd_length(struct rig *rig, size_t length)
{
	struct tfd_region_key key;
	struct tfd_mr *mr = NULL;

	memset(&error, 0, sizeof(error));
	if (rig->ops->mr_open(rig->sides[1].domain, rig->sides[1].memory, length, 1, &mr, &key, &error) == 0)
		rig->ops->mr_close(rig->sides[1].domain, mr);
	else
		CHECK(error.text[0] && !mr);
}

void case_memory_lengths(void)
{
	static const uint64_t lengths[] = { 1, 2, 7, 8, 4095, 4096, 4097, 65535, 1000003 };
	struct rig *rig = rig_open();
	struct pair pair;

	pair_open(rig, &pair, 0);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		if (lengths[i] > pair.from->info.max_message_bytes)
			continue;
		register_and_fill(rig, &pair, PAGE_BYTES, lengths[i]);
		register_and_fill(rig, &pair, PAGE_BYTES + 1 + i, lengths[i]);
	}
	/* Nothing can be written there: refused, or of no use. */
	odd_length(rig, 0);
	odd_length(rig, (size_t)1 << 46);
	odd_length(rig, (size_t)1 << 62);
	odd_length(rig, SIZE_MAX);
	rig_write(rig, &pair, 4096, NULL);
	pair_close(rig, &pair);
	rig_close(rig);
}

/* ---- memory that is mapped nowhere ---- */

#define DMABUF_BYTES (64 * PAGE_BYTES)
#define DMABUF_OFFSET (3 * PAGE_BYTES) /* of what is registered, into it */
#define DMABUF_LENGTH (60 * PAGE_BYTES - 5)
#define DMABUF_ADDRESS (0x700000000000ull + DMABUF_OFFSET) /* what posts call it */

struct dmabuf {
	int fd;
	bool real; /* of the kernel's; else a memfd, which doubles take for one */
	uint8_t *memory; /* the case's own view of what is registered */
	struct tfd_mr *mr;
	struct tfd_region_key key;
};

/* With /dev/udmabuf the kernel makes a dma-buf of a memfd. */
static int dmabuf_of(int memfd)
{
	struct udmabuf_create create = { .memfd = (uint32_t)memfd, .size = DMABUF_BYTES };
	int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	int fd = -1;

	if (device < 0)
		return -1;
	if (fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK) == 0)
		fd = ioctl(device, UDMABUF_CREATE, &create);
	(void)close(device);
	return fd;
}

static void dmabuf_make(struct dmabuf *dmabuf)
{
	int memfd = memfd_create("dmabuf", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	uint8_t *whole;

	CHECK(memfd >= 0 && ftruncate(memfd, DMABUF_BYTES) == 0);
	whole = mmap(NULL, DMABUF_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	CHECK(whole != MAP_FAILED);
	memset(whole, GUARD, DMABUF_BYTES);
	dmabuf->memory = whole + DMABUF_OFFSET;
	dmabuf->fd = dmabuf_of(memfd);
	dmabuf->real = dmabuf->fd >= 0;
	if (dmabuf->real)
		(void)close(memfd);
	else
		dmabuf->fd = memfd;
}

static void dmabuf_register(struct rig *rig, struct side *side, struct dmabuf *dmabuf)
{
	const struct tfd_dmabuf named = {
		.fd = dmabuf->fd, .offset = DMABUF_OFFSET, .length = DMABUF_LENGTH, .address = DMABUF_ADDRESS
	};
	int rc = rig->ops->mr_open_dmabuf(side->domain, &named, 1, &dmabuf->mr, &dmabuf->key, &error);

	if (rc == -EOPNOTSUPP && error.text[0])
		outcome_skip("its rail takes none: %s", error.text);
	if (rc && !dmabuf->real)
		outcome_skip("it takes no memfd for one, and this host has no /dev/udmabuf: %s", error.text);
	CHECK_OK(rc);
	outcome_remark("%s", dmabuf->real ? "of /dev/udmabuf" : "a memfd");
}

static void dmabuf_free(struct rig *rig, struct side *side, struct dmabuf *dmabuf)
{
	const uint8_t *whole = dmabuf->memory - DMABUF_OFFSET;

	rig->ops->mr_close(side->domain, dmabuf->mr);
	CHECK(all_are(whole, DMABUF_OFFSET, GUARD));
	CHECK(all_are(dmabuf->memory + DMABUF_LENGTH, DMABUF_BYTES - DMABUF_OFFSET - DMABUF_LENGTH, GUARD));
	CHECK(munmap(dmabuf->memory - DMABUF_OFFSET, DMABUF_BYTES) == 0);
	CHECK(close(dmabuf->fd) == 0);
}

/* A post between the two, or one of them and plain memory; from the far one if it reads. */
static void dmabuf_move(struct rig *rig, struct pair *pair, struct dmabuf *near, struct dmabuf *far,
                        uint64_t length, bool read)
{
	uint64_t offset = (DMABUF_LENGTH - length) / 3;
	struct tfd_post post = post_write(pair, offset, offset, length);
	uint8_t *here = (near ? near->memory : pair->from->memory) + offset;
	uint8_t *there = (far ? far->memory : pair->to->memory) + offset;
	uint32_t before = rig->arrival_count;

	pattern_fill(read ? there : here, length, length + 1);
	memset(read ? here : there, 0, length);
	post.read = read;
	post.has_imm = !read;
	post.imm = 7;
	if (near) {
		post.local = (const void *)(uintptr_t)(DMABUF_ADDRESS + offset);
		post.mr = near->mr;
	}
	if (far) {
		post.remote_address = far->key.address + offset;
		post.remote_key = far->key.key;
	}
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	if (!read)
		AWAIT(rig, rig->arrival_count == before + 1);
	CHECK(pattern_is(read ? here : there, length, length + 1));
}

void case_memory_dmabuf(void)
{
	static const uint64_t lengths[] = { 1, 8, 33, 64, 65, 200, PAGE_BYTES, DMABUF_LENGTH };
	struct dmabuf near = { .fd = -1 }, far = { .fd = -1 };
	struct rig *rig = rig_open();
	uint32_t fds = count_fds();
	struct pair pair;

	if (!rig->ops->mr_open_dmabuf)
		outcome_skip("the provider takes none");
	dmabuf_make(&near);
	dmabuf_make(&far);
	dmabuf_register(rig, &rig->sides[0], &near);
	dmabuf_register(rig, &rig->sides[1], &far);
	pair_open(rig, &pair, 0);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		for (uint32_t read = 0; read < 2; read++) {
			dmabuf_move(rig, &pair, NULL, &far, lengths[i], read);
			dmabuf_move(rig, &pair, &near, NULL, lengths[i], read);
			dmabuf_move(rig, &pair, &near, &far, lengths[i], read);
		}
	}
	pair_close(rig, &pair);
	dmabuf_free(rig, &rig->sides[0], &near);
	dmabuf_free(rig, &rig->sides[1], &far);
	(void)rig_pass(rig);
	CHECK(count_fds() <= fds);
	rig_close(rig);
}

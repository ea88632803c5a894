/* SPDX-License-Identifier: Apache-2.0 */
/* The client half believes no segment: sizes that lie, other ABIs, files that could shrink. */
#include "fake_daemon.h"

static int try_open(struct fake_daemon *fake)
{
	struct tfd_client *client = NULL;
	int rc = tfd_client_open(fake->segment_fd, &fake->doorbell_fd, 1, &client);

	if (rc == 0)
		tfd_client_close(client);
	else
		CHECK(!client);
	return rc;
}

static void test_good(void)
{
	struct fake_daemon fake;
	struct tfd_client *client;

	fake_layout(&fake, 8, 16, 4);
	client = fake_attach(&fake);
	CHECK(tfd_client_header(client)->session_id == 1);
	CHECK(!tfd_client_is_dead(client));
	tfd_client_close(client);
	tfd_client_close(NULL);
	CHECK(tfd_client_open(fake.segment_fd, NULL, 0, &client) == -EINVAL);
	fake_fini(&fake);
}

#define BAD(field, bad)                                                       \
	do {                                                                  \
		struct tfd_segment_header saved = *h;                         \
		h->field = (bad);                                             \
		if (try_open(&fake) != -EPROTO) {                             \
			fprintf(stderr, "accepted: " #field " = " #bad "\n"); \
			exit(1);                                              \
		}                                                             \
		*h = saved;                                                   \
	} while (0)

static void test_hostile_headers(void)
{
	struct fake_daemon fake;
	struct tfd_segment_header *h;

	fake_layout(&fake, 8, 16, 4);
	h = fake.header;
	BAD(magic, 0);
	BAD(abi_version, TFD_ABI_VERSION + 1);
	BAD(header_bytes, sizeof(*h) - 64);
	BAD(features, 1);
	BAD(segment_bytes, fake.bytes + 1);
	BAD(segment_bytes, UINT64_MAX);
	BAD(segment_bytes, 64);
	BAD(ring_count, 0);
	BAD(ring_count, 2);
	BAD(ring_count, UINT32_MAX);
	BAD(ring_entries, 0);
	BAD(ring_entries, 7);
	BAD(ring_entries, 16);
	BAD(ring_entries, 1u << 31);
	BAD(ring_stride, 0);
	BAD(ring_stride, h->ring_stride - 64);
	BAD(ring_stride, h->ring_stride + 1);
	BAD(ring_stride, UINT64_MAX - 63);
	BAD(ring_offset, 0);
	BAD(ring_offset, 8);
	BAD(ring_offset, h->ring_offset + 1);
	BAD(ring_offset, UINT64_MAX - 63);
	BAD(ring_offset, fake.bytes);
	BAD(record_count, 0);
	BAD(record_count, (1u << 16) + 1);
	BAD(record_count, UINT32_MAX);
	BAD(record_offset, 0);
	BAD(record_offset, h->ring_offset);
	BAD(record_offset, UINT64_MAX - 63);
	BAD(counter_count, UINT32_MAX);
	BAD(counter_count, 1u << 20);
	BAD(counter_offset, 64);
	BAD(counter_offset, h->record_offset);
	BAD(counter_offset, UINT64_MAX & ~63ull);
	BAD(watcher_offset, 0);
	BAD(watcher_offset, h->counter_offset);
	BAD(watcher_offset, UINT64_MAX & ~63ull);
	BAD(watcher_count, (1u << 16) + 1);
	BAD(arena_offset, 0);
	BAD(arena_bytes, h->arena_bytes + 1);
	BAD(arena_bytes, UINT64_MAX);
	CHECK(try_open(&fake) == 0);
	fake_fini(&fake);
}

static void test_random_headers(void)
{
	struct fake_daemon fake;
	struct tfd_segment_header good;
	uint64_t state = 88172645463325252ull;

	fake_layout(&fake, 8, 16, 4);
	good = *fake.header;
	for (int round = 0; round < 20000; round++) {
		uint8_t *bytes = (uint8_t *)fake.header;

		*fake.header = good;
		for (int flips = 0; flips < 3; flips++) {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			bytes[state % 128] ^= (uint8_t)(state >> 32);
		}
		(void)try_open(&fake); /* whatever it says: no touch outside the mapping (ASan) */
	}
	fake_fini(&fake);
}

static void test_files_that_may_shrink(void)
{
	struct fake_daemon fake;
	struct tfd_client *client = NULL;
	int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int small = memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	fake_layout(&fake, 8, 16, 4);
	CHECK(ftruncate(fd, (off_t)fake.bytes) == 0);
	CHECK(pwrite(fd, fake.base, fake.bytes, 0) == (ssize_t)fake.bytes);
	CHECK(tfd_client_open(fd, &fake.doorbell_fd, 1, &client) == -EPROTO);
	CHECK(fcntl(small, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
	CHECK(tfd_client_open(small, &fake.doorbell_fd, 1, &client) == -EPROTO);
	CHECK(tfd_client_open(-1, &fake.doorbell_fd, 1, &client) == -EPROTO);
	CHECK(!client);
	close(fd);
	close(small);
	fake_fini(&fake);
}

int main(void)
{
	test_good();
	test_hostile_headers();
	test_random_headers();
	test_files_that_may_shrink();
	return 0;
}

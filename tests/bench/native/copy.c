/* SPDX-License-Identifier: Apache-2.0 */
/* One thread's memcpy between memory of the kind that regions are made of: memfds, mapped shared, whose pages are there. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT void *copy_map(uint64_t length);
EXPORT uint64_t copy_run(void *to, const void *from, uint64_t size, uint64_t slots, uint64_t count);

/* NULL: no memory. Stays mapped until the process ends. */
void *copy_map(uint64_t length)
{
	int fd = memfd_create("copy", MFD_CLOEXEC);
	void *base = MAP_FAILED;

	if (fd >= 0 && ftruncate(fd, (off_t)length) == 0)
		base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd >= 0)
		(void)close(fd);
	if (base == MAP_FAILED)
		return NULL;
	memset(base, 0x5a, length);
	return base;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Copies `size` bytes `count` times, slot after slot; returns ns. */
uint64_t copy_run(void *to, const void *from, uint64_t size, uint64_t slots, uint64_t count)
{
	uint64_t begin = now_ns();

	for (uint64_t i = 0; i < count; i++) {
		uint64_t at = i % slots * size;

		memcpy((char *)to + at, (const char *)from + at, size);
		__asm__ volatile("" : : "r"(to), "r"(from) : "memory");
	}
	return now_ns() - begin;
}

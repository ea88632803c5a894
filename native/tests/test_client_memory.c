/* SPDX-License-Identifier: Apache-2.0 */
/* Adopting memory in place. */
#include "fake_daemon.h"

int main(void)
{
	const size_t length = 4u << 20;
	int fd = memfd_create("adopted", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	uint8_t *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *other;

	CHECK(p != MAP_FAILED);
	CHECK(ftruncate(fd, (off_t)length) == 0);
	for (size_t i = 0; i < length; i++)
		p[i] = (uint8_t)(i * 31 >> 3);
	CHECK(tfd_memory_adopt(p + 1, length, fd) == -EINVAL);
	CHECK(tfd_memory_adopt(p, length - 1, fd) == -EINVAL);
	CHECK(tfd_memory_adopt(p, 0, fd) == -EINVAL);
	CHECK(tfd_memory_adopt(p, length, -1) == -EBADF);
	CHECK(tfd_memory_adopt(p, length, fd) == 0);
	for (size_t i = 0; i < length; i++)
		CHECK(p[i] == (uint8_t)(i * 31 >> 3));
	other = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(other != MAP_FAILED);
	other[12345] = 200;
	CHECK(p[12345] == 200);
	p[54321] = 201;
	CHECK(other[54321] == 201);
	munmap(p, length);
	munmap(other, length);
	close(fd);
	return 0;
}

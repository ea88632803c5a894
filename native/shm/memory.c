/* SPDX-License-Identifier: Apache-2.0 */
/* Turning pages that a process already has into pages that it can share. */
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "transferd/client.h"

static int write_all(int fd, const uint8_t *from, size_t length)
{
	size_t done = 0;

	while (done < length) {
		ssize_t n = pwrite(fd, from + done, length - done, (off_t)done);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0)
			done += (size_t)n;
		else if (n == 0)
			return -ENOSPC;
	}
	return 0;
}

int tfd_memory_adopt(void *address, size_t length, int memfd)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	int rc;

	if (!length || (uintptr_t)address % page || length % page)
		return -EINVAL;
	rc = write_all(memfd, address, length);
	if (rc)
		return rc;
	if (mmap(address, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd, 0) == MAP_FAILED)
		return -errno;
	return 0;
}

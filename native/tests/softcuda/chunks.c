/* SPDX-License-Identifier: Apache-2.0 */
/* Physical memory apart from its addresses: a chunk is a memfd, its handle a number. */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "soft.h"

struct chunk {
	struct chunk *next;
	uint64_t number;
	uint64_t bytes;
	int fd; /* owned */
	int device;
	int users; /* handles and mappings */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the list; taken before the table's */
static struct chunk *chunks;

static struct chunk *find(uint64_t number)
{
	for (struct chunk *chunk = chunks; chunk; chunk = chunk->next) {
		if (chunk->number == number)
			return chunk;
	}
	return NULL;
}

static void put(struct chunk *chunk)
{
	if (--chunk->users)
		return;
	for (struct chunk **link = &chunks; *link; link = &(*link)->next) {
		if (*link == chunk) {
			*link = chunk->next;
			break;
		}
	}
	(void)close(chunk->fd);
	free(chunk);
}

static int add(int fd, uint64_t bytes, int device, uint64_t *out)
{
	struct chunk *chunk = calloc(1, sizeof(*chunk));

	if (!chunk) {
		(void)close(fd);
		return SOFT_OUT_OF_MEMORY;
	}
	*chunk = (struct chunk){
		.number = soft_number(), .bytes = bytes, .fd = fd, .device = device, .users = 1
	};
	*out = chunk->number;
	(void)pthread_mutex_lock(&lock);
	chunk->next = chunks;
	chunks = chunk;
	(void)pthread_mutex_unlock(&lock);
	return SOFT_SUCCESS;
}

int cuMemCreate(uint64_t *out, size_t bytes, const struct soft_allocation *what, uint64_t flags)
{
	int result = soft_enter("cuMemCreate"), fd;

	(void)flags;
	if (result)
		return result;
	fd = memfd_create("softcuda-chunk", MFD_CLOEXEC);
	if (fd < 0)
		return SOFT_OUT_OF_MEMORY;
	if (ftruncate(fd, (off_t)bytes)) {
		(void)close(fd);
		return SOFT_OUT_OF_MEMORY;
	}
	return add(fd, bytes, what->device, out);
}

int cuMemRelease(uint64_t number)
{
	struct chunk *chunk;

	(void)pthread_mutex_lock(&lock);
	chunk = find(number);
	if (chunk)
		put(chunk);
	(void)pthread_mutex_unlock(&lock);
	return chunk ? SOFT_SUCCESS : SOFT_INVALID_VALUE;
}

int cuMemRetainAllocationHandle(uint64_t *out, void *address)
{
	const struct soft_memory *memory;
	struct chunk *chunk = NULL;

	(void)pthread_mutex_lock(&lock);
	soft_memory_lock();
	memory = soft_memory_at((uint64_t)(uintptr_t)address, 1);
	if (memory && memory->kind == SOFT_MAPPED)
		chunk = find(memory->chunk);
	soft_memory_unlock();
	if (chunk) {
		chunk->users++;
		*out = chunk->number;
	}
	(void)pthread_mutex_unlock(&lock);
	return chunk ? SOFT_SUCCESS : SOFT_INVALID_VALUE;
}

int cuMemExportToShareableHandle(void *out, uint64_t number, int kind, uint64_t flags)
{
	struct chunk *chunk;
	int fd = -1;

	(void)kind;
	(void)flags;
	(void)pthread_mutex_lock(&lock);
	chunk = find(number);
	if (chunk)
		fd = fcntl(chunk->fd, F_DUPFD_CLOEXEC, 0);
	(void)pthread_mutex_unlock(&lock);
	if (fd < 0)
		return SOFT_INVALID_VALUE;
	*(int *)out = fd;
	return SOFT_SUCCESS;
}

int cuMemImportFromShareableHandle(uint64_t *out, void *from, int kind)
{
	int result = soft_enter("cuMemImportFromShareableHandle");
	int fd = fcntl((int)(intptr_t)from, F_DUPFD_CLOEXEC, 0);
	struct stat file;

	(void)kind;
	if (!result && (fd < 0 || fstat(fd, &file) || !file.st_size))
		result = SOFT_INVALID_VALUE;
	if (!result && !soft_current())
		result = SOFT_INVALID_CONTEXT;
	if (!result)
		return add(fd, (uint64_t)file.st_size, soft_device_of(soft_current()), out);
	if (fd >= 0)
		(void)close(fd);
	return result;
}

int cuMemAddressReserve(uint64_t *out, size_t bytes, size_t alignment, uint64_t address, uint64_t flags)
{
	void *base;

	(void)alignment;
	(void)address;
	(void)flags;
	base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return SOFT_OUT_OF_MEMORY;
	*out = (uint64_t)(uintptr_t)base;
	return SOFT_SUCCESS;
}

int cuMemAddressFree(uint64_t address, size_t bytes)
{
	return munmap((void *)(uintptr_t)address, bytes) ? SOFT_INVALID_VALUE : SOFT_SUCCESS;
}

int cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t number, uint64_t flags)
{
	int result = soft_enter("cuMemMap");
	struct soft_memory memory = { .address = address,
	                              .bytes = bytes,
	                              .buffer_id = soft_number(),
	                              .chunk = number,
	                              .kind = SOFT_MAPPED,
	                              .fd = -1 };
	struct chunk *chunk;

	(void)flags;
	if (result)
		return result;
	(void)pthread_mutex_lock(&lock);
	chunk = find(number);
	if (!chunk || offset || chunk->bytes != bytes ||
	    mmap((void *)(uintptr_t)address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, chunk->fd,
	         0) == MAP_FAILED) {
		result = SOFT_INVALID_VALUE;
	} else {
		memory.device = chunk->device;
		soft_memory_lock();
		result = soft_memory_add(&memory) ? SOFT_SUCCESS : SOFT_OUT_OF_MEMORY;
		soft_memory_unlock();
		chunk->users++;
	}
	(void)pthread_mutex_unlock(&lock);
	return result;
}

/* Of whole chunks, one behind the other. */
int cuMemUnmap(uint64_t address, size_t bytes)
{
	int result = soft_enter("cuMemUnmap");

	(void)pthread_mutex_lock(&lock);
	while (!result && bytes) {
		struct soft_memory gone = { 0 };
		struct chunk *chunk;
		bool found;

		soft_memory_lock();
		found = soft_memory_remove(address, SOFT_MAPPED, &gone);
		soft_memory_unlock();
		if (!found || gone.bytes > bytes) {
			result = SOFT_INVALID_VALUE;
			break;
		}
		(void)mmap((void *)(uintptr_t)address, gone.bytes, PROT_NONE,
		           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
		chunk = find(gone.chunk);
		if (chunk)
			put(chunk);
		address += gone.bytes;
		bytes -= gone.bytes;
	}
	(void)pthread_mutex_unlock(&lock);
	return result;
}

int cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count)
{
	int result = soft_enter("cuMemSetAccess");

	(void)access;
	(void)count;
	return result ? result : soft_may_copy(address, bytes, false) ? SOFT_SUCCESS : SOFT_INVALID_VALUE;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* Memory "of a device": a memfd each, so that another process can map it; and host memory that is registered. */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/barrier.h"
#include "soft.h"

#define PAGE 4096u
#define MAGIC "softcuda"

/* CUpointer_attribute */
enum {
	MEMORY_TYPE = 2,
	SYNC_MEMOPS = 6,
	BUFFER_ID = 7,
	IS_MANAGED = 8,
	DEVICE_ORDINAL = 9,
	IS_LEGACY_IPC = 10,
};

struct handle { /* in a soft_ipc_handle */
	char magic[8];
	int32_t pid;
	int32_t fd;
	uint64_t bytes;
	uint64_t inode; /* of a number that came back for another file the handle does not hold */
	int32_t device;
	int32_t _pad;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the table */
static struct soft_memory *table;
static uint64_t numbers = 1000;

uint64_t soft_number(void)
{
	return tfd_add_seq(&numbers, 1);
}

void soft_memory_lock(void)
{
	(void)pthread_mutex_lock(&lock);
}

void soft_memory_unlock(void)
{
	(void)pthread_mutex_unlock(&lock);
}

struct soft_memory *soft_memory_add(const struct soft_memory *memory)
{
	struct soft_memory *made = malloc(sizeof(*made));

	if (!made)
		return NULL;
	*made = *memory;
	made->next = table;
	table = made;
	return made;
}

struct soft_memory *soft_memory_at(uint64_t address, uint64_t bytes)
{
	for (struct soft_memory *memory = table; memory; memory = memory->next) {
		if (address >= memory->address && bytes <= memory->bytes &&
		    address - memory->address <= memory->bytes - bytes)
			return memory;
	}
	return NULL;
}

bool soft_memory_remove(uint64_t address, enum soft_kind kind, struct soft_memory *gone)
{
	for (struct soft_memory **link = &table; *link; link = &(*link)->next) {
		struct soft_memory *memory = *link;

		if (memory->address != address || memory->kind != kind)
			continue;
		*link = memory->next;
		*gone = *memory;
		free(memory);
		return true;
	}
	return false;
}

/* Chunks one behind the other are one range for a copy. */
bool soft_may_copy(uint64_t address, uint64_t bytes, bool host)
{
	bool may = true;

	soft_memory_lock();
	while (bytes && may) {
		const struct soft_memory *memory = soft_memory_at(address, 1);
		uint64_t here = memory ? memory->address + memory->bytes - address : 0;

		may = memory && (memory->kind == SOFT_HOST) == host;
		address += here;
		bytes -= here < bytes ? here : bytes;
	}
	soft_memory_unlock();
	return may;
}

static uint64_t rounded(uint64_t bytes)
{
	return (bytes + PAGE - 1) / PAGE * PAGE;
}

static int map(int fd, struct soft_memory *memory, uint64_t *out)
{
	void *base = mmap(NULL, rounded(memory->bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	bool added;

	if (base == MAP_FAILED)
		return SOFT_OUT_OF_MEMORY;
	memory->address = (uint64_t)(uintptr_t)base;
	memory->buffer_id = soft_number();
	soft_memory_lock();
	added = soft_memory_add(memory) != NULL;
	soft_memory_unlock();
	if (!added) {
		(void)munmap(base, rounded(memory->bytes));
		return SOFT_OUT_OF_MEMORY;
	}
	*out = memory->address;
	return SOFT_SUCCESS;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes)
{
	struct soft_memory memory = { .bytes = bytes, .kind = SOFT_DEVICE };
	int result = soft_enter("cuMemAlloc_v2");

	if (result)
		return result;
	if (!bytes || !soft_current())
		return bytes ? SOFT_INVALID_CONTEXT : SOFT_INVALID_VALUE;
	memory.device = soft_device_of(soft_current());
	memory.fd = memfd_create("softcuda", MFD_CLOEXEC);
	if (memory.fd < 0)
		return SOFT_OUT_OF_MEMORY;
	result = ftruncate(memory.fd, (off_t)rounded(bytes)) ? SOFT_OUT_OF_MEMORY :
	                                                       map(memory.fd, &memory, address);
	if (result)
		(void)close(memory.fd);
	return result;
}

int cuMemFree_v2(uint64_t address)
{
	struct soft_memory gone;
	bool found;

	soft_settle();
	soft_memory_lock();
	found = soft_memory_remove(address, SOFT_DEVICE, &gone);
	soft_memory_unlock();
	if (!found)
		return SOFT_INVALID_VALUE;
	(void)munmap((void *)(uintptr_t)address, rounded(gone.bytes));
	(void)close(gone.fd);
	return SOFT_SUCCESS;
}

int cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags)
{
	struct soft_memory memory = {
		.address = (uint64_t)(uintptr_t)address, .bytes = bytes, .kind = SOFT_HOST, .fd = -1
	};
	int result = soft_enter("cuMemHostRegister_v2");

	(void)flags;
	if (result)
		return result;
	if (!soft_current() || !bytes)
		return bytes ? SOFT_INVALID_CONTEXT : SOFT_INVALID_VALUE;
	soft_memory_lock();
	if (soft_memory_at(memory.address, 1))
		result = SOFT_ALREADY_REGISTERED;
	else if (!soft_memory_add(&memory))
		result = SOFT_OUT_OF_MEMORY;
	soft_memory_unlock();
	return result;
}

int cuMemHostUnregister(void *address)
{
	struct soft_memory gone;
	bool found;

	soft_settle();
	soft_memory_lock();
	found = soft_memory_remove((uint64_t)(uintptr_t)address, SOFT_HOST, &gone);
	soft_memory_unlock();
	return found ? SOFT_SUCCESS : SOFT_NOT_REGISTERED;
}

int cuMemHostGetDevicePointer_v2(uint64_t *out, void *address, unsigned flags)
{
	const struct soft_memory *memory;
	uint64_t at = (uint64_t)(uintptr_t)address;
	bool found;

	(void)flags;
	soft_memory_lock();
	memory = soft_memory_at(at, 1);
	found = memory && memory->kind == SOFT_HOST;
	soft_memory_unlock();
	if (!found)
		return SOFT_NOT_REGISTERED;
	*out = at;
	return SOFT_SUCCESS;
}

static int attribute_of(const struct soft_memory *memory, int attribute, void *out)
{
	uint32_t value;

	switch (attribute) {
	case BUFFER_ID:
		memcpy(out, &memory->buffer_id, sizeof(memory->buffer_id));
		return SOFT_SUCCESS;
	case MEMORY_TYPE:
		value = memory->kind == SOFT_HOST ? 1 : 2;
		break;
	case IS_MANAGED:
		value = 0;
		break;
	case DEVICE_ORDINAL:
		value = (uint32_t)memory->device;
		break;
	case IS_LEGACY_IPC:
		value = memory->kind == SOFT_DEVICE;
		break;
	default:
		return SOFT_INVALID_VALUE;
	}
	memcpy(out, &value, sizeof(value));
	return SOFT_SUCCESS;
}

int cuPointerGetAttribute(void *out, int attribute, uint64_t address)
{
	const struct soft_memory *memory;
	int result = SOFT_INVALID_VALUE;

	soft_memory_lock();
	memory = soft_memory_at(address, 1);
	if (memory)
		result = attribute_of(memory, attribute, out);
	soft_memory_unlock();
	return result;
}

int cuPointerGetAttributes(unsigned count, int *attributes, void **out, uint64_t address)
{
	for (unsigned i = 0; i < count; i++) /* zeros for what is nobody's */
		(void)cuPointerGetAttribute(out[i], attributes[i], address);
	return SOFT_SUCCESS;
}

int cuPointerSetAttribute(const void *value, int attribute, uint64_t address)
{
	uint32_t id[2];

	(void)value;
	return attribute == SYNC_MEMOPS ? cuPointerGetAttribute(id, BUFFER_ID, address) : SOFT_INVALID_VALUE;
}

int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t address)
{
	const struct soft_memory *memory;

	soft_memory_lock();
	memory = soft_memory_at(address, 1);
	if (memory && memory->kind != SOFT_HOST) {
		*base = memory->address;
		*bytes = memory->bytes;
	} else {
		memory = NULL;
	}
	soft_memory_unlock();
	return memory ? SOFT_SUCCESS : SOFT_NOT_FOUND;
}

int cuMemGetHandleForAddressRange(void *out, uint64_t address, size_t bytes, int kind, uint64_t flags)
{
	(void)out;
	(void)address;
	(void)bytes;
	(void)kind;
	(void)flags;
	return SOFT_NOT_SUPPORTED; /* of a memfd nobody makes a dma-buf */
}

int cuIpcGetMemHandle(struct soft_ipc_handle *out, uint64_t address)
{
	struct handle handle = { .pid = (int32_t)getpid() };
	const struct soft_memory *memory;
	struct stat file = { 0 };
	bool good;

	memcpy(handle.magic, MAGIC, sizeof(handle.magic));
	soft_memory_lock();
	memory = soft_memory_at(address, 1);
	good = memory && memory->kind == SOFT_DEVICE && !fstat(memory->fd, &file);
	if (good) {
		handle.fd = memory->fd;
		handle.bytes = memory->bytes;
		handle.inode = (uint64_t)file.st_ino;
		handle.device = memory->device;
	}
	soft_memory_unlock();
	if (!good)
		return SOFT_INVALID_VALUE;
	memset(out, 0, sizeof(*out));
	memcpy(out, &handle, sizeof(handle));
	return SOFT_SUCCESS;
}

int cuIpcOpenMemHandle_v2(uint64_t *out, struct soft_ipc_handle from, unsigned flags)
{
	struct soft_memory memory = { .kind = SOFT_IMPORTED, .fd = -1 };
	int result = soft_enter("cuIpcOpenMemHandle_v2");
	struct handle handle;
	struct stat file;
	char path[64];
	int fd;

	(void)flags;
	if (result)
		return result;
	memcpy(&handle, &from, sizeof(handle));
	if (memcmp(handle.magic, MAGIC, sizeof(handle.magic)) != 0 || !handle.bytes)
		return SOFT_INVALID_VALUE;
	if (handle.pid == (int32_t)getpid() || !soft_current())
		return SOFT_INVALID_CONTEXT;
	if (handle.device < 0 || handle.device >= soft_device_count())
		return SOFT_INVALID_DEVICE;
	(void)snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle.pid, handle.fd);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return SOFT_INVALID_VALUE; /* freed, or its owner is gone */
	if (fstat(fd, &file) || (uint64_t)file.st_ino != handle.inode ||
	    (uint64_t)file.st_size < handle.bytes) {
		(void)close(fd);
		return SOFT_INVALID_VALUE;
	}
	memory.bytes = handle.bytes;
	memory.device = handle.device;
	result = map(fd, &memory, out);
	(void)close(fd);
	return result;
}

int cuIpcCloseMemHandle(uint64_t address)
{
	int result = soft_enter("cuIpcCloseMemHandle");
	struct soft_memory gone;
	bool found;

	if (result)
		return result;
	soft_settle();
	soft_memory_lock();
	found = soft_memory_remove(address, SOFT_IMPORTED, &gone);
	soft_memory_unlock();
	if (!found)
		return SOFT_INVALID_VALUE;
	(void)munmap((void *)(uintptr_t)address, rounded(gone.bytes));
	return SOFT_SUCCESS;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../core/parts.h"

enum { LAZY_PEER_ACCESS = 1, POSIX_FD = 1, LOCATION_DEVICE = 1, READ_WRITE = 3 };

static struct tfd_gpu_memory **link_of(struct tfd_gpu_memories *memories, uint64_t number)
{
	struct tfd_gpu_memory **link = &memories->buckets[number % TFD_GPU_BUCKETS];

	while (*link && (*link)->number != number)
		link = &(*link)->next;
	return link;
}

const struct tfd_gpu_memory *tfd_gpu_memory_find(const struct tfd_gpu_memories *memories, uint64_t number)
{
	const struct tfd_gpu_memory *memory = memories->buckets[number % TFD_GPU_BUCKETS];

	while (memory && memory->number != number)
		memory = memory->next;
	return memory && memory->complete ? memory : NULL;
}

static int unmap(const struct tfd_cuda *cuda, struct tfd_gpu_memory *memory, struct tfd_error *error)
{
	uint64_t at = memory->address;
	int result = 0;

	if (!memory->chunks) {
		result = memory->address ? cuda->ipc_close(memory->address) : 0;
		return result ? tfd_cuda_fail(cuda, error, "cuIpcCloseMemHandle", result) : 0;
	}
	for (uint32_t i = 0; !result && i < memory->chunk_count; i++) {
		result = cuda->unmap(at, memory->chunk_bytes[i]);
		at += memory->chunk_bytes[i];
	}
	if (!result && memory->address)
		result = cuda->unreserve(memory->address, memory->bytes);
	return result ? tfd_cuda_fail(cuda, error, "cuMemUnmap", result) : 0;
}

static void drop(struct tfd_gpu_memory **link)
{
	struct tfd_gpu_memory *memory = *link;

	*link = memory->next;
	free(memory->chunk_bytes);
	free(memory);
}

static int remove_at(struct tfd_gpu_memories *memories, struct tfd_gpu_memory **link, struct tfd_error *error)
{
	int rc = unmap(memories->cuda, *link, error);

	drop(link);
	return rc;
}

void tfd_gpu_memories_fini(struct tfd_gpu_memories *memories)
{
	for (uint32_t i = 0; i < TFD_GPU_BUCKETS; i++) {
		while (memories->buckets[i])
			drop(&memories->buckets[i]);
	}
}

/* What its owner says of its size is not believed: a copy past the end would cost the context. */
static int open_handle(struct tfd_gpu_memories *memories, struct tfd_gpu_memory *memory,
                       const struct tfd_gpu_message *message, struct tfd_error *error)
{
	const struct tfd_cuda *cuda = memories->cuda;
	struct tfd_cuda_handle handle;
	uint64_t base = 0;
	size_t bytes = 0;
	int result;

	memcpy(handle.bytes, message->ipc_handle, sizeof(handle.bytes));
	result = cuda->ipc_open(&memory->address, handle, LAZY_PEER_ACCESS);
	if (result) {
		memory->address = 0;
		return tfd_cuda_fail(cuda, error, "cuIpcOpenMemHandle", result);
	}
	result = cuda->range(&base, &bytes, memory->address);
	if (result)
		return tfd_cuda_fail(cuda, error, "cuMemGetAddressRange", result);
	bytes -= (size_t)(memory->address - base);
	if (bytes < memory->bytes)
		return tfd_fail(error, -ERANGE, "the allocation has %llu bytes, and was registered with %llu",
		                (unsigned long long)bytes, (unsigned long long)memory->bytes);
	memory->complete = true;
	return 0;
}

static int map_chunk(const struct tfd_cuda *cuda, struct tfd_gpu_memory *memory, uint64_t bytes, int fd,
                     struct tfd_error *error)
{
	uint64_t chunk = 0;
	int result;

	if (!bytes || bytes > memory->bytes - memory->mapped)
		return tfd_fail(error, -ERANGE, "chunks of more than the allocation's %llu bytes",
		                (unsigned long long)memory->bytes);
	result = cuda->chunk_import(&chunk, (void *)(intptr_t)fd, POSIX_FD);
	if (result)
		return tfd_cuda_fail(cuda, error, "cuMemImportFromShareableHandle", result);
	result = cuda->map(memory->address + memory->mapped, bytes, 0, chunk, 0);
	(void)cuda->chunk_release(chunk); /* the mapping keeps it */
	if (result)
		return tfd_cuda_fail(cuda, error, "cuMemMap", result);
	memory->chunk_bytes[memory->chunk_count++] = bytes;
	memory->mapped += bytes;
	return 0;
}

static int open_chunks(struct tfd_gpu_memories *memories, struct tfd_gpu_memory *memory,
                       const struct tfd_gpu_message *message, const int *fds, struct tfd_error *error)
{
	struct tfd_cuda_access access = { LOCATION_DEVICE, memories->device, READ_WRITE };
	const struct tfd_cuda *cuda = memories->cuda;
	uint64_t *sizes =
		realloc(memory->chunk_bytes, (memory->chunk_count + message->chunk_count) * sizeof(*sizes));
	int result, rc = 0;

	if (!sizes)
		return tfd_fail(error, -ENOMEM, "no memory is left");
	memory->chunk_bytes = sizes;
	if (!memory->address) {
		result = cuda->reserve(&memory->address, memory->bytes, 0, 0, 0);
		if (result) {
			memory->address = 0;
			return tfd_cuda_fail(cuda, error, "cuMemAddressReserve", result);
		}
	}
	for (uint32_t i = 0; !rc && i < message->chunk_count; i++)
		rc = map_chunk(cuda, memory, message->chunk_bytes[i], fds[i], error);
	if (rc || message->more)
		return rc;
	if (memory->mapped != memory->bytes)
		return tfd_fail(error, -ERANGE, "chunks of %llu bytes, and not of the allocation's %llu",
		                (unsigned long long)memory->mapped, (unsigned long long)memory->bytes);
	result = cuda->access(memory->address, memory->bytes, &access, 1);
	if (result)
		return tfd_cuda_fail(cuda, error, "cuMemSetAccess", result);
	memory->complete = true;
	return 0;
}

int tfd_gpu_memory_open(struct tfd_gpu_memories *memories, const struct tfd_gpu_message *message,
                        const int *fds, struct tfd_error *error)
{
	struct tfd_gpu_memory **link = link_of(memories, message->memory);
	struct tfd_gpu_memory *memory = *link;
	struct tfd_error ignored;
	int rc;

	if (memory && (memory->complete || !message->chunk_count))
		return tfd_fail(error, -EEXIST, "memory %llu is open", (unsigned long long)message->memory);
	if (!memory) {
		memory = calloc(1, sizeof(*memory));
		if (!memory)
			return tfd_fail(error, -ENOMEM, "no memory is left");
		memory->number = message->memory;
		memory->bytes = message->bytes;
		memory->chunks = message->chunk_count != 0;
		*link = memory;
	}
	rc = memory->chunks ? open_chunks(memories, memory, message, fds, error) :
	                      open_handle(memories, memory, message, error);
	if (rc)
		(void)remove_at(memories, link, &ignored);
	return rc;
}

int tfd_gpu_memory_close(struct tfd_gpu_memories *memories, uint64_t number, struct tfd_error *error)
{
	struct tfd_gpu_memory **link = link_of(memories, number);

	return *link ? remove_at(memories, link, error) : 0;
}

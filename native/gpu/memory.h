/* SPDX-License-Identifier: Apache-2.0 */
/* Allocations of clients that are open in the helper, by the daemon's numbers. */
#ifndef TFD_GPU_MEMORY_H
#define TFD_GPU_MEMORY_H

#include <stdbool.h>

#include "driver.h"

#define TFD_GPU_BUCKETS 1024u

struct tfd_gpu_memory {
	struct tfd_gpu_memory *next;
	uint64_t number;
	uint64_t address;
	uint64_t bytes;
	uint64_t mapped; /* of chunks: bytes that are mapped */
	uint64_t *chunk_bytes; /* of chunks: the size of each that is mapped; owned */
	uint32_t chunk_count;
	bool chunks;
	bool complete;
};

struct tfd_gpu_memories {
	const struct tfd_cuda *cuda; /* borrowed */
	int device;
	struct tfd_gpu_memory *buckets[TFD_GPU_BUCKETS];
};

/* What may be copied, or NULL. */
const struct tfd_gpu_memory *tfd_gpu_memory_find(const struct tfd_gpu_memories *memories, uint64_t number);
/*
 * By an OPEN and its fds, which stay the caller's. -errno and error, and then nothing of it is left. -EEXIST: it is open.
 */
int tfd_gpu_memory_open(struct tfd_gpu_memories *memories, const struct tfd_gpu_message *message,
                        const int *fds, struct tfd_error *error);
/* The caller has seen to it that no copy uses it. 0 also if it is not open. */
int tfd_gpu_memory_close(struct tfd_gpu_memories *memories, uint64_t number, struct tfd_error *error);
/* Forgets all of them without a call of the driver: the process ends, and its mappings with it. */
void tfd_gpu_memories_fini(struct tfd_gpu_memories *memories);

#endif

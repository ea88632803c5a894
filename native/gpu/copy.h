/* SPDX-License-Identifier: Apache-2.0 */
/* Copies between the pool and memory of the GPU, each by a copy engine: README.md says which calls those are. */
#ifndef TFD_GPU_COPY_H
#define TFD_GPU_COPY_H

#include <stdbool.h>

#include "driver.h"

/* Of the calls below; each enqueues and returns a CUresult. */
struct tfd_gpu_rows {
	uint8_t *host; /* in the pool: one row behind the other */
	uint64_t device;
	uint64_t stride; /* of rows on the device */
	uint32_t bytes; /* of a row */
	uint32_t rows;
};

int tfd_gpu_copy_out(const struct tfd_cuda *cuda, void *stream, const struct tfd_gpu_rows *rows);
int tfd_gpu_copy_in(const struct tfd_cuda *cuda, void *stream, const struct tfd_gpu_rows *rows);

#endif
